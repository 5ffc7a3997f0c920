"""isvd/subspace.py: the paper's iteration, its stop, and its products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from spectra import KEY, RANK, SPECTRA, M, N, with_values

from isvd import functions, operators
from isvd.factorize import svd


def reference_subspace(a_MN, start_NB, rank, iterations):
    """Section 1.1 of the paper's algorithm, in numpy."""
    q = start_NB
    for _ in range(iterations):
        q = a_MN @ np.linalg.qr(q)[0]
        q = a_MN.T @ np.linalg.qr(q)[0]
    q = np.linalg.qr(a_MN @ np.linalg.qr(q)[0])[0]
    return np.linalg.svd((a_MN.T @ q).T, compute_uv=False)[:rank]


def test_subspace_iteration_is_the_papers():
    with jax.enable_x64(True):
        a_MN = with_values(SPECTRA["flat"])
        op = operators.dense(a_MN)
        factors = svd(op, KEY, rank=RANK, method="subspace")
        start_NB = jax.random.normal(KEY, (N, 2 * RANK), jnp.float64)
        wanted = reference_subspace(a_MN, np.asarray(start_NB), RANK, 10)
        np.testing.assert_allclose(factors.s_K, wanted, rtol=1e-12)
        assert factors.products == 22 * 2 * RANK + RANK
        assert not factors.converged
        left_K = np.linalg.norm(a_MN @ factors.v_NK - factors.u_MK * factors.s_K, axis=0)
        np.testing.assert_allclose(factors.residual_K, left_K, rtol=1e-6)


@pytest.mark.parametrize("shape", [(M, N), (N, M)])
def test_subspace_iteration_stops_at_its_tolerance(shape):
    a_MN = with_values(SPECTRA["fast decay"], shape=shape).astype("float32")
    op = operators.dense(a_MN)
    factors = svd(op, KEY, rank=RANK, method="subspace", tol=1e-4, oversample=4)
    assert factors.converged
    assert factors.products < 12 * 22
    np.testing.assert_allclose(factors.s_K, SPECTRA["fast decay"][:RANK], rtol=1e-5)
    miss_K = np.linalg.norm(a_MN @ factors.v_NK - factors.u_MK * factors.s_K, axis=0)
    assert miss_K.max() < 2e-4


@pytest.mark.parametrize("shape", [(M, N), (N, M)])
def test_subspace_iteration_at_every_scale(shape):
    a_MN = with_values(SPECTRA["fast decay"], shape=shape).astype("float32")
    find = functools.partial(svd, rank=RANK, method="subspace", tol=1e-3)
    wanted = find(operators.dense(a_MN), KEY)
    for scale in (np.float32(1e30), np.float32(1e-30)):
        factors = find(operators.dense(scale * a_MN), KEY)
        assert factors.converged
        assert factors.products == wanted.products
        np.testing.assert_allclose(factors.s_K / scale, wanted.s_K, rtol=1e-5)
        np.testing.assert_allclose(factors.residual_K / scale, wanted.residual_K, atol=1e-6)


def test_subspace_iteration_warm_started_counts_its_products():
    calls = []

    def product(a_MN, x_NC):
        jax.debug.callback(lambda: calls.append(x_NC.shape[1]), ordered=False)
        return a_MN @ x_NC

    a_MN = with_values(SPECTRA["fast decay"], shape=(N, M)).astype("float32")
    op = functions.from_matmat(
        Partial(product, a_MN), (N, M), rmatmat=Partial(product, a_MN.T), block=True
    )
    start = np.linalg.svd(a_MN)[2][:5].T
    factors = svd(op, KEY, rank=3, method="subspace", tol=1e-3, warm_start=start)
    jax.effects_barrier()
    assert sum(calls) == factors.products

"""Entries near the least of float32, which does not hold their products with unit vectors."""

import jax.numpy as jnp
import numpy as np
import pytest
from spectra import KEY, with_values

from isvd import adaptive, operators, solve
from isvd.factorize import svd

VALUES = np.linspace(1, 0.1, 100)


def tiny(exponent, symmetric=False):
    """Without the entries that are below all normal numbers, which XLA reads as zero on a CPU."""
    a_MN = with_values(VALUES, shape=(130, 130) if symmetric else (150, 120))
    if symmetric:
        a_MN = a_MN + a_MN.T
    a_MN = (a_MN * 10.0**exponent).astype("float32")
    return np.where(np.abs(a_MN) < np.finfo("float32").tiny, 0, a_MN)


@pytest.mark.parametrize("exponent", [-34, -35])
@pytest.mark.parametrize("method", ["krylov", "subspace"])
def test_triplets(method, exponent):
    a_MN = tiny(exponent)
    factors = svd(operators.dense(a_MN), KEY, rank=6, method=method, tol=1e-4)
    u_MK, s_K, v_NK = (np.asarray(part, "float64") for part in factors[:3])
    u_MN, s_N, vh_NN = np.linalg.svd(a_MN.astype("float64"))
    np.testing.assert_allclose(s_K, s_N[:6], rtol=2e-6)
    for got, wanted in ((u_MK, u_MN[:, :6]), (v_NK, vh_NN[:6].T)):
        np.testing.assert_allclose(np.abs((got * wanted).sum(0)), 1, rtol=1e-3)
    assert factors.converged
    assert factors.products < 3000


def test_eigenpairs():
    a_NN = tiny(-34, symmetric=True)
    pairs = solve.eigh(operators.dense(a_NN), KEY, rank=5)
    values_N = np.linalg.eigvalsh(a_NN.astype("float64"))
    wanted_K = values_N[np.argsort(-np.abs(values_N))[:5]]
    np.testing.assert_allclose(np.asarray(pairs.values_K, "float64"), wanted_K, rtol=2e-6)
    assert pairs.converged


def test_rank_by_error():
    a_MN = tiny(-34)
    factors = adaptive.svd_to_error(operators.dense(a_MN), KEY, error=0.9, first_rank=4)
    rank = len(factors.s_K)
    assert rank > 4  # more than one stage
    wanted_K = np.linalg.svd(a_MN.astype("float64"), compute_uv=False)[:rank]
    np.testing.assert_allclose(np.asarray(factors.s_K, "float64"), wanted_K, rtol=5e-6)
    assert factors.converged


def test_ordinary_scales_round_as_before():
    """The first divisor is a power of two: a scale that is one too changes no bit."""
    a_MN = with_values(VALUES).astype("float32")
    wanted, found = (
        svd(operators.dense(np.float32(unit) * a_MN), KEY, rank=6) for unit in (1, 2.0**-60)
    )
    assert found.products == wanted.products
    for got, same in ((found.u_MK, wanted.u_MK), (found.v_NK, wanted.v_NK)):
        np.testing.assert_array_equal(got, same)
    np.testing.assert_array_equal(jnp.ldexp(found.s_K, 60), wanted.s_K)

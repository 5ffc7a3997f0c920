"""isvd/derivative.py: gradients of triplets against differences and LAPACK's vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from jax.tree_util import Partial
from spectra import GAPS, KEY, M, N, dense_triplets, with_values

from isvd import functions, operators, spmm
from isvd.factorize import svd


def invariant_loss(factors, weights):
    """A function of the triplets that does not depend on their phases."""
    left, right, cross, w_K = weights
    u_MK, s_K, v_NK = factors[:3]
    total = jnp.einsum("mk,mn,nk,k->", u_MK.conj(), left, u_MK, w_K)
    total += jnp.einsum("mk,mn,nk,k->", v_NK.conj(), right, v_NK, w_K)
    total += jnp.einsum("mk,mn,nk,k->", u_MK.conj(), cross, v_NK, w_K)
    return total.real / 30 + (jnp.sin(s_K) * w_K).sum()


@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("method", ["krylov", "subspace"])
def test_gradient_with_a_heavy_tail(complex_, method):
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)

        def draw(*shape):
            x = rng.normal(size=shape)
            return x + 1j * rng.normal(size=shape) if complex_ else x

        a_MN = with_values(GAPS, complex_=complex_)
        weights = [draw(M, M), draw(N, N), draw(M, N), rng.normal(size=4)]
        direction = draw(M, N)

        def loss(a_MN):
            factors = svd(operators.dense(a_MN), KEY, rank=4, method=method, tol=1e-12)
            return invariant_loss(factors, weights)

        slope = (jax.grad(loss)(jnp.asarray(a_MN)) * direction).sum().real
        step = 1e-5
        ends = [
            invariant_loss(dense_triplets(a_MN + sign * step * direction, 4), weights)
            for sign in (1, -1)
        ]
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-6)


@pytest.mark.parametrize("form", ["vector", "block"])
def test_gradient_reaches_what_a_function_closes_over(form):
    with jax.enable_x64(True):
        a_MN = with_values(GAPS)

        def loss(scale_M):
            def product(x):
                assert x.ndim == (1 if form == "vector" else 2)
                return scale_M.reshape(-1, *(1,) * (x.ndim - 1)) * (a_MN @ x)

            op = functions.from_matmat(product, (M, N), jnp.float64, block=form == "block")
            return svd(op, KEY, rank=3, tol=1e-12).s_K.sum()

        scale_M = np.random.default_rng(0).uniform(1, 2, M)
        slope = jax.jit(jax.grad(loss))(scale_M)
        u_MK, _, v_NK = dense_triplets(scale_M[:, None] * a_MN, 3)
        np.testing.assert_allclose(slope, (u_MK * (a_MN @ v_NK)).sum(1), rtol=1e-9, atol=1e-12)


class Scaled:
    def __init__(self, a_MN, scale_M):
        self.a_MN, self.scale_M = a_MN, scale_M

    def product(self, x_N):
        return self.scale_M * (self.a_MN @ x_N)


HOLDERS = {
    "bound method": lambda a_MN, scale_M: Scaled(a_MN, scale_M).product,
    "Partial": lambda a_MN, scale_M: Partial(Scaled(a_MN, scale_M).product),
    "default": lambda a_MN, scale_M: lambda x_N, a=a_MN, scale=scale_M: scale * (a @ x_N),
    "keyword": lambda a_MN, scale_M: lambda x_N, *, a=a_MN, scale=scale_M: scale * (a @ x_N),
}


@pytest.mark.parametrize("holder", list(HOLDERS))
def test_gradient_reaches_what_a_function_holds(holder):
    with jax.enable_x64(True):
        a_MN = jnp.asarray(with_values(GAPS))[:40, :30]

        def loss(scale_M):
            product = HOLDERS[holder](a_MN, scale_M)
            op = functions.from_matmat(product, (40, 30), jnp.float64)
            return svd(op, KEY, rank=3).s_K.sum()

        scale_M = np.random.default_rng(0).uniform(1, 2, 40)
        slope = jax.jit(jax.grad(loss))(scale_M)
        u_MK, _, v_NK = dense_triplets(scale_M[:, None] * a_MN, 3)
        np.testing.assert_allclose(slope, (u_MK * (a_MN @ v_NK)).sum(1), rtol=1e-9, atol=1e-12)


def test_gradient_of_vectors_at_every_scale():
    """Of 1e30 and 1e-30, whose squares float32 does not hold."""
    a_MN = with_values(GAPS[:30], shape=(40, 30)).astype("float32")
    weight = np.random.default_rng(0).normal(size=(40, 40)).astype("float32")

    @jax.jit
    @jax.grad
    def slope(a_MN):
        u_M = svd(operators.dense(a_MN), KEY, rank=3).u_MK[:, 0]
        return u_M @ weight @ u_M

    wanted = slope(a_MN)
    for scale in (np.float32(1e30), np.float32(1e-30)):
        np.testing.assert_allclose(scale * slope(scale * a_MN), wanted, atol=1e-5)


def test_gradient_by_sparse_values():
    coo = scipy.sparse.random_array((400, 300), density=0.03, rng=np.random.default_rng(0))
    with jax.enable_x64(True):

        def loss(values_E):
            op = spmm.sparse_from_entries(*coo.coords, values_E, coo.shape)
            return svd(op, KEY, rank=2, tol=1e-12).s_K.sum()

        slope = jax.grad(loss)(jnp.asarray(coo.data))
        u_MK, _, v_NK = dense_triplets(coo.toarray(), 2)
        wanted = (u_MK[coo.coords[0]] * v_NK[coo.coords[1]]).sum(1)
        np.testing.assert_allclose(slope, wanted, rtol=1e-8, atol=1e-12)


def test_equal_values_have_a_finite_gradient_of_their_sum():
    with jax.enable_x64(True):
        a_MN = with_values(np.r_[5, 5, 5, np.linspace(3, 0.1, N - 3)])
        loss = lambda a_MN: svd(operators.dense(a_MN), KEY, rank=3).s_K.sum()  # noqa: E731
        u_MK, _, v_NK = dense_triplets(a_MN, 3)
        np.testing.assert_allclose(jax.grad(loss)(a_MN), u_MK @ v_NK.T, atol=1e-9)


def test_gradient_where_a_function_closes_over_a_traced_integer():
    a_NN = jnp.asarray(with_values(GAPS)[:6, :6], jnp.float32)

    def loss(scale, shift):
        op = functions.from_matmat(lambda x_N: scale * jnp.roll(a_NN @ x_N, shift) + x_N, (6, 6))
        return svd(op, KEY, rank=2).s_K.sum()

    def wanted(scale, shift):
        matrix = scale * jnp.roll(a_NN, shift, axis=0) + jnp.eye(6)
        return jnp.linalg.svd(matrix, compute_uv=False)[:2].sum()

    shifts = jnp.arange(3)
    wanted_3 = [jax.grad(wanted)(2.0, int(shift)) for shift in shifts]
    slope = jax.grad(loss)
    mapped_3 = jax.jit(jax.vmap(slope, (None, 0)))(2.0, shifts)
    np.testing.assert_allclose(mapped_3, wanted_3, rtol=1e-4)
    scanned_3 = jax.lax.scan(lambda _, shift: (None, slope(2.0, shift)), None, shifts)[1]
    np.testing.assert_allclose(scanned_3, wanted_3, rtol=1e-4)


def test_gradient_mapped_over_floats_that_a_function_closes_over():
    a_NN = jnp.asarray(with_values(GAPS)[:6, :6], jnp.float32)

    def slope(weight):
        def loss(scale):
            op = functions.from_matmat(lambda x_N: scale * weight * (a_NN @ x_N), (6, 6))
            return svd(op, KEY, rank=2).s_K.sum()

        return jax.grad(loss)(3.0)

    weights = jnp.array([1.0, 2.0])
    wanted = jnp.linalg.svd(a_NN, compute_uv=False)[:2].sum() * weights
    np.testing.assert_allclose(jax.vmap(slope)(weights), wanted, rtol=1e-4)

"""Singular triplets against LAPACK's, and their derivatives against differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from jax.sharding import AxisType, Mesh, PartitionSpec
from jax.tree_util import Partial

from isvd import factorize, operators, spmm
from isvd.factorize import svd

M, N, RANK = 150, 120, 8  # the Krylov basis of this rank has 80 columns: less than N
KEY = jax.random.key(0)


def with_values(values, *, shape=(M, N), complex_=False, seed=0):
    """A matrix with these singular values and random vectors."""
    rng = np.random.default_rng(seed)

    def orthonormal(size):
        x = rng.normal(size=(size, len(values)))
        return np.linalg.qr(x + 1j * rng.normal(size=x.shape) if complex_ else x)[0]

    return (orthonormal(shape[0]) * values) @ orthonormal(shape[1]).conj().T


SPECTRA = {
    "fast decay": 0.8 ** np.arange(N),
    "slow decay": 1 / np.sqrt(1 + np.arange(N)),
    "flat": 1 + np.linspace(1, 0, N),
    "a cluster": np.r_[5 - 1e-9 * np.arange(12), np.linspace(4, 0.1, N - 12)],
    "20 copies": np.r_[np.full(20, 5.0), np.linspace(4, 0.1, N - 20)],
    "3 copies below 2": np.r_[9, 8, np.full(3, 5.0), np.linspace(4, 0.1, N - 5)],
    "rank 3": np.array([3.0, 2.0, 1.0]),
    "zero": np.zeros(1),
    "1 to 1e-119": 10.0 ** -np.arange(N),
    "tiny": 1e-30 * 0.8 ** np.arange(N),
    "huge": 1e30 * 0.8 ** np.arange(N),
}


def check(op, a_MN, factors, *, tolerance):
    """Values, orthonormality, and the residuals that the result claims, relative to s[0]."""
    dtype = op.dtype
    size = max(np.linalg.norm(a_MN, 2), 1e-300)
    a_MN = a_MN / size
    u_MK, s_K, v_NK, residual_K = (np.asarray(part) for part in factors[:4])
    s_K, residual_K = s_K.astype("float64") / size, residual_K.astype("float64") / size
    rank = len(s_K)
    rounding = 100 * np.finfo(dtype).eps
    wanted_K = np.linalg.svd(a_MN, compute_uv=False)[:rank]
    np.testing.assert_allclose(s_K, wanted_K, rtol=0, atol=max(tolerance, rounding))
    for x in (u_MK, v_NK):
        assert np.linalg.norm(x.conj().T @ x - np.eye(rank), 2) < rounding
    right_K = np.linalg.norm(a_MN @ v_NK - u_MK * s_K, axis=0)
    left_K = np.linalg.norm(a_MN.conj().T @ u_MK - v_NK * s_K, axis=0)
    true_K = np.maximum(right_K, left_K)
    assert (true_K < residual_K + rounding).all()
    assert (residual_K < np.maximum(true_K, true_K.max()) + rounding).all()
    assert u_MK.dtype == v_NK.dtype == dtype
    peak_K = u_MK[np.abs(u_MK).argmax(0), np.arange(rank)]
    assert (peak_K.real > 0).all()
    assert np.abs(peak_K.imag).max() < rounding


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", list(SPECTRA))
def test_every_kind_of_spectrum(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        a_MN = with_values(SPECTRA[name]).astype(dtype)
        op = operators.dense(a_MN)
        factors = svd(op, KEY, rank=RANK, tol=1e-5 if dtype == "float32" else 1e-9)
        assert factors.converged
        check(op, a_MN.astype("float64"), factors, tolerance=1e-9)


def test_copies_beyond_the_block_are_found_where_nothing_ends_the_iteration():
    """20 copies, 8 columns in a block: the first pass can see 8 of them and the lower values."""
    with jax.enable_x64(True):
        a_MN = with_values(SPECTRA["20 copies"])
        factors = svd(operators.dense(a_MN), KEY, rank=24, block=8, width=48)
        np.testing.assert_allclose(factors.s_K[:20], 5, rtol=1e-12)
        np.testing.assert_allclose(factors.s_K[20:], np.linspace(4, 0.1, 100)[:4], rtol=1e-9)


def test_complex():
    with jax.enable_x64(True):
        a_MN = with_values(SPECTRA["fast decay"], complex_=True)
        op = operators.dense(a_MN)
        factors = svd(op, KEY, rank=RANK)
        assert factors.s_K.dtype == jnp.float64
        check(op, a_MN, factors, tolerance=1e-12)


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (6, 4), (4, 300)])
def test_small_matrices_at_every_rank(shape):
    a_MN = np.random.default_rng(0).normal(size=shape).astype("float32")
    for rank in range(1, min(shape) + 1):
        factors = svd(operators.dense(a_MN), KEY, rank=rank)
        check(operators.dense(a_MN), a_MN, factors, tolerance=1e-6)
        assert factors.products == min(shape)


@pytest.mark.parametrize("shape", [(300, 30), (30, 300)])
@pytest.mark.parametrize("name", ["fast decay", "20 copies", "rank 3", "zero", "tiny", "huge"])
def test_long_matrices_that_are_formed(name, shape):
    a_MN = with_values(SPECTRA[name][:30], shape=shape, complex_=True)
    op = operators.dense(a_MN.astype("complex64"))
    factors = svd(op, KEY, rank=RANK)
    check(op, a_MN, factors, tolerance=0)
    assert factors.products == 30
    assert factors.converged


def test_wide_matrix_and_transposition():
    a_MN = with_values(SPECTRA["fast decay"], shape=(N, 700)).astype("float32")
    op = operators.dense(a_MN)
    wide, tall = svd(op, KEY, rank=RANK), svd(op.H, KEY, rank=RANK)
    check(op, a_MN, wide, tolerance=1e-6)
    np.testing.assert_allclose(wide.s_K, tall.s_K, rtol=1e-5)


@pytest.fixture(scope="module")
def sparse_matrix():
    return scipy.sparse.random_array((400, 300), density=0.03, rng=np.random.default_rng(0))


def test_sparse_matrix_stops_at_its_tolerance(sparse_matrix):
    op = spmm.sparse(sparse_matrix)
    loose = svd(op, KEY, rank=RANK, tol=1e-1)
    tight = svd(op, KEY, rank=RANK, tol=1e-5)
    assert loose.converged
    assert tight.converged
    assert (tight.residual_K <= 1e-5 * tight.s_K[0]).all()
    assert loose.products < tight.products
    check(op, sparse_matrix.toarray(), tight, tolerance=1e-6)


def test_many_restarts_add_no_rounding_to_the_values():
    rng = np.random.default_rng(0)
    half = scipy.sparse.random_array((1500, 1500), density=5e-3, rng=rng)
    matrix = half + half.T
    matrix.data -= 0.5  # so that no value stands out
    wanted_K = np.linalg.svd(matrix.toarray(), compute_uv=False)[:RANK]
    factors = svd(spmm.sparse(matrix, "float32"), KEY, rank=RANK, tol=1e-4)
    assert factors.converged
    assert factors.products > 20 * RANK
    error_K = np.abs(factors.s_K - wanted_K) / wanted_K[0]
    assert error_K.max() < 4 * np.finfo("float32").eps
    assert (np.diff(factors.s_K) <= 0).all()


def test_what_is_not_reached_is_said(sparse_matrix):
    factors = svd(spmm.sparse(sparse_matrix), KEY, rank=RANK, tol=1e-5, max_products=10)
    assert not factors.converged
    assert factors.residual_K.max() > 1e-5 * factors.s_K[0]
    check(spmm.sparse(sparse_matrix), sparse_matrix.toarray(), factors, tolerance=1)


@pytest.mark.parametrize("method", ["krylov", "subspace"])
def test_not_a_number_ends_at_once(sparse_matrix, method):
    broken = sparse_matrix.tocsr()
    broken.data[3] = np.nan
    factors = svd(spmm.sparse(broken), KEY, rank=RANK, tol=1e-5, method=method)
    assert not factors.converged
    assert factors.products < 300


def test_products_are_those_of_the_operator():
    calls = []

    def product(a_MN, x_NC):
        jax.debug.callback(lambda: calls.append(x_NC.shape[1]), ordered=False)
        return a_MN @ x_NC

    a_MN = with_values(SPECTRA["slow decay"]).astype("float32")
    op = operators.from_matmat(
        Partial(product, a_MN), (M, N), rmatmat=Partial(product, a_MN.T), block=True
    )
    factors = jax.block_until_ready(svd(op, KEY, rank=RANK))
    jax.effects_barrier()
    assert sum(calls) == factors.products


@pytest.mark.parametrize("method", ["krylov", "subspace"])
def test_every_pass_is_reported(method):
    seen = []

    def report(products, residual):
        seen.append((int(products), float(residual)))

    op = operators.dense(with_values(SPECTRA["flat"]).astype("float32"))
    factors = svd(op, KEY, rank=RANK, method=method, tol=1e-3, max_products=2000, report=report)
    jax.effects_barrier()
    assert len(seen) >= 2
    products, residual = zip(*seen, strict=True)
    assert list(products) == sorted(products)
    assert residual[-1] < residual[0]
    if method == "krylov":
        last = RANK if products[-1] > 20 * RANK else 0  # for the values, after many passes
        assert products[-1] + last == factors.products
        largest = factors.residual_K.max() / factors.s_K[0]
        np.testing.assert_allclose(residual[-1], largest, rtol=1e-5)


def test_warm_start_saves_products():
    a_MN = with_values(SPECTRA["flat"]).astype("float32")
    cold = svd(operators.dense(a_MN), KEY, rank=RANK)
    close = a_MN + 1e-4 * np.random.default_rng(1).normal(size=a_MN.shape).astype("float32")
    op = operators.dense(close)
    for start in (cold, cold.v_NK):
        warm = svd(op, KEY, rank=RANK, warm_start=start)
        check(op, close, warm, tolerance=1e-6)
        assert warm.products < cold.products
    iterated = svd(op, KEY, rank=RANK, method="subspace", tol=1e-3)
    warm = svd(op, KEY, rank=RANK, method="subspace", tol=1e-3, warm_start=cold)
    assert warm.products < iterated.products


@pytest.mark.parametrize("method", ["krylov", "subspace"])
def test_warm_start_does_not_hide_what_it_misses(method):
    """Exact singular vectors span a space that products do not leave: 30 is not in it."""
    values = np.r_[30, np.linspace(10, 9, 8), np.linspace(1, 0, 491)].astype("float32")
    place = np.random.default_rng(0).permutation(500)
    op = operators.diagonal(values[place])
    others = np.eye(500, dtype="float32")[:, np.argsort(place)[1:9]]
    for start in (others[:, :4], others):
        factors = svd(op, KEY, rank=4, method=method, tol=1e-3, warm_start=start)
        np.testing.assert_allclose(factors.s_K, values[:4], rtol=1e-4)
        assert factors.converged


def test_later_cycles_are_wider_where_the_spectrum_is_flat():
    s_N = np.linspace(1, 0, 4000).astype("float32")
    op = operators.diagonal(s_N)
    found, narrow = (svd(op, KEY, rank=8, tol=1e-4, width=width) for width in (None, 80))
    for factors in (found, narrow):
        np.testing.assert_allclose(factors.s_K, s_N[:8], rtol=1e-6)
        np.testing.assert_allclose(jnp.abs(factors.u_MK[:8]), np.eye(8), atol=0.05)
        assert factors.converged
    assert 10 * 80 < found.products < 0.8 * narrow.products


def test_a_basis_that_no_cycle_reaches_takes_no_memory():
    def temporary(**options):
        find = jax.jit(lambda op: svd(op, KEY, rank=8, tol=1e-4, **options))
        compiled = find.lower(operators.diagonal(jnp.ones(4000))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one_basis = (144 - 80) * 4000 * 4
    assert temporary() - temporary(max_products=800) > one_basis
    assert temporary(max_products=800) == temporary(max_products=800, width=80)


def test_same_key_same_bits_and_jit_changes_nothing():
    op = operators.dense(with_values(SPECTRA["slow decay"]).astype("float32"))
    first, again = svd(op, KEY, rank=RANK), svd(op, KEY, rank=RANK)
    inside = jax.jit(lambda op, key: svd(op, key, rank=RANK))(op, KEY)
    for a, b, c in zip(first, again, inside, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)


def test_one_program_for_operators_of_one_kind():
    before = factorize._svd._cache_size()
    for seed in range(3):
        a_MN = np.random.default_rng(seed).normal(size=(31, 17))
        svd(operators.dense(a_MN.astype("float32")), KEY, rank=2)
    assert factorize._svd._cache_size() == before + 1


def test_vmap_over_operators():
    both = np.stack([with_values(SPECTRA[name]).astype("f") for name in ("flat", "rank 3")])
    factors = jax.vmap(lambda a_MN, key: svd(operators.dense(a_MN), key, rank=RANK, tol=1e-4))(
        both, jax.random.split(KEY)
    )
    wanted = np.linalg.svd(both, compute_uv=False)[:, :RANK]
    np.testing.assert_allclose(factors.s_K, wanted, atol=1e-5)
    assert factors.converged.all()


# Subspace iteration ------------------------------------------------------------------------------


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
    op = operators.from_matmat(
        Partial(product, a_MN), (N, M), rmatmat=Partial(product, a_MN.T), block=True
    )
    start = np.linalg.svd(a_MN)[2][:5].T
    factors = svd(op, KEY, rank=3, method="subspace", tol=1e-3, warm_start=start)
    jax.effects_barrier()
    assert sum(calls) == factors.products


# Gradients ---------------------------------------------------------------------------------------

GAPS = np.r_[10, 8, 6.5, 5, 3.5 * 0.97 ** np.arange(N - 4)]  # s[4] / s[3] = .7: a heavy tail


def invariant_loss(factors, weights):
    """A function of the triplets that does not depend on their phases."""
    left, right, cross, w_K = weights
    u_MK, s_K, v_NK = factors[:3]
    total = jnp.einsum("mk,mn,nk,k->", u_MK.conj(), left, u_MK, w_K)
    total += jnp.einsum("mk,mn,nk,k->", v_NK.conj(), right, v_NK, w_K)
    total += jnp.einsum("mk,mn,nk,k->", u_MK.conj(), cross, v_NK, w_K)
    return total.real / 30 + (jnp.sin(s_K) * w_K).sum()


def dense_triplets(a_MN, rank):
    u_MK, s_K, vh_KN = jnp.linalg.svd(a_MN, full_matrices=False)
    return u_MK[:, :rank], s_K[:rank], vh_KN[:rank].conj().T


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

            op = operators.from_matmat(product, (M, N), jnp.float64, block=form == "block")
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
            op = operators.from_matmat(product, (40, 30), jnp.float64)
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


def test_gradient_by_sparse_values(sparse_matrix):
    with jax.enable_x64(True):
        coo = sparse_matrix.tocoo()

        def loss(values_E):
            op = spmm.sparse_from_entries(*coo.coords, values_E, coo.shape)
            return svd(op, KEY, rank=2, tol=1e-12).s_K.sum()

        slope = jax.grad(loss)(jnp.asarray(coo.data))
        u_MK, _, v_NK = dense_triplets(sparse_matrix.toarray(), 2)
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
        op = operators.from_matmat(lambda x_N: scale * jnp.roll(a_NN @ x_N, shift) + x_N, (6, 6))
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
            op = operators.from_matmat(lambda x_N: scale * weight * (a_NN @ x_N), (6, 6))
            return svd(op, KEY, rank=2).s_K.sum()

        return jax.grad(loss)(3.0)

    weights = jnp.array([1.0, 2.0])
    wanted = jnp.linalg.svd(a_NN, compute_uv=False)[:2].sum() * weights
    np.testing.assert_allclose(jax.vmap(slope)(weights), wanted, rtol=1e-4)


def test_operators_that_differ_between_devices():
    """In shard_map with its check of what varies: too large to be formed, with wider cycles."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("device",), axis_types=(AxisType.Auto,))
    spread = PartitionSpec("device")
    a_DMN = np.random.default_rng(0).normal(size=(2, 130, 120)).astype("float32")

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=spread, out_specs=spread)
    def each(a_1MN):
        return svd(operators.dense(a_1MN[0]), KEY, rank=9, block=3).s_K[None]

    wanted_DK = np.linalg.svd(a_DMN, compute_uv=False)[:, :9]
    np.testing.assert_allclose(each(a_DMN), wanted_DK, rtol=1e-5)


# Errors ------------------------------------------------------------------------------------------

OP = operators.dense(np.ones((6, 4), "f"))
WRONG = {
    "rank": ({"rank": 5}, r"rank=5, expected from 1 to 4, min\(M, N\) of .* shape \(6, 4\)"),
    "no rank": ({"rank": 0}, "rank=0, expected from 1 to 4"),
    "fraction": ({"rank": 2.0}, "rank=2.0, expected a whole number"),
    "method": ({"rank": 1, "method": "qr"}, "method='qr', expected krylov or subspace"),
    "tol": ({"rank": 1, "tol": -1.0}, "tol=-1.0, expected None, or from 0 to less than 1"),
    "products": ({"rank": 1, "max_products": 0}, "max_products=0, expected from 1 to 2147483647"),
    "too many products": (
        {"rank": 1, "max_products": 2**31},
        "max_products=2147483648, expected from 1 to 2147483647",
    ),
    "block": ({"rank": 1, "block": 5}, "block=5, expected from 1 to 4"),
    "width": (
        {"rank": 4, "block": 2, "width": 3},
        "width=3, expected at least 10, rank=4 and block=2",
    ),
    "warm start": ({"rank": 1, "warm_start": np.ones((6, 1))}, r"warm_start has shape \(6, 1\)"),
    "oversample": ({"rank": 1, "oversample": 1}, "oversample is of method='subspace'"),
    "subspace block": ({"rank": 1, "method": "subspace", "block": 2}, "are of method='krylov'"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_requests(case):
    options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        svd(OP, KEY, **options)


@pytest.mark.parametrize("dtype", ["int32", "float16", "bfloat16"])
def test_other_types_are_refused(dtype):
    op = operators.dense(jnp.ones((6, 4), dtype))
    wanted = f"op has dtype {dtype}, expected one of float32, float64, complex64, complex128"
    with pytest.raises(ValueError, match=wanted):
        svd(op, KEY, rank=1)


@pytest.mark.parametrize("form", [np.asarray, scipy.sparse.csr_array])
def test_matrices_are_no_operators(form):
    matrix = form(np.ones((6, 4), "f"))
    wanted = f"op has type {type(matrix).__name__}, expected LinearOperator: isvd.dense and isvd.s"
    with pytest.raises(ValueError, match=wanted):
        svd(matrix, KEY, rank=1)

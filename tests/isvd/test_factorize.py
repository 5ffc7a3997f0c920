"""Singular triplets against LAPACK's, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from jax.sharding import AxisType, Mesh, PartitionSpec
from jax.tree_util import Partial
from spectra import KEY, RANK, SPECTRA, M, N, check, with_values

from isvd import factorize, functions, operators, spmm
from isvd.factorize import svd


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


@pytest.mark.parametrize("tol", [1e-5, 1e-6])
def test_residuals_near_rounding_are_not_less_than_they_are(tol):
    """A tolerance of 8 eps is not reached, and that is said."""
    a_MN = np.random.default_rng(0).normal(size=(400, 300)).astype("float32")
    factors = svd(operators.dense(a_MN), KEY, rank=RANK, tol=tol)
    u_MK, s_K, v_NK, claimed_K = (np.asarray(part, "float64") for part in factors[:4])
    right_K = np.linalg.norm(a_MN @ v_NK - u_MK * s_K, axis=0)
    left_K = np.linalg.norm(a_MN.T @ u_MK - v_NK * s_K, axis=0)
    true_K = np.maximum(right_K, left_K)
    assert (true_K < 2 * claimed_K).all()
    assert (claimed_K < 2 * true_K).all()
    assert factors.converged == (claimed_K <= tol * s_K[0]).all()
    assert factors.converged == (tol == 1e-5)


def test_leading_triplets():
    factors = svd(operators.dense(with_values(SPECTRA["flat"])), KEY, rank=5)
    part = factors.leading(3)
    shapes = [x.shape for x in part]
    assert shapes == [(M, 3), (3,), (N, 3), (3,), (), ()]
    np.testing.assert_array_equal(part.u_MK * part.s_K, (factors.u_MK * factors.s_K)[:, :3])


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
    op = functions.from_matmat(
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
    "a word for tol": ({"rank": 1, "tol": "small"}, "tol='small', expected a number"),
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


@pytest.mark.parametrize("method", ["krylov", "subspace"])
def test_a_tolerance_is_a_number_that_is_known(method):
    def values(tol):
        return svd(OP, KEY, rank=2, method=method, tol=tol).s_K

    np.testing.assert_array_equal(values(jnp.float32(0.25)), values(0.25))
    with pytest.raises(ValueError, match=r"tol=.*, expected a number, not traced"):
        jax.jit(values)(0.25)


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

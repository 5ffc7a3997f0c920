"""Uses of a truncated SVD, against numpy's full one and central differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from isvd import functions, operators, solve, spmm
from isvd.factorize import svd

M, N, RANK = 30, 20, 4
KEY = jax.random.key(0)
# Equal values inside the rank, and a heavy tail: a rule without either would be far off.
DEGENERATE = np.r_[10, 6, 6, 6, 3.5 * 0.9 ** np.arange(N - 4)]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def draw(seed, *shape, complex_=False):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape)
    return x + 1j * rng.normal(size=shape) if complex_ else x


def matrix(complex_=False):
    left = np.linalg.qr(draw(0, M, N, complex_=complex_))[0]
    return (left * DEGENERATE) @ np.linalg.qr(draw(1, N, N, complex_=complex_))[0].conj().T


def factored(a_MN):
    op = operators.dense(a_MN)
    return op, svd(op, KEY, rank=RANK)


def truncated(a_MN, values):
    """v values(s) u^H of the leading triplets, in numpy."""
    u_MN, s_N, vh_NN = np.linalg.svd(a_MN, full_matrices=False)
    u_MK, s_K, v_NK = u_MN[:, :RANK], s_N[:RANK], vh_NN[:RANK].conj().T
    return (v_NK * values(s_K)) @ u_MK.conj().T


def slope_by_differences(function, a_MN, direction):
    step = 1e-5
    return (function(a_MN + step * direction) - function(a_MN - step * direction)) / (2 * step)


@jax.jit  # one program for every ridge
def solution_and_its_gradient(a_MN, y_MC, ridge, weight):
    def loss(a_MN, y_MC, ridge):
        op, factors = factored(a_MN)
        w_NC = solve.pinv_solve(factors, y_MC, ridge=ridge, op=op)
        return (weight * w_NC).sum().real

    return jax.value_and_grad(loss, argnums=(0, 1, 2))(a_MN, y_MC, ridge)


@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 2.0])
def test_solution_and_its_gradient_at_equal_values(complex_, ridge):
    a_MN, y_MC = matrix(complex_), draw(2, M, 2, complex_=complex_)
    weight = draw(3, N, 2, complex_=complex_)
    direction = draw(4, M, N, complex_=complex_)

    def wanted(a_MN, y_MC=y_MC, ridge=ridge):
        w_NC = truncated(a_MN, lambda s: s / (s**2 + ridge)) @ y_MC
        return (weight * w_NC).sum().real

    value, slopes = solution_and_its_gradient(a_MN, y_MC, ridge, weight)
    np.testing.assert_allclose(value, wanted(a_MN), rtol=1e-10)
    np.testing.assert_allclose(
        (slopes[0] * direction).sum().real,
        slope_by_differences(wanted, a_MN, direction),
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        slopes[1], weight.T.dot(truncated(a_MN, lambda s: s / (s**2 + ridge))).T, rtol=1e-9
    )
    if ridge:
        by_ridge = (wanted(a_MN, ridge=ridge + 1e-5) - wanted(a_MN, ridge=ridge - 1e-5)) / 2e-5
        np.testing.assert_allclose(slopes[2], by_ridge, rtol=1e-6)


@pytest.mark.parametrize("complex_", [False, True])
def test_low_rank_product_and_its_gradient_at_equal_values(complex_):
    a_MN, x_NC = matrix(complex_), draw(5, N, 3, complex_=complex_)
    weight, direction = draw(6, M, 3, complex_=complex_), draw(7, M, N, complex_=complex_)

    def loss(a_MN, x_NC):
        op, factors = factored(a_MN)
        return (weight * solve.low_rank_product(op, factors, x_NC)).sum().real

    def wanted(a_MN):
        best_MN = truncated(a_MN, lambda s: s).conj().T
        return (weight * (best_MN @ x_NC)).sum().real

    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    value, (by_matrix, by_block) = program(a_MN, x_NC)
    np.testing.assert_allclose(value, wanted(a_MN), rtol=1e-10)
    np.testing.assert_allclose(
        (by_matrix * direction).sum().real,
        slope_by_differences(wanted, a_MN, direction),
        rtol=1e-6,
    )
    np.testing.assert_allclose(by_block, truncated(a_MN, lambda s: s).conj() @ weight, rtol=1e-9)


def solution(a_MN, y_MC, **options):
    op, factors = factored(a_MN)
    return solve.pinv_solve(factors, y_MC, op=op, **options)


@pytest.mark.parametrize("ridge", [0.0, 2.0])
def test_gradient_of_a_solution_that_leaves_triplets_out(ridge):
    y_MC, weight, direction = draw(2, M, 2), draw(3, N, 2), draw(4, M, N)

    def wanted(a_MN):
        u_MN, s_N, vh_NN = np.linalg.svd(a_MN)
        used = s_N[:1] / (s_N[:1] ** 2 + ridge)
        return (weight * ((vh_NN[:1].T * used) @ u_MN[:, :1].T @ y_MC)).sum()

    def loss(a_MN):
        return (weight * solution(a_MN, y_MC, ridge=ridge, rcond=0.8)).sum()  # 10 stays, 6 goes

    slope = (jax.jit(jax.grad(loss))(matrix()) * direction).sum()
    by_differences = slope_by_differences(wanted, matrix(), direction)
    np.testing.assert_allclose(slope, by_differences, rtol=1e-6)


def test_gradient_of_a_solution_does_not_depend_on_the_unit():
    """Values of 1e-170, whose squares are 0."""
    a_MN, y_MC, unit = matrix(), draw(2, M, 2), 1e-170
    slope = jax.jit(jax.grad(lambda a_MN, y_MC: solution(a_MN, y_MC).sum()))
    wanted = slope(a_MN, y_MC)
    np.testing.assert_allclose(unit * slope(unit * a_MN, unit * y_MC), wanted, atol=1e-12)


def uses(op, factors):
    """Loss of a low-rank product, and of a solution."""
    product_MC = solve.low_rank_product(op, factors, draw(5, N, 3))
    w_NC = solve.pinv_solve(factors, draw(2, M, 2), op=op)
    return jnp.square(product_MC).sum() + jnp.square(10 * w_NC).sum()


def uses_of_lapacks(a_MN):
    u_MN, s_N, vh_NN = jnp.linalg.svd(a_MN, full_matrices=False)
    u_MK, s_K, v_NK = u_MN[:, :RANK], s_N[:RANK], vh_NN[:RANK].T
    product_MC = (u_MK * s_K) @ (v_NK.T @ draw(5, N, 3))
    w_NC = (v_NK / s_K) @ (u_MK.T @ draw(2, M, 2))
    return jnp.square(product_MC).sum() + jnp.square(10 * w_NC).sum()


def test_first_and_second_derivative_by_what_a_function_closes_over():
    values = np.r_[10, 8, 6.5, 5, 3.5 * 0.9 ** np.arange(N - 4)]
    left, right = np.linalg.qr(draw(0, M, N))[0], np.linalg.qr(draw(1, N, N))[0]
    a_MN, direction = (left * values) @ right, draw(7, M, N)

    def loss(z):
        op = functions.from_matmat(lambda x: a_MN @ x + z * (direction @ x), (M, N), jnp.float64)
        return uses(op, svd(op, KEY, rank=RANK, tol=1e-13))

    wanted = jax.jit(jax.grad(lambda z: uses_of_lapacks(a_MN + z * direction)))
    slope, curvature = jax.jit(jax.value_and_grad(jax.grad(loss)))(0.0)
    np.testing.assert_allclose(slope, wanted(0.0), rtol=1e-9)
    np.testing.assert_allclose(curvature, (wanted(1e-5) - wanted(-1e-5)) / 2e-5, rtol=1e-7)


def test_whole_numbers_and_vectors_are_blocks_too():
    @jax.jit
    def first(a_MN, x_N, y_M):
        product_M = solve.low_rank_product(*factored(a_MN), x_N)
        return product_M[0] + solution(a_MN, y_M)[0]

    whole = np.arange(N) % 3 == 0, np.arange(M)
    same = (x.astype("float64") for x in whole)
    value, slope = jax.value_and_grad(first)(matrix(), *whole)
    by_floats = jax.value_and_grad(first)(matrix(), *same)
    np.testing.assert_allclose(value, by_floats[0], rtol=1e-12)
    np.testing.assert_allclose(slope, by_floats[1], rtol=1e-9, atol=1e-12)
    wanted = truncated(matrix(), lambda s: s).T[0] @ whole[0]
    wanted += truncated(matrix(), lambda s: 1 / s)[0] @ whole[1]
    np.testing.assert_allclose(value, wanted, rtol=1e-9)


def test_shortest_least_squares_solution():
    """Rank 3 of 4 asked for: the fourth triplet is rounding, and is left out."""
    a_MN = draw(8, M, 3) @ draw(9, 3, N)
    y_M = draw(10, M)
    _, factors = factored(a_MN)
    wanted, *_ = np.linalg.lstsq(a_MN, y_M, rcond=1e-10)
    np.testing.assert_allclose(solve.pinv_solve(factors, y_M), wanted, rtol=1e-9)


def test_ridge_regression_and_cutoff():
    a_MN, y_MC = matrix(), draw(2, M, 2)
    factors = svd(operators.dense(a_MN), KEY, rank=N)
    wanted = np.linalg.solve(a_MN.T @ a_MN + 3 * np.eye(N), a_MN.T @ y_MC)
    np.testing.assert_allclose(solve.pinv_solve(factors, y_MC, ridge=3.0), wanted, rtol=1e-9)
    cut = solve.pinv_solve(factors, y_MC, rcond=0.5)  # 10, 6, 6, 6 stay, 3.5 and less go
    np.testing.assert_allclose(cut, truncated(a_MN, lambda s: 1 / s) @ y_MC, rtol=1e-8)


def test_approximation_is_an_operator():
    a_MN = matrix()
    _, factors = factored(a_MN)
    wanted = truncated(a_MN, lambda s: s).T
    np.testing.assert_allclose(solve.approximation(factors).to_dense(), wanted, atol=1e-9)


@pytest.mark.parametrize("complex_", [False, True])
def test_eigenpairs_of_both_signs(complex_):
    """Bipartite: every value comes with its negative, which singular vectors mix."""
    block = draw(11, 50, 50, complex_=complex_)
    a_NN = np.block([[np.zeros((50, 50)), block], [block.conj().T, np.zeros((50, 50))]])
    pairs = solve.eigh(operators.dense(a_NN), KEY, rank=5)
    values = np.linalg.eigvalsh(a_NN)
    wanted = values[np.argsort(-np.abs(values))][:5]
    np.testing.assert_allclose(np.abs(pairs.values_K), np.abs(wanted), rtol=1e-9)
    assert sorted(np.sign(pairs.values_K[:4])) == [-1, -1, 1, 1]
    x_NK = np.asarray(pairs.vectors_NK)
    np.testing.assert_allclose(a_NN @ x_NK, x_NK * pairs.values_K, atol=1e-7)
    np.testing.assert_allclose(x_NK.conj().T @ x_NK, np.eye(5), atol=1e-12)
    assert pairs.residual_K.max() < 1e-7
    assert pairs.converged


def ring(size):
    step = scipy.sparse.eye_array(size, k=1) + scipy.sparse.eye_array(size, k=1 - size)
    return scipy.sparse.csr_array(step + step.T)


SYMMETRIC = {
    "small torus": scipy.sparse.kronsum(ring(8), ring(8)),
    "torus": scipy.sparse.kronsum(ring(16), ring(16)),  # too large to be formed
    "path": scipy.sparse.diags_array([np.ones(6), np.ones(6)], offsets=[1, -1]),
    "positive": scipy.sparse.diags_array(np.r_[5, 5, np.linspace(4, 0, 18)]),
}


@pytest.mark.parametrize("name", list(SYMMETRIC))
def test_eigenpairs_where_values_and_their_negatives_are_multiple(name):
    matrix = scipy.sparse.csr_array(SYMMETRIC[name], dtype="float64")
    pairs = solve.eigh(spmm.sparse(matrix), KEY, rank=4)
    assert pairs.converged
    x_NK, values = np.asarray(pairs.vectors_NK), np.linalg.eigvalsh(matrix.toarray())
    np.testing.assert_allclose(matrix @ x_NK, x_NK * pairs.values_K, atol=1e-8)
    np.testing.assert_allclose(x_NK.T @ x_NK, np.eye(4), atol=1e-12)
    np.testing.assert_allclose(np.abs(pairs.values_K), np.sort(np.abs(values))[:-5:-1], atol=1e-12)


@pytest.mark.parametrize("scale", [1, 1e25, 1e-25])
def test_eigenpairs_at_every_scale_but_of_symmetric_matrices_only(scale):
    a_NN = draw(12, 60, 60).astype("float32")
    assert not solve.eigh(operators.dense(np.float32(scale) * a_NN), KEY, rank=3).converged
    a_NN += a_NN.T
    pairs = solve.eigh(operators.dense(np.float32(scale) * a_NN), KEY, rank=3)
    values = np.linalg.eigvalsh(a_NN)
    wanted = values[np.argsort(-np.abs(values))[:3]]
    np.testing.assert_allclose(pairs.values_K / np.float32(scale), wanted, rtol=1e-5)
    assert pairs.converged


@pytest.mark.parametrize("complex_", [False, True])
def test_gradient_of_eigenpairs_of_both_signs(complex_):
    """Bipartite, so that each value of the three has its negative, the last one outside."""
    size, half = 24, 12

    def hermitian(x_NN):
        x_NN = x_NN * (np.arange(size) < half) * (np.arange(size) >= half)[:, None]
        return x_NN + x_NN.conj().T

    a_NN, change = (hermitian(draw(i, size, size, complex_=complex_)) for i in (11, 12))
    weight = draw(13, size, size, complex_=complex_)

    def total(values_K, x_NK):
        """Without the sign or phase of a vector, and the order of a value and its negative."""
        each_K = jnp.einsum("nk,nm,mk->k", x_NK.conj(), weight, x_NK).real
        return (each_K[:2] * values_K[:2]).sum() + jnp.sin(values_K[:2]).sum() + values_K[2] ** 2

    def loss(z):
        pairs = solve.eigh(operators.dense(a_NN + z * change), KEY, rank=3)
        return total(pairs.values_K, pairs.vectors_NK)

    def wanted(z):
        values_N, x_NN = jnp.linalg.eigh(a_NN + z * change)
        order = jnp.argsort(-jnp.abs(values_N))[:3]
        return total(values_N[order], x_NN[:, order])

    slope, curvature = jax.jit(jax.value_and_grad(jax.grad(loss)))(0.0)
    steps = np.array([-1e-4, 0, 1e-4])
    low, middle, high = map(jax.jit(wanted), steps)
    np.testing.assert_allclose(slope, (high - low) / 2e-4, rtol=1e-5)
    np.testing.assert_allclose(curvature, (high - 2 * middle + low) / 1e-8, rtol=1e-4)


def test_norms():
    a_MN = matrix()
    op = operators.dense(a_MN)
    np.testing.assert_allclose(solve.spectral_norm(op, KEY), 10, rtol=1e-12)
    square, error = solve.frobenius_norm(op, KEY, samples=4000)
    assert abs(square - np.square(a_MN).sum()) < 4 * error
    assert error < 0.05 * square
    for scale in (1e-9, 1e9):  # whose fourth powers float32 does not hold
        small = operators.dense((scale * a_MN).astype("float32"))
        parts = np.float64(solve.frobenius_norm(small, KEY, samples=4000))
        np.testing.assert_allclose(parts / scale**2, (square, error), rtol=0.01)
    slope = jax.grad(lambda a: solve.spectral_norm(operators.dense(a), KEY))(a_MN)
    u_MN, _, vh_NN = np.linalg.svd(a_MN, full_matrices=False)
    np.testing.assert_allclose(slope, np.outer(u_MN[:, 0], vh_NN[0]), atol=1e-9)


def test_trace():
    a_NN = draw(12, 60, 60)
    a_NN = a_NN @ a_NN.T
    estimate, error = solve.trace(operators.dense(a_NN), KEY, samples=48)
    assert 0 < error < 0.05 * np.trace(a_NN)
    assert abs(estimate - np.trace(a_NN)) < 4 * error
    low = draw(13, 60, 7)
    estimate, error = solve.trace(operators.dense(low @ low.T), KEY, samples=24)
    np.testing.assert_allclose(estimate, np.trace(low @ low.T), rtol=1e-10)
    assert error < 1e-9


@pytest.mark.parametrize("rank", [3, 30])
def test_gradient_of_the_trace_is_without_bias(rank):
    """Also where the sketch has more columns than the matrix has rank."""
    a_NN = draw(14, 30, rank) @ draw(15, rank, 30)
    direction = draw(16, 30, 30)

    @jax.jit
    @jax.vmap
    def slopes(key):
        slope = jax.grad(lambda a: solve.trace(operators.dense(a), key, samples=24)[0])(a_NN)
        return (slope * direction).sum()

    slope_S = slopes(jax.random.split(KEY, 400))
    error = slope_S.std() / len(slope_S) ** 0.5
    assert abs(slope_S.mean() - np.trace(direction)) < 4 * error
    assert error < 0.05 * np.linalg.norm(direction)  # a few columns' noise, and no more


def test_wrong_requests():
    op, factors = factored(matrix())
    with pytest.raises(ValueError, match=r"y_MC has shape \(20, 1\), expected \(30,\) or \(30, c"):
        solve.pinv_solve(factors, np.ones((N, 1)))
    with pytest.raises(ValueError, match=r"op has shape \(20, 30\), and factors are of .*30, 20"):
        solve.pinv_solve(factors, np.ones(M), op=op.H)
    for function in (solve.trace, lambda op, key: solve.eigh(op, key, rank=2)):
        with pytest.raises(ValueError, match=r"A has shape \(30, 20\), expected a square one"):
            function(op, KEY)
    with pytest.raises(ValueError, match="samples=5, expected at least 6"):
        solve.trace(operators.identity(4), KEY, samples=5)
    with pytest.raises(ValueError, match=r"samples=48\.0, expected a whole number"):
        solve.trace(operators.identity(4), KEY, samples=48.0)
    with pytest.raises(ValueError, match="op has dtype int32, expected one of float32, float64, "):
        solve.trace(operators.identity(4, "int32"), KEY)
    with pytest.raises(ValueError, match=r"ridge=-1\.0, expected at least 0"):
        solve.pinv_solve(factors, np.ones(M), ridge=-1.0)
    with pytest.raises(ValueError, match="ridge=nan, expected at least 0"):
        solve.pinv_solve(factors, np.ones(M), ridge=np.nan)
    with pytest.raises(ValueError, match=r"ridge has shape \(2,\), expected one number"):
        solve.pinv_solve(factors, np.ones(M), ridge=jnp.ones(2))
    for dtype in ("uint8", "int8", "bool"):
        with pytest.raises(ValueError, match=f"op has dtype {dtype}, expected one of float32, "):
            solve.frobenius_norm(operators.dense(np.ones((3, 2), dtype)), KEY)
    for rank, message in ((2.0, "rank=2.0, expected a whole"), (5, "rank=5, expected from 1 to 4")):
        with pytest.raises(ValueError, match=message):
            solve.eigh(operators.identity(4), KEY, rank=rank)
    with pytest.raises(ValueError, match="samples=1, expected at least 2"):
        solve.frobenius_norm(operators.identity(4), KEY, samples=1)
    with pytest.raises(ValueError, match=r"x_NC has shape \(30, 2\), expected \(20,\) or \(20, c"):
        solve.low_rank_product(op, factors, np.ones((M, 2)))
    with pytest.raises(ValueError, match=r"op has shape \(20, 30\), and factors are of .*30, 20"):
        solve.low_rank_product(op.H, factors, np.ones(M))
    with pytest.raises(ValueError, match="op has type ndarray, expected LinearOperator: "):
        solve.eigh(np.eye(4), KEY, rank=2)

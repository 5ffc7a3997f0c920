"""Uses of a truncated SVD, against numpy's full one and central differences."""

import jax
import numpy as np
import pytest

from isvd import operators, solve
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


def test_norms():
    a_MN = matrix()
    op = operators.dense(a_MN)
    np.testing.assert_allclose(solve.spectral_norm(op, KEY), 10, rtol=1e-12)
    square, error = solve.frobenius_norm(op, KEY, samples=4000)
    assert abs(square - np.square(a_MN).sum()) < 4 * error
    assert error < 0.05 * square
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


def test_wrong_requests():
    op, factors = factored(matrix())
    with pytest.raises(ValueError, match=r"y_MC has shape \(20, 1\), expected \(30,\) or \(30, c"):
        solve.pinv_solve(factors, np.ones((N, 1)))
    with pytest.raises(ValueError, match=r"op has shape \(20, 30\), and factors are of .*30, 20"):
        solve.pinv_solve(factors, np.ones(M), op=op.H)
    for function in (solve.trace, lambda op, key: solve.eigh(op, key, rank=2)):
        with pytest.raises(ValueError, match=r"A has shape \(30, 20\), expected a square one"):
            function(op, KEY)
    with pytest.raises(ValueError, match="samples=5 must be at least 6"):
        solve.trace(operators.identity(4), KEY, samples=5)

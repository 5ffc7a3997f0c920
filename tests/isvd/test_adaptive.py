import jax
import numpy as np
import pytest

from isvd import operators
from isvd.adaptive import svd_to_error

KEY = jax.random.key(0)
VALUES = 0.9 ** np.arange(60)


def matrix():
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(size, 60)))[0] for size in (90, 60))
    return ((left * VALUES) @ right.T).astype("float32")


@pytest.mark.parametrize("error", [0.5, 0.1])
@pytest.mark.parametrize(("norm", "order"), [("frobenius", None), ("spectral", 2)])
def test_smallest_rank_that_keeps_the_error(norm, order, error):
    a_MN = matrix()
    factors = svd_to_error(operators.dense(a_MN), KEY, error=error, norm=norm, first_rank=4)
    rank = len(factors.s_K)
    if norm == "spectral":
        least = int(np.argmax(error * VALUES[0] >= VALUES))
        assert rank == least
    else:
        left = np.sqrt(np.cumsum(VALUES[::-1] ** 2)[::-1])
        least = int(np.argmax(left <= error * left[0]))
        assert abs(rank - least) <= 1  # what is left is estimated
    best_MN = (np.asarray(factors.u_MK) * factors.s_K) @ factors.v_NK.T
    reached = np.linalg.norm(a_MN - best_MN, order) / np.linalg.norm(a_MN, order)
    assert reached < 1.1 * error
    np.testing.assert_allclose(factors.s_K, VALUES[:rank], rtol=1e-4)
    for x in (factors.u_MK, factors.v_NK):
        np.testing.assert_allclose(x.T @ x, np.eye(rank), atol=1e-5)
    assert factors.converged


def test_stops_at_the_largest_rank():
    factors = svd_to_error(operators.dense(matrix()), KEY, error=0.01, first_rank=4, max_rank=7)
    assert len(factors.s_K) == 7
    assert not factors.converged


@pytest.mark.parametrize(("error", "max_rank"), [(0.1, 2), (0.005, 3), (0.1, 3), (0.6, 1)])
def test_a_largest_rank_that_reaches_the_error(error, max_rank):
    """The spectral norm of what is left is a value that is not among those of the result."""
    values = np.array([1, 0.5, 0.01, 0.001], "float32")
    op = operators.diagonal(values)
    options = {"error": error, "norm": "spectral", "first_rank": 1}
    factors = svd_to_error(op, KEY, max_rank=max_rank, **options)
    least = int(np.argmax(values <= error))
    np.testing.assert_allclose(factors.s_K, values[:least], rtol=1e-5)
    assert factors.converged
    if least > 1:
        fewer = svd_to_error(op, KEY, max_rank=least - 1, **options)
        assert len(fewer.s_K) == least - 1
        assert not fewer.converged


def test_every_triplet_if_need_be():
    a_MN = np.eye(5, dtype="float32")
    factors = svd_to_error(operators.dense(a_MN), KEY, error=0.1, first_rank=2)
    np.testing.assert_allclose(factors.s_K, np.ones(5), rtol=1e-6)
    assert factors.converged


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_scale_changes_nothing(norm):
    """Of 1e30 and 1e-30, whose squares float32 does not hold."""
    wanted = svd_to_error(operators.dense(matrix()), KEY, error=0.3, norm=norm, first_rank=4)
    for scale in (np.float32(1e30), np.float32(1e-30)):
        op = operators.dense(scale * matrix())
        factors = svd_to_error(op, KEY, error=0.3, norm=norm, first_rank=4)
        assert len(factors.s_K) == len(wanted.s_K)
        np.testing.assert_allclose(factors.s_K / scale, wanted.s_K, rtol=1e-5)
        assert factors.residual_K.max() < 1e-4 * factors.s_K[0]
        assert factors.converged


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_what_is_not_a_number_ends_at_once(norm, value):
    a_MN = matrix()
    a_MN[3, 5] = value
    factors = svd_to_error(operators.dense(a_MN), KEY, error=0.1, norm=norm, first_rank=4)
    assert len(factors.s_K) == 4
    assert not factors.converged


def test_small_matrices_need_no_first_rank():
    factors = svd_to_error(operators.dense(np.diag([4.0, 2, 1, 0.1]).astype("f")), KEY, error=0.1)
    np.testing.assert_allclose(factors.s_K, [4, 2, 1], rtol=1e-6)


def test_wrong_requests():
    op = operators.identity(4)
    with pytest.raises(ValueError, match="error=1, expected a number between 0 and 1"):
        svd_to_error(op, KEY, error=1)
    with pytest.raises(ValueError, match="norm='nuclear', expected frobenius or spectral"):
        svd_to_error(op, KEY, error=0.1, norm="nuclear")
    with pytest.raises(ValueError, match="first_rank=5, expected from 1 to 4, for an operator"):
        svd_to_error(op, KEY, error=0.1, first_rank=5)
    with pytest.raises(ValueError, match=r"max_rank=2.5, expected a whole number"):
        svd_to_error(op, KEY, error=0.1, max_rank=2.5)
    with pytest.raises(ValueError, match="samples=1, expected at least 2"):
        svd_to_error(op, KEY, error=0.1, samples=1)

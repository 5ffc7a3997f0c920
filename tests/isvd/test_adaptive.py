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


def test_every_triplet_if_need_be():
    a_MN = np.eye(5, dtype="float32")
    factors = svd_to_error(operators.dense(a_MN), KEY, error=0.1, first_rank=2)
    np.testing.assert_allclose(factors.s_K, np.ones(5), rtol=1e-6)
    assert factors.converged


def test_wrong_requests():
    op = operators.identity(4)
    with pytest.raises(ValueError, match="error=1, expected a number between 0 and 1"):
        svd_to_error(op, KEY, error=1)
    with pytest.raises(ValueError, match="norm='nuclear', expected frobenius or spectral"):
        svd_to_error(op, KEY, error=0.1, norm="nuclear")
    with pytest.raises(ValueError, match=r"first_rank=16 and max_rank=4, expected 1 to 4"):
        svd_to_error(op, KEY, error=0.1)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isvd.orthonormal import orthonormalize


def conditioned(condition, dtype, shape=(300, 12)):
    """A block with this condition number, its directions mixed over all columns."""
    rng = np.random.default_rng(0)
    draw = lambda *size: rng.normal(size=size) + (1j * rng.normal(size=size))  # noqa: E731
    left, right = np.linalg.qr(draw(*shape))[0], np.linalg.qr(draw(*shape[1:] * 2))[0]
    x = (left * np.geomspace(1, 1 / condition, shape[1])) @ right
    if np.dtype(dtype).kind == "f":
        left, right = np.linalg.qr(left.real)[0], np.linalg.qr(right.real)[0]
        x = (left * np.geomspace(1, 1 / condition, shape[1])) @ right
    return x.astype(dtype)


CASES = [
    ("float32", 1e1),
    ("float32", 1e6),
    ("float32", 1e30),
    ("float64", 1e1),
    ("float64", 1e12),
    ("float64", 1e200),
    ("complex64", 1e6),
    ("complex128", 1e12),
]


@pytest.mark.parametrize("method", ["cholesky", "householder", None])
@pytest.mark.parametrize(("dtype", "condition"), CASES)
def test_orthonormal_whatever_the_condition(dtype, condition, method):
    with jax.enable_x64(dtype in ("float64", "complex128")):
        x_NB = conditioned(condition, dtype)
        q_NB, r_BB = jax.jit(orthonormalize, static_argnums=1)(x_NB, method)
        eps = np.finfo(dtype).eps
        defect = np.linalg.norm(np.asarray(q_NB.conj().T @ q_NB) - np.eye(12), 2)
        assert q_NB.dtype == dtype
        assert defect < 10 * eps * 12
        assert np.linalg.norm(q_NB @ r_BB - x_NB) < 10 * eps * 12 * np.linalg.norm(x_NB)


@pytest.mark.parametrize("method", ["cholesky", "householder"])
@pytest.mark.parametrize("scale", [0, 1e-30, 1e30])
def test_rank_zero_tiny_and_huge(scale, method):
    x_NB = scale * conditioned(1e3, "float32")
    q_NB, r_BB = orthonormalize(x_NB, method)
    assert np.linalg.norm(q_NB.T @ q_NB - np.eye(12), 2) < 1e-5
    np.testing.assert_allclose(q_NB @ r_BB, x_NB, atol=1e-5 * scale)


def test_columns_of_very_unlike_sizes():
    x_NB = conditioned(2, "float32") * np.geomspace(1e-18, 1e18, 12, dtype="float32")
    q_NB, r_BB = orthonormalize(x_NB, "cholesky")
    assert np.linalg.norm(q_NB.T @ q_NB - np.eye(12), 2) < 1e-5
    np.testing.assert_allclose(
        q_NB @ r_BB / np.abs(x_NB).max(0), x_NB / np.abs(x_NB).max(0), atol=1e-5
    )


def test_vmap():
    both = jnp.stack([conditioned(10, "float32"), conditioned(1e8, "float32")])
    q_2NB, r_2BB = jax.vmap(lambda x: orthonormalize(x, "cholesky"))(both)
    for q_NB, r_BB, x_NB in zip(q_2NB, r_2BB, both, strict=True):
        assert np.linalg.norm(q_NB.T @ q_NB - np.eye(12), 2) < 1e-5
        np.testing.assert_allclose(q_NB @ r_BB, x_NB, atol=1e-6)


def test_what_fails_on_the_way_is_no_error():
    """A Cholesky factorisation of a block of rank one, where JAX raises at what is NaN."""
    x_NB = jnp.ones((30, 4))
    with jax.debug_nans(True):
        q_NB, r_BB = orthonormalize(x_NB, "cholesky")
    assert np.linalg.norm(q_NB.T @ q_NB - np.eye(4), 2) < 1e-5
    np.testing.assert_allclose(q_NB @ r_BB, x_NB, atol=1e-5)


def test_wrong_requests():
    with pytest.raises(ValueError, match=r"shape \(3, 4\), expected no more columns than rows"):
        orthonormalize(jnp.ones((3, 4)))
    with pytest.raises(ValueError, match="method='qr', expected one of householder, cholesky"):
        orthonormalize(jnp.ones((4, 3)), "qr")

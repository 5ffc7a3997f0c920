"""Matrices with given singular values, and what LAPACK makes of them."""

import jax
import jax.numpy as jnp
import numpy as np

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
    "flat below one": np.r_[1, np.linspace(0.015, 0.01, N - 1)],  # small left blocks in every step
    "a cluster": np.r_[5 - 1e-9 * np.arange(12), np.linspace(4, 0.1, N - 12)],
    "20 copies": np.r_[np.full(20, 5.0), np.linspace(4, 0.1, N - 20)],
    "3 copies below 2": np.r_[9, 8, np.full(3, 5.0), np.linspace(4, 0.1, N - 5)],
    "rank 3": np.array([3.0, 2.0, 1.0]),
    "zero": np.zeros(1),
    "1 to 1e-119": 10.0 ** -np.arange(N),
    "tiny": 1e-30 * 0.8 ** np.arange(N),
    "huge": 1e30 * 0.8 ** np.arange(N),
}
GAPS = np.r_[10, 8, 6.5, 5, 3.5 * 0.97 ** np.arange(N - 4)]  # s[4] / s[3] = .7: a heavy tail


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


def dense_triplets(a_MN, rank):
    u_MK, s_K, vh_KN = jnp.linalg.svd(a_MN, full_matrices=False)
    return u_MK[:, :rank], s_K[:rank], vh_KN[:rank].conj().T

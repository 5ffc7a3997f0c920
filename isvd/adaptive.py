"""The SVD of as few triplets as an error asks for.

Axes: M rows, N columns, K rank.
"""

import jax
import jax.numpy as jnp
import numpy as np

from isvd.factorize import SVD, svd
from isvd.operators import LinearOperator
from isvd.orthonormal import orthonormalize
from isvd.solve import approximation, frobenius_norm
from isvd.triplets import thin_svd


def svd_to_error(
    op: LinearOperator,
    key: jax.Array,
    *,
    error: float,
    norm: str = "frobenius",
    first_rank: int = 16,
    max_rank: int | None = None,
    samples: int = 32,
    tol: float | None = None,
) -> SVD:
    """The smallest rank K with |A - u s v^H| <= error * |A|, and its triplets.

    Stages double the number of triplets: what is there is subtracted from the operator, and only
    new ones are computed. Not for use inside jit, as the shape of the result depends on values.

    Args:
        error: relative, in (0, 1).
        norm: "frobenius", where what is left of A is estimated from `samples` products (relative
            standard error about sqrt(2 / samples) or less); or "spectral", where it is s[K].
        first_rank: triplets of the first stage.   max_rank: where to stop, by default min(M, N).
        tol: of each stage, as of `svd`.
    Returns:
        SVD; `converged` is False if `max_rank` did not reach the error.
    Raises:
        ValueError: for values outside their range.
    """
    limit = min(op.shape)
    max_rank = limit if max_rank is None else max_rank
    if not 0 < error < 1:
        raise ValueError(f"error={error}, expected a number between 0 and 1")
    if norm not in ("frobenius", "spectral"):
        raise ValueError(f"norm={norm!r}, expected frobenius or spectral")
    if not 1 <= first_rank <= limit or not 1 <= max_rank <= limit:
        raise ValueError(
            f"first_rank={first_rank} and max_rank={max_rank}, expected 1 to {limit} for an "
            f"operator of shape {op.shape}"
        )
    factors, rest = None, op
    while True:
        key, stage_key, rest_key = jax.random.split(key, 3)
        known = 0 if factors is None else len(factors.s_K)
        rank = min(max(first_rank, known), max_rank - known)
        new = svd(rest, stage_key, rank=rank, tol=tol)
        factors = new if factors is None else _joined(op, factors, new)
        rest = op - approximation(factors)
        complete = len(factors.s_K) == limit
        tail = 0.0 if complete else float(frobenius_norm(rest, rest_key, samples=samples)[0])
        enough = _enough(np.asarray(factors.s_K, np.float64), tail, error, norm, complete)
        if enough is not None or len(factors.s_K) >= max_rank:
            break
    kept = len(factors.s_K) if enough is None else max(enough, 1)
    return SVD(
        factors.u_MK[:, :kept],
        factors.s_K[:kept],
        factors.v_NK[:, :kept],
        factors.residual_K[:kept],
        factors.products,
        factors.converged & (enough is not None),
    )


def _enough(s_K: np.ndarray, tail: float, error: float, norm: str, complete: bool) -> int | None:
    """The least K that keeps the error, or None if it is not among these values."""
    if norm == "spectral":
        below = np.flatnonzero(s_K <= error * s_K[0])
        return int(below[0]) if below.size else len(s_K) if complete else None
    left_K = tail + np.cumsum(s_K[::-1] ** 2)[::-1]  # squared error of keeping the k before
    left_K = np.append(left_K, tail)
    below = np.flatnonzero(left_K <= error**2 * left_K[0])
    return int(below[0]) if below.size else None


def _joined(op: LinearOperator, old: SVD, new: SVD) -> SVD:
    """Both sets as one, orthonormal to rounding: the SVD of A on all their right vectors."""
    v_NK, _ = orthonormalize(jnp.hstack([old.v_NK, new.v_NK]))
    u_MK, s_K, vh_KK = thin_svd(op.matmat(v_NK))
    v_NK = jnp.matmul(v_NK, vh_KK.conj().T, precision="highest")
    miss_NK = op.rmatmat(u_MK) - v_NK * s_K
    products = old.products + new.products + 2 * len(s_K)
    converged = old.converged & new.converged
    return SVD(u_MK, s_K, v_NK, jnp.linalg.norm(miss_NK, axis=0), products, converged)

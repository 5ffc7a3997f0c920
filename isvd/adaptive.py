"""The SVD of as few triplets as an error asks for.

Axes: M rows, N columns, K rank.
"""

import jax
import jax.numpy as jnp
import numpy as np

from isvd.arguments import check_integer
from isvd.axes import on_automatic_axes
from isvd.factorize import SVD, svd
from isvd.operators import LinearOperator
from isvd.orthonormal import orthonormalize
from isvd.solve import approximation, frobenius_norm
from isvd.triplets import over, positive, thin_svd


@on_automatic_axes
def svd_to_error(
    op: LinearOperator,
    key: jax.Array,
    *,
    error: float,
    norm: str = "frobenius",
    first_rank: int | None = None,
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
            standard error about sqrt(2 / samples) or less); or "spectral", where it is s[K], so
            that up to max_rank + 1 triplets are computed.
        first_rank: triplets of the first stage, by default 16, or all if they are fewer.
        max_rank: where to stop, by default min(M, N).
        samples: for the Frobenius norm, at least 2.
        tol: of each stage, as of `svd`.
    Returns:
        SVD; `converged` is False if `max_rank` did not reach the error, or A is not finite.
    Raises:
        ValueError: for values outside their range.
    """
    limit = min(op.shape)
    why = f"for an operator of shape {op.shape}"
    max_rank = limit if max_rank is None else max_rank
    check_integer("max_rank", max_rank, 1, limit, why)
    first_rank = min(16, limit) if first_rank is None else first_rank
    check_integer("first_rank", first_rank, 1, limit, why)
    check_integer("samples", samples, 2)
    if not 0 < error < 1:
        raise ValueError(f"error={error}, expected a number between 0 and 1")
    if norm not in ("frobenius", "spectral"):
        raise ValueError(f"norm={norm!r}, expected frobenius or spectral")
    # What K triplets leave is known in the spectral norm by one more.
    most = min(max_rank + (norm == "spectral"), limit)
    factors, rest = None, op
    while True:
        key, stage_key, rest_key = jax.random.split(key, 3)
        known = 0 if factors is None else len(factors.s_K)
        rank = min(max(first_rank, known), most - known)
        new = svd(rest, stage_key, rank=rank, tol=tol)
        if factors is None:  # from here on of A / s[0], whose squares neither over- nor underflow
            scale = positive(new.s_K[0])
            op, factors = over(op, scale), _scaled(new, 1 / scale)
        else:
            factors = _joined(op, factors, new)
        rest = op - approximation(factors)
        complete = len(factors.s_K) == limit
        tail = 0.0
        if norm == "frobenius" and not complete:
            tail = float(frobenius_norm(rest, rest_key, samples=samples)[0])
        s_K = np.asarray(factors.s_K, np.float64)
        finite = np.isfinite(s_K.sum() + tail)
        enough = _enough(s_K, tail, error, norm, complete) if finite else None
        if enough is not None or len(s_K) >= most or not finite:
            break
    reached = enough is not None and enough <= max_rank
    kept = max(enough, 1) if reached else min(len(s_K), max_rank)
    factors = _scaled(factors.leading(kept), scale)
    return factors._replace(converged=factors.converged & reached)


def _scaled(factors: SVD, scale: jax.Array) -> SVD:
    return factors._replace(s_K=factors.s_K * scale, residual_K=factors.residual_K * scale)


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

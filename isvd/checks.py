"""Checks of an operator on request, by products with random vectors.

Axes: M rows, N columns, C columns of a block.
"""

import jax
import jax.numpy as jnp
import numpy as np

from isvd.axes import on_automatic_axes
from isvd.operators import LinearOperator


@on_automatic_axes
def adjoint_defect(a: LinearOperator, key: jax.Array, *, columns: int = 4) -> jax.Array:
    """max |<y, A x> - <A^H y, x>| / (|y| |A x|) over random columns; rounding, if all is right.

    Raises:
        ValueError: if A is not of a floating type.
    """
    x_NC, y_MC = _random_blocks(a, key, columns)
    ax_MC, ahy_NC = a.matmat(x_NC), a.rmatmat(y_MC)
    left = jnp.einsum("mc,mc->c", y_MC.conj(), ax_MC, precision="highest")
    right = jnp.einsum("nc,nc->c", ahy_NC.conj(), x_NC, precision="highest")
    size = _norm(y_MC, axis=0) * _norm(ax_MC, axis=0)
    return (jnp.abs(left - right) / jnp.where(size > 0, size, 1)).max()


@on_automatic_axes
def linearity_defect(a: LinearOperator, key: jax.Array, *, columns: int = 4) -> jax.Array:
    """|A(c x + z) - c A x - A z| / |A x| of random blocks: rounding, if A is linear.

    c is 2, or 2 + i where A is complex, so that parts and conjugates of x are seen. Coefficients do
    not add up to 0, so that what is added to a product does not cancel.

    Raises:
        ValueError: if A is not of a floating type.
    """
    c = _coefficient(a)
    x_NC, _ = _random_blocks(a, key, columns)
    z_NC = x_NC[:, ::-1]
    ax_MC = a.matmat(x_NC)
    miss_MC = a.matmat(c * x_NC + z_NC) - c * ax_MC - a.matmat(z_NC)
    size = _norm(ax_MC)
    return _norm(miss_MC) / jnp.where(size > 0, size, 1)


def _coefficient(a: LinearOperator) -> complex:
    return 2 + 1j if a.dtype.kind == "c" else 2


@on_automatic_axes
def nonfinite(a: LinearOperator, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Masks of the rows (M,) and the columns (N,) that hold NaN or infinity, by two products.

    Raises:
        ValueError: if A is not of a floating type.
    """
    x_NC, y_MC = _random_blocks(a, key, 1)
    rows_M, columns_N = a.matmat(x_NC)[:, 0], a.rmatmat(y_MC)[:, 0]
    return ~jnp.isfinite(rows_M), ~jnp.isfinite(columns_N)


def verify(a: LinearOperator, key: jax.Array) -> None:
    """Try an operator on random vectors, for about ten products.

    Raises:
        ValueError: if entries or products are not finite (and where), if A is not linear, or if
            `rmatmat` is not the adjoint of `matmat`; and if A is not of a floating type.
    """
    keys = jax.random.split(key, 3)
    # First what needs no adjoint: none can be derived from a function that is not linear.
    defect = float(linearity_defect(a, keys[1]))
    allowed = 1e3 * float(jnp.finfo(a.dtype).eps)
    if defect >= allowed:  # NaN is not: which entries make it is said below
        raise ValueError(
            f"A is not linear: A(c x + z) and c A x + A z, c = {_coefficient(a)}, differ by "
            f"{defect:.2g} of |A x|, expected less than {allowed:.2g}"
        )
    rows_M, columns_N = map(np.asarray, nonfinite(a, keys[0]))
    if rows_M.any() or columns_N.any():
        raise ValueError(
            f"products with A are not finite, in rows {_some(rows_M)} and columns "
            f"{_some(columns_N)}: entries are infinite or NaN, or so large that products overflow "
            f"{a.dtype}"
        )
    defect = float(adjoint_defect(a, keys[2]))
    if not defect < allowed:
        raise ValueError(
            f"rmatmat is not the adjoint of matmat: <y, A x> and <A^H y, x> differ by "
            f"{defect:.2g} of |y| |A x|, expected less than {allowed:.2g}; leave rmatmat out and "
            "it is derived"
        )


def _norm(x: jax.Array, axis: int | None = None) -> jax.Array:
    """Also of entries whose squares would overflow or vanish."""
    size = jnp.abs(x)
    peak = size.max(axis, keepdims=True)
    peak = jnp.where(peak > 0, peak, 1)
    return peak.squeeze(axis) * jnp.linalg.norm(size / peak, axis=axis)


def _random_blocks(a: LinearOperator, key: jax.Array, columns: int) -> tuple[jax.Array, jax.Array]:
    if not jnp.issubdtype(a.dtype, jnp.inexact):
        raise ValueError(f"A has dtype {a.dtype}, expected a real or complex floating type")
    keys = jax.random.split(key)
    x_NC = jax.random.normal(keys[0], (a.shape[1], columns), a.dtype)
    return x_NC, jax.random.normal(keys[1], (a.shape[0], columns), a.dtype)


def _some(mask: np.ndarray) -> str:
    index = np.flatnonzero(mask)
    more = f", ... ({len(index)} in all)" if len(index) > 5 else ""
    return ", ".join(map(str, index[:5])) + more

"""Products with sparse matrices as gathers of rows of equal length (sliced ELLPACK).

The entries of a row are cut into pieces of at most 16, pieces are filled up to 1, 4 or 16 entries,
and all pieces of a length are multiplied at once: rows of x are gathered, scaled and added. Rows of
several pieces are then the sums of those: a matrix of ones, in the same form.

Axes: M rows, N columns, C columns of a block, E stored entries, P pieces, L pieces of one length.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

_LENGTHS = np.array([1, 4, 16])  # few: each is an operation more, and filling up costs little

Level = tuple[tuple[jax.Array, jax.Array], ...]  # values and columns, each (L, length)


def product(values_E: Any, columns_E: np.ndarray, start: np.ndarray) -> Partial:
    """x_NC -> A x_NC for compressed rows: row m has the entries start[m], ..., start[m + 1] - 1.

    `values_E` may be traced, the pattern may not.
    """
    levels, done = [], 0
    place_M = np.empty(len(start) - 1, np.int64)
    row_R = np.arange(len(place_M))  # the rows that are not yet one piece
    while True:
        level, place_P, next_start = _level(values_E, columns_E, start)
        levels.append(level)
        pieces_R = np.diff(next_start)
        whole_R = pieces_R == 1
        place_M[row_R[whole_R]] = done + place_P[next_start[:-1][whole_R]]
        if whole_R.all():
            return Partial(_apply, tuple(levels), jnp.asarray(place_M, jnp.int32))
        done += len(place_P)
        row_R = row_R[~whole_R]
        columns_E = place_P[np.repeat(~whole_R, pieces_R)]
        values_E = jnp.ones(len(columns_E), values_E.dtype)
        start = np.concatenate([[0], np.cumsum(pieces_R[~whole_R])])


def _level(
    values_E: Any, columns_E: np.ndarray, start: np.ndarray
) -> tuple[Level, np.ndarray, np.ndarray]:
    """Pieces by length, the place of each piece among them, and where each row's pieces start."""
    longest = _LENGTHS[-1]
    degree_M = np.diff(start)
    pieces_M = np.maximum(-(-degree_M // longest), 1)  # an empty row is an empty piece
    next_start = np.concatenate([[0], np.cumsum(pieces_M)])
    row_P = np.repeat(np.arange(len(degree_M)), pieces_M)
    before_P = longest * (np.arange(len(row_P)) - next_start[row_P])  # entries in earlier pieces
    first_P = start[row_P] + before_P
    count_P = np.minimum(degree_M[row_P] - before_P, longest)
    length_P = _LENGTHS[np.searchsorted(_LENGTHS, count_P)]
    order_P = np.argsort(length_P, kind="stable")
    level = []
    for length in np.unique(length_P):
        piece_L = order_P[length_P[order_P] == length]
        count_L1 = count_P[piece_L, None]
        # Filled up with the piece's last column, so that no NaN of another row comes in.
        offset_LK = np.minimum(np.arange(length), np.maximum(count_L1 - 1, 0))
        entry_LK = np.minimum(first_P[piece_L, None] + offset_LK, len(columns_E) - 1)
        values_LK = jnp.where(np.arange(length) < count_L1, jnp.asarray(values_E)[entry_LK], 0)
        level.append((values_LK, jnp.asarray(columns_E[entry_LK], jnp.int32)))
    place_P = np.empty(len(order_P), np.int64)
    place_P[order_P] = np.arange(len(order_P))
    return tuple(level), place_P, next_start


def _apply(levels: tuple[Level, ...], place_M: jax.Array, x_NC: jax.Array) -> jax.Array:
    x_NC = jnp.asarray(x_NC, jnp.result_type(levels[0][0][0], x_NC))
    found = []
    for level in levels:
        x_NC = _whole([_gather_sum(*part, x_NC) for part in level])
        found.append(x_NC)
    return _rows(_whole(found), place_M)


def _whole(parts: list[jax.Array]) -> jax.Array:
    """As one array in memory: XLA would work out each row again wherever it is read."""
    return jax.lax.optimization_barrier(jnp.concatenate(parts))


def _gather_sum(values_LK: jax.Array, columns_LK: jax.Array, x_NC: jax.Array) -> jax.Array:
    """One fused loop without an intermediate: XLA would write out x_NC[columns_LK]."""
    values_LK = values_LK.astype(x_NC.dtype)  # whole: XLA takes conversions out of loops
    return sum(
        values_LK[:, k, None] * _rows(x_NC, columns_LK[:, k]) for k in range(values_LK.shape[1])
    )


def _rows(x_NC: jax.Array, row_L: jax.Array) -> jax.Array:
    # Without a test for negative rows in the innermost loop. Unsigned ones have none either but are
    # converted: XLA takes that out of loops, for each slice an operation and an array more.
    return x_NC.at[row_L].get(mode="promise_in_bounds", wrap_negative_indices=False)

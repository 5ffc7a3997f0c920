"""Products with sparse matrices as gathers of rows of equal length (sliced ELLPACK).

The entries of a row are cut into pieces of at most 16, pieces are filled up to 1, 2, 4 or 16
entries, and all pieces of a length are multiplied at once: rows of x are gathered, scaled and
added. Where rows have several pieces these are summed in the same way, with a one for each.

Axes: M rows, N columns, C columns of a block, E stored entries, P pieces, L pieces of one length.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

# Few, as each is an operation more. Between 4 and 16 none is worth one: with blocks of 8 columns
# XLA on a CPU takes all columns of a piece at once from 14 entries on, below them one by one.
_LENGTHS = np.array([1, 2, 4, 16])

Level = tuple[tuple[jax.Array, jax.Array], ...]  # values and columns, each (L, length)


def product(values_E: Any, columns_E: np.ndarray, start: np.ndarray) -> Partial:
    """x_NC -> A x_NC for compressed rows: row m has the entries start[m], ..., start[m + 1] - 1.

    `values_E` may be traced, the pattern may not.
    """
    levels, num_pieces = [], 0
    row_M = np.arange(len(start) - 1)  # those that this level cuts
    place_M = np.empty(len(row_M), np.int64)  # of the piece that is all of a row, among all levels'
    while True:
        level, place_P, next_start = _level(values_E, columns_E, start)
        levels.append(level)
        place_P += num_pieces
        num_pieces += len(place_P)
        pieces_M = np.diff(next_start)
        whole_M = pieces_M == 1
        place_M[row_M[whole_M]] = place_P[next_start[:-1][whole_M]]
        if whole_M.all():
            return Partial(_apply, tuple(levels), jnp.asarray(place_M, jnp.uint32))
        columns_E = place_P[np.repeat(~whole_M, pieces_M)]
        values_E = jnp.ones(len(columns_E), values_E.dtype)
        start = np.concatenate([[0], np.cumsum(pieces_M[~whole_M])])
        row_M = row_M[~whole_M]


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
        level.append((values_LK, jnp.asarray(columns_E[entry_LK], jnp.uint32)))
    place_P = np.empty(len(order_P), np.int64)
    place_P[order_P] = np.arange(len(order_P))
    return tuple(level), place_P, next_start


def _apply(levels: tuple[Level, ...], place_M: jax.Array, x_NC: jax.Array) -> jax.Array:
    x_NC = jnp.asarray(x_NC, jnp.result_type(levels[0][0][0], x_NC))
    levels, x_NC = jax.lax.optimization_barrier((levels, x_NC))
    num_pieces = sum(len(values_LK) for level in levels for values_LK, _ in level)
    # Written part by part: XLA fuses a concatenation with what reads it, and looks up at each
    # element in which part it lies.
    sum_PC = jnp.zeros_like(x_NC, shape=(num_pieces, x_NC.shape[1]))
    done = 0
    for level in levels:
        for part_LC in [_gather_sum(*part, x_NC) for part in level]:
            sum_PC = jax.lax.dynamic_update_slice_in_dim(sum_PC, part_LC, done, axis=0)
            done += len(part_LC)
        x_NC = sum_PC
    return _rows(sum_PC, place_M)


def _gather_sum(values_LK: jax.Array, columns_LK: jax.Array, x_NC: jax.Array) -> jax.Array:
    """One fused loop without an intermediate: XLA would write out x_NC[columns_LK]."""
    return sum(
        values_LK[:, k, None].astype(x_NC.dtype) * _rows(x_NC, columns_LK[:, k])
        for k in range(values_LK.shape[1])
    )


def _rows(x_NC: jax.Array, row_L: jax.Array) -> jax.Array:
    """Of unsigned rows, which need no test for negative ones in the innermost loop."""
    return x_NC.at[row_L].get(mode="promise_in_bounds")

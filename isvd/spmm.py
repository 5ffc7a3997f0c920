"""Sparse matrices as operators: their products with blocks of columns, quick on each platform.

A matrix and its adjoint are kept apart, so that products from both sides read memory in order. Each
is cut into rows of few lengths (`isvd.ell`), or kept as compressed rows, whose product is that of
`jax.experimental.sparse.BCSR`, on CPU a kernel of jaxlib (docs/benchmarks.md).

Axes: M rows, N columns, C columns of a block, E stored entries.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse as jax_sparse
from jax.tree_util import Partial

from isvd import ell
from isvd.arguments import checked_shape
from isvd.closures import Static
from isvd.operators import LinearOperator, dtype_of

# On CPU the kernel takes as long for fewer columns as for this many, or longer.
_LEAST_COLUMNS = 8

# From here on an SVD was quicker with "ell", and compiled half a second to a second longer.
_MANY_ENTRIES = 2**14


def sparse(
    matrix: Any, dtype: Any = None, *, layout: Literal["auto", "ell", "csr"] = "auto"
) -> LinearOperator:
    """The operator of a sparse matrix in memory.

    Args:
        matrix: a scipy sparse matrix or array of any format, or a JAX `BCOO` or `BCSR`. Entries
            stored twice are added, and stored zeros are kept.
        dtype: of the entries; by default theirs, where integers and booleans become float32.
        layout: "ell", rows cut to few lengths (`isvd.ell`), with the quicker products; "csr",
            compressed rows, which compile quicker, share one program between patterns of equally
            many entries, and have the quicker derivative by the block that is multiplied; or, by
            default, "ell" from 16384 entries on and "csr" below (docs/benchmarks.md).
    Raises:
        ValueError: if it is no such matrix, has other than two axes, too many entries, or traced
            indices, or the layout is unknown.
    """
    if isinstance(matrix, jax_sparse.BCSR):
        matrix = matrix.to_bcoo()
    if isinstance(matrix, jax_sparse.BCOO):
        if matrix.n_batch or matrix.n_dense or matrix.ndim != 2:
            raise ValueError(
                f"a BCOO of shape {matrix.shape} with {matrix.n_batch} batch and "
                f"{matrix.n_dense} dense axes: expected two sparse axes"
            )
        rows_E, columns_E = _known("indices", matrix.indices).T
        inside_E = (rows_E < matrix.shape[0]) & (columns_E < matrix.shape[1])  # others are padding
        values_E = jnp.where(inside_E, matrix.data, 0)
        rows_E, columns_E = np.where(inside_E, rows_E, 0), np.where(inside_E, columns_E, 0)
        return sparse_from_entries(rows_E, columns_E, values_E, matrix.shape, dtype, layout=layout)
    if not hasattr(matrix, "tocoo"):
        raise ValueError(
            f"expected a scipy sparse matrix, a BCOO or a BCSR, not {type(matrix).__name__}; "
            "`dense` is for arrays and `from_matmat` for functions"
        )
    if len(matrix.shape) != 2:
        raise ValueError(f"a sparse array of shape {matrix.shape}: expected two axes")
    csr = matrix.tocsr(copy=True)
    csr.sum_duplicates()
    _check_size(csr.nnz)
    adjoint = csr.conj().T.tocsr()  # no sort: scipy counts
    dtype = _entry_dtype(csr.dtype, dtype)
    sides = [(jnp.asarray(a.data, dtype), a.indices, a.indptr) for a in (csr, adjoint)]
    return _operator(sides, csr.shape, layout)


def sparse_from_entries(
    rows_E: Any,
    columns_E: Any,
    values_E: Any,
    shape: tuple[int, int],
    dtype: Any = None,
    *,
    layout: Literal["auto", "ell", "csr"] = "auto",
) -> LinearOperator:
    """The operator of the entries A[rows[e], columns[e]] += values[e].

    `values_E` may be traced: gradients reach it through products, and through `svd`. `layout` is
    that of `sparse`.

    Raises:
        ValueError: if the lengths differ, an index lies outside the shape or is traced, or the
            layout is unknown.
    """
    shape = checked_shape(shape)
    rows_E, columns_E = _known("rows_E", rows_E), _known("columns_E", columns_E)
    values_E = jnp.asarray(values_E)
    if not rows_E.shape == columns_E.shape == values_E.shape or rows_E.ndim != 1:
        raise ValueError(
            f"rows_E has shape {rows_E.shape}, columns_E {columns_E.shape} and values_E "
            f"{values_E.shape}, expected one axis of one length"
        )
    _check_size(rows_E.size)
    for name, index_E, size in (("rows_E", rows_E, shape[0]), ("columns_E", columns_E, shape[1])):
        if not np.issubdtype(index_E.dtype, np.integer) and index_E.size:
            raise ValueError(f"{name} has dtype {index_E.dtype}, expected integers")
        outside_E = (index_E < 0) | (index_E >= size)
        if outside_E.any():
            entry = int(np.argmax(outside_E))
            raise ValueError(
                f"{name} has {index_E[entry]} at entry {entry}, expected 0 to {size - 1} in a "
                f"matrix of shape {shape}"
            )
    values_E = values_E.astype(_entry_dtype(values_E.dtype, dtype))
    sides = []
    for outer_E, inner_E, size, values in (
        (rows_E, columns_E, shape[0], values_E),
        (columns_E, rows_E, shape[1], values_E.conj()),
    ):
        order_E = np.lexsort((inner_E, outer_E))
        start = np.concatenate(
            [[0], np.cumsum(np.bincount(outer_E.astype(np.int64), minlength=size))]
        )
        sides.append((values[order_E], inner_E[order_E], start))
    return _operator(sides, shape, layout)


def _operator(sides: list, shape: tuple[int, int], layout: str) -> LinearOperator:
    if layout not in ("auto", "ell", "csr"):
        raise ValueError(f"layout={layout!r} is not one of 'auto', 'ell', 'csr'")
    num_entries = sides[0][0].size
    if layout == "auto":
        layout = "ell" if num_entries >= _MANY_ENTRIES else "csr"
    if layout == "ell" and num_entries:
        products = [ell.product(*side) for side in sides]
    else:
        products = [
            Partial(
                _compressed_rows, values, *(jnp.asarray(i, jnp.int32) for i in index), Static(size)
            )
            for (values, *index), size in zip(sides, reversed(shape), strict=True)
        ]
    return LinearOperator(*products, tuple(map(int, shape)), sides[0][0].dtype)


def _compressed_rows(
    values_E: jax.Array, columns_E: jax.Array, start: jax.Array, size: Static, x_NC: jax.Array
) -> jax.Array:
    dtype = jnp.result_type(values_E, x_NC)
    values_E, x_NC = values_E.astype(dtype), x_NC.astype(dtype)
    if not values_E.size:
        return jnp.zeros_like(x_NC, shape=(start.shape[0] - 1, x_NC.shape[1]))
    matrix = jax_sparse.BCSR(
        (values_E, columns_E, start), shape=(start.shape[0] - 1, size.value), indices_sorted=True
    )
    missing = _LEAST_COLUMNS - x_NC.shape[1]
    if missing <= 0:
        return matrix @ x_NC
    return jax.lax.platform_dependent(
        x_NC,
        cpu=lambda x_NC: (matrix @ jnp.pad(x_NC, ((0, 0), (0, missing))))[:, :-missing],
        default=lambda x_NC: matrix @ x_NC,
    )


def _known(name: str, index: Any) -> np.ndarray:
    if isinstance(index, jax.core.Tracer):
        raise ValueError(
            f"{name}: traced, expected known integers: make the operator outside of jit and pass "
            "it in, or close over the pattern; values alone may be traced"
        )
    return np.asarray(index)


def _check_size(num_entries: int) -> None:
    if num_entries >= 2**31:
        raise ValueError(f"{num_entries} entries, expected fewer than 2**31: add several operators")


def _entry_dtype(given: np.dtype, wanted: Any) -> np.dtype:
    if wanted is not None:
        return dtype_of(wanted)
    return jax.dtypes.canonicalize_dtype(given if jnp.issubdtype(given, jnp.inexact) else "float32")

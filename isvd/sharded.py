"""Matrices whose rows are spread over devices.

Device d holds rows d R, ..., (d + 1) R - 1. A product A x needs no communication and leaves its
rows where they are, if the devices divide M: if not, XLA knows no such layout of M rows and gathers
them on every device. A product A^H y needs one all-reduce of an (N, C) block.

Axes: M rows, N columns, D devices, R rows of a device, E entries of a device, C columns of a block.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from isvd.arguments import check_not_sparse
from isvd.axes import explicit_mesh
from isvd.closures import Product, Static, compiled
from isvd.operators import LinearOperator, _dense, _dense_adjoint
from isvd.spmm import _compressed_rows, _entry_dtype


def row_sharded(matrix: Any, mesh: Mesh, axis: str, dtype: Any = None) -> LinearOperator:
    """The operator of a matrix with its rows spread along one axis of a mesh.

    Use it under jit like any other, `svd` included; inside `shard_map` it does not work, as it has
    one of its own. Left vectors are then spread too, if the devices divide M and the axes of the
    context are automatic; right ones are on every device.

    Args:
        matrix: a scipy sparse matrix or an array, on the host. If the number of devices does not
            divide M, the last ones get rows of zeros, and each product A x is gathered on every
            device; rows of zeros in the matrix itself, up to a multiple, avoid that.
        mesh, axis: the axis that rows are spread along. Axes are used as automatic ones, which
            `jax.make_mesh` makes explicit unless told otherwise.
    Raises:
        ValueError: if the mesh has no such axis, or the matrix is JAX's own sparse one or has
            other than two axes.
    """
    if axis not in mesh.shape:
        raise ValueError(f"axis={axis!r}, expected one of the mesh's, {', '.join(mesh.shape)}")
    if not scipy.sparse.issparse(matrix):
        check_not_sparse("matrix", matrix, "a scipy sparse matrix or an array")
        matrix = np.asarray(matrix)
    if matrix.ndim != 2:
        raise ValueError(f"matrix has shape {matrix.shape}, expected two axes")
    num_rows, num_columns = map(int, matrix.shape)
    devices = mesh.shape[axis]
    rows = -(-num_rows // devices)
    dtype = _entry_dtype(matrix.dtype, dtype)
    if scipy.sparse.issparse(matrix):
        forward, backward = _sparse_parts(matrix, devices, rows, dtype)
        products = [
            Partial(_sparse_part, Static(num_columns)),
            Partial(_sparse_part, Static(rows)),
        ]
    else:
        a_DRN = np.zeros((devices * rows, num_columns), dtype)
        a_DRN[:num_rows] = matrix
        forward = backward = (a_DRN.reshape(devices, rows, num_columns),)
        products = [Partial(_dense_part), Partial(_dense_adjoint_part)]
    automatic = (AxisType.Auto,) * len(mesh.axis_names)
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=automatic)
    place = Static((mesh, axis, num_rows, devices * rows))
    spread = NamedSharding(mesh, PartitionSpec(axis))
    forward, backward = jax.device_put((forward, backward), spread)
    return LinearOperator(
        compiled(_matmat, place, products[0], forward),
        compiled(_rmatmat, place, products[1], backward),
        (num_rows, num_columns),
        dtype,
    )


def _matmat(place: Static, product: Product, parts: tuple, x_NC: jax.Array) -> jax.Array:
    mesh, axis, num_rows, padded = place.value
    spread, everywhere = PartitionSpec(axis), PartitionSpec()

    def rows_that_are_there(parts: tuple, x_NC: jax.Array) -> jax.Array:
        y_MC = jax.shard_map(
            product, mesh=mesh, in_specs=(spread, everywhere), out_specs=spread, check_vma=False
        )(parts, x_NC)
        return y_MC[:num_rows]

    result = spread if num_rows == padded else everywhere
    return _automatic(rows_that_are_there, result)(parts, x_NC)


def _rmatmat(place: Static, product: Product, parts: tuple, y_MC: jax.Array) -> jax.Array:
    mesh, axis, num_rows, padded = place.value
    spread, everywhere = PartitionSpec(axis), PartitionSpec()

    def total(parts: tuple, y_RC: jax.Array) -> jax.Array:
        return jax.lax.psum(product(parts, y_RC), axis)

    def of_all_rows(parts: tuple, y_MC: jax.Array) -> jax.Array:
        y_MC = jnp.pad(y_MC, ((0, padded - num_rows), (0, 0)))
        return jax.shard_map(
            total, mesh=mesh, in_specs=(spread, spread), out_specs=everywhere, check_vma=False
        )(parts, y_MC)

    return _automatic(of_all_rows, everywhere)(parts, y_MC)


def _automatic(fn: Callable, result: PartitionSpec) -> Callable:
    """fn, also where axes of the context are explicit: those of the operator are automatic."""
    return jax.sharding.auto_axes(fn, out_sharding=result) if explicit_mesh() else fn


def _dense_part(parts: tuple[jax.Array], x_NC: jax.Array) -> jax.Array:
    return _dense(parts[0][0], x_NC)


def _dense_adjoint_part(parts: tuple[jax.Array], y_RC: jax.Array) -> jax.Array:
    return _dense_adjoint(parts[0][0], y_RC)


def _sparse_part(columns: Static, parts: tuple[jax.Array, ...], x: jax.Array) -> jax.Array:
    values_E, index_E, start = (part[0] for part in parts)
    return _compressed_rows(values_E, index_E, start, columns, x)


def _sparse_parts(
    matrix: Any, devices: int, rows: int, dtype: np.dtype
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Each device's rows, and their adjoint, as compressed rows with as many entries everywhere."""
    csr = scipy.sparse.csr_array(matrix, copy=True)
    csr.sum_duplicates()
    parts = [csr[d * rows : (d + 1) * rows] for d in range(devices)]
    most = max(max(part.nnz for part in parts), 1)

    def stacked(kept: list, num_outer: int) -> tuple[np.ndarray, ...]:
        values_DE, index_DE = np.zeros((devices, most), dtype), np.zeros((devices, most), np.int32)
        start = np.zeros((devices, num_outer + 1), np.int32)
        for d, part in enumerate(kept):
            values_DE[d, : part.nnz], index_DE[d, : part.nnz] = part.data, part.indices
            start[d, : len(part.indptr)] = part.indptr
            start[d, len(part.indptr) :] = part.nnz  # rows that are not there are empty
        return values_DE, index_DE, start

    return stacked(parts, rows), stacked([p.conj().T.tocsr() for p in parts], csr.shape[1])

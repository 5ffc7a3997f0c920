"""Calls where axes of a mesh are explicit, as those of `jax.make_mesh` are by default.

There the types of arrays say how they are spread, and JAX asks each contraction over a spread axis
how its result shall be. A factorisation has hundreds; XLA chooses for them as well.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

F = TypeVar("F", bound=Callable)


def on_automatic_axes(fn: F) -> F:
    """fn, run on automatic axes where those of its arrays or of `jax.set_mesh` are explicit.

    Its results are then on every device; a caller who wants them elsewhere says so by an
    `auto_axes` of his own.
    """

    @functools.wraps(fn)
    def wrapped(*args: Any, **options: Any) -> Any:
        leaves, structure = jax.tree.flatten((args, options))
        arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array)}
        mesh = explicit_mesh(*arrays.values())
        if mesh is None:
            return fn(*args, **options)

        def run(arrays: dict[int, jax.Array]) -> Any:
            given = [arrays.get(i, x) for i, x in enumerate(leaves)]
            args, options = jax.tree.unflatten(structure, given)
            return fn(*args, **options)

        with jax.sharding.use_abstract_mesh(mesh):
            return jax.sharding.auto_axes(run, out_sharding=PartitionSpec())(arrays)

    return wrapped


def explicit_mesh(*arrays: jax.Array) -> AbstractMesh | None:
    """The mesh of the context, or of the first array, that has explicit axes."""
    meshes = [jax.sharding.get_abstract_mesh(), *map(_mesh, arrays)]
    explicit = (mesh for mesh in meshes if mesh and AxisType.Explicit in mesh.axis_types)
    return next(explicit, None)


def _mesh(x: jax.Array) -> AbstractMesh | None:
    if isinstance(x, jax.core.Tracer):
        return jax.typeof(x).sharding.mesh
    # Of arrays with values their type is slow to make, and of keys the sharding too.
    spread = isinstance(x.dtype, np.dtype) and isinstance(x.sharding, NamedSharding)
    return x.sharding.mesh.abstract_mesh if spread else None

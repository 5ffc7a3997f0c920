"""Closures on blocks of columns, as operators hold them: `Partial`s whose arrays are arguments."""

import dataclasses
from collections.abc import Callable
from types import FunctionType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

Product = Callable[[jax.Array], jax.Array]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Static:
    """A value in a Partial that decides the program."""

    value: Any


def compiled(fn: Callable, *given: Any) -> Partial:
    """`Partial(fn, *given)`, for a function of this package that makes functions, as loops do.

    Outside of jit those would be compiled again at each call: here one program serves all calls.
    Not where a user's function is in it that holds something, which may be traced and must not be
    kept with a program, or a leaf that is no array, such as text.
    """
    leaves_are_arrays = all(isinstance(x, jax.Array | np.ndarray) for x in jax.tree.leaves(given))
    if not leaves_are_arrays or holds_something(given):
        return Partial(fn, *given)
    # The jitted function is not the Partial's own, which `svd` takes for one that holds something.
    return Partial(_run, Static(fn), *given)


def _run(fn: Static, *given: Any) -> Any:
    return _run_compiled(fn, *given)


@jax.jit
def _run_compiled(fn: Static, *given: Any) -> Any:
    return fn.value(*given)


def holds_something(product: Any) -> bool:
    """Whether a function in it has more than its arguments: a closure, defaults, attributes."""
    if isinstance(product, Partial):
        parts = [product.func, *product.args, *product.keywords.values()]
        return any(map(holds_something, parts))
    if isinstance(product, tuple | list):
        return any(map(holds_something, product))
    if isinstance(product, FunctionType):
        places = (product.__closure__, product.__defaults__, product.__kwdefaults__)
        return any(place is not None for place in places)
    return callable(product)  # a bound method, or another object with arrays of its own


def promoted(x_NC: jax.Array, dtype: np.dtype) -> jax.Array:
    return x_NC.astype(jnp.result_type(dtype, x_NC))


def varying_as(product: Product, given: jax.Array, x: jax.Array) -> jax.Array:
    """x, in the type of product(given), whose shape it has, inside `shard_map`.

    Types there say along which axes of the mesh values differ, and products differ along those of
    the operator as well. Loops ask that what they carry keeps its type.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:  # spare a trace of the product
        return x
    return x + jnp.zeros_like(jax.eval_shape(product, given), dtype=x.dtype)

"""Operators from products that a user wrote.

Axes: M rows, N columns, C columns of a block.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from isvd.arguments import checked_shape
from isvd.closures import Product, Static, promoted, varying_as
from isvd.operators import LinearOperator


def from_matmat(
    matmat: Product,
    shape: tuple[int, int],
    dtype: Any = jnp.float32,
    *,
    rmatmat: Product | None = None,
    block: bool | None = None,
) -> LinearOperator:
    """An operator from a user's product.

    Args:
        matmat: x -> A x, a linear function of one vector (N,) or of a block of columns (N, C);
            a lambda, a `Partial`, a bound method. Arrays in a `Partial` are arguments under jit
            and grad; what a lambda closes over is a constant of the program.
        shape: (M, N).
        dtype: of the entries, and of what the functions give for a vector of this type.
        rmatmat: y -> A^H y, of a vector or a block. By default JAX derives it from `matmat` by
            `jax.linear_transpose`; write it where that is slow. `verify` tells if it is right.
        block: whether the functions take blocks. By default they are called with vectors, and
            mapped over columns, if they take one, and with blocks otherwise. This is the safe
            order: what sorts, shifts or transforms a vector may do another thing to a block.
    Raises:
        ValueError: if neither form gives a result of the right shape, or it is of another dtype.
    """
    rows, columns = shape = checked_shape(shape)
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    forward = _on_blocks("matmat", matmat, columns, rows, dtype, block)
    if rmatmat is None:
        backward = Partial(_derived_adjoint, forward, Static((columns, dtype)))
    else:
        backward = _on_blocks("rmatmat", rmatmat, rows, columns, dtype, block)
    return LinearOperator(forward, backward, shape, dtype)


def _on_blocks(
    name: str, fn: Product, size_in: int, size_out: int, dtype: np.dtype, block: bool | None
) -> Product:
    fn = fn if isinstance(fn, Partial) else Partial(fn)
    forms = {"a vector": Partial(_by_columns, fn), "a block": fn}
    if block is not None:
        forms = {"a block": fn} if block else {"a vector": forms["a vector"]}
    wrong = []
    for form, product in forms.items():
        # Three columns, or four: not the size of a vector, so that no broadcast looks right.
        given = jax.ShapeDtypeStruct((size_in, 3 + (size_in == 3)), dtype)
        try:
            got = jax.eval_shape(product, given)
        except Exception as error:  # whatever a user's function raises at shapes it is not for
            reason = _one_line(error)
            wrong.append(f"with {form} it raises {reason}")
            continue
        if not hasattr(got, "shape"):
            wrong.append(f"with {form} it gives a {type(got).__name__}")
            continue
        if got.shape == (size_out, given.shape[1]):
            if got.dtype != dtype:
                raise ValueError(
                    f"{name} gives {got.dtype} for {form} of dtype {dtype}, expected {dtype} too: "
                    f"pass dtype={str(got.dtype)!r}, or convert what it gives"
                )
            return product
        shape = got.shape[:-1] if form == "a vector" else got.shape
        wrong.append(f"with {form} of {size_in} it gives shape {shape}")
    raise ValueError(
        f"{name}: expected a function from ({size_in},) to ({size_out},), or from "
        f"({size_in}, C) to ({size_out}, C); {'; '.join(wrong)}"
    )


def _by_columns(fn: Product, x_NC: jax.Array) -> jax.Array:
    return jax.vmap(fn, in_axes=1, out_axes=-1)(x_NC)


def _derived_adjoint(matmat: Product, static: Static, y_MC: jax.Array) -> jax.Array:
    columns, dtype = static.value
    y_MC = promoted(y_MC.conj(), dtype)
    # Made from y, so that inside shard_map it varies as y does, and y as A and y do: a block that
    # differs less than its product does would get the sum of adjoints over devices.
    zeros_like_y = functools.partial(jnp.zeros_like, shape=(columns, y_MC.shape[1]))
    y_MC = varying_as(matmat, zeros_like_y(y_MC), y_MC)
    try:
        (x_NC,) = jax.linear_transpose(matmat, jax.typeof(zeros_like_y(y_MC)))(y_MC)
    except jax.errors.JaxRuntimeError:  # of the machine, such as too little memory
        raise
    except (RuntimeError, AssertionError) as error:  # what JAX raises differs between functions
        raise ValueError(
            "rmatmat cannot be derived: matmat is not linear, which `verify` tells, or JAX cannot "
            f"transpose it ({_one_line(error)}); expected a linear function, or rmatmat with it"
        ) from error
    return x_NC.conj()


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

"""Operators made of operators: sums of powers, blocks, selections, centring.

Axes: M rows, N columns, C columns of a block, Q coefficients, I selected.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from isvd.arguments import check_integer, check_square
from isvd.closures import Product, Static, compiled, varying_as
from isvd.operators import LinearOperator, add, compose, diagonal, low_rank


def polynomial(a: LinearOperator, coef_Q: Any) -> LinearOperator:
    """sum_q coef[q] A^q, q = 0, 1, ..., Q - 1, in one pass of Q - 1 products (Horner).

    One block is alive besides the input, whatever the degree, and the loop is compiled once.

    Raises:
        ValueError: if A is not square, or `coef_Q` is not a vector, or empty.
    """
    check_square("polynomial", a)
    coef_Q = jnp.asarray(coef_Q)
    if coef_Q.ndim != 1 or not coef_Q.size:
        raise ValueError(f"coef_Q has shape {coef_Q.shape}, expected one axis, not empty")
    dtype = jnp.result_type(a.dtype, coef_Q)
    return LinearOperator(
        compiled(_horner, coef_Q, Static(dtype), a.matmat),
        compiled(_horner, coef_Q.conj(), Static(dtype), a.rmatmat),
        a.shape,
        dtype,
    )


def _horner(coef_Q: jax.Array, dtype: Static, product: Product, x_NC: jax.Array) -> jax.Array:
    x_NC = x_NC.astype(jnp.result_type(dtype.value, x_NC))
    coef_Q = coef_Q.astype(x_NC.dtype)

    def step(y_NC, coef):
        return product(y_NC) + coef * x_NC, None

    start_NC = varying_as(product, x_NC, coef_Q[-1] * x_NC)
    return jax.lax.scan(step, start_NC, coef_Q[:-1], reverse=True)[0]


def windowed_sum(a: LinearOperator, weight_Q: Any) -> LinearOperator:
    """sum_q weight[q - 1] A^q, q = 1, ..., Q: walks of up to Q steps, in Q products.

    Raises:
        ValueError: if A is not square, or `weight_Q` is not a vector, or empty.
    """
    weight_Q = jnp.asarray(weight_Q)
    if weight_Q.ndim != 1 or not weight_Q.size:
        raise ValueError(f"weight_Q has shape {weight_Q.shape}, expected one axis, not empty")
    # A coefficient of 0 in front costs a sum more than A @ polynomial(A), but compiles A once.
    return polynomial(a, jnp.pad(weight_Q, (1, 0)))


def geometric_sum(a: LinearOperator, ratio: Any, num_terms: int) -> LinearOperator:
    """sum_q ratio^q A^q, q = 0, ..., num_terms - 1.

    Raises:
        ValueError: if A is not square, or `num_terms` is no whole number from 1.
    """
    check_integer("num_terms", num_terms, 1)
    ratio = jnp.asarray(ratio, jnp.result_type(a.dtype, ratio))
    # Whole exponents, for the right slope at ratio 0; strict promotion refuses them beside floats.
    with jax.numpy_dtype_promotion("standard"):
        powers_Q = ratio ** jnp.arange(num_terms, dtype=jnp.int32)
    return polynomial(a, powers_Q)


def hstack(operators: Sequence[LinearOperator]) -> LinearOperator:
    """[A B ...], side by side.

    Raises:
        ValueError: if there are none, they are no operators, or do not have as many rows each.
    """
    operators = _checked_operators("hstack", operators)
    rows = {a.shape[0] for a in operators}
    if len(rows) != 1:
        shapes = ", ".join(str(a.shape) for a in operators)
        raise ValueError(f"hstack: expected operators with as many rows each, got shapes {shapes}")
    stops = tuple(np.cumsum([a.shape[1] for a in operators]).tolist())
    return LinearOperator(
        Partial(_split_sum, Static(stops), tuple(a.matmat for a in operators)),
        Partial(_stacked, tuple(a.rmatmat for a in operators)),
        (rows.pop(), stops[-1]),
        jnp.result_type(*(a.dtype for a in operators)),
    )


def _split_sum(stops: Static, products: tuple[Product, ...], x_NC: jax.Array) -> jax.Array:
    parts = jnp.split(x_NC, stops.value[:-1])
    return sum(product(part) for product, part in zip(products, parts, strict=True))


def _stacked(products: tuple[Product, ...], y_MC: jax.Array) -> jax.Array:
    return jnp.concatenate([product(y_MC) for product in products])


def vstack(operators: Sequence[LinearOperator]) -> LinearOperator:
    """Operators on top of each other.

    Raises:
        ValueError: if there are none, they are no operators, or do not have as many columns each.
    """
    operators = _checked_operators("vstack", operators)
    columns = {a.shape[1] for a in operators}
    if len(columns) != 1:
        shapes = ", ".join(str(a.shape) for a in operators)
        raise ValueError(
            f"vstack: expected operators with as many columns each, got shapes {shapes}"
        )
    return hstack([a.H for a in operators]).H


def _checked_operators(name: str, operators: Sequence[Any]) -> tuple[LinearOperator, ...]:
    operators = tuple(operators)
    for a in operators:
        if not isinstance(a, LinearOperator):
            raise ValueError(
                f"{name}: expected operators, got a {type(a).__name__}; `dense` and `sparse` make "
                "them of matrices"
            )
    return operators


def take_rows(a: LinearOperator, index_I: Any) -> LinearOperator:
    """A[index, :]; rows may be repeated.

    Raises:
        ValueError: if `index_I` is not a list of integers from 0 to M - 1 (where it is traced, its
            values cannot be looked at; those outside then select nothing).
    """
    if not isinstance(index_I, jax.Array):
        index_I = np.asarray(index_I)
    if index_I.ndim != 1 or not jnp.issubdtype(index_I.dtype, jnp.integer) or not index_I.size:
        raise ValueError(
            f"index_I has shape {index_I.shape} and dtype {index_I.dtype}, expected integers on "
            "one axis, not empty (np.flatnonzero turns a mask into them)"
        )
    if not isinstance(index_I, jax.core.Tracer):
        low, high = int(index_I.min()), int(index_I.max())
        if low < 0 or high >= a.shape[0]:
            bad = low if low < 0 else high
            raise ValueError(f"index_I has {bad}, expected 0 to {a.shape[0] - 1}")
    index_I = jnp.asarray(index_I)
    return LinearOperator(
        Partial(_gathered, index_I, a.matmat),
        Partial(_scattered, index_I, Static(a.shape[0]), a.rmatmat),
        (index_I.shape[0], a.shape[1]),
        a.dtype,
    )


def _gathered(index_I: jax.Array, product: Product, x_NC: jax.Array) -> jax.Array:
    return product(x_NC).at[index_I].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def _scattered(index_I: jax.Array, rows: Static, product: Product, y_IC: jax.Array) -> jax.Array:
    y_MC = jnp.zeros_like(y_IC, shape=(rows.value, y_IC.shape[1]))
    return product(y_MC.at[index_I].add(y_IC, mode="drop", wrap_negative_indices=False))


def take_columns(a: LinearOperator, index_I: Any) -> LinearOperator:
    """A[:, index]; columns may be repeated.

    Raises:
        ValueError: if `index_I` is not a list of integers from 0 to N - 1, as of `take_rows`.
    """
    return take_rows(a.H, index_I).H


def centered(
    a: LinearOperator, mean_N: Any | None = None, scale_N: Any | None = None
) -> LinearOperator:
    """(A - 1 mean^T) / scale: columns centred, and scaled where `scale_N` is given.

    What is sparse stays sparse: the mean is subtracted as an operator of rank one.

    Args:
        mean_N: by default the mean of each column, by one product.
        scale_N: divisor of each column, such as its standard deviation. Where it is 0 the column is
            not divided, so that a constant one, centred, is a column of zeros.
    Returns:
        An operator of A's dtype, or of float32 where A has integers or booleans.
    Raises:
        ValueError: if `mean_N` or `scale_N` has another shape than (N,).
    """
    num_rows, num_columns = a.shape
    # Sums of integers may be over what their type holds.
    dtype = a.dtype if jnp.issubdtype(a.dtype, jnp.inexact) else jnp.float32
    one_M1 = jnp.ones((num_rows, 1), dtype)
    if mean_N is None:
        mean_N = a.rmatmat(one_M1)[:, 0].conj() / num_rows
    for name, given in (("mean_N", mean_N), ("scale_N", scale_N)):
        if given is not None and np.shape(given) != (num_columns,):
            raise ValueError(f"{name} has shape {np.shape(given)}, expected ({num_columns},)")
    mean_N = jnp.asarray(mean_N)
    result = add(a, -low_rank(one_M1, mean_N[:, None].conj()))
    if scale_N is None:
        return result
    scale_N = jnp.asarray(scale_N)
    return compose(result, diagonal(1 / jnp.where(scale_N == 0, 1, scale_N)))

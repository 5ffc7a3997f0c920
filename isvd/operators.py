"""Linear operators: matrices that are known by their products and never formed.

An operator is a pytree of two closures on blocks of columns,

    matmat   x_NC -> A x   (M, C)            rmatmat   y_MC -> A^H y   (N, C),

with a static shape and dtype. Closures made here are `jax.tree_util.Partial`s over functions of
this package: the arrays in them are arguments under jit, grad, vmap and shard_map, and operators of
one kind and size share one compiled program.

`functions.from_matmat` takes any function of a user; `dense`, `diagonal`, `low_rank`, `ones`,
`identity` are leaves; `+ - * / @ **`, `.T` and `.H` combine operators, and `isvd.algebra` has the
other ways.

Axes: M rows, N columns, C columns of a block, K rank.
"""

import dataclasses
import functools
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from isvd.arguments import check_integer, check_not_sparse, check_square, checked_shape
from isvd.closures import Product, Static, compiled, promoted, varying_as

Scalar = complex | float | int | np.generic | jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["matmat", "rmatmat"],
    meta_fields=["shape", "dtype"],
)
@dataclasses.dataclass(frozen=True, repr=False)
class LinearOperator:
    """A matrix A of shape (M, N), by its products.

    What is learned are the arrays from which an operator is made, inside of the loss. Its own
    leaves are no parameters: both closures hold the same arrays, so that a step of descent on
    leaves makes two matrices of one, and none of them can be donated.

    Attributes:
        matmat: x_NC -> A x.   rmatmat: y_MC -> A^H y. Both take blocks and check nothing;
            `A @ x` takes a vector or a block and checks its shape.
        shape: (M, N).
        dtype: type of the entries. Products promote it with the type of the block.
    """

    matmat: Product
    rmatmat: Product
    shape: tuple[int, int]
    dtype: np.dtype

    __array_ufunc__ = None  # so that numpy leaves `array @ A` and `scalar * A` to us

    def __repr__(self) -> str:
        return f"LinearOperator(shape={self.shape}, dtype={self.dtype})"

    @property
    def H(self) -> "LinearOperator":
        """The adjoint, conjugated and transposed."""
        return LinearOperator(self.rmatmat, self.matmat, self.shape[::-1], self.dtype)

    @property
    def T(self) -> "LinearOperator":
        """The transpose, without conjugation."""
        return self.H if self.dtype.kind != "c" else conjugate(self.H)

    def __matmul__(self, x: Any) -> Any:
        if isinstance(x, LinearOperator):
            return compose(self, x)
        check_not_sparse("A @ x: x", x)
        x = jnp.asarray(x)
        if x.ndim not in (1, 2) or x.shape[0] != self.shape[1]:
            hint = "; did you mean A.T @ x?" if x.shape[:1] == self.shape[:1] else ""
            raise ValueError(
                f"A @ x: A has shape {self.shape} and x {x.shape}, expected "
                f"({self.shape[1]},) or ({self.shape[1]}, columns){hint}"
            )
        return self.matmat(x) if x.ndim == 2 else self.matmat(x[:, None])[:, 0]

    def __rmatmul__(self, x: Any) -> jax.Array:
        check_not_sparse("x @ A: x", x)
        x = jnp.asarray(x)
        if x.ndim not in (1, 2) or x.shape[-1] != self.shape[0]:
            raise ValueError(
                f"x @ A: A has shape {self.shape} and x {x.shape}, expected "
                f"({self.shape[0]},) or (rows, {self.shape[0]})"
            )
        return (self.T @ x.T).T

    def __add__(self, other: "LinearOperator") -> "LinearOperator":
        return add(self, _checked_term(other))

    def __radd__(self, other: Any) -> "LinearOperator":
        starts_a_sum = isinstance(other, int) and other == 0  # `sum` of operators
        return self if starts_a_sum else add(_checked_term(other), self)

    def __sub__(self, other: "LinearOperator") -> "LinearOperator":
        return add(self, -_checked_term(other))

    def __rsub__(self, other: Any) -> "LinearOperator":
        return add(_checked_term(other), -self)

    def __neg__(self) -> "LinearOperator":
        return scale(-1, self)

    def __mul__(self, factor: Scalar) -> "LinearOperator":
        return NotImplemented if isinstance(factor, LinearOperator) else scale(factor, self)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Scalar) -> "LinearOperator":
        return NotImplemented if isinstance(divisor, LinearOperator) else scale(1 / divisor, self)

    def __pow__(self, exponent: int) -> "LinearOperator":
        return power(self, exponent)

    def to_dense(self) -> jax.Array:
        """The matrix a_MN, from min(M, N) columns of products: for tests and small cases."""
        rows, columns = self.shape
        if rows < columns:
            return self.H.to_dense().conj().T
        return self.matmat(jnp.eye(columns, dtype=self.dtype))


def _checked_term(other: Any) -> LinearOperator:
    if not isinstance(other, LinearOperator):
        raise TypeError(
            f"A + B: B is a {type(other).__name__}, expected an operator; `dense` and `sparse` "
            "make one of a matrix, and c * ones(M, N) is a constant one"
        )
    return other


# Leaves ------------------------------------------------------------------------------------------


def dense(a_MN: Any) -> LinearOperator:
    """The operator of a matrix in memory. Products are in full precision on every device.

    Raises:
        ValueError: if it is sparse, or has other than two axes.
    """
    check_not_sparse("a_MN", a_MN)
    a_MN = jnp.asarray(a_MN)
    if a_MN.ndim != 2:
        raise ValueError(f"a_MN has shape {a_MN.shape}, expected two axes")
    return LinearOperator(
        Partial(_dense, a_MN), Partial(_dense_adjoint, a_MN), a_MN.shape, a_MN.dtype
    )


def _dense(a_MN: jax.Array, x_NC: jax.Array) -> jax.Array:
    return jnp.matmul(a_MN, x_NC, precision="highest")


def _dense_adjoint(a_MN: jax.Array, y_MC: jax.Array) -> jax.Array:
    return jnp.matmul(a_MN.conj().T, y_MC, precision="highest")


def diagonal(d_N: Any) -> LinearOperator:
    """diag(d).

    Raises:
        ValueError: if d has other than one axis.
    """
    d_N = jnp.asarray(d_N)
    if d_N.ndim != 1:
        raise ValueError(f"d_N has shape {d_N.shape}, expected one axis")
    return LinearOperator(
        Partial(_diagonal, d_N), Partial(_diagonal, d_N.conj()), d_N.shape * 2, d_N.dtype
    )


def _diagonal(d_N: jax.Array, x_NC: jax.Array) -> jax.Array:
    return d_N[:, None] * x_NC


def low_rank(u_MK: Any, v_NK: Any) -> LinearOperator:
    """u v^H, by 2 K multiply-adds for each row and column.

    Raises:
        ValueError: if the shapes are not (M, K) and (N, K).
    """
    u_MK, v_NK = jnp.asarray(u_MK), jnp.asarray(v_NK)
    if u_MK.ndim != 2 or v_NK.ndim != 2 or u_MK.shape[1] != v_NK.shape[1]:
        raise ValueError(
            f"u_MK has shape {u_MK.shape} and v_NK {v_NK.shape}, expected (M, K) and (N, K)"
        )
    return compose(dense(u_MK), dense(v_NK).H)


def ones(num_rows: int, num_columns: int, dtype: Any = jnp.float32) -> LinearOperator:
    """The matrix of ones, 1 1^T; `c * ones(M, N)` is any other constant.

    Raises:
        ValueError: if a size is no whole number from 1.
    """
    shape = checked_shape((num_rows, num_columns))
    dtype = dtype_of(dtype)
    forward, backward = (Partial(_ones, Static((size, dtype))) for size in shape)
    return LinearOperator(forward, backward, shape, dtype)


def _ones(static: Static, x_NC: jax.Array) -> jax.Array:
    rows, dtype = static.value
    return jnp.broadcast_to(promoted(x_NC, dtype).sum(0), (rows, x_NC.shape[1]))


def identity(size: int, dtype: Any = jnp.float32) -> LinearOperator:
    """The identity.

    Raises:
        ValueError: if the size is no whole number from 1.
    """
    dtype = dtype_of(dtype)
    same = Partial(_same, Static(dtype))
    return LinearOperator(same, same, checked_shape((size, size)), dtype)


def _same(dtype: Static, x_NC: jax.Array) -> jax.Array:
    return promoted(x_NC, dtype.value)


def dtype_of(dtype: Any) -> np.dtype:
    """The dtype that JAX gives to `dtype`: float32 for float64 unless x64 is on."""
    return jnp.zeros((), dtype).dtype


# What the signs of LinearOperator mean -----------------------------------------------------------


def compose(*operators: LinearOperator) -> LinearOperator:
    """A B ..., applied from the right.

    Raises:
        ValueError: if the columns of one are not as many as the rows of the next.
    """
    for a, b in pairwise(operators):
        if a.shape[1] != b.shape[0]:
            fits = a.shape[1] == b.shape[1]
            hint = "; did you mean A @ B.T?" if fits else ""
            raise ValueError(f"A @ B: shapes {a.shape} and {b.shape} have other inner sizes{hint}")
    return LinearOperator(
        Partial(_chain, tuple(a.matmat for a in reversed(operators))),
        Partial(_chain, tuple(a.rmatmat for a in operators)),
        (operators[0].shape[0], operators[-1].shape[1]),
        jnp.result_type(*(a.dtype for a in operators)),
    )


def _chain(products: tuple[Product, ...], x: jax.Array) -> jax.Array:
    for product in products:
        x = product(x)
    return x


def add(*operators: LinearOperator) -> LinearOperator:
    """A + B + ..., of one shape.

    Raises:
        ValueError: if shapes differ.
    """
    for other in operators[1:]:
        if other.shape != operators[0].shape:
            fits = other.shape == operators[0].shape[::-1]
            hint = "; did you mean B.T?" if fits else ""
            raise ValueError(f"A + B: shapes {operators[0].shape} and {other.shape} differ{hint}")
    return LinearOperator(
        Partial(_total, tuple(a.matmat for a in operators)),
        Partial(_total, tuple(a.rmatmat for a in operators)),
        operators[0].shape,
        jnp.result_type(*(a.dtype for a in operators)),
    )


def _total(products: tuple[Product, ...], x_NC: jax.Array) -> jax.Array:
    return functools.reduce(jnp.add, (product(x_NC) for product in products))


def scale(factor: Scalar, a: LinearOperator) -> LinearOperator:
    """c A, for a number or an array without axes (which may be traced, and differentiated).

    Raises:
        ValueError: if c has axes.
    """
    if np.ndim(factor):
        raise ValueError(
            f"c * A: c has shape {np.shape(factor)}, expected a number; for one factor a row or "
            "column there is diagonal(d) @ A and A @ diagonal(d)"
        )
    dtype = jnp.result_type(a.dtype, factor)
    factor = jnp.asarray(factor, dtype)
    return LinearOperator(
        Partial(_scaled, factor, a.matmat),
        Partial(_scaled, factor.conj(), a.rmatmat),
        a.shape,
        dtype,
    )


def _scaled(factor: jax.Array, product: Product, x: jax.Array) -> jax.Array:
    return factor * product(x)


def conjugate(a: LinearOperator) -> LinearOperator:
    """The complex conjugate of every entry."""
    return LinearOperator(
        Partial(_conjugated, a.matmat), Partial(_conjugated, a.rmatmat), a.shape, a.dtype
    )


def _conjugated(product: Product, x: jax.Array) -> jax.Array:
    return product(x.conj()).conj()


def power(a: LinearOperator, exponent: int) -> LinearOperator:
    """A^n for a square A and n >= 0: n products in a loop, of which one is compiled.

    Raises:
        ValueError: if A is not square, or n is no whole number from 0.
    """
    check_square("A ** n", a)
    check_integer("A ** n: n", exponent, 0)
    n = Static((int(exponent), a.dtype))
    forward, backward = (compiled(_repeated, n, product) for product in (a.matmat, a.rmatmat))
    return LinearOperator(forward, backward, a.shape, a.dtype)


def _repeated(n: Static, product: Product, x: jax.Array) -> jax.Array:
    count, dtype = n.value
    x = promoted(x, dtype)
    x = varying_as(product, x, x)
    return jax.lax.fori_loop(0, count, lambda _, x: product(x), x)

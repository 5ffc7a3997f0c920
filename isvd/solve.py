"""What a truncated SVD is good for: low-rank products, least squares, eigenvalues, norms, traces.

`low_rank_product` and `pinv_solve` do not depend on which basis of a singular subspace the SVD
chose. Their own rules for gradients hold where values inside the rank are equal, and the vectors
alone have none (section "Gradients" of docs/isvd.md).

Axes: M rows, N columns, K rank, C columns of a block, S samples.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from isvd.arguments import check_dtype, check_integer, check_square
from isvd.axes import on_automatic_axes
from isvd.derivative import inverse_of, outside_span, pull_back
from isvd.factorize import SVD, hoisted, svd
from isvd.operators import LinearOperator, low_rank
from isvd.orthonormal import orthonormalize
from isvd.triplets import matmul, over, positive, power_of_two


def approximation(factors: SVD) -> LinearOperator:
    """u diag(s) v^H as an operator: the best of its rank, if the triplets have converged."""
    return low_rank(factors.u_MK * factors.s_K, factors.v_NK)


@on_automatic_axes
def low_rank_product(op: LinearOperator, factors: SVD, x_NC: jax.Array) -> jax.Array:
    """u diag(s) v^H x, where `factors` is `svd(op, ...)`, with gradients to `op` and x.

    The gradient is that of the best approximation of rank K: defined where s[K - 1] > s[K],
    whatever is equal above (second derivatives only where nothing is). `factors` counts as a
    function of `op`, not as an input.

    Raises:
        ValueError: if the sizes differ.
    """
    _check_factors(op, factors)
    x_NC = _checked_block("x_NC", x_NC, op.shape[1], op.dtype)
    if x_NC.ndim == 1:
        return low_rank_product(op, factors, x_NC[:, None])[:, 0]
    return _low_rank_product(hoisted(op), factors, x_NC)


def _check_factors(op: LinearOperator, factors: SVD) -> None:
    shape = (factors.u_MK.shape[0], factors.v_NK.shape[0])
    if op.shape != shape:
        raise ValueError(f"op has shape {op.shape}, and factors are of a matrix {shape}")


def _checked_block(name: str, x_NC: jax.Array, size: int, dtype: np.dtype) -> jax.Array:
    x_NC = jnp.asarray(x_NC)
    if x_NC.ndim not in (1, 2) or x_NC.shape[0] != size:
        raise ValueError(f"{name} has shape {x_NC.shape}, expected ({size},) or ({size}, columns)")
    # Whole numbers have no cotangent that a rule could give back.
    return x_NC if jnp.issubdtype(x_NC.dtype, jnp.inexact) else x_NC.astype(dtype)


@jax.custom_vjp
def _low_rank_product(op: LinearOperator, factors: SVD, x_NC: jax.Array) -> jax.Array:
    return approximation(factors).matmat(x_NC)


def _product_forward(op, factors, x_NC):
    return _low_rank_product(op, factors, x_NC), (op, factors, x_NC)


@jax.jit  # its solver would compile at every call
def _product_backward(saved, cotangent_MC):
    op, factors, x_NC = saved
    u_MK, s_K, v_NK = factors[:3]
    eps = float(jnp.finfo(op.dtype).eps)

    def tangent(dav_MK: jax.Array, dahu_NK: jax.Array) -> jax.Array:
        out_MK, out_NK = outside_span(op, factors, eps, dav_MK, dahu_NK)
        vx_KC = matmul(v_NK.conj().T, x_NC)
        left_MK = matmul(u_MK, matmul(u_MK.conj().T, dav_MK)) + out_MK * s_K
        return matmul(left_MK, vx_KC) + matmul(u_MK * s_K, matmul(out_NK.conj().T, x_NC))

    (x_bar_NC,) = jax.linear_transpose(approximation(factors).matmat, x_NC)(cotangent_MC)
    return pull_back(op, factors, tangent, cotangent_MC), None, x_bar_NC


_low_rank_product.defvjp(_product_forward, _product_backward)


@on_automatic_axes
def pinv_solve(
    factors: SVD,
    y_MC: jax.Array,
    *,
    rcond: float | None = None,
    ridge: float | jax.Array = 0.0,
    op: LinearOperator | None = None,
) -> jax.Array:
    """The least-squares solution in the span of the triplets, v diag(s / (s^2 + ridge)) u^H y.

    With ridge = 0 it is A_K^+ y: of all w that make |A_K w - y| least the shortest (section 3.1
    of the iSVD paper's method). With ridge > 0 it minimises |A_K w - y|^2 + ridge |w|^2.

    Args:
        factors: an SVD of the operator.
        y_MC: right sides, (M,) or (M, C).
        rcond: triplets with s <= rcond * s[0] are left out; by default eps * max(M, N).
        op: the operator of `factors`. If it is given, gradients reach it by a rule that holds for
            equal values too (not for second derivatives); without it they pass through `factors`.
    Returns:
        w_NC, or (N,).
    Raises:
        ValueError: if the sizes differ, or `ridge` is not one number of at least 0 (where it is
            traced, its value cannot be looked at).
    """
    num_rows, num_columns = factors.u_MK.shape[0], factors.v_NK.shape[0]
    y_MC = _checked_block("y_MC", y_MC, num_rows, factors.u_MK.dtype)
    if op is not None:
        _check_factors(op, factors)
    if np.ndim(ridge):
        raise ValueError(f"ridge has shape {np.shape(ridge)}, expected one number")
    if not isinstance(ridge, jax.core.Tracer) and not ridge >= 0:  # NaN neither
        raise ValueError(f"ridge={ridge}, expected at least 0")
    if y_MC.ndim == 1:
        return pinv_solve(factors, y_MC[:, None], rcond=rcond, ridge=ridge, op=op)[:, 0]
    if rcond is None:
        rcond = float(jnp.finfo(factors.s_K.dtype).eps) * max(num_rows, num_columns)
    used_K = factors.s_K > rcond * factors.s_K[0]
    # Zeros for all of a triplet, so that the rule counts it as outside the span.
    u_MK, s_K, v_NK = (jnp.where(used_K, part, 0) for part in factors[:3])
    factors = factors._replace(u_MK=u_MK, s_K=s_K, v_NK=v_NK)
    ridge = jnp.asarray(ridge, s_K.dtype)
    if op is None:
        return _solve(factors, y_MC, ridge)
    return _pinv_solve(hoisted(op), factors, y_MC, ridge)


def _solve(factors: SVD, y_MC: jax.Array, ridge: jax.Array) -> jax.Array:
    weight_K = _filter(factors.s_K, ridge)
    return matmul(factors.v_NK, weight_K[:, None] * matmul(factors.u_MK.conj().T, y_MC))


def _filter(s_K: jax.Array, ridge: jax.Array) -> jax.Array:
    """s / (s^2 + ridge), 0 for s = 0; by two divisions, so that s^2 need not be a number."""
    inverse_K = inverse_of(s_K)
    return inverse_K / (1 + ridge * inverse_K * inverse_K)


@jax.custom_vjp
def _pinv_solve(op: LinearOperator, factors: SVD, y_MC: jax.Array, ridge: jax.Array) -> jax.Array:
    return _solve(factors, y_MC, ridge)


def _pinv_forward(op, factors, y_MC, ridge):
    return _pinv_solve(op, factors, y_MC, ridge), (op, factors, y_MC, ridge)


@jax.jit
def _pinv_backward(saved, cotangent_NC):
    op, factors, y_MC, ridge = saved
    u_MK, s_K, v_NK = factors[:3]
    eps = float(jnp.finfo(op.dtype).eps)
    g_K, inverse_K = _filter(s_K, ridge), inverse_of(s_K)
    # A number even where ridge is so far above s^2 that g is 0.
    largest = float(jnp.finfo(s_K.dtype).max)
    share_KK = jnp.minimum(ridge * inverse_K[:, None] * inverse_K, largest)

    def tangent(dav_MK: jax.Array, dahu_NK: jax.Array) -> jax.Array:
        out_MK, out_NK = outside_span(op, factors, eps, dav_MK, dahu_NK)
        p_KK = matmul(u_MK.conj().T, dav_MK)
        # What u, s and v change together, their common denominators s_i^2 - s_j^2 cancelled.
        first_KK = g_K[:, None] * share_KK * p_KK.conj().T * g_K
        inside_KK = first_KK - g_K[:, None] * p_KK * g_K
        uy_KC = matmul(u_MK.conj().T, y_MC)
        left_NK = matmul(v_NK, inside_KK) + out_NK * g_K
        return matmul(left_NK, uy_KC) + matmul(v_NK * g_K, matmul(out_MK.conj().T, y_MC))

    _, pull = jax.vjp(lambda y_MC, ridge: _solve(factors, y_MC, ridge), y_MC, ridge)
    return pull_back(op, factors, tangent, cotangent_NC), None, *pull(cotangent_NC)


_pinv_solve.defvjp(_pinv_forward, _pinv_backward)


# Symmetric operators, norms, traces --------------------------------------------------------------


class Eigen(NamedTuple):
    """A x ~= x diag(values), for a symmetric or Hermitian A; largest modulus first.

    Attributes:
        values_K: real.   vectors_NK: orthonormal.
        residual_K: |A x - value x|.
        products: columns that were multiplied.   converged: whether residuals reached `tol`.
    """

    values_K: jax.Array
    vectors_NK: jax.Array
    residual_K: jax.Array
    products: jax.Array
    converged: jax.Array


@on_automatic_axes
def eigh(op: LinearOperator, key: jax.Array, *, rank: int, **options: object) -> Eigen:
    """The eigenpairs of largest modulus of a symmetric (Hermitian) operator.

    The SVD does not tell a value from its negative. Its right and left vectors together span a
    space that A maps to itself, on which A is diagonalised.

    The gradient is that of Hermitian changes, defined for pairs whose value occurs once (its
    negative may be there), and for symmetric functions of equal values that are all in the result.

    Args:
        options: as of `svd`.
    Returns:
        Eigen; `converged` is False too where A is not Hermitian.
    Raises:
        ValueError: if A is not square, `rank` is not from 1 to N, or as of `svd`.
    """
    check_square("eigh", op)
    size = op.shape[0]
    op = hoisted(op)
    check_integer("rank", rank, 1, size, f"for an operator of shape {op.shape}")
    fixed = jax.lax.stop_gradient(op)
    factors = svd(fixed, key, rank=min(rank + 1, size), **options)
    both_NX = jnp.hstack([factors.v_NK, factors.u_MK])
    if both_NX.shape[1] > size:
        both_NX = jnp.eye(size, dtype=op.dtype)
    q_NX, _ = orthonormalize(both_NX)
    # So that squares neither overflow nor underflow, and values that are equal stay equal: the rule
    # for gradients takes them for one, and XLA may fuse an inexact product with its differences.
    scale = power_of_two(positive(factors.s_K[0]))
    aq_NX = over(fixed, scale).matmat(q_NX)
    small_XX = matmul(q_NX.conj().T, aq_NX)
    values_X, turn_XX = jnp.linalg.eigh((small_XX + small_XX.conj().T) / 2)
    x_NX, ax_NX = matmul(q_NX, turn_XX), matmul(aq_NX, turn_XX)
    residual_X = jnp.linalg.norm(ax_NX - x_NX * values_X, axis=0)
    # A span can hold little of a vector, and its residual is then large. Of values that are equal
    # to rounding (more than were asked for), take others.
    eps = float(jnp.finfo(op.dtype).eps)
    tol = options.get("tol")
    tol = eps ** (2 / 3) if tol is None else tol
    size_X = jnp.abs(values_X)
    largest = size_X.max()
    size_X -= jnp.where(residual_X <= tol * largest, 0, 100 * eps * largest)
    order_K = jnp.argsort(-size_X)[:rank]
    residual_K = residual_X[order_K]
    products = factors.products + q_NX.shape[1]
    values_K, x_NK = _eigenpairs(op, values_X[order_K] * scale, x_NX[:, order_K])
    return Eigen(values_K, x_NK, residual_K * scale, products, (residual_K <= tol * largest).all())


@jax.custom_vjp
def _eigenpairs(
    op: LinearOperator, values_K: jax.Array, x_NK: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return values_K, x_NK


def _eigenpairs_forward(op, values_K, x_NK):
    pairs = _eigenpairs(op, values_K, x_NK)
    return pairs, (op, *pairs)


@jax.jit
def _eigenpairs_backward(saved, cotangent):
    op, values_K, x_NK = saved
    size = positive(jnp.abs(values_K[0]))
    gap_KK = (values_K - values_K[:, None]) / size
    inverse_KK = jnp.where(gap_KK != 0, 1 / jnp.where(gap_KK != 0, gap_KK, 1), 0) / size
    inverse_K = jnp.where(values_K != 0, 1 / jnp.where(values_K != 0, values_K, 1), 0)

    def system(y_NK: jax.Array) -> jax.Array:
        """(value - A') y over value, A' = A - x diag(values) x^H: eigenvalues from 0 to 2."""
        rest_NK = op.matmat(y_NK) - matmul(x_NK * values_K, matmul(x_NK.conj().T, y_NK))
        return y_NK - rest_NK * inverse_K

    def tangent(dax_NK: jax.Array, _: jax.Array) -> tuple[jax.Array, jax.Array]:
        p_KK = matmul(x_NK.conj().T, dax_NK)
        given_NK = (dax_NK - matmul(x_NK, p_KK)) * inverse_K
        eps = float(jnp.finfo(op.dtype).eps)
        out_NK, _ = jax.scipy.sparse.linalg.cg(system, given_NK, tol=eps, maxiter=1000)
        return jnp.diagonal(p_KK).real, matmul(x_NK, inverse_KK * p_KK) + out_NK

    # Of `factors` only the blocks of vectors are read.
    factors = SVD(x_NK, values_K, x_NK, values_K, None, None)
    return pull_back(op, factors, tangent, cotangent), None, None


_eigenpairs.defvjp(_eigenpairs_forward, _eigenpairs_backward)


def spectral_norm(op: LinearOperator, key: jax.Array, **options: object) -> jax.Array:
    """|A|_2, the largest singular value. It can be differentiated where it is a single one.

    Args:
        options: as of `svd`, but for `rank`.
    Raises:
        ValueError: as of `svd`.
    """
    return svd(op, key, rank=1, **options).s_K[0]


@on_automatic_axes
@functools.partial(jax.jit, static_argnames="samples")
def frobenius_norm(
    op: LinearOperator, key: jax.Array, *, samples: int = 32
) -> tuple[jax.Array, jax.Array]:
    """An estimate of |A|_F^2 from `samples` products, without bias, and its standard error.

    Raises:
        ValueError: if A is not of a floating type that LAPACK factors, or `samples` is no whole
            number from 2.
    """
    check_dtype(op)
    check_integer("samples", samples, 2)
    x_MS = op.matmat(_signs(key, op, samples))
    scale = positive(jax.lax.stop_gradient(jnp.abs(x_MS).max()))  # so that no square is lost
    square_S = jnp.square(jnp.abs(x_MS / scale)).sum(0)
    error = square_S.std(ddof=1) / samples**0.5
    return square_S.mean() * scale * scale, error * scale * scale


@on_automatic_axes
@functools.partial(jax.jit, static_argnames="samples")
def trace(op: LinearOperator, key: jax.Array, *, samples: int = 48) -> tuple[jax.Array, jax.Array]:
    """An estimate of tr(A) from `samples` products, and its standard error.

    Hutch++ (Meyer, Musco, Musco and Woodruff, SOSA 2021): exact on the range of a third of them,
    random signs on what is left. Exact for matrices of rank up to samples / 3.

    Its gradient is without bias, but not exact for these matrices.

    Raises:
        ValueError: if A is not square or not of a floating type that LAPACK factors, or `samples`
            is no whole number from 6.
    """
    check_square("trace", op)
    check_dtype(op)
    check_integer("samples", samples, 6)
    third = min(samples // 3, op.shape[0])
    sketch_key, sign_key = jax.random.split(key)
    q_NS, _ = orthonormalize(op.matmat(_signs(sketch_key, op, third)))
    # The estimate is without bias for any q. Columns beyond the rank of A have no derivative.
    q_NS = jax.lax.stop_gradient(q_NS)
    known = jnp.vdot(q_NS, op.matmat(q_NS))
    signs_NS = _signs(sign_key, op, samples - 2 * third)
    rest_NS = signs_NS - matmul(q_NS, matmul(q_NS.conj().T, signs_NS))
    each_S = (rest_NS.conj() * op.matmat(rest_NS)).sum(0)
    return known + each_S.mean(), each_S.std(ddof=1) / each_S.shape[0] ** 0.5


def _signs(key: jax.Array, op: LinearOperator, samples: int) -> jax.Array:
    return jax.random.rademacher(key, (op.shape[1], samples), op.dtype)

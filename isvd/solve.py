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

from isvd.derivative import inverse_of, outside_span, pull_back
from isvd.factorize import SVD, svd
from isvd.operators import LinearOperator, check_square, low_rank
from isvd.orthonormal import orthonormalize
from isvd.triplets import matmul


def approximation(factors: SVD) -> LinearOperator:
    """u diag(s) v^H as an operator: the best of its rank, if the triplets have converged."""
    return low_rank(factors.u_MK * factors.s_K, factors.v_NK)


def low_rank_product(op: LinearOperator, factors: SVD, x_NC: jax.Array) -> jax.Array:
    """u diag(s) v^H x, where `factors` is `svd(op, ...)`, with gradients to `op` and x.

    The gradient is that of the best approximation of rank K: defined where s[K - 1] > s[K],
    whatever is equal above. `factors` counts as a function of `op`, not as an input.
    """
    return _low_rank_product(op, jax.lax.stop_gradient(factors), x_NC)


@jax.custom_vjp
def _low_rank_product(op: LinearOperator, factors: SVD, x_NC: jax.Array) -> jax.Array:
    return approximation(factors).matmat(x_NC)


def _product_forward(op, factors, x_NC):
    return _low_rank_product(op, factors, x_NC), (op, factors, x_NC)


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
            equal values too; without it they pass through `factors`.
    Returns:
        w_NC, or (N,).
    Raises:
        ValueError: if the sizes differ.
    """
    num_rows, num_columns = factors.u_MK.shape[0], factors.v_NK.shape[0]
    y_MC = jnp.asarray(y_MC)
    if y_MC.ndim not in (1, 2) or y_MC.shape[0] != num_rows:
        raise ValueError(
            f"y_MC has shape {y_MC.shape}, expected ({num_rows},) or ({num_rows}, columns)"
        )
    if y_MC.ndim == 1:
        return pinv_solve(factors, y_MC[:, None], rcond=rcond, ridge=ridge, op=op)[:, 0]
    if rcond is None:
        rcond = float(jnp.finfo(factors.s_K.dtype).eps) * max(num_rows, num_columns)
    used_K = factors.s_K > rcond * factors.s_K[0]
    s_K = jnp.where(used_K, factors.s_K, 0)
    ridge = jnp.asarray(ridge, s_K.dtype)
    if op is None:
        return _solve(factors._replace(s_K=s_K), y_MC, ridge)
    if op.shape != (num_rows, num_columns):
        raise ValueError(
            f"op has shape {op.shape}, and factors are of a matrix ({num_rows}, {num_columns})"
        )
    factors = jax.lax.stop_gradient(factors._replace(s_K=s_K))
    return _pinv_solve(op, factors, y_MC, ridge)


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
    return _solve(factors, y_MC, ridge), (op, factors, y_MC, ridge)


def _pinv_backward(saved, cotangent_NC):
    op, factors, y_MC, ridge = saved
    u_MK, s_K, v_NK = factors[:3]
    eps = float(jnp.finfo(op.dtype).eps)
    g_K = _filter(s_K, ridge)  # s / (s^2 + ridge)
    h_K = g_K * inverse_of(s_K)  # 1 / (s^2 + ridge)

    def tangent(dav_MK: jax.Array, dahu_NK: jax.Array) -> jax.Array:
        out_MK, out_NK = outside_span(op, factors, eps, dav_MK, dahu_NK)
        p_KK = matmul(u_MK.conj().T, dav_MK)
        # What u, s and v change together, their common denominators s_i^2 - s_j^2 cancelled.
        inside_KK = ridge * h_K[:, None] * p_KK.conj().T * h_K - g_K[:, None] * p_KK * g_K
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


def eigh(op: LinearOperator, key: jax.Array, *, rank: int, **options: object) -> Eigen:
    """The eigenpairs of largest modulus of a symmetric (Hermitian) operator.

    The SVD does not tell a value from its negative, so the small matrix v^H A v of one triplet
    more than asked for is diagonalised.

    Args:
        options: as of `svd`.
    """
    check_square("eigh", op)
    size = op.shape[0]
    factors = svd(op, key, rank=min(rank + 1, size) if rank <= size else rank, **options)
    v_NK, _ = orthonormalize(factors.v_NK)
    av_NK = op.matmat(v_NK)
    small_KK = matmul(v_NK.conj().T, av_NK)
    values_K, turn_KK = jnp.linalg.eigh((small_KK + small_KK.conj().T) / 2)
    order_K = jnp.argsort(-jnp.abs(values_K))[:rank]
    values_K, turn_KK = values_K[order_K], turn_KK[:, order_K]
    x_NK, ax_NK = matmul(v_NK, turn_KK), matmul(av_NK, turn_KK)
    residual_K = jnp.linalg.norm(ax_NK - x_NK * values_K, axis=0)
    products = factors.products + v_NK.shape[1]
    return Eigen(values_K, x_NK, residual_K, products, factors.converged)


def spectral_norm(op: LinearOperator, key: jax.Array, **options: object) -> jax.Array:
    """|A|_2, the largest singular value. It can be differentiated where it is a single one."""
    return svd(op, key, rank=1, **options).s_K[0]


@functools.partial(jax.jit, static_argnames="samples")
def frobenius_norm(
    op: LinearOperator, key: jax.Array, *, samples: int = 32
) -> tuple[jax.Array, jax.Array]:
    """An estimate of |A|_F^2 from `samples` products, without bias, and its standard error."""
    signs_NS = _signs(key, op, samples)
    square_S = jnp.square(jnp.abs(op.matmat(signs_NS))).sum(0)
    return square_S.mean(), square_S.std(ddof=1) / samples**0.5


@functools.partial(jax.jit, static_argnames="samples")
def trace(op: LinearOperator, key: jax.Array, *, samples: int = 48) -> tuple[jax.Array, jax.Array]:
    """An estimate of tr(A) from `samples` products, and its standard error.

    Hutch++ (Meyer, Musco, Musco and Woodruff, SOSA 2021): exact on the range of a third of them,
    random signs on what is left. Exact for matrices of rank up to samples / 3.

    Raises:
        ValueError: if A is not square or `samples` is less than 6.
    """
    check_square("trace", op)
    if samples < 6:
        raise ValueError(f"samples={samples} must be at least 6")
    third = min(samples // 3, op.shape[0])
    sketch_key, sign_key = jax.random.split(key)
    q_NS, _ = orthonormalize(op.matmat(_signs(sketch_key, op, third)))
    known = jnp.vdot(q_NS, op.matmat(q_NS))
    signs_NS = _signs(sign_key, op, samples - 2 * third)
    rest_NS = signs_NS - matmul(q_NS, matmul(q_NS.conj().T, signs_NS))
    each_S = (rest_NS.conj() * op.matmat(rest_NS)).sum(0)
    return known + each_S.mean(), each_S.std(ddof=1) / each_S.shape[0] ** 0.5


def _signs(key: jax.Array, op: LinearOperator, samples: int) -> jax.Array:
    return jax.random.rademacher(key, (op.shape[1], samples), op.dtype)

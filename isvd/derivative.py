"""The derivative of a truncated SVD, by products with the operator.

Axes: M rows, N columns, K rank, X columns that are pulled back.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from isvd.operators import LinearOperator
from isvd.triplets import SVD, matmul, positive


def pull_back(
    op: LinearOperator, factors: SVD, tangent: Callable[..., Any], cotangent: Any
) -> LinearOperator:
    """The cotangent of an operator from that of something made of its SVD.

    Args:
        tangent: (dA v, dA^H u) -> the change of that something: all that a change of A can do to
            a truncated SVD goes through these two blocks. Its transpose says how a loss depends
            on them, and they are products with the operator.
    """
    u_MK, v_NK = factors.u_MK, factors.v_NK
    dav_MK, dahu_NK = jax.vjp(tangent, jnp.zeros_like(u_MK), jnp.zeros_like(v_NK))[1](cotangent)

    # <w, A^H u> = <A w, u>: both blocks by products with A, so that arrays of A^H take no part.
    columns_NX = jnp.hstack([v_NK, dahu_NK.conj()])
    leaves, structure = jax.tree.flatten(op)
    learned = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

    def product(arrays: list[jax.Array]) -> jax.Array:
        given = iter(arrays)
        filled = [next(given) if ok else leaf for ok, leaf in zip(learned, leaves, strict=True)]
        return jax.tree.unflatten(structure, filled).matmat(columns_NX)

    arrays = [leaf for ok, leaf in zip(learned, leaves, strict=True) if ok]
    (slopes,) = jax.vjp(product, arrays)[1](jnp.hstack([dav_MK, u_MK.conj()]))
    slopes = iter(slopes)
    back = [
        next(slopes) if ok else np.zeros(np.shape(leaf), jax.dtypes.float0)
        for ok, leaf in zip(learned, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, back)


def svd_tangent(
    op: LinearOperator, factors: SVD, tol: float, dav_MK: jax.Array, dahu_NK: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The change of (u, s, v). Complex pairs turn so that both phases stay put."""
    u_MK, s_K, v_NK = factors[:3]
    p_KK = matmul(u_MK.conj().T, dav_MK)
    size = positive(s_K[0])
    t_K, q_KK = s_K / size, p_KK / size  # so that squares neither overflow nor underflow
    gap_KK = (t_K - t_K[:, None]) * (t_K + t_K[:, None])  # s_j^2 - s_i^2, over size^2
    f_KK = jnp.where(gap_KK != 0, 1 / jnp.where(gap_KK != 0, gap_KK, 1), 0)
    inside_u = f_KK * (q_KK * t_K + t_K[:, None] * q_KK.conj().T)
    inside_v = f_KK * (t_K[:, None] * q_KK + q_KK.conj().T * t_K)
    if jnp.iscomplexobj(p_KK):
        turn_KK = jnp.diag(0.5j * jnp.diagonal(p_KK).imag * inverse_of(s_K))
        inside_u, inside_v = inside_u + turn_KK, inside_v - turn_KK
    x_MK, y_NK = outside_span(op, factors, tol, dav_MK, dahu_NK)
    ds_K = jnp.diagonal(p_KK).real
    return matmul(u_MK, inside_u) + x_MK, ds_K, matmul(v_NK, inside_v) + y_NK


def outside_span(
    op: LinearOperator, factors: SVD, tol: float, dav_MK: jax.Array, dahu_NK: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What u and v gain outside their span: x (M, K) and y (N, K) with

        s x - A' y = (I - u u^H) dA v,    s y - A'^H x = (I - v v^H) dA^H u,    A' = A - u s v^H.

    Positive definite for s > s[K], the first value left out, so conjugate gradients solve it, with
    K columns of A and A^H each step. To drop A' would be the rule of a matrix of rank K.
    """
    u_MK, s_K, v_NK = factors[:3]
    inverse_K = inverse_of(s_K)

    def system(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Both equations over s: the eigenvalues are 1 +- s[i] / s, i from K on."""
        x_MK, y_NK = pair
        ay_MK = op.matmat(y_NK) - matmul(u_MK * s_K, matmul(v_NK.conj().T, y_NK))
        ahx_NK = op.rmatmat(x_MK) - matmul(v_NK * s_K, matmul(u_MK.conj().T, x_MK))
        return x_MK - ay_MK * inverse_K, y_NK - ahx_NK * inverse_K

    given = (
        (dav_MK - matmul(u_MK, matmul(u_MK.conj().T, dav_MK))) * inverse_K,
        (dahu_NK - matmul(v_NK, matmul(v_NK.conj().T, dahu_NK))) * inverse_K,
    )
    return jax.scipy.sparse.linalg.cg(system, given, tol=tol, maxiter=1000)[0]


def inverse_of(s_K: jax.Array) -> jax.Array:
    """1 / s, and 0 for s = 0, where u and v have no derivative."""
    return jnp.where(s_K > 0, 1 / jnp.where(s_K > 0, s_K, 1), 0)

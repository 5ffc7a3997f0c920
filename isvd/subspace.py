"""Randomised subspace iteration, the algorithm of the iSVD paper.

Sources: Halko, Martinsson and Tropp, SIAM Review 53 (2011); Abu-El-Haija et al. (2021).

Axes: M rows, N columns, K rank, B = K + oversampling.
"""

import jax
import jax.numpy as jnp

from isvd.operators import LinearOperator
from isvd.orthonormal import orthonormalize
from isvd.triplets import (
    SVD,
    Plan,
    matmul,
    mixed_start,
    over,
    positive,
    report_pass,
    signed,
    thin_svd,
)


def subspace_svd(plan: Plan, op: LinearOperator, key: jax.Array, warm_NB: jax.Array | None) -> SVD:
    """The iSVD paper's algorithm: 2 (n + 1) products of K + oversample columns for n iterations.

    Orthonormalised before every product, which changes nothing but rounding. K more products give
    the residuals.
    """
    wide = op.shape[0] < op.shape[1]
    a = op.H if wide else op  # the small matrix is on the short side
    rows = a.shape[1] if warm_NB is None else op.shape[1]
    start_NB = jax.random.normal(key, (rows, plan.block), op.dtype)
    begun = 0  # columns multiplied for the start
    if warm_NB is not None:
        start_NB = mixed_start(plan, start_NB, warm_NB)
        if wide:  # the start is on the short side, that of left vectors
            start_NB = op.matmat(start_NB)
            begun = plan.block

    def unfinished(state: tuple) -> jax.Array:
        _, _, residual_K, s_K, _, products = state
        more = products + 2 * plan.block <= plan.max_products
        done = (residual_K <= plan.tol * s_K[0]).all() | ~jnp.isfinite(s_K[0])
        return more & ~done

    def iteration(state: tuple) -> tuple:
        start_NB, _, _, _, scale, products = state
        v_NB, _ = orthonormalize(start_NB)
        left_MB = over(a, positive(scale)).matmat(v_NB)
        # By what the first product shows, so that squares neither overflow nor underflow.
        first = jnp.where(scale > 0, 1, positive(jnp.abs(left_MB).max()))
        scale = positive(scale) * first
        u_MB, r_BB = orthonormalize(left_MB / first)
        right_NB = over(a, scale).rmatmat(u_MB)
        # A (v y) = (u x) s to rounding, so the other side says how far the pairs are from singular.
        x_BB, s_B, yh_BB = thin_svd(r_BB)
        miss_NB = matmul(right_NB, x_BB) - matmul(v_NB, yh_BB.conj().T) * s_B
        k = plan.rank
        residual_K = jnp.linalg.norm(miss_NB[:, :k], axis=0)
        products += 2 * plan.block
        report_pass(plan, products, residual_K, s_B)
        return right_NB, u_MB, residual_K, s_B[:k], scale, products

    k = plan.rank
    real = jnp.finfo(op.dtype).dtype
    state = (
        start_NB,
        jnp.zeros((a.shape[0], plan.block), op.dtype),
        jnp.full(k, jnp.inf, real),
        jnp.zeros(k, real),
        jnp.zeros((), real),
        jnp.int32(0),
    )
    state = iteration(state)  # so that there is a result whatever max_products is
    right_NB, u_MB, _, _, scale, products = jax.lax.while_loop(unfinished, iteration, state)

    v_NB, r_BB = orthonormalize(right_NB)  # A^H u = v r
    x_BB, s_B, yh_BB = thin_svd(r_BB.conj().T)
    u_MK, v_NK = matmul(u_MB, x_BB[:, :k]), matmul(v_NB, yh_BB[:k].conj().T)
    residual_K = jnp.linalg.norm(over(a, scale).matmat(v_NK) - u_MK * s_B[:k], axis=0)
    u_MK, v_NK = signed(v_NK, u_MK) if wide else signed(u_MK, v_NK)
    return SVD(
        u_MK,
        s_B[:k] * scale,
        v_NK,
        residual_K * scale,
        products + k + begun,
        (residual_K <= (plan.tol or jnp.finfo(op.dtype).eps ** (2 / 3)) * s_B[0]).all(),
    )

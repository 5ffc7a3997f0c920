"""The leading singular triplets of an operator, by its products with blocks of columns.

`svd` is block Golub-Kahan bidiagonalisation with reorthogonalisation and thick restarts
(Golub and Kahan 1965; Baglama and Reichel, SISC 27, 2005), or the randomised subspace iteration of
Halko, Martinsson and Tropp (SIAM Review 53, 2011) as the iSVD paper uses it. Both say how good each
triplet is, and both can be differentiated.

Axes: M rows, N columns, K rank, B block.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from isvd.arguments import check_dtype, check_integer, checked_number
from isvd.axes import on_automatic_axes
from isvd.closures import Static, holds_something
from isvd.derivative import pull_back, svd_tangent
from isvd.krylov import PATIENCE, krylov_svd
from isvd.operators import LinearOperator
from isvd.orthonormal import orthonormalize
from isvd.subspace import subspace_svd
from isvd.triplets import SVD, Plan, matmul, signed, thin_svd

_MOST_PRODUCTS = 2**31 - 1  # they are counted in int32
BLOCK = 8  # columns: a cache line of float64, and where the sparse product starts to pay


@on_automatic_axes
def svd(
    op: LinearOperator,
    key: jax.Array,
    *,
    rank: int,
    method: str = "krylov",
    tol: float | None = None,
    max_products: int | None = None,
    block: int | None = None,
    width: int | None = None,
    oversample: int | None = None,
    warm_start: SVD | jax.Array | None = None,
    report: Callable[[Any, Any], None] | None = None,
) -> SVD:
    """The `rank` leading singular triplets of an operator.

    A compiled program serves all operators of one structure, shape and type: call it as it is, or
    inside your own jit, vmap and grad. The gradient reaches the arrays in `op.matmat`; see
    `docs/isvd.md` for the rule and for where it is undefined (equal or zero singular values, a
    cluster cut at `rank`).

    Args:
        rank: K, from 1 to min(M, N).
        method: "krylov", or "subspace" for the iSVD paper's algorithm.
        tol: residual to reach, relative to s[0]; by default eps ** (2 / 3) of the type. Values are
            far more accurate than that. Subspace iteration with tol=None makes its ten
            iterations whatever they give.
        max_products: columns multiplied at most (a started cycle is finished, so somewhat more),
            from 1 to 2**31 - 1. After more than 20 for each triplet, one product more settles the
            values.
        block: columns of one product, 8 by default; more suits accelerators. It is the
            multiplicity that one pass can see: clusters that are larger are searched for.
        width: columns of the Krylov basis, which bound memory: (M + N) * width numbers. More of
            them need fewer products. If it reaches min(M, N) the matrix is formed and factored.
            The default for rank 32: 104 columns for the first 1040 products, 168 after them.
        oversample: subspace iteration's p, by default min(rank, 30).
        warm_start: an SVD of a similar operator, or its right vectors (N, any): the first block,
            with noise of about 10 tol in it by which a triplet that they miss is found.
        report: called on the host, also from inside jit, after each pass over the basis or each
            subspace iteration, with the columns multiplied so far and the largest residual
            relative to s[0]. Another function is another program.
    Raises:
        ValueError: for a rank beyond min(M, N) and other values outside their range.
    """
    plan = _checked_plan(op, rank, method, tol, max_products, block, width, oversample, warm_start)
    plan = dataclasses.replace(plan, report=report)
    warm_NB = warm_start.v_NK if isinstance(warm_start, SVD) else warm_start
    return _svd(plan, hoisted(op), key, warm_NB)


def hoisted(op: LinearOperator) -> LinearOperator:
    """The operator with traced arrays that a user's function holds as arguments.

    Rules for gradients see arguments only.

    Raises:
        ValueError: if it is no operator.
    """
    _check_operator(op)
    products = []
    for product, size in ((op.matmat, op.shape[1]), (op.rmatmat, op.shape[0])):
        if not holds_something(product):
            products.append(product)
            continue
        leaves, structure = jax.tree.flatten(product)

        # On one column: what is traced is fixed to the shape of its example.
        def apply(x_N: jax.Array, *leaves: Any, structure: Any = structure) -> jax.Array:
            return jax.tree.unflatten(structure, leaves)(x_N[:, None])[:, 0]

        converted, constants = _closure_converted(apply, jnp.zeros(size, op.dtype), *leaves)
        applied = Partial(_applied, Static(converted), leaves, constants)
        products.append(applied if constants else product)
    return dataclasses.replace(op, matmat=products[0], rmatmat=products[1])


def _closure_converted(fn: Callable, *example: Any) -> tuple[Callable, list[jax.Array]]:
    """`jax.closure_convert` for all that is traced: JAX's leaves integers where they are."""
    closed = jax.make_jaxpr(fn)(*example)
    traced = [x for x in closed.consts if isinstance(x, jax.core.Tracer)]
    fixed = [None if isinstance(x, jax.core.Tracer) else x for x in closed.consts]
    count, jaxpr = len(example), closed.jaxpr
    # `converted` outlives this trace, and so may hold nothing traced: from jax 0.12 a jaxpr would.
    if hasattr(jaxpr, "with_consts"):
        jaxpr = jaxpr.with_consts(fixed)

    def converted(*given: Any) -> jax.Array:
        own, traced = given[:count], iter(given[count:])
        constants = [next(traced) if x is None else x for x in fixed]
        return jax.core.eval_jaxpr(jaxpr, constants, *own)[0]

    return converted, traced


def _applied(fn: Static, leaves: list, constants: list, x_NC: jax.Array) -> jax.Array:
    return jax.vmap(lambda x_N: fn.value(x_N, *leaves, *constants), 1, 1)(x_NC)


def _check_operator(op: Any) -> None:
    if not isinstance(op, LinearOperator):
        raise ValueError(
            f"op has type {type(op).__name__}, expected LinearOperator: isvd.dense and isvd.sparse "
            "make one of a matrix"
        )


def _checked_plan(
    op: LinearOperator,
    rank: int,
    method: str,
    tol: float | None,
    max_products: int | None,
    block: int | None,
    width: int | None,
    oversample: int | None,
    warm_start: Any,
) -> Plan:
    _check_operator(op)
    limit = min(op.shape)
    check_integer("rank", rank, 1, limit, f"min(M, N) of an operator of shape {op.shape}")
    check_dtype(op)
    if method not in ("krylov", "subspace"):
        raise ValueError(f"method={method!r}, expected krylov or subspace")
    if tol is not None:
        tol = checked_number("tol", tol)
        if not 0 <= tol < 1:
            raise ValueError(f"tol={tol}, expected None, or from 0 to less than 1")
    if max_products is not None:
        check_integer("max_products", max_products, 1, _MOST_PRODUCTS)
    warm = 0 if warm_start is None else _warm_columns(op, warm_start)
    if method == "subspace":
        if block is not None or width is not None:
            raise ValueError("block and width are of method='krylov'; subspace has oversample")
        return _subspace_plan(op, rank, tol, max_products, oversample, warm)
    if oversample is not None:
        raise ValueError("oversample is of method='subspace'; krylov has block and width")
    return _krylov_plan(op, rank, tol, max_products, block, width, warm)


def _warm_columns(op: LinearOperator, warm_start: Any) -> int:
    shape = np.shape(warm_start.v_NK if isinstance(warm_start, SVD) else warm_start)
    if len(shape) != 2 or shape[0] != op.shape[1]:
        raise ValueError(
            f"warm_start has shape {shape}, expected right vectors ({op.shape[1]}, any)"
        )
    return shape[1]


def _subspace_plan(
    op: LinearOperator,
    rank: int,
    tol: float | None,
    max_products: int | None,
    oversample: int | None,
    warm: int,
) -> Plan:
    if oversample is not None:
        check_integer("oversample", oversample, 0)
    extra = min(rank, 30) if oversample is None else oversample
    block = min(max(rank, warm) + extra, *op.shape)
    iterations = 10 if tol is None else 10_000
    return Plan(
        method="subspace",
        rank=rank,
        block=block,
        kept=rank,
        narrow=block,
        width=block,
        tol=tol or 0.0,
        max_products=max_products or 2 * (iterations + 1) * block,
    )


def _krylov_plan(
    op: LinearOperator,
    rank: int,
    tol: float | None,
    max_products: int | None,
    block: int | None,
    width: int | None,
    warm: int,
) -> Plan:
    limit = min(op.shape)
    if block is None:
        block = min(max(warm, BLOCK), limit)
    check_integer("block", block, 1, limit, f"min(M, N) of an operator of shape {op.shape}")
    kept = -(-(rank + block // 2) // block) * block
    least = kept + 2 * block
    narrow = kept + max(-(-max(8 * BLOCK, kept) // block), 2) * block
    if width is not None:
        check_integer("width", width, least, why=f"rank={rank} and block={block}")
        narrow = width = -(-width // block) * block
    elif max_products is not None and max_products <= PATIENCE * narrow:
        width = narrow
    else:
        # Fewer than the whole space has: only where `narrow` reaches it is the matrix formed.
        width = max(narrow, min(2 * narrow - kept, (limit - 1) // block * block))
    return Plan(
        method="dense" if width >= limit else "krylov",
        rank=rank,
        block=block,
        kept=kept,
        narrow=narrow,
        width=width,
        tol=float(jnp.finfo(op.dtype).eps) ** (2 / 3) if tol is None else tol,
        max_products=max_products or 100 * width,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(
    plan: Plan, op: LinearOperator, key: jax.Array, warm_NB: jax.Array | None
) -> SVD:
    methods = {"dense": _dense, "krylov": krylov_svd, "subspace": subspace_svd}
    return methods[plan.method](plan, op, key, warm_NB)


# Outermost, so that a second call is answered without Python: the rule's own takes 3 ms.
_svd = jax.jit(_differentiable, static_argnums=0)


def _svd_forward(
    plan: Plan, op: LinearOperator, key: jax.Array, warm_NB: jax.Array | None
) -> tuple[SVD, tuple[LinearOperator, SVD]]:
    factors = _svd(plan, op, key, warm_NB)
    return factors, (op, factors)


@functools.partial(jax.jit, static_argnums=0)
def _svd_backward(
    plan: Plan, saved: tuple[LinearOperator, SVD], cotangent: SVD
) -> tuple[LinearOperator, None, None]:
    op, factors = saved
    tangent = functools.partial(svd_tangent, op, factors, plan.tol)
    given = (cotangent.u_MK, cotangent.s_K, cotangent.v_NK)
    return pull_back(op, factors, tangent, given), None, None


_differentiable.defvjp(_svd_forward, _svd_backward)


def _dense(plan: Plan, op: LinearOperator, key: jax.Array, warm_NB: jax.Array | None) -> SVD:
    """min(M, N) products give the whole matrix, which a library factors."""
    del key, warm_NB
    k = plan.rank
    u_MK, s_K, v_NK = _leading(op.to_dense(), k)
    u_MK, v_NK = signed(u_MK, v_NK)
    residual_K = jnp.zeros_like(s_K[:k])
    finite = jnp.isfinite(s_K).all()
    return SVD(u_MK, s_K[:k], v_NK, residual_K, jnp.int32(min(op.shape)), finite)


def _leading(x_MN: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """u_MK, v_NK of the `rank` leading triplets, and all values."""
    num_rows, num_columns = x_MN.shape
    if num_rows < num_columns:
        v_NK, s_K, u_MK = _leading(x_MN.conj().T, rank)
        return u_MK, s_K, v_NK
    if num_rows < 2 * num_columns:
        u_MK, s_K, vh_KN = thin_svd(x_MN)
        return u_MK[:, :rank], s_K, vh_KN[:rank].conj().T
    # Of a long matrix by its triangle, and only as many long vectors as are wanted: 280 x 18048
    # takes LAPACK's own SVD, which does so as well, two and a half times as long.
    q_MN, r_NN = orthonormalize(x_MN)
    x_NN, s_K, vh_KN = thin_svd(r_NN)
    return matmul(q_MN, x_NN[:, :rank]), s_K, vh_KN[:rank].conj().T

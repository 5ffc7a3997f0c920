"""The leading singular triplets of an operator, by its products with blocks of columns.

`svd` is block Golub-Kahan bidiagonalisation with full reorthogonalisation and thick restarts
(Golub and Kahan 1965; Baglama and Reichel, SISC 27, 2005), or the randomised subspace iteration of
Halko, Martinsson and Tropp (SIAM Review 53, 2011) as the iSVD paper uses it. Both say how good each
triplet is, and both can be differentiated.

Axes: M rows, N columns, K rank, B block, W width of the Krylov basis.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from isvd.operators import LinearOperator, _Static
from isvd.orthonormal import orthonormalize

BLOCK = 8  # columns: a cache line of float64, and where the sparse product starts to pay


class SVD(NamedTuple):
    """A ~= u diag(s) v^H.

    Attributes:
        u_MK, s_K, v_NK: singular vectors and values, largest first. The entry of largest modulus
            of each left vector is positive, so that runs can be compared.
        residual_K: |A^H u - s v| of each triplet (|A v - s u| is at rounding): some singular value
            lies within it of s, the error of s is about its square over the gap to the others,
            and the angle of u and v to the exact ones is about it over the gap. Subspace iteration
            gives |A v - s u|. Below rounding, eps * s[0], it means nothing.
        products: columns that were multiplied, by A or by A^H.
        converged: whether every residual is below tol * s[0].
    """

    u_MK: jax.Array
    s_K: jax.Array
    v_NK: jax.Array
    residual_K: jax.Array
    products: jax.Array
    converged: jax.Array


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is decided before anything is traced."""

    method: str
    rank: int
    block: int  # columns of a product
    kept: int  # triplets that a restart keeps
    width: int  # columns of the Krylov basis
    tol: float
    max_products: int
    report: Callable[[Any, Any], None] | None = None

    @property
    def locked(self) -> int:
        """Triplets that are kept when the basis is searched for further copies."""
        return -(-self.rank // self.block) * self.block


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
        max_products: columns multiplied at most (a started cycle is finished, so somewhat more).
        block: columns of one product, 8 by default; more suits accelerators. It is the
            multiplicity that one pass can see: clusters that are larger are searched for.
        width: columns of the Krylov basis, which bound memory: (M + N) * width numbers. More of
            them need fewer products. If it reaches min(M, N) the matrix is formed and factored.
        oversample: subspace iteration's p, by default min(rank, 30).
        warm_start: an SVD of a similar operator, or its right vectors (N, any): the first block.
        report: called on the host, also from inside jit, after each pass over the basis or each
            subspace iteration, with the columns multiplied so far and the largest residual
            relative to s[0]. Another function is another program.
    Raises:
        ValueError: for a rank beyond min(M, N) and other values outside their range.
    """
    plan = _checked_plan(op, rank, method, tol, max_products, block, width, oversample, warm_start)
    plan = dataclasses.replace(plan, report=report)
    warm_NB = warm_start.v_NK if isinstance(warm_start, SVD) else warm_start
    return _svd(plan, _hoisted(op), key, warm_NB)


def _hoisted(op: LinearOperator) -> LinearOperator:
    """The operator with traced arrays that a user's function closes over as arguments.

    The rule for gradients sees arguments only.
    """
    products = []
    for product, size in ((op.matmat, op.shape[1]), (op.rmatmat, op.shape[0])):
        if not _closes_over_something(product):
            products.append(product)
            continue
        leaves, structure = jax.tree.flatten(product)

        # On one column: what is converted is fixed to the shape of its example.
        def apply(x_N: jax.Array, *leaves: Any, structure: Any = structure) -> jax.Array:
            return jax.tree.unflatten(structure, leaves)(x_N[:, None])[:, 0]

        example = jnp.zeros(size, op.dtype)
        converted, constants = jax.closure_convert(apply, example, *leaves)
        hoisted = Partial(_applied, _Static(converted), leaves, constants)
        products.append(hoisted if constants else product)
    return dataclasses.replace(op, matmat=products[0], rmatmat=products[1])


def _closes_over_something(product: Any) -> bool:
    if isinstance(product, Partial):
        parts = [product.func, *product.args, *product.keywords.values()]
        return any(map(_closes_over_something, parts))
    if isinstance(product, tuple | list):
        return any(map(_closes_over_something, product))
    return callable(product) and getattr(product, "__closure__", True) is not None


def _applied(fn: _Static, leaves: list, constants: list, x_NC: jax.Array) -> jax.Array:
    return jax.vmap(lambda x_N: fn.value(x_N, *leaves, *constants), 1, 1)(x_NC)


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
) -> _Plan:
    limit = min(op.shape)
    _check_integer("rank", rank, 1, limit, f"min(M, N) of an operator of shape {op.shape}")
    if op.dtype.kind not in "fc":
        raise ValueError(f"op has dtype {op.dtype}, expected a real or complex floating type")
    if method not in ("krylov", "subspace"):
        raise ValueError(f"method={method!r}, expected krylov or subspace")
    if tol is not None and not 0 <= tol < 1:
        raise ValueError(f"tol={tol}, expected None, or from 0 to less than 1")
    if max_products is not None:
        _check_integer("max_products", max_products, 1)
    columns = None
    if warm_start is not None:
        warm = warm_start.v_NK if isinstance(warm_start, SVD) else warm_start
        if np.ndim(warm) != 2 or np.shape(warm)[0] != op.shape[1]:
            raise ValueError(
                f"warm_start has shape {np.shape(warm)}, expected right vectors "
                f"({op.shape[1]}, any)"
            )
        columns = min(np.shape(warm)[1], limit)
    eps = float(jnp.finfo(op.dtype).eps)

    if method == "subspace":
        if block is not None or width is not None:
            raise ValueError("block and width are of method='krylov'; subspace has oversample")
        if oversample is not None:
            _check_integer("oversample", oversample, 0)
        extra = min(rank, 30) if oversample is None else oversample
        size = min(rank + extra, limit) if columns is None else max(columns, rank)
        iterations = 10 if tol is None else 10_000
        return _Plan(
            method, rank, size, rank, size, tol or 0.0, max_products or 2 * (iterations + 1) * size
        )
    if oversample is not None:
        raise ValueError("oversample is of method='subspace'; krylov has block and width")
    if block is None:
        block = min(columns or BLOCK, limit)
    _check_integer("block", block, 1, limit, f"min(M, N) of an operator of shape {op.shape}")
    kept = -(-(rank + block // 2) // block) * block
    least = kept + 2 * block
    if width is None:
        width = kept + max(8 * BLOCK, kept, 2 * block)
    else:
        _check_integer("width", width, least, why=f"rank={rank} and block={block}")
    width = -(-width // block) * block
    return _Plan(
        "dense" if width >= limit else method,
        rank,
        block,
        kept,
        width,
        eps ** (2 / 3) if tol is None else float(tol),
        max_products or 100 * width,
    )


def _check_integer(name: str, value: Any, low: int, high: int | None = None, why: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name}={value!r}, expected a whole number")
    if value < low or (high is not None and value > high):
        span = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name}={value}, expected {span}{f', {why}' if why else ''}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _svd(plan: _Plan, op: LinearOperator, key: jax.Array, warm_NB: jax.Array | None) -> SVD:
    return _svd_jit(plan, op, key, warm_NB)


@functools.partial(jax.jit, static_argnums=0)
def _svd_jit(plan: _Plan, op: LinearOperator, key: jax.Array, warm_NB: jax.Array | None) -> SVD:
    methods = {"dense": _dense, "krylov": _krylov, "subspace": _subspace}
    return methods[plan.method](plan, op, key, warm_NB)


def _svd_forward(
    plan: _Plan, op: LinearOperator, key: jax.Array, warm_NB: jax.Array | None
) -> tuple[SVD, tuple[LinearOperator, SVD]]:
    factors = _svd(plan, op, key, warm_NB)
    return factors, (op, factors)


@functools.partial(jax.jit, static_argnums=0)
def _svd_backward(
    plan: _Plan, saved: tuple[LinearOperator, SVD], cotangent: SVD
) -> tuple[LinearOperator, None, None]:
    op, factors = saved
    tangent = functools.partial(_svd_tangent, op, factors, plan.tol)
    given = (cotangent.u_MK, cotangent.s_K, cotangent.v_NK)
    return pull_back(op, factors, tangent, given), None, None


_svd.defvjp(_svd_forward, _svd_backward)


def _dense(plan: _Plan, op: LinearOperator, key: jax.Array, warm_NB: jax.Array | None) -> SVD:
    """min(M, N) products give the whole matrix, which a library factors."""
    del key, warm_NB
    u_MK, s_K, vh_KN = jnp.linalg.svd(op.to_dense(), full_matrices=False)
    k = plan.rank
    u_MK, v_NK = _signed(u_MK[:, :k], vh_KN[:k].conj().T)
    residual_K = jnp.zeros_like(s_K[:k])
    finite = jnp.isfinite(s_K).all()
    return SVD(u_MK, s_K[:k], v_NK, residual_K, jnp.int32(min(op.shape)), finite)


def _signed(u_MK: jax.Array, v_NK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Turn each pair so that the left entry of largest modulus is real and positive."""
    peak_1K = jnp.take_along_axis(u_MK, jnp.abs(u_MK).argmax(0)[None], axis=0)
    size_1K = jnp.abs(peak_1K)
    turn_1K = jnp.where(size_1K > 0, peak_1K.conj() / jnp.where(size_1K > 0, size_1K, 1), 1)
    return u_MK * turn_1K, v_NK * turn_1K


# Derivatives -------------------------------------------------------------------------------------


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
        next(slopes) if ok else np.zeros(leaf.shape, jax.dtypes.float0)
        for ok, leaf in zip(learned, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, back)


def _svd_tangent(
    op: LinearOperator, factors: SVD, tol: float, dav_MK: jax.Array, dahu_NK: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The change of (u, s, v). Complex pairs turn so that both phases stay put."""
    u_MK, s_K, v_NK = factors[:3]
    p_KK = _mm(u_MK.conj().T, dav_MK)
    gap_KK = (s_K - s_K[:, None]) * (s_K + s_K[:, None])  # s_j^2 - s_i^2
    f_KK = jnp.where(gap_KK != 0, 1 / jnp.where(gap_KK != 0, gap_KK, 1), 0)
    inside_u = f_KK * (p_KK * s_K + s_K[:, None] * p_KK.conj().T)
    inside_v = f_KK * (s_K[:, None] * p_KK + p_KK.conj().T * s_K)
    if jnp.iscomplexobj(p_KK):
        turn_KK = jnp.diag(0.5j * jnp.diagonal(p_KK).imag * inverse_of(s_K))
        inside_u, inside_v = inside_u + turn_KK, inside_v - turn_KK
    x_MK, y_NK = outside_span(op, factors, tol, dav_MK, dahu_NK)
    ds_K = jnp.diagonal(p_KK).real
    return _mm(u_MK, inside_u) + x_MK, ds_K, _mm(v_NK, inside_v) + y_NK


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
        ay_MK = op.matmat(y_NK) - _mm(u_MK * s_K, _mm(v_NK.conj().T, y_NK))
        ahx_NK = op.rmatmat(x_MK) - _mm(v_NK * s_K, _mm(u_MK.conj().T, x_MK))
        return x_MK - ay_MK * inverse_K, y_NK - ahx_NK * inverse_K

    given = (
        (dav_MK - _mm(u_MK, _mm(u_MK.conj().T, dav_MK))) * inverse_K,
        (dahu_NK - _mm(v_NK, _mm(v_NK.conj().T, dahu_NK))) * inverse_K,
    )
    return jax.scipy.sparse.linalg.cg(system, given, tol=tol, maxiter=1000)[0]


def inverse_of(s_K: jax.Array) -> jax.Array:
    """1 / s, and 0 for s = 0, where u and v have no derivative."""
    return jnp.where(s_K > 0, 1 / jnp.where(s_K > 0, s_K, 1), 0)


# Block Golub-Kahan bidiagonalisation -------------------------------------------------------------


class _Basis(NamedTuple):
    """One pass in progress. Vectors are rows: the filled part of a basis is one piece of memory."""

    u_WM: jax.Array
    v_WN: jax.Array
    b_WX: jax.Array  # u^H A [v, next], upper triangular by blocks; X = W + B
    next_NB: jax.Array  # the next right block, orthogonal to v
    known_MB: jax.Array  # u u^H A next: what A next has along u
    size: jax.Array  # largest |A x| of a unit vector that was seen: what rounding is relative to


class _Cycle(NamedTuple):
    """The state between passes: A v = u s and A^H u = v s + next tail."""

    u_WM: jax.Array
    v_WN: jax.Array
    s_W: jax.Array
    tail_BW: jax.Array
    next_NB: jax.Array
    filled: jax.Array  # rows of the basis that the next cycle starts with
    size: jax.Array
    products: jax.Array
    dropped: jax.Array  # residual that a search for copies left out of `tail`
    searched_K: jax.Array  # singular values before that search, or NaN
    done: jax.Array
    noise_XB: jax.Array  # random numbers, max(M, N) rows: see `_noise`


def _krylov(plan: _Plan, op: LinearOperator, key: jax.Array, warm_NB: jax.Array | None) -> SVD:
    noise_XB = jax.random.normal(key, (max(op.shape), plan.block), op.dtype)
    products = plan.block
    if warm_NB is None:
        left_MB = noise_XB[: op.shape[0]]
    else:
        left_MB = op.matmat(warm_NB[:, : plan.block].astype(op.dtype))
        left_MB /= _positive(jnp.abs(left_MB).max())
        products += plan.block
    right_NB = op.rmatmat(left_MB)
    scale = _positive(jnp.abs(right_NB).max())  # so that squares neither overflow nor underflow
    next_NB, _ = orthonormalize(right_NB / scale)

    def unfinished(c: _Cycle) -> jax.Array:
        return ~c.done & (c.products < plan.max_products)

    width, real = plan.width, scale.dtype
    cycle = _Cycle(
        u_WM=jnp.zeros((width, op.shape[0]), op.dtype),
        v_WN=jnp.zeros((width, op.shape[1]), op.dtype),
        s_W=jnp.zeros(width, real),
        tail_BW=jnp.zeros((plan.block, width), op.dtype),
        next_NB=next_NB,
        filled=jnp.int32(0),
        size=jnp.zeros((), real),
        products=jnp.int32(products),
        dropped=jnp.zeros((), real),
        searched_K=jnp.full(plan.rank, jnp.nan, real),
        done=jnp.bool(False),
        noise_XB=noise_XB,
    )
    cycle = jax.lax.while_loop(unfinished, functools.partial(_cycle, plan, op, scale), cycle)
    k = plan.rank
    residual_K = _residual(cycle, k)
    converged = (residual_K <= plan.tol * cycle.s_W[0]).all()
    u_MK, v_NK = _signed(cycle.u_WM[:k].T, cycle.v_WN[:k].T)
    return SVD(u_MK, cycle.s_W[:k] * scale, v_NK, residual_K * scale, cycle.products, converged)


def _positive(x: jax.Array) -> jax.Array:
    return jnp.where((x > 0) & jnp.isfinite(x), x, 1)


def _residual(cycle: _Cycle, k: int) -> jax.Array:
    return jnp.hypot(jnp.linalg.norm(cycle.tail_BW[:, :k], axis=0), cycle.dropped)


def _cycle(plan: _Plan, op: LinearOperator, scale: jax.Array, c: _Cycle) -> _Cycle:
    """Fill the basis or converge, factor the small matrix, keep its leading triplets."""
    block, width, kept, k = plan.block, plan.width, plan.kept, plan.rank
    searching = jnp.isfinite(c.searched_K[0])
    # A small factorisation costs little, a step that was not needed two products: four in a cycle.
    every = max((width - kept) // (4 * block), 1)

    def unfinished(state: tuple[jax.Array, _Basis, _Small]) -> jax.Array:
        filled, _, small = state
        return (filled + block <= width) & ~(_converged(plan, small, c.dropped) & ~searching)

    def step(state: tuple[jax.Array, _Basis, _Small]) -> tuple[jax.Array, _Basis, _Small]:
        """Two products, from which the recurrence takes what they have along known vectors."""
        at, basis, small = state
        noise_M, noise_N = (
            _noise(c, size, c.products + 2 * at + i) for i, size in enumerate(op.shape)
        )
        v_WN = _put(basis.v_WN, basis.next_NB.T, at, 0)
        left_MB = op.matmat(basis.next_NB) / scale
        size = jnp.maximum(basis.size, jnp.linalg.norm(left_MB, axis=0).max())
        u_MB, r_BB = _next_block(noise_M, left_MB - basis.known_MB, basis.u_WM, at, size)
        right_NB = op.rmatmat(u_MB) / scale - _mm(basis.next_NB, r_BB.conj().T)
        next_NB, s_BB = _next_block(noise_N, right_NB, v_WN, at + block, size)
        known_MB = _mm(u_MB, s_BB.conj().T)
        b_WX = _put(basis.b_WX, jnp.hstack([r_BB, s_BB.conj().T]), at, at)
        basis = _Basis(_put(basis.u_WM, u_MB.T, at, 0), v_WN, b_WX, next_NB, known_MB, size)
        filled = at + block
        look = (filled >= kept) & (((filled - c.filled) // block % every == 0) | (filled == width))
        small = jax.lax.cond(look, lambda: _factor(plan, b_WX, filled), lambda: small)
        return filled, basis, small

    b_WX = jnp.eye(width, width + block, dtype=op.dtype) * c.s_W[:, None]
    b_WX = _put(b_WX, c.tail_BW.conj().T, 0, c.filled)
    known_MB = _mm(c.u_WM.T, c.tail_BW.conj().T)
    basis = _Basis(c.u_WM, c.v_WN, b_WX, c.next_NB, known_MB, c.size)
    unknown = jax.tree.map(
        lambda x: jnp.full(x.shape, jnp.inf, x.dtype),
        jax.eval_shape(functools.partial(_factor, plan), b_WX, c.filled),
    )
    filled, basis, small = jax.lax.while_loop(unfinished, step, (c.filled, basis, unknown))

    after = ((0, width - kept), (0, 0))
    s_W = jnp.pad(small.s_L, after[0])
    c_next = c._replace(
        u_WM=jnp.pad(_mm(small.x_WL.T, basis.u_WM), after),
        v_WN=jnp.pad(_mm(small.y_WL.T, basis.v_WN), after),
        s_W=s_W,
        tail_BW=jnp.pad(small.tail_BL, after[::-1]),
        next_NB=basis.next_NB,
        filled=jnp.int32(kept),
        size=basis.size,
        products=c.products + 2 * (filled - c.filled),
        searched_K=jnp.full_like(c.searched_K, jnp.nan),
    )

    # From a block of B columns, B copies of a singular value can be seen and no more. Where the
    # result has so many, look for others from random columns before believing it.
    converged = _converged(plan, small, c.dropped)
    _report(plan, c_next.products, _residuals(small, c.dropped)[:k], s_W)
    if k < block:
        return c_next._replace(done=converged | ~jnp.isfinite(s_W[0]))
    same = s_W[0] * max(plan.tol**2, 100 * float(jnp.finfo(op.dtype).eps))
    crowded = (s_W[: k - block + 1] - s_W[block - 1 : k] <= same).any()
    found_none = (jnp.abs(s_W[:k] - c.searched_K) <= same).all()
    residual_L = _residuals(small, c.dropped)[: plan.locked]
    search = converged & crowded & ~found_none & (residual_L <= plan.tol * s_W[0]).all()
    return jax.lax.cond(
        search,
        lambda: _search_copies(plan, c_next, residual_L.max()),
        lambda: c_next._replace(done=(converged & (~crowded | found_none)) | ~jnp.isfinite(s_W[0])),
    )


def _report(plan: _Plan, products: jax.Array, residual_K: jax.Array, s_K: jax.Array) -> None:
    if plan.report is not None:
        jax.debug.callback(plan.report, products, residual_K.max() / _positive(s_K[0]))


class _Small(NamedTuple):
    """The leading triplets of the small matrix, and what they leave: A^H u = v s + next tail."""

    x_WL: jax.Array
    s_L: jax.Array
    y_WL: jax.Array
    tail_BL: jax.Array


def _factor(plan: _Plan, b_WX: jax.Array, filled: jax.Array) -> _Small:
    block, width, kept = plan.block, plan.width, plan.kept
    inside_W = jnp.arange(width) < filled
    b_WW = jnp.where(inside_W, b_WX[:, :width], 0)
    # Rows that are not filled get values above all others, so that they are not taken for zeros.
    size_WW = jnp.abs(b_WW)
    above = 1.1 * jnp.sqrt(size_WW.sum(0).max() * size_WW.sum(1).max())
    b_WW += jnp.diag(jnp.where(inside_W, 0, jnp.where(above > 0, above, 1))).astype(b_WW.dtype)
    x_WW, s_W, yh_WW = jnp.linalg.svd(b_WW)
    start = width - filled
    x_WL = jax.lax.dynamic_slice_in_dim(x_WW, start, kept, axis=1)
    s_L = jnp.where(above == 0, 0, jax.lax.dynamic_slice_in_dim(s_W, start, kept))
    y_WL = jax.lax.dynamic_slice_in_dim(yh_WW, start, kept).conj().T
    coupling_BB = _take(b_WX, filled - block, filled, (block, block)).conj().T
    tail_BL = _mm(coupling_BB, _take(x_WL, filled - block, 0, (block, kept)))
    return _Small(x_WL, s_L, y_WL, tail_BL)


def _residuals(small: _Small, dropped: jax.Array) -> jax.Array:
    return jnp.hypot(jnp.linalg.norm(small.tail_BL, axis=0), dropped)


def _converged(plan: _Plan, small: _Small, dropped: jax.Array) -> jax.Array:
    residual_K = _residuals(small, dropped)[: plan.rank]
    return (residual_K <= plan.tol * small.s_L[0]).all() & jnp.isfinite(small.s_L[0])


def _search_copies(plan: _Plan, c: _Cycle, dropped: jax.Array) -> _Cycle:
    """Keep what has converged, and go on from random columns that are orthogonal to it."""
    keep_W1 = (jnp.arange(plan.width) < plan.locked)[:, None]
    v_WN = jnp.where(keep_W1, c.v_WN, 0)
    known_WN = _put(v_WN, c.next_NB.T, plan.locked, 0)  # A^H u has a part along the old block
    random_NB = _noise(c, len(c.next_NB), c.products + 2)()
    return c._replace(
        u_WM=jnp.where(keep_W1, c.u_WM, 0),
        v_WN=v_WN,
        s_W=jnp.where(keep_W1[:, 0], c.s_W, 0),
        tail_BW=jnp.zeros_like(c.tail_BW),
        next_NB=_orthonormalize_beside(random_NB, known_WN)[0],
        filled=jnp.int32(plan.locked),
        dropped=jnp.maximum(c.dropped, dropped),
        searched_K=c.s_W[: plan.rank],
    )


def _noise(c: _Cycle, rows: int, shift: jax.Array) -> Callable[[], jax.Array]:
    """A random block for each shift: one block, rolled, as to generate more is slow to compile."""
    return lambda: jnp.roll(c.noise_XB, shift, axis=0)[:rows]


def _next_block(
    noise: Callable[[], jax.Array],
    z_NB: jax.Array,
    basis_WN: jax.Array,
    filled: jax.Array,
    size: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Q, R with z = basis (...) + Q R, Q orthonormal, and orthogonal to the basis' filled rows.

    Directions of z at rounding of `size` are noise: there Q has random columns, and R zero rows, so
    that the iteration goes on from them when the subspace so far is invariant.
    """
    z_NB, along = _project_filled(z_NB, basis_WN, filled)
    q_NB, r_BB = orthonormalize(z_NB)
    floor = 10 * jnp.finfo(z_NB.dtype).eps * size

    def again() -> tuple[jax.Array, jax.Array]:
        twice_NB, more_BB = orthonormalize(_project(q_NB, basis_WN)[0])
        twice_BB = _mm(more_BB, r_BB)
        turn_BB, s_B, vh_BB = jnp.linalg.svd(twice_BB)
        noise_B = ~(s_B > floor)
        full_NB = jnp.where(noise_B, noise(), _mm(twice_NB, turn_BB))
        full_NB, flip_B = _orthonormalize_beside(full_NB, basis_WN)
        full_NB *= flip_B  # the columns that are no noise stay what they are
        full_BB = jnp.where(noise_B, 0, s_B)[:, None] * vh_BB
        return jax.lax.cond(noise_B.any(), lambda: (full_NB, full_BB), lambda: (twice_NB, twice_BB))

    # A pass leaves the basis' own defect times what it took away. The recurrence leaves it little
    # to take away, so that a second pass is needed only where little is left of z.
    smallest = jnp.abs(jnp.diagonal(r_BB)).min()
    enough = (along < 0.01 * smallest) & (smallest > floor)
    return jax.lax.cond(enough, lambda: (q_NB, r_BB), again)


def _orthonormalize_beside(z_NB: jax.Array, basis_WN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """An orthonormal block, orthogonal to a basis, and the signs that give the columns of z.

    The signs mean something where z was such a block up to later columns.
    """
    once_NB, first_BB = orthonormalize(_project(z_NB, basis_WN)[0])
    twice_NB, second_BB = orthonormalize(_project(once_NB, basis_WN)[0])
    return twice_NB, _phase(jnp.diagonal(first_BB)) * _phase(jnp.diagonal(second_BB))


def _phase(x: jax.Array) -> jax.Array:
    size = jnp.abs(x)
    return jnp.where(size > 0, x / jnp.where(size > 0, size, 1), 1)


def _project(z_NB: jax.Array, basis_WN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """z - basis^H (basis z), and the norm of basis z."""
    along_WB = _mm(basis_WN.conj(), z_NB)
    return z_NB - _mm(basis_WN.T, along_WB), jnp.linalg.norm(along_WB)


def _project_filled(
    z_NB: jax.Array, basis_WN: jax.Array, filled: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The same, reading in quarters as much of the basis as holds the filled rows."""
    width = basis_WN.shape[0]
    sizes = sorted({-(-width * i // 4) for i in range(1, 5)})
    parts = [functools.partial(_project, z_NB, basis_WN[:size]) for size in sizes]
    none = jnp.zeros((), jnp.finfo(z_NB.dtype).dtype)
    which = jnp.searchsorted(jnp.array([0, *sizes]), filled)
    return jax.lax.switch(which, [lambda: (z_NB, none), *parts])


def _put(x: jax.Array, part: jax.Array, row: Any, column: Any) -> jax.Array:
    return jax.lax.dynamic_update_slice(x, part, (jnp.int32(row), jnp.int32(column)))


def _take(x: jax.Array, row: Any, column: Any, shape: tuple[int, int]) -> jax.Array:
    return jax.lax.dynamic_slice(x, (jnp.int32(row), jnp.int32(column)), shape)


def _mm(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")


# Randomised subspace iteration -------------------------------------------------------------------


def _subspace(plan: _Plan, op: LinearOperator, key: jax.Array, warm_NB: jax.Array | None) -> SVD:
    """The iSVD paper's algorithm: 2 (n + 1) products of K + oversample columns for n iterations.

    Orthonormalised before every product, which changes nothing but rounding. K more products give
    the residuals.
    """
    wide = op.shape[0] < op.shape[1]
    a = op.H if wide else op  # the small matrix is on the short side
    start_NB = jax.random.normal(key, (a.shape[1], plan.block), op.dtype)
    if warm_NB is not None:
        known_NB = warm_NB[:, : plan.block].astype(op.dtype)
        known_NB = op.matmat(known_NB) if wide else known_NB
        start_NB = start_NB.at[:, : known_NB.shape[1]].set(known_NB)

    def unfinished(state: tuple) -> jax.Array:
        _, _, residual_K, s_K, products = state
        more = products + 2 * plan.block <= plan.max_products
        return more & ~(residual_K <= plan.tol * s_K[0]).all()

    def iteration(state: tuple) -> tuple:
        products = state[-1]
        v_NB, _ = orthonormalize(state[0])
        u_MB, r_BB = orthonormalize(a.matmat(v_NB))
        right_NB = a.rmatmat(u_MB)
        # A (v y) = (u x) s to rounding, so the other side says how far the pairs are from singular.
        x_BB, s_B, yh_BB = jnp.linalg.svd(r_BB)
        miss_NB = _mm(right_NB, x_BB) - _mm(v_NB, yh_BB.conj().T) * s_B
        k = plan.rank
        residual_K = jnp.linalg.norm(miss_NB[:, :k], axis=0)
        products += 2 * plan.block
        _report(plan, products, residual_K, s_B)
        return right_NB, u_MB, residual_K, s_B[:k], products

    k = plan.rank
    real = jnp.finfo(op.dtype).dtype
    state = (
        start_NB,
        jnp.zeros((a.shape[0], plan.block), op.dtype),
        jnp.full(k, jnp.inf, real),
        jnp.zeros(k, real),
        jnp.int32(0),
    )
    state = iteration(state)  # so that there is a result whatever max_products is
    right_NB, u_MB, _, _, products = jax.lax.while_loop(unfinished, iteration, state)

    v_NB, r_BB = orthonormalize(right_NB)  # A^H u = v r
    x_BB, s_B, yh_BB = jnp.linalg.svd(r_BB.conj().T)
    u_MK, v_NK = _mm(u_MB, x_BB[:, :k]), _mm(v_NB, yh_BB[:k].conj().T)
    residual_K = jnp.linalg.norm(a.matmat(v_NK) - u_MK * s_B[:k], axis=0)
    u_MK, v_NK = _signed(v_NK, u_MK) if wide else _signed(u_MK, v_NK)
    return SVD(
        u_MK,
        s_B[:k],
        v_NK,
        residual_K,
        products + k,
        (residual_K <= (plan.tol or jnp.finfo(op.dtype).eps ** (2 / 3)) * s_B[0]).all(),
    )

"""Block Golub-Kahan bidiagonalisation with reorthogonalisation and thick restarts.

Sources: Golub and Kahan (1965); Baglama and Reichel, SISC 27 (2005). Right blocks are made
orthogonal to all of their basis, left ones where the recurrence alone would not do (`_next_left`).

Axes: M rows, N columns, K rank, B block, L kept triplets, W width of the basis, X = W + B.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

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

# How many times the narrow width is multiplied before cycles get the whole one. Most spectra have
# converged by then, and a wide cycle costs them more; flat ones need fewer products with it.
PATIENCE = 10


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


def krylov_svd(plan: Plan, op: LinearOperator, key: jax.Array, warm_NB: jax.Array | None) -> SVD:
    """Cycles until every residual is below `tol`, or `max_products` columns were multiplied.

    Args:
        warm_NB: right vectors to start from, with noise in them; random ones for None.
    """
    noise_XB = jax.random.normal(key, (max(op.shape), plan.block), op.dtype)
    products = plan.block
    if warm_NB is None:
        left_MB = noise_XB[: op.shape[0]]
    else:
        left_MB = op.matmat(mixed_start(plan, noise_XB[: op.shape[1]], warm_NB))
        left_MB /= positive(jnp.abs(left_MB).max())
        products += plan.block
    right_NB = op.rmatmat(left_MB)
    scale = positive(jnp.abs(right_NB).max())  # so that squares neither overflow nor underflow
    next_NB, _ = orthonormalize(right_NB / scale)
    op = over(op, scale)

    def unfinished(c: _Cycle) -> jax.Array:
        return ~c.done & (c.products < plan.max_products)

    # Made from a product, so that inside shard_map their types say that they vary as it does.
    zeros = functools.partial(jnp.zeros_like, next_NB)
    width, real = plan.width, scale.dtype
    cycle = _Cycle(
        u_WM=zeros(shape=(width, op.shape[0])),
        v_WN=zeros(shape=(width, op.shape[1])),
        s_W=zeros(shape=width, dtype=real),
        tail_BW=zeros(shape=(plan.block, width)),
        next_NB=next_NB,
        filled=jnp.int32(0),
        size=zeros(shape=(), dtype=real),
        products=zeros(shape=(), dtype=jnp.int32) + products,
        dropped=zeros(shape=(), dtype=real),
        searched_K=zeros(shape=plan.rank, dtype=real) + jnp.nan,
        done=zeros(shape=(), dtype=jnp.bool),
        noise_XB=noise_XB,
    )
    cycle = jax.lax.while_loop(unfinished, functools.partial(_cycle, plan, op), cycle)
    k = plan.rank
    u_MK, s_K, v_NK = cycle.u_WM[:k].T, cycle.s_W[:k], cycle.v_WN[:k].T
    residual_K = jnp.hypot(jnp.linalg.norm(cycle.tail_BW[:, :k], axis=0), cycle.dropped)

    # Each restart adds its rounding to the values. Where there were many, one more product with the
    # vectors costs little beside them, and its quotients start from the operator again.
    many = cycle.products > 20 * k
    s_K, miss_K = jax.lax.cond(
        many, lambda: _quotients(op, u_MK, v_NK), lambda: (s_K, jnp.zeros_like(s_K))
    )
    residual_K = jnp.hypot(residual_K, miss_K)
    converged = (residual_K <= plan.tol * s_K.max()).all()
    order_K = jnp.argsort(-s_K)
    u_MK, s_K, v_NK, residual_K = (
        jnp.take(part, order_K, axis=-1) for part in (u_MK, s_K, v_NK, residual_K)
    )
    products = cycle.products + jnp.where(many, k, 0)
    u_MK, v_NK = signed(u_MK, v_NK)
    return SVD(u_MK, s_K * scale, v_NK, residual_K * scale, products, converged)


def _quotients(op: LinearOperator, u_MK: jax.Array, v_NK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """s = <u, A v>, and |A v - s u|."""
    left_MK = op.matmat(v_NK)
    sizes_K = jnp.linalg.norm(u_MK, axis=0) * jnp.linalg.norm(v_NK, axis=0)
    s_K = jnp.maximum((u_MK.conj() * left_MK).sum(0).real / sizes_K, 0)
    return s_K, jnp.linalg.norm(left_MK - u_MK * s_K, axis=0)


def _cycle(plan: Plan, op: LinearOperator, c: _Cycle) -> _Cycle:
    """Fill the basis or converge, factor the small matrix, keep its leading triplets."""
    block, width, kept, k = plan.block, plan.width, plan.kept, plan.rank
    searching = jnp.isfinite(c.searched_K[0])
    end = jnp.where(c.products < PATIENCE * plan.narrow, plan.narrow, width)
    # A small factorisation costs little, a step that was not needed two products: four in a cycle.
    every = jnp.maximum((end - kept) // (4 * block), 1)

    def unfinished(state: tuple[jax.Array, _Basis, _Small]) -> jax.Array:
        filled, _, small = state
        return (filled + block <= end) & ~(_converged(plan, small, c.dropped) & ~searching)

    def step(state: tuple[jax.Array, _Basis, _Small]) -> tuple[jax.Array, _Basis, _Small]:
        """Two products, from which the recurrence takes what they have along known vectors."""
        at, basis, small = state
        noise_M, noise_N = (
            _noise(c, size, c.products + 2 * at + i) for i, size in enumerate(op.shape)
        )
        v_WN = _put(basis.v_WN, basis.next_NB.T, at, 0)
        left_MB = op.matmat(basis.next_NB)
        size = jnp.maximum(basis.size, jnp.linalg.norm(left_MB, axis=0).max())
        u_MB, r_BB = _next_left(noise_M, left_MB - basis.known_MB, basis.u_WM, at, size)
        right_NB = op.rmatmat(u_MB) - matmul(basis.next_NB, r_BB.conj().T)
        next_NB, s_BB = _next_block(noise_N, right_NB, v_WN, at + block, size)
        known_MB = matmul(u_MB, s_BB.conj().T)
        b_WX = _put(basis.b_WX, jnp.hstack([r_BB, s_BB.conj().T]), at, at)
        basis = _Basis(_put(basis.u_WM, u_MB.T, at, 0), v_WN, b_WX, next_NB, known_MB, size)
        filled = at + block
        look = (filled >= kept) & (((filled - c.filled) // block % every == 0) | (filled == end))
        small = jax.lax.cond(look, lambda: _factor(plan, b_WX, filled), lambda: small)
        return filled, basis, small

    b_WX = jnp.eye(width, width + block, dtype=op.dtype) * c.s_W[:, None]
    b_WX = _put(b_WX, c.tail_BW.conj().T, 0, c.filled)
    known_MB = matmul(c.u_WM[:kept].T, c.tail_BW[:, :kept].conj().T)  # the others are zero
    basis = _Basis(c.u_WM, c.v_WN, b_WX, c.next_NB, known_MB, c.size)
    unknown = jax.tree.map(
        lambda x: jnp.full_like(b_WX, jnp.inf, shape=x.shape, dtype=x.dtype),
        jax.eval_shape(functools.partial(_factor, plan), b_WX, c.filled),
    )
    filled, basis, small = jax.lax.while_loop(unfinished, step, (c.filled, basis, unknown))

    after = ((0, width - kept), (0, 0))
    s_W = jnp.pad(small.s_L, after[0])
    c_next = c._replace(
        u_WM=jnp.pad(matmul(small.x_WL.T, basis.u_WM), after),
        v_WN=jnp.pad(matmul(small.y_WL.T, basis.v_WN), after),
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
    report_pass(plan, c_next.products, _residuals(small, c.dropped)[:k], s_W)
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


class _Small(NamedTuple):
    """The leading triplets of the small matrix, and what they leave: A^H u = v s + next tail."""

    x_WL: jax.Array
    s_L: jax.Array
    y_WL: jax.Array
    tail_BL: jax.Array


def _factor(plan: Plan, b_WX: jax.Array, filled: jax.Array) -> _Small:
    def of(width: int) -> _Small:
        small = _factor_leading(plan, b_WX[:width, : width + plan.block], filled)
        more = ((0, plan.width - width), (0, 0))
        return small._replace(x_WL=jnp.pad(small.x_WL, more), y_WL=jnp.pad(small.y_WL, more))

    if plan.narrow == plan.width:
        return of(plan.width)
    return jax.lax.cond(filled <= plan.narrow, lambda: of(plan.narrow), lambda: of(plan.width))


def _factor_leading(plan: Plan, b_WX: jax.Array, filled: jax.Array) -> _Small:
    width, block, kept = len(b_WX), plan.block, plan.kept
    inside_W = jnp.arange(width, dtype=jnp.int32) < filled
    b_WW = jnp.where(inside_W, b_WX[:, :width], 0)
    # Rows that are not filled get values above all others, so that they are not taken for zeros.
    size_WW = jnp.abs(b_WW)
    above = 1.1 * jnp.sqrt(size_WW.sum(0).max() * size_WW.sum(1).max())
    b_WW += jnp.diag(jnp.where(inside_W, 0, jnp.where(above > 0, above, 1))).astype(b_WW.dtype)
    x_WW, s_W, yh_WW = thin_svd(b_WW)
    start = width - filled
    x_WL = jax.lax.dynamic_slice_in_dim(x_WW, start, kept, axis=1)
    s_L = jnp.where(above == 0, 0, jax.lax.dynamic_slice_in_dim(s_W, start, kept))
    y_WL = jax.lax.dynamic_slice_in_dim(yh_WW, start, kept).conj().T
    coupling_BB = _take(b_WX, filled - block, filled, (block, block)).conj().T
    tail_BL = matmul(coupling_BB, _take(x_WL, filled - block, 0, (block, kept)))
    return _Small(x_WL, s_L, y_WL, tail_BL)


def _residuals(small: _Small, dropped: jax.Array) -> jax.Array:
    return jnp.hypot(jnp.linalg.norm(small.tail_BL, axis=0), dropped)


def _converged(plan: Plan, small: _Small, dropped: jax.Array) -> jax.Array:
    residual_K = _residuals(small, dropped)[: plan.rank]
    return (residual_K <= plan.tol * small.s_L[0]).all() & jnp.isfinite(small.s_L[0])


def _search_copies(plan: Plan, c: _Cycle, dropped: jax.Array) -> _Cycle:
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


# Share of the largest value above which a left block needs no reorthogonalisation.
_LARGE = 0.005


def _next_left(
    noise: Callable[[], jax.Array],
    z_MB: jax.Array,
    basis_WM: jax.Array,
    filled: jax.Array,
    size: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`_next_block` for left blocks, mostly without reading their basis.

    Where the right basis is orthonormal, u = A v / s is as orthonormal as s is large: the
    recurrence alone keeps it so (Simon and Zha, SISC 21, 2000), until a direction of z is small.
    """
    q_MB, r_BB = orthonormalize(z_MB)
    large = jnp.abs(jnp.diagonal(r_BB)).min() > _LARGE * size
    otherwise = functools.partial(_next_block, noise, z_MB, basis_WM, filled, size)
    return jax.lax.cond(large, lambda: (q_MB, r_BB), otherwise)


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
        twice_BB = matmul(more_BB, r_BB)
        turn_BB, s_B, vh_BB = thin_svd(twice_BB)
        noise_B = ~(s_B > floor)
        full_NB = jnp.where(noise_B, noise(), matmul(twice_NB, turn_BB))
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
    # Products in this layout read the basis as it lies; without the barriers XLA rewrites them to
    # others that take half as long again on a CPU.
    along_WB = jax.lax.optimization_barrier(matmul(basis_WN.conj(), z_NB))
    known_BN = jax.lax.optimization_barrier(matmul(along_WB.T, basis_WN))
    return z_NB - known_BN.T, jnp.linalg.norm(along_WB)


def _project_filled(
    z_NB: jax.Array, basis_WN: jax.Array, filled: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The same, reading in quarters as much of the basis as holds the filled rows."""
    width = basis_WN.shape[0]
    sizes = sorted({-(-width * i // 4) for i in range(1, 5)})

    def part(size: int) -> tuple[jax.Array, jax.Array]:
        return _project(z_NB, basis_WN[:size])  # sliced here: outside, every step copies each size

    parts = [functools.partial(part, size) for size in sizes]
    # Made from z, so that inside shard_map its type says that it varies as z does.
    none = jnp.zeros_like(z_NB, shape=(), dtype=jnp.finfo(z_NB.dtype).dtype)
    which = jnp.searchsorted(jnp.array([0, *sizes], jnp.int32), filled)
    return jax.lax.switch(which, [lambda: (z_NB, none), *parts])


def _put(x: jax.Array, part: jax.Array, row: Any, column: Any) -> jax.Array:
    return jax.lax.dynamic_update_slice(x, part, (jnp.int32(row), jnp.int32(column)))


def _take(x: jax.Array, row: Any, column: Any, shape: tuple[int, int]) -> jax.Array:
    return jax.lax.dynamic_slice(x, (jnp.int32(row), jnp.int32(column)), shape)

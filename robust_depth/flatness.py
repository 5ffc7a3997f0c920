"""How far the loss can fall near a solution of a diagonal network, exactly and with a certificate.

The products of all weights in an l_inf ball around w fill a box, so the smallest loss in the ball
is that of a linear programme,

    min_theta (1/M) |y - X theta|_1   over   low <= theta <= high,

solved here on the device for many problems at once, together with a bound from below. Models
without such a programme have lower bounds on the drop only.

Axes: N layers, D coordinates, M rows, G radii, P weights in all.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from robust_depth import models
from robust_depth.method import Model, l1_loss
from robust_depth.problems import NetworkProblem, Problem, check_finite

_CHECK_EVERY = 40  # steps between looks at the gap; a look costs two steps


class BoxMinimum(NamedTuple):
    """The smallest mean absolute residual in a box lies between `bound` and `loss`.

    Attributes:
        loss, theta_D: the smallest one found, and where.
        bound, dual_M: the largest bound from below, and the u, |u| <= 1/M, that proves it.
        gap: loss - bound, without the cancellation of that difference.
        steps, converged: steps made, and whether the gap is as small as was asked.
    """

    loss: jax.Array
    bound: jax.Array
    gap: jax.Array
    theta_D: jax.Array
    dual_M: jax.Array
    steps: jax.Array
    converged: jax.Array


class Flatness(NamedTuple):
    """The loss falls by `drop` at least and `drop + gap` at most, from w within its ball.

    Attributes:
        loss, minimum: L(w), and the smallest loss found: minimum = loss - drop.
        drop, gap: certified, to rounding; exact far below the rounding of the loss itself.
        radius: of the ball, in each weight.
        theta_D: product of weights in the ball with that smallest loss.
        steps, converged: as in `BoxMinimum`.
    """

    loss: jax.Array
    minimum: jax.Array
    drop: jax.Array
    gap: jax.Array
    radius: jax.Array
    theta_D: jax.Array
    steps: jax.Array
    converged: jax.Array


class RadiusRange(NamedTuple):
    """A drop is within the tolerance up to `inside`, certainly, and beyond it from `outside` on.

    `inside` is 0, and `outside` infinite, where no radius tried has that certificate.
    """

    inside: jax.Array
    outside: jax.Array


# The box and its linear programme ----------------------------------------------------------------


def reachable_box(w_ND: jax.Array, radius: Any) -> tuple[jax.Array, jax.Array]:
    """Smallest and largest product of N numbers, one from each [w_ij - radius, w_ij + radius].

    Coordinates do not mix, and every value between the two is reached, so these are the theta of
    the l_inf ball, exactly. A product is linear in each factor: its extremes are at end points, and
    those of i + 1 layers come from those of i.

    Raises:
        ValueError: for a concrete radius below 0 or not finite, or w_ND that is not (N, D).

    >>> reachable_box(jnp.array([[1.0], [-2.0]]), 0.5)
    (Array([-3.75], dtype=float32), Array([-0.75], dtype=float32))
    """
    _check_weights(w_ND)
    _check_radius("radius", radius)
    radius = jnp.asarray(radius, w_ND.dtype)
    low_D = high_D = jnp.ones_like(w_ND[0])
    for w_D in w_ND:
        ends_4D = jnp.stack([a * b for a in (low_D, high_D) for b in (w_D - radius, w_D + radius)])
        low_D, high_D = ends_4D.min(0), ends_4D.max(0)
    return low_D, high_D


def box_minimum_lp(problem: Problem, low_D: Any, high_D: Any) -> tuple[float, np.ndarray]:
    """Smallest mean absolute residual in the box, and its theta_D, by HiGHS on the host.

    In float64 and to its tolerance of 1e-7: the reference for `box_minimum`, and quick for one
    small problem.

    Raises:
        ValueError: as `box_minimum`.
        RuntimeError: if HiGHS fails, with its message.
    """
    from scipy.optimize import linprog

    _check_box(problem, low_D, high_D)
    check_finite(problem)
    x_MD, y_M = (np.asarray(part, np.float64) for part in (problem.x_MD, problem.y_M))
    num_rows, dim = x_MD.shape
    eye_MM = np.eye(num_rows)
    result = linprog(  # over (theta, t), with |y - X theta| <= t
        np.concatenate([np.zeros(dim), np.full(num_rows, 1 / num_rows)]),
        A_ub=np.block([[x_MD, -eye_MM], [-x_MD, -eye_MM]]),
        b_ub=np.concatenate([y_M, -y_M]),
        bounds=[*zip(np.asarray(low_D), np.asarray(high_D), strict=True)] + [(0, None)] * num_rows,
        method="highs",
    )
    if result.status != 0:
        raise RuntimeError(f"HiGHS: {result.message}")
    return float(result.fun), result.x[:dim]


def box_minimum(
    problem: Problem,
    low_D: jax.Array,
    high_D: jax.Array,
    *,
    center_D: jax.Array | None = None,
    start: tuple[jax.Array, jax.Array] | None = None,
    tol: Any = 1e-4,
    max_steps: Any = 20_000,
) -> BoxMinimum:
    """Smallest mean absolute residual in a box, by the primal-dual hybrid gradient method.

    min_theta max_{|u| <= 1/M} u.(y - X theta); with q = X^T u, every u gives the bound
    u.y - sum_j max(low_j q_j, high_j q_j) from below. Steps are those of PDLP: rows and columns
    equilibrated, Halpern's average of reflected steps, restarted as the residual of the fixed
    point shrinks, and at each restart a new ratio of the two step sizes.

    It stops when gap <= tol * (loss(center) - bound), the most that the loss can fall from the
    centre: a small fall is known to as many digits as a large one, and a minimum of 0 needs no
    case of its own. Where the centre is itself the minimum, a gap of 4 roundings of its loss is
    enough.

    Args:
        center_D: a point of the box; the middle by default.
        start: theta_D and dual_M to begin at, say of a box nearby.
        tol, max_steps: as above; both may be traced. Steps are counted in forties.
    Raises:
        ValueError: for shapes that do not fit; where values are concrete also for low_D above
            high_D, a centre outside, and data that are not finite.
    Source: Chambolle and Pock, JMIV 40, 2011; Lu and Yang, arXiv:2407.16144 (the restarts).
    """
    _check_box(problem, low_D, high_D)
    _check_concrete(problem)
    center_D = (low_D + high_D) / 2 if center_D is None else center_D
    if center_D.shape != low_D.shape or _known((center_D < low_D) | (center_D > high_D)):
        raise ValueError(f"center_D={center_D}, expected {low_D.shape[0]} values within the box")
    return _box_minimum(problem, low_D, high_D, center_D, start, tol, max_steps)


@jax.jit
def _box_minimum(problem, low_D, high_D, center_D, start, tol, max_steps) -> BoxMinimum:
    scaled = _equilibrate(problem.x_MD)
    programme = _programme(scaled, problem, center_D, low_D, high_D)
    shift_D, dual_M = _origin(programme)
    if start is not None:
        shift_D, dual_M = (start[0] - center_D) / scaled.column_D, start[1] / scaled.row_M
    found = _solve(programme, shift_D, dual_M, tol, max_steps)
    loss = _loss(programme)
    return BoxMinimum(
        loss - found.drop,
        loss - found.most,
        found.most - found.drop,
        jnp.clip(center_D + scaled.column_D * found.shift_D, low_D, high_D),
        scaled.row_M * found.dual_M,
        found.steps,
        found.converged,
    )


# Flatness of a diagonal network ------------------------------------------------------------------


def flatness(
    w_ND: jax.Array,
    problem: Problem,
    radius: Any,
    *,
    tol: Any = 1e-4,
    max_steps: Any = 20_000,
) -> Flatness:
    """L(w) less the smallest loss in the l_inf ball around w, certified by `gap`.

    Args:
        w_ND: weights, of a solution or any other; `check_solution` says which.
        radius: of the ball, from 0 up; may be traced, and batched under vmap.
        tol: gap asked for, relative to drop + gap; see `box_minimum`. In float32, drops below
            about 1e-6 of the loss are lost in the rounding of y - X theta.
        max_steps: of the method; the certificate holds however early it stops.
    Raises:
        ValueError: for shapes that do not fit; where values are concrete also for a radius below
            0, and for weights or data that are not finite.
    """
    _check_weights(w_ND, problem)
    _check_radius("radius", radius)
    _check_concrete(problem, w_ND)
    radius_1 = jnp.asarray(radius, w_ND.dtype)[None]
    return jax.tree.map(lambda part: part[0], _curve(w_ND, problem, radius_1, tol, max_steps))


def flatness_curve(
    w_ND: jax.Array,
    problem: Problem,
    radius_G: jax.Array,
    *,
    tol: Any = 1e-4,
    max_steps: Any = 20_000,
) -> Flatness:
    """`flatness` at each radius, with a leading axis G; each begins at the dual of the one before.

    Any order will do; radii that grow, or shrink, little by little are the quickest.

    Raises:
        ValueError: as `flatness`.
    """
    _check_weights(w_ND, problem)
    _check_radius("radius_G", radius_G, ndim=1)
    _check_concrete(problem, w_ND)
    return _curve(w_ND, problem, jnp.asarray(radius_G, w_ND.dtype), tol, max_steps)


@jax.jit
def _curve(w_ND, problem, radius_G, tol, max_steps) -> Flatness:
    scaled, theta_D = _equilibrate(problem.x_MD), models.product(w_ND)

    def one(dual_M: jax.Array | None, radius: jax.Array) -> tuple[jax.Array, Flatness]:
        low_D, high_D = reachable_box(w_ND, radius)
        programme = _programme(scaled, problem, theta_D, low_D, high_D)
        found = _solve(programme, jnp.zeros_like(theta_D), dual_M, tol, max_steps)
        loss = _loss(programme)
        near_D = jnp.clip(theta_D + scaled.column_D * found.shift_D, low_D, high_D)
        drop, gap = found.drop, found.most - found.drop
        return found.dual_M, Flatness(
            loss, loss - drop, drop, gap, radius, near_D, found.steps, found.converged
        )

    point = _programme(scaled, problem, theta_D, theta_D, theta_D)
    return jax.lax.scan(one, _origin(point)[1], radius_G)[1]


def largest_radius(
    w_ND: jax.Array,
    problem: Problem,
    *,
    drop: Any,
    bounds: tuple[Any, Any] = (1e-4, 1.0),
    num_halvings: int = 20,
    tol: Any = 1e-4,
    max_steps: Any = 20_000,
) -> RadiusRange:
    """Largest radius within which the loss falls by no more than `drop`, certified from both sides.

    Bisection of log radius between `bounds`; each programme is left as soon as it is decided.

    Raises:
        ValueError: as `flatness`, and where concrete for a drop below 0 or bounds that are not
            0 < bounds[0] < bounds[1].
    """
    _check_weights(w_ND, problem)
    _check_concrete(problem, w_ND)
    low, high = (jnp.asarray(bound, w_ND.dtype) for bound in bounds)
    if _known(~((low > 0) & (low < high) & jnp.isfinite(high))):
        raise ValueError(f"bounds={bounds}, expected 0 < bounds[0] < bounds[1]")
    drop = jnp.asarray(drop, w_ND.dtype)
    if _known(~(drop >= 0)):
        raise ValueError(f"drop={drop}, expected at least 0")
    return _largest_radius(w_ND, problem, drop, low, high, num_halvings, tol, max_steps)


@functools.partial(jax.jit, static_argnums=5)
def _largest_radius(w_ND, problem, drop, low, high, num_halvings, tol, max_steps) -> RadiusRange:
    scaled, theta_D = _equilibrate(problem.x_MD), models.product(w_ND)

    def halve(_: Any, carry: tuple) -> tuple:
        low, high, inside, outside, dual_M = carry
        radius = jnp.sqrt(low * high)
        programme = _programme(scaled, problem, theta_D, *reachable_box(w_ND, radius))
        found = _solve(programme, jnp.zeros_like(theta_D), dual_M, tol, max_steps, drop)
        inside = jnp.where(found.most <= drop, jnp.maximum(inside, radius), inside)
        outside = jnp.where(found.drop > drop, jnp.minimum(outside, radius), outside)
        within = found.drop + found.most <= 2 * drop  # a guess where neither is certain
        low, high = jnp.where(within, radius, low), jnp.where(within, high, radius)
        return low, high, inside, outside, found.dual_M

    dual_M = _origin(_programme(scaled, problem, theta_D, theta_D, theta_D))[1]
    carry = (low, high, jnp.zeros_like(low), jnp.full_like(low, jnp.inf), dual_M)
    return RadiusRange(*jax.lax.fori_loop(0, num_halvings, halve, carry)[2:4])


def check_solution(w_ND: jax.Array, theta_D: jax.Array, tol: float = 1e-5) -> None:
    """ValueError unless the layers multiply to theta_D, to `tol` of its largest entry.

    For weights that are claimed to be a true solution; it waits for the device.
    """
    _check_weights(w_ND)
    if theta_D.shape != w_ND.shape[1:]:
        raise ValueError(f"theta_D has shape {theta_D.shape}, w_ND needs {w_ND.shape[1:]}")
    off_D = jnp.abs(models.product(w_ND) - theta_D)
    if not off_D.max() <= tol * jnp.abs(theta_D).max():
        worst = int(jnp.argmax(off_D))
        raise ValueError(
            f"w_ND multiplies to {float(models.product(w_ND)[worst]):.6g} in coordinate {worst}, "
            f"expected theta_D[{worst}] = {float(theta_D[worst]):.6g} to a relative {tol}"
        )


def fit_slope(radius_G: jax.Array, drop_G: jax.Array, mask_G: jax.Array | None = None) -> jax.Array:
    """Slope of log drop against log radius by least squares; NaN with fewer than two points.

    About N at a balanced solution of N layers, and 1 at an unbalanced one.

    Args:
        mask_G: points to use, all by default; those of a drop of 0 or less are left out.
    """
    used_G = (drop_G > 0) & (radius_G > 0) & (True if mask_G is None else mask_G)
    x_G, y_G = (jnp.log(jnp.where(used_G, part, 1)) for part in (radius_G, drop_G))
    x_G = jnp.where(used_G, x_G - x_G.sum() / used_G.sum().astype(x_G.dtype), 0)
    return (x_G * y_G).sum() / (x_G * x_G).sum()


# Lower bounds for any model ----------------------------------------------------------------------


def sampled_lower_bound(
    key: jax.Array,
    weights: Any,
    problem: Problem | NetworkProblem,
    *,
    model: Model,
    radius: Any,
    samples: int,
) -> jax.Array:
    """Largest fall of the loss over random weights of the l_inf ball: a lower bound on the drop.

    Even samples are uniform in the ball, odd ones corners of it. At least 0, the fall at w itself.

    Raises:
        ValueError: for fewer than one sample, or a concrete radius below 0.
    """
    _check_count("samples", samples)
    flat_P, loss = _flat_loss(weights, problem, model, radius)

    def one(item: tuple[jax.Array, jax.Array]) -> jax.Array:
        return loss(flat_P + _offset(*item, flat_P, radius))

    items = jax.random.split(key, samples), jnp.arange(samples)
    loss_S = jax.lax.map(one, items, batch_size=min(samples, 64))
    return jnp.maximum(loss(flat_P) - loss_S.min(), 0)


def descent_lower_bound(
    key: jax.Array,
    weights: Any,
    problem: Problem | NetworkProblem,
    *,
    model: Model,
    radius: Any,
    steps: int,
    starts: int,
) -> jax.Array:
    """Largest fall that projected sub-gradient steps find in the ball: a lower bound on the drop.

    From w and from starts - 1 points drawn as in `sampled_lower_bound`, with the largest entry of
    a step shrinking from the radius to a millionth of it.

    Raises:
        ValueError: for fewer than one step or start, or a concrete radius below 0.
    """
    _check_count("steps", steps)
    _check_count("starts", starts)
    flat_P, loss = _flat_loss(weights, problem, model, radius)
    radius = jnp.asarray(radius, flat_P.dtype)
    low_P, high_P = flat_P - radius, flat_P + radius

    def descend(item: tuple[jax.Array, jax.Array]) -> jax.Array:
        key, index = item
        begin_P = flat_P + jnp.where(index > 0, _offset(key, index, flat_P, radius), 0)

        def step(carry: tuple, eta: jax.Array) -> tuple[tuple, None]:
            w_P, best = carry
            value, slope_P = jax.value_and_grad(loss)(w_P)
            largest = jnp.abs(slope_P).max()
            slope_P = slope_P / jnp.where(largest > 0, largest, 1)
            w_P = jnp.clip(w_P - eta * radius * slope_P, low_P, high_P)
            return (w_P, jnp.minimum(best, value)), None

        eta_T = jnp.geomspace(1, 1e-6, steps, dtype=flat_P.dtype)
        (w_P, best), _ = jax.lax.scan(step, (begin_P, loss(flat_P)), eta_T)
        return jnp.minimum(best, loss(w_P))

    best_S = jax.vmap(descend)((jax.random.split(key, starts), jnp.arange(starts)))
    return loss(flat_P) - best_S.min()


def _flat_loss(weights: Any, problem: Any, model: Model, radius: Any) -> tuple:
    _check_radius("radius", radius)
    flat_P, unravel = ravel_pytree(weights)
    return flat_P, lambda w_P: l1_loss(unravel(w_P), problem, model=model)


def _offset(key: jax.Array, index: jax.Array, like_P: jax.Array, radius: Any) -> jax.Array:
    part_P = jax.random.uniform(key, like_P.shape, like_P.dtype, -1, 1)
    return jnp.asarray(radius, like_P.dtype) * jnp.where(index % 2 > 0, jnp.sign(part_P), part_P)


# The primal-dual method --------------------------------------------------------------------------


class _Scaled(NamedTuple):
    x_MD: jax.Array  # diag(row) X diag(column)
    row_M: jax.Array
    column_D: jax.Array
    norm: jax.Array


class _Programme(NamedTuple):
    """min over d in [low, high] of sum_i cap_i |residual_i - (x d)_i|, where d = 0 is the centre.

    In shifts from the centre, so that a fall of 1e-12 of the loss keeps its digits.
    """

    x_MD: jax.Array
    residual_M: jax.Array
    cap_M: jax.Array
    low_D: jax.Array
    high_D: jax.Array
    norm: jax.Array


class _Found(NamedTuple):
    """The best d and its fall, the best u and the most that the loss can fall by."""

    shift_D: jax.Array
    drop: jax.Array
    dual_M: jax.Array
    most: jax.Array
    steps: jax.Array
    converged: jax.Array


class _Epoch(NamedTuple):
    """Where the iteration is, where its epoch began, and its residuals: first and last."""

    shift_D: jax.Array
    dual_M: jax.Array
    shift0_D: jax.Array
    dual0_M: jax.Array
    age: jax.Array
    weight: jax.Array
    first: jax.Array
    last: jax.Array


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")


def _equilibrate(x_MD: jax.Array) -> _Scaled:
    """Rows and columns brought to a mean square near 1, in the manner of Ruiz, and the norm."""

    def scale(_: Any, scales: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        row_M, column_D = scales
        square_MD = (row_M[:, None] * x_MD * column_D) ** 2
        row2_M, column2_D = square_MD.mean(1), square_MD.mean(0)
        return (
            row_M * jnp.where(row2_M > 0, row2_M, 1) ** -0.25,
            column_D * jnp.where(column2_D > 0, column2_D, 1) ** -0.25,
        )

    start = jnp.ones_like(x_MD[:, 0]), jnp.ones_like(x_MD[0])
    row_M, column_D = jax.lax.fori_loop(0, 10, scale, start)
    x_MD = row_M[:, None] * x_MD * column_D

    def power(_: Any, v_D: jax.Array) -> jax.Array:
        v_D = _matmul(_matmul(x_MD, v_D), x_MD)
        size = jnp.linalg.norm(v_D)
        return v_D / jnp.where(size > 0, size, 1)

    v_D = jax.random.normal(jax.random.key(0), x_MD.shape[1:], x_MD.dtype)
    norm = jnp.linalg.norm(_matmul(x_MD, jax.lax.fori_loop(0, 50, power, v_D)))
    # A power iteration ends a little low.
    return _Scaled(x_MD, row_M, column_D, 1.05 * jnp.where(norm > 0, norm, 1))


def _programme(
    scaled: _Scaled, problem: Problem, center_D: jax.Array, low_D: jax.Array, high_D: jax.Array
) -> _Programme:
    residual_M = problem.y_M - _matmul(problem.x_MD, center_D)
    # Rounding may leave the centre outside by a last digit.
    low_D, high_D = jnp.minimum(low_D - center_D, 0), jnp.maximum(high_D - center_D, 0)
    return _Programme(
        scaled.x_MD,
        scaled.row_M * residual_M,
        1 / (scaled.row_M * residual_M.shape[0]),
        low_D / scaled.column_D,
        high_D / scaled.column_D,
        scaled.norm,
    )


def _loss(programme: _Programme) -> jax.Array:
    return (programme.cap_M * jnp.abs(programme.residual_M)).sum()


def _origin(programme: _Programme) -> tuple[jax.Array, jax.Array]:
    dual_M = programme.cap_M * jnp.sign(programme.residual_M)
    return jnp.zeros_like(programme.low_D), dual_M


def _solve(
    programme: _Programme,
    shift_D: jax.Array,
    dual_M: jax.Array,
    tol: Any,
    max_steps: Any,
    threshold: Any = jnp.nan,
) -> _Found:
    """Until gap <= tol * most, or `threshold` is below the drop or above the most, or max_steps."""
    x_MD, residual_M, cap_M, low_D, high_D, norm = programme
    dtype = x_MD.dtype
    tol, threshold = jnp.asarray(tol, dtype), jnp.asarray(threshold, dtype)
    tiny = jnp.finfo(dtype).tiny
    # A gap below what rounds in the sums of `most_at` says nothing.
    width_D = jnp.maximum(-low_D, high_D)
    rounded = _loss(programme) / 8 + jnp.linalg.norm(width_D * _matmul(cap_M, jnp.abs(x_MD)))
    floor = jnp.finfo(dtype).eps * rounded

    def advance(d_D: jax.Array, u_M: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        new_D = jnp.clip(d_D + _matmul(u_M, x_MD) / (norm * weight), low_D, high_D)
        climb_M = (weight / norm) * (residual_M - _matmul(x_MD, 2 * new_D - d_D))
        return new_D, jnp.clip(u_M + climb_M, -cap_M, cap_M)

    # Row by row, |r| - |r - b|: no difference of losses, hence no cancellation.
    sign_M = jnp.where(residual_M < 0, -1, 1).astype(dtype)

    def drop_at(d_D: jax.Array) -> jax.Array:
        along_M = sign_M * _matmul(x_MD, d_D)
        return (cap_M * jnp.minimum(along_M, 2 * jnp.abs(residual_M) - along_M)).sum()

    def most_at(u_M: jax.Array) -> jax.Array:
        """L(centre) less the dual value of u; every term is at least 0."""
        q_D = _matmul(u_M, x_MD)
        slack_M = (cap_M - u_M * sign_M) * jnp.abs(residual_M)
        return slack_M.sum() + jnp.maximum(low_D * q_D, high_D * q_D).sum()

    def done(found: _Found) -> jax.Array:
        gap = found.most - found.drop
        decided = (found.drop > threshold) | (found.most <= threshold)
        return (gap <= jnp.maximum(tol * found.most, floor)) | decided

    def unfinished(carry: tuple[_Epoch, _Found]) -> jax.Array:
        return ~carry[1].converged & (carry[1].steps < max_steps)

    def look(carry: tuple[_Epoch, _Found]) -> tuple[_Epoch, _Found]:
        epoch, found = carry

        def step(i: jax.Array, point: tuple) -> tuple:
            new = advance(*point, epoch.weight)
            part = 1 / (epoch.age + i + 2).astype(dtype)
            anchor = (epoch.shift0_D, epoch.dual0_M)
            return tuple(
                part * a + (1 - part) * (2 * b - z)
                for a, b, z in zip(anchor, new, point, strict=True)
            )

        point = jax.lax.fori_loop(0, _CHECK_EVERY, step, (epoch.shift_D, epoch.dual_M))
        new_D, new_M = advance(*point, epoch.weight)
        steps, age = found.steps + _CHECK_EVERY, epoch.age + _CHECK_EVERY

        drop, most = drop_at(new_D), most_at(new_M)
        found = _Found(
            jnp.where(drop > found.drop, new_D, found.shift_D),
            jnp.maximum(drop, found.drop),
            jnp.where(most < found.most, new_M, found.dual_M),
            jnp.minimum(most, found.most),
            steps,
            found.converged,
        )
        found = found._replace(converged=done(found))

        # Restarts as PDLP's: much progress, some but no more, or a long time.
        d_D, u_M = new_D - point[0], new_M - point[1]
        square = epoch.weight * (d_D @ d_D) + u_M @ u_M / epoch.weight
        square -= 2 * u_M @ _matmul(x_MD, d_D) / norm
        residual = jnp.sqrt(jnp.maximum(square, 0))
        first = jnp.where(age == _CHECK_EVERY, jnp.minimum(residual, epoch.first), epoch.first)
        restart = (residual <= 0.2 * first) | ((residual <= 0.8 * first) & (residual > epoch.last))
        restart |= age.astype(dtype) >= 0.36 * steps.astype(dtype)
        moved_D = jnp.linalg.norm(new_D - epoch.shift0_D)
        moved_M = jnp.linalg.norm(new_M - epoch.dual0_M)
        both = restart & (moved_D > tiny) & (moved_M > tiny)
        ratio = jnp.where(both, moved_M, 1) / jnp.where(both, moved_D, 1)
        again = _Epoch(new_D, new_M, new_D, new_M, jnp.zeros_like(age), epoch.weight, first, first)
        again = again._replace(
            weight=jnp.where(both, jnp.sqrt(ratio * epoch.weight), epoch.weight),
            first=residual,
            last=residual,
        )
        on = _Epoch(*point, epoch.shift0_D, epoch.dual0_M, age, epoch.weight, first, residual)
        return jax.tree.map(lambda a, b: jnp.where(restart, a, b), again, on), found

    # The first ratio of the step sizes: how far duals may go, to how far most coordinates may.
    typical = jnp.nanmedian(jnp.where(width_D > 0, width_D, jnp.nan))
    reach = jnp.fmin(typical * width_D.shape[0] ** 0.5, jnp.linalg.norm(residual_M) / norm)
    weight = jnp.linalg.norm(cap_M) / jnp.where(reach > tiny, reach, 1)
    shift_D, dual_M = jnp.clip(shift_D, low_D, high_D), jnp.clip(dual_M, -cap_M, cap_M)
    infinite = jnp.full_like(weight, jnp.inf)
    start = (shift_D, dual_M, shift_D, dual_M, jnp.int32(0), weight, infinite, infinite)
    drop, most = drop_at(shift_D), most_at(dual_M)
    found = _Found(
        jnp.where(drop > 0, shift_D, 0),
        jnp.maximum(drop, 0),
        dual_M,
        most,
        jnp.int32(0),
        jnp.asarray(False),
    )
    found = found._replace(converged=done(found))
    return jax.lax.while_loop(unfinished, look, (_Epoch(*start), found))[1]


# Checks ------------------------------------------------------------------------------------------


def _known(bad: Any) -> bool:
    """Whether any of these is true, where that is known already: not while tracing."""
    return not isinstance(bad, jax.core.Tracer) and bool(np.any(bad))


def _check_weights(w_ND: jax.Array, problem: Problem | None = None) -> None:
    if w_ND.ndim != 2 or w_ND.shape[0] < 1:
        raise ValueError(f"w_ND has shape {w_ND.shape}, expected (layers, coordinates)")
    if problem is not None and w_ND.shape[1] != problem.x_MD.shape[1]:
        raise ValueError(
            f"w_ND has shape {w_ND.shape}, expected {problem.x_MD.shape[1]} columns, as x_MD has"
        )


def _check_radius(name: str, radius: Any, ndim: int = 0) -> None:
    if jnp.ndim(radius) != ndim:
        raise ValueError(f"{name} has shape {jnp.shape(radius)}, expected {ndim} axes")
    if not isinstance(radius, jax.core.Tracer):
        bad = ~(np.isfinite(radius) & (np.asarray(radius) >= 0))
        if bad.any():
            raise ValueError(f"{name}={radius}, expected finite numbers, at least 0")


def _check_box(problem: Problem, low_D: Any, high_D: Any) -> None:
    wanted = problem.x_MD.shape[1:]
    for name, part in (("low_D", low_D), ("high_D", high_D)):
        if jnp.shape(part) != wanted:
            raise ValueError(f"{name} has shape {jnp.shape(part)}, expected {wanted}, as x_MD has")
        if _known(~jnp.isfinite(part)):
            raise ValueError(f"{name}={part}, expected finite numbers")
    if _known(low_D > high_D):
        raise ValueError(f"low_D={low_D} is above high_D={high_D}, expected low_D <= high_D")


def _check_concrete(problem: Problem, w_ND: Any = None) -> None:
    # Within a trace of jit, what is computed of known data is not known.
    if not any(isinstance(jnp.isfinite(part), jax.core.Tracer) for part in problem):
        check_finite(problem)
    if w_ND is not None and _known(~jnp.isfinite(w_ND)):
        raise ValueError("w_ND has a NaN or an infinity, expected finite numbers")


def _check_count(name: str, count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{name}={count!r}, expected a whole number, at least 1")

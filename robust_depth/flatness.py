"""How far the loss can fall near a solution of a diagonal network, exactly and with a certificate.

The products of all weights in an l_inf ball around w fill a box, so the smallest loss in the ball
is that of a linear programme, which `box` solves. Models without such a programme have lower
bounds on the drop only, those of `lower_bounds`.

Axes: N layers, D coordinates, M rows, G radii.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from robust_depth import box, models
from robust_depth.arguments import check_radius, known
from robust_depth.problems import Problem, check_finite


class Flatness(NamedTuple):
    """The loss falls by `drop` at least and `drop + gap` at most, from w within its ball.

    Attributes:
        loss, minimum: L(w), and the smallest loss found: minimum = loss - drop.
        drop, gap: certified, to rounding; exact far below the rounding of the loss itself.
        radius: of the ball, in each weight.
        theta_D: product of weights in the ball with that smallest loss.
        steps, converged: as in `box.BoxMinimum`.
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
    _check_layers(w_ND)
    check_radius("radius", radius)
    radius = jnp.asarray(radius, w_ND.dtype)
    low_D = high_D = jnp.ones_like(w_ND[0])
    for w_D in w_ND:
        ends_4D = jnp.stack([a * b for a in (low_D, high_D) for b in (w_D - radius, w_D + radius)])
        low_D, high_D = ends_4D.min(0), ends_4D.max(0)
    return low_D, high_D


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
        tol: gap asked for, relative to drop + gap; see `box.box_minimum`. In float32, drops below
            about 1e-6 of the loss are lost in the rounding of y - X theta.
        max_steps: of the method; the certificate holds however early it stops.
    Raises:
        ValueError: for shapes that do not fit; where values are concrete also for a radius below
            0, and for weights or data that are not finite.
    """
    _check_weights(w_ND, problem)
    check_radius("radius", radius)
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
    check_radius("radius_G", radius_G, ndim=1)
    return _curve(w_ND, problem, jnp.asarray(radius_G, w_ND.dtype), tol, max_steps)


@jax.jit
def _curve(w_ND, problem, radius_G, tol, max_steps) -> Flatness:
    scaled, theta_D = box.equilibrate(problem.x_MD), models.product(w_ND)

    def one(dual_M: jax.Array | None, radius: jax.Array) -> tuple[jax.Array, Flatness]:
        low_D, high_D = reachable_box(w_ND, radius)
        programme = box.programme_at(scaled, problem, theta_D, low_D, high_D)
        found = box.solve(programme, jnp.zeros_like(theta_D), dual_M, tol, max_steps)
        loss = programme.loss()
        near_D = jnp.clip(theta_D + scaled.column_D * found.shift_D, low_D, high_D)
        drop, gap = found.drop, found.most - found.drop
        return found.dual_M, Flatness(
            loss, loss - drop, drop, gap, radius, near_D, found.steps, found.converged
        )

    point = box.programme_at(scaled, problem, theta_D, theta_D, theta_D)
    return jax.lax.scan(one, point.dual_M(), radius_G)[1]


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
    low, high = (jnp.asarray(bound, w_ND.dtype) for bound in bounds)
    if known(~((low > 0) & (low < high) & jnp.isfinite(high))):
        raise ValueError(f"bounds={bounds}, expected 0 < bounds[0] < bounds[1]")
    drop = jnp.asarray(drop, w_ND.dtype)
    if known(~(drop >= 0)):
        raise ValueError(f"drop={drop}, expected at least 0")
    return _largest_radius(w_ND, problem, drop, low, high, num_halvings, tol, max_steps)


@functools.partial(jax.jit, static_argnums=5)
def _largest_radius(w_ND, problem, drop, low, high, num_halvings, tol, max_steps) -> RadiusRange:
    scaled, theta_D = box.equilibrate(problem.x_MD), models.product(w_ND)

    def halve(_: Any, carry: tuple) -> tuple:
        low, high, inside, outside, dual_M = carry
        radius = jnp.sqrt(low * high)
        programme = box.programme_at(scaled, problem, theta_D, *reachable_box(w_ND, radius))
        found = box.solve(programme, jnp.zeros_like(theta_D), dual_M, tol, max_steps, drop)
        inside = jnp.where(found.most <= drop, jnp.maximum(inside, radius), inside)
        outside = jnp.where(found.drop > drop, jnp.minimum(outside, radius), outside)
        within = found.drop + found.most <= 2 * drop  # a guess where neither is certain
        low, high = jnp.where(within, radius, low), jnp.where(within, high, radius)
        return low, high, inside, outside, found.dual_M

    dual_M = box.programme_at(scaled, problem, theta_D, theta_D, theta_D).dual_M()
    carry = (low, high, jnp.zeros_like(low), jnp.full_like(low, jnp.inf), dual_M)
    return RadiusRange(*jax.lax.fori_loop(0, num_halvings, halve, carry)[2:4])


def check_solution(w_ND: jax.Array, theta_D: jax.Array, tol: float = 1e-5) -> None:
    """ValueError unless the layers multiply to theta_D, to `tol` of its largest entry.

    For weights that are claimed to be a true solution; it waits for the device.
    """
    _check_layers(w_ND)
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


def _check_layers(w_ND: jax.Array) -> None:
    if w_ND.ndim != 2 or w_ND.shape[0] < 1:
        raise ValueError(f"w_ND has shape {w_ND.shape}, expected (layers, coordinates)")


def _check_weights(w_ND: jax.Array, problem: Problem) -> None:
    _check_layers(w_ND)
    if w_ND.shape[1] != problem.x_MD.shape[1]:
        raise ValueError(
            f"w_ND has shape {w_ND.shape}, expected {problem.x_MD.shape[1]} columns, as x_MD has"
        )
    check_finite(problem)
    if known(~jnp.isfinite(w_ND)):
        raise ValueError("w_ND has a NaN or an infinity, expected finite numbers")

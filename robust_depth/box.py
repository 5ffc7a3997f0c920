"""The smallest mean absolute residual over a box, exactly and with a certificate.

    min_theta (1/M) |y - X theta|_1   over   low <= theta <= high

is a linear programme, solved here on the device for many problems at once, together with a bound
from below.

Axes: D coordinates, M rows.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robust_depth.arguments import known
from robust_depth.problems import Problem, check_finite

_CHECK_EVERY = 40  # steps between looks at the gap; a look costs two steps


class BoxMinimum(NamedTuple):
    """The smallest mean absolute residual in a box lies between `bound` and `loss`.

    Attributes:
        loss, theta_D: the smallest one found, and where.
        bound, dual_M: the largest bound from below, and the u, |u| <= 1/M, that proves it.
        gap: loss - bound, without the cancellation of that difference.
        steps, converged: steps made, and whether the gap is as small as was asked, or as the
            rounding of the loss lets it be: `gap` tells.
    """

    loss: jax.Array
    bound: jax.Array
    gap: jax.Array
    theta_D: jax.Array
    dual_M: jax.Array
    steps: jax.Array
    converged: jax.Array


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
    check_finite(problem)
    center_D = (low_D + high_D) / 2 if center_D is None else center_D
    if center_D.shape != low_D.shape or known((center_D < low_D) | (center_D > high_D)):
        raise ValueError(f"center_D={center_D}, expected {low_D.shape[0]} values within the box")
    return _box_minimum(problem, low_D, high_D, center_D, start, tol, max_steps)


@jax.jit
def _box_minimum(problem, low_D, high_D, center_D, start, tol, max_steps) -> BoxMinimum:
    scaled = equilibrate(problem.x_MD)
    programme = programme_at(scaled, problem, center_D, low_D, high_D)
    shift_D, dual_M = jnp.zeros_like(center_D), programme.dual_M()
    if start is not None:
        shift_D, dual_M = (start[0] - center_D) / scaled.column_D, start[1] / scaled.row_M
    found = solve(programme, shift_D, dual_M, tol, max_steps)
    loss = programme.loss()
    return BoxMinimum(
        loss - found.drop,
        loss - found.most,
        found.most - found.drop,
        jnp.clip(center_D + scaled.column_D * found.shift_D, low_D, high_D),
        scaled.row_M * found.dual_M,
        found.steps,
        found.converged,
    )


# The primal-dual method --------------------------------------------------------------------------


class Scaled(NamedTuple):
    """X with its rows and columns scaled, and its spectral norm, a little over."""

    x_MD: jax.Array  # diag(row) X diag(column)
    row_M: jax.Array
    column_D: jax.Array
    norm: jax.Array


class Programme(NamedTuple):
    """min over d in [low, high] of sum_i cap_i |residual_i - (x d)_i|, where d = 0 is the centre.

    In shifts from the centre, so that a fall of 1e-12 of the loss keeps its digits.
    """

    x_MD: jax.Array
    residual_M: jax.Array
    cap_M: jax.Array
    low_D: jax.Array
    high_D: jax.Array
    norm: jax.Array

    def loss(self) -> jax.Array:
        """At the centre."""
        return (self.cap_M * jnp.abs(self.residual_M)).sum()

    def dual_M(self) -> jax.Array:
        """The u that attains the loss at the centre."""
        return self.cap_M * jnp.sign(self.residual_M)

    def drop(self, shift_D: jax.Array) -> jax.Array:
        """L(centre) less the loss at d.

        Row by row, |r| - |r - b|: no difference of losses, hence no cancellation.
        """
        along_M = self._sign_M() * _matmul(self.x_MD, shift_D)
        return (self.cap_M * jnp.minimum(along_M, 2 * jnp.abs(self.residual_M) - along_M)).sum()

    def most(self, dual_M: jax.Array) -> jax.Array:
        """L(centre) less the dual value of u; every term is at least 0."""
        q_D = _matmul(dual_M, self.x_MD)
        slack_M = (self.cap_M - dual_M * self._sign_M()) * jnp.abs(self.residual_M)
        return slack_M.sum() + jnp.maximum(self.low_D * q_D, self.high_D * q_D).sum()

    def _sign_M(self) -> jax.Array:
        return jnp.where(self.residual_M < 0, -1, 1).astype(self.x_MD.dtype)

    def width_D(self) -> jax.Array:
        """How far a coordinate may go from the centre."""
        return jnp.maximum(-self.low_D, self.high_D)

    def rounding(self) -> jax.Array:
        """Of the sums in `most`: a gap below it says nothing."""
        size = jnp.linalg.norm(self.width_D() * _matmul(self.cap_M, jnp.abs(self.x_MD)))
        return jnp.finfo(self.x_MD.dtype).eps * (self.loss() / 8 + size)

    def advance(
        self, shift_D: jax.Array, dual_M: jax.Array, weight: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """A step of d and of u; `weight` is the ratio of their sizes."""
        push_D = _matmul(dual_M, self.x_MD) / (self.norm * weight)
        new_D = jnp.clip(shift_D + push_D, self.low_D, self.high_D)
        climb_M = self.residual_M - _matmul(self.x_MD, 2 * new_D - shift_D)
        new_M = dual_M + (weight / self.norm) * climb_M
        return new_D, jnp.clip(new_M, -self.cap_M, self.cap_M)


class Found(NamedTuple):
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


def equilibrate(x_MD: jax.Array) -> Scaled:
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
    return Scaled(x_MD, row_M, column_D, 1.05 * jnp.where(norm > 0, norm, 1))


def programme_at(
    scaled: Scaled, problem: Problem, center_D: jax.Array, low_D: jax.Array, high_D: jax.Array
) -> Programme:
    """That of a box around a centre, in the scaled rows and columns."""
    residual_M = problem.y_M - _matmul(problem.x_MD, center_D)
    # Rounding may leave the centre outside by a last digit.
    low_D, high_D = jnp.minimum(low_D - center_D, 0), jnp.maximum(high_D - center_D, 0)
    return Programme(
        scaled.x_MD,
        scaled.row_M * residual_M,
        1 / (scaled.row_M * residual_M.shape[0]),
        low_D / scaled.column_D,
        high_D / scaled.column_D,
        scaled.norm,
    )


def solve(
    programme: Programme,
    shift_D: jax.Array,
    dual_M: jax.Array,
    tol: Any,
    max_steps: Any,
    threshold: Any = jnp.nan,
) -> Found:
    """Until gap <= tol * most, or `threshold` is below the drop or above the most, or max_steps."""
    dtype = programme.x_MD.dtype
    tol, threshold = jnp.asarray(tol, dtype), jnp.asarray(threshold, dtype)
    rounding = programme.rounding()

    def judged(found: Found) -> Found:
        gap = found.most - found.drop
        decided = (found.drop > threshold) | (found.most <= threshold)
        small = gap <= jnp.maximum(tol * found.most, rounding)
        return found._replace(converged=small | decided)

    def unfinished(carry: tuple[_Epoch, Found]) -> jax.Array:
        return ~carry[1].converged & (carry[1].steps < max_steps)

    def look(carry: tuple[_Epoch, Found]) -> tuple[_Epoch, Found]:
        epoch, found = carry
        step = functools.partial(_averaged_step, programme, epoch)
        point = jax.lax.fori_loop(0, _CHECK_EVERY, step, (epoch.shift_D, epoch.dual_M))
        new = programme.advance(*point, epoch.weight)
        drop, most = programme.drop(new[0]), programme.most(new[1])
        found = judged(
            found._replace(
                shift_D=jnp.where(drop > found.drop, new[0], found.shift_D),
                drop=jnp.maximum(drop, found.drop),
                dual_M=jnp.where(most < found.most, new[1], found.dual_M),
                most=jnp.minimum(most, found.most),
                steps=found.steps + _CHECK_EVERY,
            )
        )
        return _next_epoch(programme, epoch, point, new, found.steps), found

    shift_D = jnp.clip(shift_D, programme.low_D, programme.high_D)
    dual_M = jnp.clip(dual_M, -programme.cap_M, programme.cap_M)
    drop = programme.drop(shift_D)
    found = Found(
        shift_D=jnp.where(drop > 0, shift_D, 0),
        drop=jnp.maximum(drop, 0),
        dual_M=dual_M,
        most=programme.most(dual_M),
        steps=jnp.int32(0),
        converged=jnp.asarray(False),
    )
    start = _first_epoch(programme, shift_D, dual_M)
    return jax.lax.while_loop(unfinished, look, (start, judged(found)))[1]


def _first_epoch(programme: Programme, shift_D: jax.Array, dual_M: jax.Array) -> _Epoch:
    # The first ratio of the step sizes: how far duals may go, to how far most coordinates may.
    width_D, tiny = programme.width_D(), jnp.finfo(shift_D.dtype).tiny
    typical = jnp.nanmedian(jnp.where(width_D > 0, width_D, jnp.nan))
    residual = jnp.linalg.norm(programme.residual_M) / programme.norm
    reach = jnp.fmin(typical * width_D.shape[0] ** 0.5, residual)
    weight = jnp.linalg.norm(programme.cap_M) / jnp.where(reach > tiny, reach, 1)
    return _Epoch(
        shift_D=shift_D,
        dual_M=dual_M,
        shift0_D=shift_D,
        dual0_M=dual_M,
        age=jnp.int32(0),
        weight=weight,
        first=jnp.full_like(weight, jnp.inf),
        last=jnp.full_like(weight, jnp.inf),
    )


def _averaged_step(programme: Programme, epoch: _Epoch, i: jax.Array, point: tuple) -> tuple:
    """Halpern's: the reflected step, averaged with where the epoch began."""
    new = programme.advance(*point, epoch.weight)
    part = 1 / (epoch.age + i + 2).astype(programme.x_MD.dtype)
    return tuple(
        part * a + (1 - part) * (2 * b - z)
        for a, b, z in zip((epoch.shift0_D, epoch.dual0_M), new, point, strict=True)
    )


def _next_epoch(
    programme: Programme, epoch: _Epoch, point: tuple, new: tuple, steps: jax.Array
) -> _Epoch:
    """Goes on from `point`, or restarts from `new`, the step from it, with another weight."""
    age, tiny = epoch.age + _CHECK_EVERY, jnp.finfo(programme.x_MD.dtype).tiny
    (new_D, new_M), (d_D, u_M) = new, (new[0] - point[0], new[1] - point[1])
    square = epoch.weight * (d_D @ d_D) + u_M @ u_M / epoch.weight
    square -= 2 * u_M @ _matmul(programme.x_MD, d_D) / programme.norm
    residual = jnp.sqrt(jnp.maximum(square, 0))
    first = jnp.where(age == _CHECK_EVERY, jnp.minimum(residual, epoch.first), epoch.first)
    # Restarts as PDLP's: much progress, some but no more, or a long time.
    restart = (residual <= 0.2 * first) | ((residual <= 0.8 * first) & (residual > epoch.last))
    restart |= age.astype(residual.dtype) >= 0.36 * steps.astype(residual.dtype)
    moved_D = jnp.linalg.norm(new_D - epoch.shift0_D)
    moved_M = jnp.linalg.norm(new_M - epoch.dual0_M)
    both = restart & (moved_D > tiny) & (moved_M > tiny)
    ratio = jnp.where(both, moved_M, 1) / jnp.where(both, moved_D, 1)
    again = _Epoch(
        shift_D=new_D,
        dual_M=new_M,
        shift0_D=new_D,
        dual0_M=new_M,
        age=jnp.zeros_like(age),
        weight=jnp.where(both, jnp.sqrt(ratio * epoch.weight), epoch.weight),
        first=residual,
        last=residual,
    )
    on = epoch._replace(shift_D=point[0], dual_M=point[1], age=age, first=first, last=residual)
    return jax.tree.map(lambda a, b: jnp.where(restart, a, b), again, on)


def _check_box(problem: Problem, low_D: Any, high_D: Any) -> None:
    wanted = problem.x_MD.shape[1:]
    for name, part in (("low_D", low_D), ("high_D", high_D)):
        if jnp.shape(part) != wanted:
            raise ValueError(f"{name} has shape {jnp.shape(part)}, expected {wanted}, as x_MD has")
        if known(~jnp.isfinite(part)):
            raise ValueError(f"{name}={part}, expected finite numbers")
    if known(low_D > high_D):
        raise ValueError(f"low_D={low_D} is above high_D={high_D}, expected low_D <= high_D")

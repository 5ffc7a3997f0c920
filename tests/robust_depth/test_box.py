"""The programme against HiGHS and a grid, its certificate against its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from regressions import SOLUTIONS, regression

from robust_depth.box import box_minimum, box_minimum_lp
from robust_depth.flatness import reachable_box
from robust_depth.problems import Problem


def test_lp_against_a_grid():
    rng = np.random.default_rng(0)
    for dim, points in ((1, 20_001), (2, 401)):
        x_MD, y_M = rng.normal(size=(5, dim)), rng.normal(size=5)
        low_D, high_D = -rng.random(dim), rng.random(dim)
        axes = [np.linspace(a, b, points) for a, b in zip(low_D, high_D, strict=True)]
        theta_GD = np.stack(np.meshgrid(*axes), -1).reshape(-1, dim)
        loss_G = np.abs(y_M - theta_GD @ x_MD.T).mean(1)
        loss, theta_D = box_minimum_lp(Problem(x_MD, y_M, np.zeros(dim)), low_D, high_D)
        spacing = (high_D - low_D).max() / (points - 1)
        assert -1e-9 < loss_G.min() - loss < np.abs(x_MD).sum(1).mean() * spacing
        assert loss == pytest.approx(np.abs(y_M - x_MD @ theta_D).mean(), abs=1e-9)
        assert np.all((low_D <= theta_D) & (theta_D <= high_D))


RADII = (0.001, 0.03, 0.1, 0.3, 1.0)
CASES = [(name, depth) for name in SOLUTIONS for depth in range(1, 6)]


@functools.cache
def boxes(dtype):
    """Boxes of all cases and radii, their centres, and what HiGHS says; of one problem."""
    problem = regression(dtype=dtype)
    parts = []
    for name, depth in CASES:
        w_ND = SOLUTIONS[name](problem.theta_D, depth)
        for radius in RADII:
            low_D, high_D = reachable_box(w_ND, radius)
            highs = box_minimum_lp(problem, low_D, high_D)[0]
            parts.append((low_D, high_D, w_ND.prod(0), np.asarray(highs, dtype)))
    return problem, *(jnp.stack(part) for part in zip(*parts, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_box_minimum_against_highs(dtype):
    with jax.enable_x64(dtype == "float64"):
        problem, low_BD, high_BD, center_BD, highs_B = boxes(dtype)
        tol = {"float32": 1e-4, "float64": 1e-5}[dtype]
        solve = lambda a, b, c: box_minimum(problem, a, b, center_D=c, tol=tol)  # noqa: E731
        with jax.numpy_dtype_promotion("strict"):
            found = jax.vmap(solve)(low_BD, high_BD, center_BD)
        slack = {"float32": 3e-6, "float64": 1e-7}[dtype]  # roundings of a loss of about 1
        assert found.converged.all()
        assert found.loss.dtype == found.dual_M.dtype == dtype
        assert np.all(found.bound <= highs_B + slack)
        assert np.all(highs_B <= found.loss + slack)
        # The gap is relative to the fall from the centre, so that a loss of 0 is no special case.
        center_loss = jnp.abs(problem.y_M - problem.x_MD @ center_BD[0]).mean()
        most_B = center_loss - found.bound
        assert np.all(found.gap <= 1.01 * tol * most_B + slack / 30)
        assert np.all(found.loss - highs_B <= 1.01 * tol * most_B + slack)
        assert np.all(highs_B - found.bound <= 1.01 * tol * most_B + slack)
        ordinary_B = tol * most_B <= 1e-4 * highs_B
        assert ordinary_B.sum() >= 30
        np.testing.assert_allclose(found.loss[ordinary_B], highs_B[ordinary_B], rtol=1.02e-4)
        np.testing.assert_allclose(found.bound[ordinary_B], highs_B[ordinary_B], rtol=1.02e-4)

        # The certificate, from its definition.
        low_BD, high_BD, theta_BD, u_BM = (
            np.asarray(part, np.float64) for part in (low_BD, high_BD, found.theta_D, found.dual_M)
        )
        x_MD, y_M = np.asarray(problem.x_MD, np.float64), np.asarray(problem.y_M, np.float64)
        assert np.all((low_BD <= theta_BD) & (theta_BD <= high_BD))
        assert np.abs(u_BM).max() <= (1 + 1e-6) / 48
        q_BD = u_BM @ x_MD
        bound_B = u_BM @ y_M - np.maximum(low_BD * q_BD, high_BD * q_BD).sum(1)
        np.testing.assert_allclose(found.bound, bound_B, rtol=1e-5, atol=slack)
        loss_B = np.abs(y_M - theta_BD @ x_MD.T).mean(1)
        np.testing.assert_allclose(found.loss, loss_B, rtol=1e-5, atol=slack)


def test_certificate_holds_however_early_it_stops():
    problem, low_BD, high_BD, center_BD, highs_B = boxes("float32")
    solve = lambda a, b, c: box_minimum(problem, a, b, center_D=c, max_steps=80)  # noqa: E731
    found = jax.vmap(solve)(low_BD, high_BD, center_BD)
    assert np.all(found.steps <= 80)
    assert (~found.converged).sum() > 30
    assert np.all((found.bound <= highs_B + 3e-6) & (highs_B <= found.loss + 3e-6))
    assert np.median(found.gap) > 1e-5  # it did stop early


def test_vmap_equals_loop_and_warm_starts_help():
    problem, low_BD, high_BD, center_BD, _ = boxes("float32")
    solve = lambda a, b, c: box_minimum(problem, a, b, center_D=c)  # noqa: E731
    index = [12, 23, 44]
    batch = jax.vmap(solve)(low_BD, high_BD, center_BD)
    for i in index:
        alone = solve(low_BD[i], high_BD[i], center_BD[i])
        np.testing.assert_allclose(alone.loss, batch.loss[i], rtol=1e-4, atol=1e-4)
        assert np.all((alone.bound <= batch.loss[i] + 1e-6) & (batch.bound[i] <= alone.loss + 1e-6))
        assert abs(int(alone.steps) - int(batch.steps[i])) <= 0.5 * int(alone.steps)
        again = box_minimum(
            problem,
            low_BD[i],
            high_BD[i],
            center_D=center_BD[i],
            start=(alone.theta_D, alone.dual_M),
        )
        assert int(again.steps) < int(alone.steps) / 4


def test_minimum_of_zero_and_an_empty_box():
    """Both gaps that are relative to 0: there is nothing left, or nothing to gain."""
    problem = regression(outlier_fraction=0.0)
    two_D = jnp.full(60, 2.0)
    found = box_minimum(problem, -two_D, two_D)
    assert found.converged
    assert 0 <= float(found.loss) < 1e-4 * float(jnp.abs(problem.y_M).mean())
    point = box_minimum(problem, two_D, two_D)
    assert point.converged
    assert float(point.gap) == 0
    np.testing.assert_array_equal(point.theta_D, two_D)


def test_unlike_scales_and_a_column_of_zeros():
    with jax.enable_x64(True):
        problem = regression(dtype="float64")
        column_D, row_M = np.geomspace(1e-3, 1e3, 60), np.geomspace(0.1, 10, 48)
        column_D[7] = 0
        x_MD = row_M[:, None] * problem.x_MD * column_D
        problem = problem._replace(x_MD=x_MD, y_M=row_M * problem.y_M)
        bound_D = np.full(60, 0.5)
        found = box_minimum(problem, -bound_D, bound_D)
        highs = box_minimum_lp(problem, -bound_D, bound_D)[0]
        most = float(jnp.abs(problem.y_M).mean() - found.bound)
        assert found.converged
        assert highs - 1e-4 * most - 1e-6 <= found.bound <= highs + 1e-6
        assert highs - 1e-6 <= found.loss <= highs + 1e-4 * most + 1e-6


def test_wrong_requests():
    problem, zeros_D = regression(), jnp.zeros(60)
    wrong = [
        (r"low_D has shape \(59,\)", lambda: box_minimum(problem, zeros_D[1:], zeros_D)),
        (r"is above high_D", lambda: box_minimum(problem, zeros_D + 1, zeros_D)),
        (r"is above high_D", lambda: box_minimum_lp(problem, zeros_D + 1, zeros_D)),
        (r"high_D=.*inf", lambda: box_minimum(problem, zeros_D, zeros_D + jnp.inf)),
        (r"center_D=", lambda: box_minimum(problem, zeros_D, zeros_D, center_D=zeros_D + 1)),
    ]
    for message, call in wrong:
        with pytest.raises(ValueError, match=message):
            call()

"""Boxes against their corners, drops against HiGHS, and what depth does to them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from regressions import SOLUTIONS, regression

from robust_depth import flatness as F
from robust_depth import models
from robust_depth.box import box_minimum_lp


def corner_box(w_ND, radius):
    """From all 2^N corners, in the dtype of the weights."""
    corners = itertools.product((-radius, radius), repeat=len(w_ND))
    reached = np.stack([(w_ND + np.array(c, w_ND.dtype)[:, None]).prod(0) for c in corners])
    return reached.min(0), reached.max(0)


def highs_drop(w_ND, problem, radius):
    """Independent of the module but for HiGHS, which it calls, and in float64 throughout."""
    w_ND = np.asarray(w_ND, np.float64)
    minimum, _ = box_minimum_lp(problem, *corner_box(w_ND, float(radius)))
    x_MD, y_M = np.asarray(problem.x_MD, np.float64), np.asarray(problem.y_M, np.float64)
    return np.abs(y_M - x_MD @ w_ND.prod(0)).mean() - minimum


@pytest.mark.parametrize("depth", range(1, 6))
@pytest.mark.parametrize("radius", [0, 0.3, 2.0])
def test_box_is_that_of_the_corners(depth, radius):
    rng = np.random.default_rng(depth)
    w_ND = rng.normal(size=(depth, 40)).astype("float32")
    w_ND[rng.random(w_ND.shape) < 0.2] = 0
    w_ND[0, :3], w_ND[:, 3] = radius, -radius  # an interval that ends at 0, and all of them
    found_2D, wanted_2D = jax.jit(F.reachable_box)(w_ND, radius), corner_box(w_ND, radius)
    np.testing.assert_allclose(found_2D, wanted_2D, rtol=1e-5, atol=1e-6)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "depth",
    [pytest.param(1, marks=SLOW), 2, pytest.param(3, marks=SLOW), pytest.param(4, marks=SLOW), 5],
)
def test_deeper_is_flatter(depth):
    with jax.enable_x64(True):
        problem = regression(seed=depth, dtype="float64")
        w_2ND = jnp.stack([make(problem.theta_D, depth) for make in SOLUTIONS.values()])
        radius_G = jnp.geomspace(0.003, 0.03, 5)
        with jax.numpy_dtype_promotion("strict"):
            curve = jax.vmap(lambda w_ND: F.flatness_curve(w_ND, problem, radius_G))(w_2ND)
            slope_2 = jax.vmap(F.fit_slope, (0, 0))(curve.radius, curve.drop)
        assert curve.converged.all()
        assert np.all(curve.gap <= 1.01e-4 * (curve.drop + curve.gap))
        np.testing.assert_allclose(slope_2, [depth, 1], atol=0.1)
        for i, j in ((0, 4), (1, 0), (1, 4)):
            assert float(curve.drop[i, j]) == pytest.approx(
                highs_drop(w_2ND[i], problem, radius_G[j]), rel=1e-3, abs=2e-7
            )
        np.testing.assert_array_equal(curve.minimum, curve.loss - curve.drop)


def test_curve_is_the_flatness_of_each_radius_in_one_program():
    problem = regression()
    w_ND = models.balanced_solution(problem.theta_D, 3)
    radius_G = jnp.array([0.0, 0.2, 0.1, 0.5])
    curve = F.flatness_curve(w_ND, problem, radius_G)
    F.flatness(w_ND, problem, 0.7)
    programs = F._curve._cache_size()
    for i, radius in enumerate(radius_G):
        one = F.flatness(w_ND, problem, radius)
        assert float(one.drop) == pytest.approx(float(curve.drop[i]), rel=2e-4, abs=1e-7)
    F.flatness(w_ND + 0.1, regression(1), 0.3, tol=1e-2, max_steps=100)
    assert F._curve._cache_size() == programs
    inside = jax.jit(jax.vmap(lambda radius: F.flatness(w_ND, problem, radius)))(radius_G)
    np.testing.assert_allclose(inside.drop, curve.drop, rtol=2e-4, atol=1e-7)
    assert float(curve.drop[0]) == float(curve.gap[0]) == 0


def test_unique_minimum_is_flat_to_rounding():
    """With more rows than coordinates the truth is the only minimum: no ball has a lower loss."""
    problem = regression(num_rows=150)
    found = F.flatness(problem.theta_D[None], problem, 0.5)
    assert found.converged
    assert 0 <= float(found.drop) <= float(found.drop + found.gap) < 1e-5


@pytest.mark.parametrize("name", ["balanced", pytest.param("unbalanced", marks=SLOW)])
def test_largest_radius_against_a_dense_search(name):
    problem = regression()
    w_ND = SOLUTIONS[name](problem.theta_D, 2)
    dense = np.geomspace(0.05, 0.5, 30)
    drops = np.array([highs_drop(w_ND, problem, radius) for radius in dense])
    tolerance = float(np.sqrt(drops[14] * drops[15]))
    found = F.largest_radius(w_ND, problem, drop=tolerance)
    assert dense[14] < float(found.outside)
    assert float(found.inside) < dense[15]
    assert 1 < float(found.outside / found.inside) < 1.001
    assert highs_drop(w_ND, problem, found.inside) <= tolerance + 1e-6
    assert highs_drop(w_ND, problem, found.outside) >= tolerance - 1e-6

    never = F.largest_radius(w_ND, problem, drop=100.0)
    assert np.isinf(never.outside)
    assert float(never.inside) > 0.99
    always = F.largest_radius(w_ND, problem, drop=0.0, bounds=(0.5, 1.0))
    assert float(always.inside) == 0


def test_fit_slope():
    rng = np.random.default_rng(0)
    radius_G = np.geomspace(0.01, 1, 9).astype("float32")
    drop_G = (3 * radius_G**2.5 * np.exp(0.1 * rng.normal(size=9))).astype("float32")
    wanted = np.polyfit(np.log(radius_G[2:]), np.log(drop_G[2:]), 1)[0]
    mask_G = np.arange(9) > 0
    drop_G[0], drop_G[1] = 1e9, 0
    assert float(F.fit_slope(radius_G, drop_G, mask_G)) == pytest.approx(wanted, rel=1e-4)
    assert not np.isclose(F.fit_slope(radius_G, drop_G), wanted, rtol=0.1)
    assert np.isnan(F.fit_slope(radius_G[:1], radius_G[:1]))


def test_wrong_requests():
    problem = regression()
    w_ND = models.balanced_solution(problem.theta_D, 2)
    wrong = [
        (r"radius=-1, expected", lambda: F.flatness(w_ND, problem, -1)),
        (r"radius=nan, expected", lambda: F.flatness(w_ND, problem, float("nan"))),
        (r"radius has shape \(2,\)", lambda: F.flatness(w_ND, problem, jnp.ones(2))),
        (r"radius=-0.5, expected", lambda: F.reachable_box(w_ND, -0.5)),
        (r"radius_G=\[.*\], expected", lambda: F.flatness_curve(w_ND, problem, -np.ones(2))),
        (r"radius_G has shape \(\)", lambda: F.flatness_curve(w_ND, problem, 0.1)),
        (r"w_ND has shape \(60,\)", lambda: F.flatness(problem.theta_D, problem, 0.1)),
        (r"shape \(2, 59\), expected 60", lambda: F.flatness(w_ND[:, 1:], problem, 0.1)),
        (r"w_ND has a NaN", lambda: F.flatness(w_ND.at[0, 0].set(jnp.nan), problem, 0.1)),
        (
            r"y_M\[3\] is inf",
            lambda: F.flatness(w_ND, problem._replace(y_M=problem.y_M.at[3].set(jnp.inf)), 0.1),
        ),
        (r"drop=-1.0, expected", lambda: F.largest_radius(w_ND, problem, drop=-1.0)),
        (
            r"bounds=\(1.0, 0.5\)",
            lambda: F.largest_radius(w_ND, problem, drop=0.1, bounds=(1.0, 0.5)),
        ),
    ]
    for message, call in wrong:
        with pytest.raises(ValueError, match=message):
            call()


def test_check_solution():
    problem = regression()
    w_ND = models.balanced_solution(problem.theta_D, 3)
    F.check_solution(w_ND, problem.theta_D)
    at = int(jnp.argmax(problem.theta_D))
    with pytest.raises(ValueError, match=rf"in coordinate {at}, expected theta_D\[{at}\] = 1 to"):
        F.check_solution(w_ND * (1 + 1e-3), problem.theta_D)
    F.check_solution(w_ND * (1 + 1e-3), problem.theta_D, tol=1e-2)
    with pytest.raises(ValueError, match="theta_D has shape"):
        F.check_solution(w_ND, problem.theta_D[1:])

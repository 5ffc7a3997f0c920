import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_depth import flatness as F
from robust_depth import method, models
from robust_depth.problems import Problem, sample_regression, sample_relu_teacher

SOLUTIONS = {"balanced": models.balanced_solution, "unbalanced": models.unbalanced_solution}


def regression(seed=0, dtype="float32", **options):
    """The setting of the paper's experiments, at its smallest size."""
    options = {"num_rows": 48, "dim": 60, "sparsity": 2, "dtype": dtype, **options}
    return sample_regression(jax.random.key(seed), **options)


def corner_box(w_ND, radius):
    """From all 2^N corners, in the dtype of the weights."""
    corners = itertools.product((-radius, radius), repeat=len(w_ND))
    reached = np.stack([(w_ND + np.array(c, w_ND.dtype)[:, None]).prod(0) for c in corners])
    return reached.min(0), reached.max(0)


def highs_drop(w_ND, problem, radius):
    """Independent of the module but for HiGHS, which it calls, and in float64 throughout."""
    w_ND = np.asarray(w_ND, np.float64)
    minimum, _ = F.box_minimum_lp(problem, *corner_box(w_ND, float(radius)))
    x_MD, y_M = np.asarray(problem.x_MD, np.float64), np.asarray(problem.y_M, np.float64)
    return np.abs(y_M - x_MD @ w_ND.prod(0)).mean() - minimum


# The box and its linear programme


@pytest.mark.parametrize("depth", range(1, 6))
@pytest.mark.parametrize("radius", [0, 0.3, 2.0])
def test_box_is_that_of_the_corners(depth, radius):
    rng = np.random.default_rng(depth)
    w_ND = rng.normal(size=(depth, 40)).astype("float32")
    w_ND[rng.random(w_ND.shape) < 0.2] = 0
    w_ND[0, :3], w_ND[:, 3] = radius, -radius  # an interval that ends at 0, and all of them
    found_2D, wanted_2D = jax.jit(F.reachable_box)(w_ND, radius), corner_box(w_ND, radius)
    np.testing.assert_allclose(found_2D, wanted_2D, rtol=1e-5, atol=1e-6)


def test_lp_against_a_grid():
    rng = np.random.default_rng(0)
    for dim, points in ((1, 20_001), (2, 401)):
        x_MD, y_M = rng.normal(size=(5, dim)), rng.normal(size=5)
        low_D, high_D = -rng.random(dim), rng.random(dim)
        axes = [np.linspace(a, b, points) for a, b in zip(low_D, high_D, strict=True)]
        theta_GD = np.stack(np.meshgrid(*axes), -1).reshape(-1, dim)
        loss_G = np.abs(y_M - theta_GD @ x_MD.T).mean(1)
        loss, theta_D = F.box_minimum_lp(Problem(x_MD, y_M, np.zeros(dim)), low_D, high_D)
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
        w_ND = np.asarray(SOLUTIONS[name](problem.theta_D, depth))
        for radius in RADII:
            low_D, high_D = corner_box(w_ND, radius)
            highs = F.box_minimum_lp(problem, low_D, high_D)[0]
            parts.append((low_D, high_D, w_ND.prod(0), np.asarray(highs, dtype)))
    return problem, *(jnp.stack(part) for part in zip(*parts, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_box_minimum_against_highs(dtype):
    with jax.enable_x64(dtype == "float64"):
        problem, low_BD, high_BD, center_BD, highs_B = boxes(dtype)
        tol = {"float32": 1e-4, "float64": 1e-5}[dtype]
        solve = lambda a, b, c: F.box_minimum(problem, a, b, center_D=c, tol=tol)  # noqa: E731
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
    solve = lambda a, b, c: F.box_minimum(problem, a, b, center_D=c, max_steps=80)  # noqa: E731
    found = jax.vmap(solve)(low_BD, high_BD, center_BD)
    assert np.all(found.steps <= 80)
    assert (~found.converged).sum() > 30
    assert np.all((found.bound <= highs_B + 3e-6) & (highs_B <= found.loss + 3e-6))
    assert np.median(found.gap) > 1e-5  # it did stop early


def test_vmap_equals_loop_and_warm_starts_help():
    problem, low_BD, high_BD, center_BD, _ = boxes("float32")
    solve = lambda a, b, c: F.box_minimum(problem, a, b, center_D=c)  # noqa: E731
    index = [12, 23, 44]
    batch = jax.vmap(solve)(low_BD, high_BD, center_BD)
    for i in index:
        alone = solve(low_BD[i], high_BD[i], center_BD[i])
        np.testing.assert_allclose(alone.loss, batch.loss[i], rtol=1e-4, atol=1e-4)
        assert np.all((alone.bound <= batch.loss[i] + 1e-6) & (batch.bound[i] <= alone.loss + 1e-6))
        assert abs(int(alone.steps) - int(batch.steps[i])) <= 0.5 * int(alone.steps)
        again = F.box_minimum(
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
    found = F.box_minimum(problem, -two_D, two_D)
    assert found.converged
    assert 0 <= float(found.loss) < 1e-4 * float(jnp.abs(problem.y_M).mean())
    point = F.box_minimum(problem, two_D, two_D)
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
        found = F.box_minimum(problem, -bound_D, bound_D)
        highs = F.box_minimum_lp(problem, -bound_D, bound_D)[0]
        most = float(jnp.abs(problem.y_M).mean() - found.bound)
        assert found.converged
        assert highs - 1e-4 * most - 1e-6 <= found.bound <= highs + 1e-6
        assert highs - 1e-6 <= found.loss <= highs + 1e-4 * most + 1e-6


# Flatness of a diagonal network


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


# Lower bounds for any model


def linear_twin(model):
    """A model of one layer, which is linear, and the problem that says so: an exact drop."""
    if model == method.RELU:
        teacher = sample_relu_teacher(
            jax.random.key(0), num_rows=48, dim=20, width=5, num_test=2, outlier_fraction=0.2
        )
        weights = models.init_relu(jax.random.key(1), depth=1, dim=20, width=5)
        x_MD = jnp.concatenate([teacher.x_MD, jnp.ones((48, 1))], 1)  # and the bias
        w_1D = jnp.concatenate([weights[0]["w"][:, 0], weights[0]["b"]])[None]
        return weights, teacher, w_1D, Problem(x_MD, teacher.y_M, w_1D[0])
    problem = regression(dim=25)
    weights = (
        problem.theta_D[None] if model == method.DIAGONAL else problem.theta_D.reshape(1, 5, 5)
    )
    return weights, problem, problem.theta_D[None], problem


@pytest.mark.parametrize(
    "model", [method.DIAGONAL, pytest.param(method.MATRIX, marks=SLOW), method.RELU]
)
def test_lower_bounds_against_the_exact_drop_of_one_layer(model):
    weights, problem, w_1D, twin = linear_twin(model)
    exact = F.flatness(w_1D, twin, 0.2)
    sampled = F.sampled_lower_bound(
        jax.random.key(2), weights, problem, model=model, radius=0.2, samples=500
    )
    descended = F.descent_lower_bound(
        jax.random.key(2), weights, problem, model=model, radius=0.2, steps=500, starts=2
    )
    most = float(exact.drop + exact.gap) + 1e-6
    assert 0 <= float(sampled) < float(descended) <= most
    assert float(descended) > 0.5 * float(exact.drop)
    still = F.descent_lower_bound(
        jax.random.key(2), weights, problem, model=model, radius=0.0, steps=3, starts=2
    )
    assert float(still) == 0


def test_lower_bounds_of_a_deep_diagonal_network():
    problem = regression()
    w_ND = models.balanced_solution(problem.theta_D, 2)
    exact = F.flatness(w_ND, problem, 0.3)
    options = {"model": method.DIAGONAL, "radius": 0.3}
    sampled, many = (
        float(F.sampled_lower_bound(jax.random.key(1), w_ND, problem, samples=samples, **options))
        for samples in (1, 1000)
    )
    one, starts = (
        float(
            F.descent_lower_bound(
                jax.random.key(1), w_ND, problem, steps=steps, starts=8, **options
            )
        )
        for steps in (1, 1000)
    )
    assert sampled <= many
    assert max(many, one) < starts <= float(exact.drop + exact.gap) + 1e-6
    assert starts > 0.3 * float(exact.drop)


# Bad input


def test_wrong_requests():
    problem = regression()
    w_ND = models.balanced_solution(problem.theta_D, 2)
    zeros_D = jnp.zeros(60)
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
        (r"low_D has shape \(59,\)", lambda: F.box_minimum(problem, zeros_D[1:], zeros_D)),
        (r"is above high_D", lambda: F.box_minimum(problem, zeros_D + 1, zeros_D)),
        (r"is above high_D", lambda: F.box_minimum_lp(problem, zeros_D + 1, zeros_D)),
        (r"high_D=.*inf", lambda: F.box_minimum(problem, zeros_D, zeros_D + jnp.inf)),
        (r"center_D=", lambda: F.box_minimum(problem, zeros_D, zeros_D, center_D=zeros_D + 1)),
        (r"drop=-1.0, expected", lambda: F.largest_radius(w_ND, problem, drop=-1.0)),
        (
            r"bounds=\(1.0, 0.5\)",
            lambda: F.largest_radius(w_ND, problem, drop=0.1, bounds=(1.0, 0.5)),
        ),
        (
            r"samples=0, expected",
            lambda: F.sampled_lower_bound(
                jax.random.key(0), w_ND, problem, model=method.DIAGONAL, radius=0.1, samples=0
            ),
        ),
        (
            r"starts=0, expected",
            lambda: F.descent_lower_bound(
                jax.random.key(0), w_ND, problem, model=method.DIAGONAL, radius=1, steps=1, starts=0
            ),
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

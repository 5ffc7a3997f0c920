"""Each baseline where it should work and where it should not; the LP against another solver."""

import functools
import itertools

import numpy as np
import pytest

pytest.importorskip("sklearn")

from sklearn.linear_model import QuantileRegressor

from robust_depth import baselines

EVERY = [getattr(baselines, n) for n in ("least_squares", "huber", "ransac", "lasso", "lad_lasso")]


def problem(seed, *, num_rows, dim, sparsity, outlier_fraction):
    rng = np.random.default_rng(seed)
    x_MD = rng.normal(size=(num_rows, dim))
    theta_D = np.zeros(dim)
    theta_D[:sparsity] = rng.choice([-1.0, 1.0], sparsity)
    y_M = x_MD @ theta_D
    bad = rng.permutation(num_rows)[: round(outlier_fraction * num_rows)]
    y_M[bad] += 10 * rng.normal(size=len(bad))
    return x_MD, y_M, theta_D


def error(fit, x_MD, y_M, theta_D):
    return np.linalg.norm(fit(x_MD, y_M) - theta_D) / np.linalg.norm(theta_D)


@pytest.mark.parametrize("fit", EVERY, ids=lambda f: f.__name__)
def test_clean_problems(fit):
    """With more rows than coordinates and no outliers all find the truth."""
    clean = problem(0, num_rows=60, dim=5, sparsity=5, outlier_fraction=0)
    # Cross-validated shrinkage stops at a thousandth of the largest penalty.
    assert error(fit, *clean) < (5e-2 if fit is baselines.lasso else 1e-3)


@pytest.mark.parametrize(
    ("fit", "bound"),
    [
        (baselines.huber, 1e-3),
        (baselines.ransac, 0.1),  # its threshold lets smaller outliers in
        (functools.partial(baselines.ransac, residual_threshold=1e-6), 1e-8),
        (baselines.lad_lasso, 1e-8),
    ],
    ids=["huber", "ransac", "tight ransac", "lad_lasso"],
)
def test_outliers_with_many_rows(fit, bound):
    corrupted = problem(1, num_rows=150, dim=5, sparsity=5, outlier_fraction=0.2)
    assert error(fit, *corrupted) < bound
    assert error(baselines.least_squares, *corrupted) > 0.2


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("p", [0.1, 0.2])
@pytest.mark.parametrize("shape", [(48, 60, 2), (60, 100, 3)])
def test_only_the_penalised_lp_solves_the_problems_of_the_paper(shape, p):
    num_rows, dim, sparsity = shape
    corrupted = problem(2, num_rows=num_rows, dim=dim, sparsity=sparsity, outlier_fraction=p)
    assert error(baselines.lad_lasso, *corrupted) < 1e-6
    for fit in EVERY[:-1]:
        if fit is baselines.ransac:
            fit = functools.partial(fit, max_trials=20)  # a thousand give no more
        theta_D = fit(*corrupted[:2])
        assert theta_D.shape == (dim,)
        assert np.linalg.norm(theta_D - corrupted[2]) > 0.1 * np.linalg.norm(corrupted[2])


def test_least_squares_has_minimum_norm():
    x_MD, y_M, _ = problem(3, num_rows=8, dim=20, sparsity=2, outlier_fraction=0)
    theta_D = baselines.least_squares(x_MD, y_M)
    np.testing.assert_allclose(x_MD @ theta_D, y_M)
    null_D = np.linalg.svd(x_MD)[2][8:] @ theta_D
    np.testing.assert_allclose(null_D, 0, atol=1e-12)


def objective(x_MD, y_M, theta_D, penalty):
    return np.abs(y_M - x_MD @ theta_D).mean() + penalty * np.abs(theta_D).sum()


@pytest.mark.parametrize("penalty", [0.0, 0.05, 0.3, None])
def test_programme_of_lad_lasso_against_scikit_learn(penalty):
    x_MD, y_M, _ = problem(4, num_rows=30, dim=12, sparsity=4, outlier_fraction=0.2)
    ours_D = baselines.lad_lasso(x_MD, y_M, penalty=penalty)
    penalty = baselines.default_penalty(x_MD) if penalty is None else penalty
    theirs = QuantileRegressor(quantile=0.5, alpha=penalty / 2, fit_intercept=False)
    wanted = objective(x_MD, y_M, theirs.fit(x_MD, y_M).coef_, penalty)
    np.testing.assert_allclose(objective(x_MD, y_M, ours_D, penalty), wanted, rtol=1e-9)


def test_programme_of_lad_lasso_against_every_vertex():
    """A solution lies where D of the M + D planes y_i = x_i . theta, theta_j = 0 meet."""
    x_MD, y_M, _ = problem(5, num_rows=8, dim=3, sparsity=2, outlier_fraction=0.25)
    planes, levels = np.vstack([x_MD, np.eye(3)]), np.append(y_M, np.zeros(3))
    vertices = [
        np.linalg.solve(planes[list(rows)], levels[list(rows)])
        for rows in itertools.combinations(range(11), 3)
    ]
    for penalty in (0.0, 0.1, 0.5):
        least = min(objective(x_MD, y_M, theta_D, penalty) for theta_D in vertices)
        ours_D = baselines.lad_lasso(x_MD, y_M, penalty=penalty)
        np.testing.assert_allclose(objective(x_MD, y_M, ours_D, penalty), least, rtol=1e-9)


def test_default_penalty_follows_the_units():
    x_MD, y_M, theta_D = problem(6, num_rows=48, dim=60, sparsity=2, outlier_fraction=0.1)
    np.testing.assert_allclose(
        baselines.default_penalty(7 * x_MD), 7 * baselines.default_penalty(x_MD)
    )
    found_D = baselines.lad_lasso(1e3 * x_MD, 1e-2 * y_M)
    np.testing.assert_allclose(found_D, 1e-5 * theta_D, atol=1e-11)


def test_options_change_results():
    x_MD, y_M, _ = problem(7, num_rows=60, dim=5, sparsity=5, outlier_fraction=0.3)

    def differ(fit, **changes):
        return np.abs(fit(x_MD, y_M, **changes) - fit(x_MD, y_M)).max()

    assert differ(baselines.huber, epsilon=5.0) > 1e-3
    assert differ(baselines.huber, alpha=100.0) > 1e-3
    assert differ(baselines.ransac, residual_threshold=20.0) > 1e-3
    assert differ(baselines.ransac, max_trials=1, seed=3) > 1e-3
    assert differ(baselines.ransac, min_rows=40) > 1e-3
    assert differ(baselines.lasso, folds=3) > 1e-12
    assert differ(baselines.lad_lasso, penalty=2.0) > 1e-3


def test_ransac_without_agreement_is_least_squares():
    x_MD, y_M, _ = problem(8, num_rows=12, dim=3, sparsity=3, outlier_fraction=0.5)
    theta_D = baselines.ransac(x_MD, y_M, residual_threshold=0.0, min_rows=11, max_trials=5)
    np.testing.assert_array_equal(theta_D, baselines.least_squares(x_MD, y_M))


@pytest.mark.parametrize("fit", EVERY, ids=lambda f: f.__name__)
def test_wrong_requests(fit):
    x_MD = np.ones((4, 2))
    with pytest.raises(ValueError, match=r"shapes \(4, 2\) and \(3,\), expected \(M, D\) and"):
        fit(x_MD, np.ones(3))
    with pytest.raises(ValueError, match="y_M has entries that are not finite"):
        fit(x_MD, np.array([1, np.nan, 1, 1]))
    with pytest.raises(ValueError, match="penalty=-1, expected at least 0"):
        baselines.lad_lasso(x_MD, np.ones(4), penalty=-1)

"""Conventions of scikit-learn, and what depth does for recovery, through its interface."""

import warnings

import jax
import numpy as np
import pytest

pytest.importorskip("sklearn")

from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from robust_depth import problems
from robust_depth.estimator import RobustDepthRegressor

SHORT = {"num_steps": 300, "record_every": 100}


def problem(seed=0, *, num_rows=60, dim=100, sparsity=3, outlier_fraction=0.1):
    drawn = problems.sample_regression(
        jax.random.key(seed),
        num_rows=num_rows,
        dim=dim,
        sparsity=sparsity,
        outlier_fraction=outlier_fraction,
        truth="signed",
    )
    return tuple(np.asarray(part, np.float64) for part in drawn)


def error(model, theta_D):
    return np.linalg.norm(model.coef_ - theta_D) / np.linalg.norm(theta_D)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_conventions_of_scikit_learn():
    """It skips, itself, what needs pandas or the array API."""
    results = check_estimator(RobustDepthRegressor(), on_fail=None)
    failed = {r["check_name"]: r["exception"] for r in results if r["status"] == "failed"}
    assert not failed
    assert sum(r["status"] == "passed" for r in results) > 40


@pytest.mark.parametrize("seed", [0, 1])
def test_depth_3_recovers_where_depth_1_fits_outliers(seed):
    x_MD, y_M, theta_D = problem(seed)
    deep = RobustDepthRegressor(3).fit(x_MD, y_M + 4)
    shallow = RobustDepthRegressor(1).fit(x_MD, y_M + 4)
    assert error(deep, theta_D) < 0.1
    assert abs(deep.intercept_ - 4) < 0.1
    assert error(shallow, theta_D) > 0.5

    clean_MD = problem(seed + 10)[0]
    truth_M = clean_MD @ theta_D + 4
    assert deep.score(clean_MD, truth_M) > 0.98
    assert shallow.score(clean_MD, truth_M) < 0.5


def test_units_do_not_matter():
    x_MD, y_M, theta_D = problem(3)
    unit_D = np.logspace(-4, 4, 100)
    plain = RobustDepthRegressor().fit(x_MD, y_M)
    other = RobustDepthRegressor().fit(x_MD * unit_D + 3 * unit_D, 1e5 * y_M - 7e5)
    np.testing.assert_allclose(other.coef_ * unit_D / 1e5, plain.coef_, atol=0.01)
    # An intercept at X = 0 is far from the data here; a prediction is not.
    there_M = other.predict(x_MD * unit_D + 3 * unit_D)
    np.testing.assert_allclose(there_M / 1e5 + 7, plain.predict(x_MD), atol=0.05)
    assert error(plain, theta_D) < 0.1


def test_types_and_shapes():
    x_MD, y_M, _ = problem(num_rows=20, dim=4, sparsity=2)
    for dtype in (np.float64, np.float32):
        model = RobustDepthRegressor(num_steps=1000, record_every=50)
        assert model.fit(x_MD.astype(dtype), y_M.astype(dtype)) is model
        parts = {"coef_": (4,), "theta_path_": (20, 4), "loss_path_": (20,)}
        for name, shape in parts.items():
            part = getattr(model, name)
            assert type(part) is np.ndarray
            assert (part.shape, part.dtype) == (shape, dtype), name
        predicted_M = model.predict(x_MD.astype(dtype))
        assert type(predicted_M) is np.ndarray
        assert predicted_M.dtype == dtype
        assert type(model.intercept_) is float
    assert (model.n_iter_, model.n_features_in_) == (1000, 4)
    assert RobustDepthRegressor(**SHORT).fit(x_MD.tolist(), y_M.tolist()).coef_.dtype == np.float64


def test_path():
    """It begins at 0, its losses are those of its thetas, and it goes on to the result."""
    x_MD, y_M, _ = problem(num_rows=40, dim=6, sparsity=2)
    options = {"fit_intercept": False, "schedule": "constant", "record_every": 50}
    model = RobustDepthRegressor(num_steps=1000, **options).fit(x_MD, y_M)
    np.testing.assert_array_equal(model.theta_path_[0], 0)
    residual_RM = y_M - model.theta_path_ @ x_MD.T
    np.testing.assert_allclose(model.loss_path_, np.abs(residual_RM).mean(1), rtol=1e-5)
    shorter = RobustDepthRegressor(num_steps=500, **options).fit(x_MD, y_M)
    np.testing.assert_allclose(model.theta_path_[10], shorter.coef_, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(model.theta_path_[:10], shorter.theta_path_)
    assert np.abs(model.coef_).max() > 0.1


def test_clone_and_parameters():
    options = {
        "depth": 2, "step_size": 0.02, "num_steps": 300, "init_scale": 0.01, "scheme": "gaussian",
        "record_every": 100, "fit_intercept": False, "schedule": "constant", "random_state": 4,
    }  # fmt: skip
    model = RobustDepthRegressor(**options)
    assert model.get_params() == options
    x_MD, y_M, _ = problem(num_rows=20, dim=4, sparsity=2)
    coef_D = model.fit(x_MD, y_M).coef_
    copy = clone(model)
    assert not hasattr(copy, "coef_")
    np.testing.assert_array_equal(copy.fit(x_MD, y_M).coef_, coef_D)
    assert copy.set_params(depth=3).depth == 3
    piped = make_pipeline(StandardScaler(), RobustDepthRegressor(**SHORT)).fit(x_MD, y_M)
    assert piped.predict(x_MD).shape == (20,)


@pytest.mark.parametrize(
    "change",
    [
        {"depth": 2},
        {"step_size": 0.1},
        {"num_steps": 600},
        {"init_scale": 0.3},
        {"scheme": "gaussian"},
        {"scheme": "balanced"},
        {"fit_intercept": False},
        {"schedule": "constant"},
        {"schedule": "inverse_sqrt"},
    ],
    ids=str,
)
def test_each_option_changes_the_result(change):
    x_MD, y_M, _ = problem(num_rows=30, dim=4, sparsity=2)
    fits = [
        RobustDepthRegressor(**(SHORT | {"random_state": 0} | some)).fit(x_MD, y_M + 1)
        for some in ({}, change)
    ]
    assert np.abs(fits[0].coef_ - fits[1].coef_).max() > 1e-4


def test_randomness():
    x_MD, y_M, _ = problem(num_rows=20, dim=4, sparsity=2)

    def coef(seed, scheme="gaussian"):
        model = RobustDepthRegressor(scheme=scheme, init_scale=0.3, random_state=seed, **SHORT)
        return model.fit(x_MD, y_M).coef_

    np.testing.assert_array_equal(coef(0), coef(0))
    np.testing.assert_array_equal(coef(0), coef(np.random.RandomState(0)))
    assert np.abs(coef(0) - coef(1)).max() > 1e-4
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    np.testing.assert_array_equal(coef(None, "zero_first"), coef(5, "zero_first"))
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_columns_and_responses_that_do_not_vary():
    x_MD, y_M, _ = problem(num_rows=20, dim=4, sparsity=2)
    x_MD[:, 1] = 0.1
    model = RobustDepthRegressor(**SHORT).fit(x_MD, y_M)
    assert model.coef_[1] == 0
    assert np.isfinite(model.coef_).all()
    model.fit(x_MD, np.full(20, 0.3))
    np.testing.assert_array_equal(model.coef_, 0)
    assert model.intercept_ == 0.3
    mostly_M = np.where(np.arange(20) < 15, 0.3, y_M)  # the median deviation is 0
    assert np.isfinite(model.fit(x_MD, mostly_M).coef_).all()


def test_steps_too_large():
    x_MD, y_M, _ = problem(num_rows=20, dim=4, sparsity=2)
    model = RobustDepthRegressor(step_size=1e6, num_steps=100, record_every=10)
    with pytest.raises(ValueError, match=r"step_size=1000000.0: the method diverged by step \d+"):
        model.fit(x_MD, y_M)
    with pytest.raises(ValueError, match=r"sub-gradient had norm .* with a step size of"):
        model.fit(x_MD, y_M)
    linear = RobustDepthRegressor(1, step_size=10.0, schedule="constant", **SHORT)
    with pytest.warns(ConvergenceWarning, match=r"the loss rose from .* step_size=10.0 is too"):
        linear.fit(x_MD, y_M)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RobustDepthRegressor(**SHORT).fit(x_MD, y_M)


def test_divergence_after_the_last_record_is_seen():
    x_MD, y_M, _ = problem(num_rows=20, dim=4, sparsity=2)
    model = RobustDepthRegressor(step_size=1e6, num_steps=100, record_every=100)
    with pytest.raises(ValueError, match="the method diverged by step 100"):
        model.fit(x_MD, y_M)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth=0, expected a whole number, at least 1"),
        ({"depth": 2.5}, "depth=2.5, expected a whole number"),
        ({"num_steps": 250}, "record_every=100 does not divide num_steps=250"),
        ({"step_size": 0}, "step_size=0, expected more than 0"),
        ({"init_scale": 0.0}, "init_scale=0.0, expected more than 0"),
        ({"schedule": "cosine"}, "expected one of constant, geometric, inverse_sqrt"),
        ({"scheme": "ones"}, "expected one of zero_first"),
    ],
    ids=str,
)
def test_wrong_settings(options, message):
    x_MD, y_M, _ = problem(num_rows=20, dim=4, sparsity=2)
    with pytest.raises(ValueError, match=message):
        RobustDepthRegressor(**(SHORT | options)).fit(x_MD, y_M)


def test_wrong_data():
    x_MD, y_M, _ = problem(num_rows=20, dim=4, sparsity=2)
    model = RobustDepthRegressor(**SHORT)
    with pytest.raises(NotFittedError):
        model.predict(x_MD)
    broken_MD = x_MD.copy()
    broken_MD[3, 1] = np.nan
    with pytest.raises(ValueError, match="Input X contains NaN"):
        model.fit(broken_MD, y_M)
    with pytest.raises(ValueError, match="Input y contains infinity"):
        model.fit(x_MD, np.where(np.arange(20) == 3, np.inf, y_M))
    with pytest.raises(ValueError, match="X has 3 features, but RobustDepthRegressor is expecting"):
        model.fit(x_MD, y_M).predict(x_MD[:, :3])

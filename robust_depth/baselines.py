"""Other ways to fit y = X theta + s, on the host: functions from (x_MD, y_M) to theta_D.

None fits an intercept, and results are float64. `lad_lasso` is the one to beat: it solves the
problems of this package, more rows or fewer, exactly and in a fraction of a second.
`huber`, `ransac` and `lasso` need scikit-learn, which is imported when they are called.

Axes: M rows, D coordinates.
"""

import warnings
from typing import Any

import numpy as np


def least_squares(x_MD: Any, y_M: Any) -> np.ndarray:
    """min ||y - X theta||_2, and among those the theta of least norm."""
    x_MD, y_M = _arrays(x_MD, y_M)
    return np.linalg.lstsq(x_MD, y_M, rcond=None)[0]


def huber(x_MD: Any, y_M: Any, *, epsilon: float = 1.35, alpha: float = 1e-4) -> np.ndarray:
    """scikit-learn's HuberRegressor: squares for small residuals, absolute values for large ones.

    It has a ridge penalty and knows nothing of sparsity, so with M < D it fits outliers as well.

    Args:
        epsilon: residual, in units of a scale that is fitted too, at which the loss turns.
        alpha: ridge penalty.
    Warns:
        sklearn.exceptions.ConvergenceWarning, as it does, where 1000 iterations are too few.
    """
    from sklearn.linear_model import HuberRegressor

    x_MD, y_M = _arrays(x_MD, y_M)
    model = HuberRegressor(epsilon=epsilon, alpha=alpha, max_iter=1000, fit_intercept=False)
    return model.fit(x_MD, y_M).coef_


def ransac(
    x_MD: Any,
    y_M: Any,
    *,
    min_rows: int | None = None,
    residual_threshold: float | None = None,
    max_trials: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """scikit-learn's RANSACRegressor around least squares: the fit that most rows agree with.

    With M < D it cannot work: any D rows, or fewer, are fitted exactly, and no others agree. It
    then fits half the rows and what it returns is the best that it saw; least squares where no
    draw was acceptable.

    Args:
        min_rows: of a draw, by default the lesser of D and M / 2. All have to be clean, which
            one draw in (1 - p)^-min_rows is.
        residual_threshold: largest residual of a row that agrees, by default the median
            absolute deviation of y, which lets smaller outliers in; give less where noise is small.
        max_trials: most draws.
        seed: of the draws.
    """
    from sklearn.exceptions import UndefinedMetricWarning
    from sklearn.linear_model import LinearRegression, RANSACRegressor

    x_MD, y_M = _arrays(x_MD, y_M)
    num_rows, dim = x_MD.shape
    model = RANSACRegressor(
        LinearRegression(fit_intercept=False),
        min_samples=max(1, min(dim, num_rows // 2)) if min_rows is None else min_rows,
        residual_threshold=residual_threshold,
        max_trials=max_trials,
        random_state=seed,
    )
    try:
        with warnings.catch_warnings():  # of scores of a single row
            warnings.simplefilter("ignore", UndefinedMetricWarning)
            model.fit(x_MD, y_M)
    except ValueError as error:
        if "could not find a valid consensus set" not in str(error):
            raise
        return least_squares(x_MD, y_M)
    return model.estimator_.coef_


def lasso(x_MD: Any, y_M: Any, *, folds: int = 5) -> np.ndarray:
    """scikit-learn's LassoCV: sparse, with squared residuals, so not robust.

    Args:
        folds: of the cross-validation that chooses the penalty.
    """
    from sklearn.linear_model import LassoCV

    x_MD, y_M = _arrays(x_MD, y_M)
    return LassoCV(cv=folds, fit_intercept=False, max_iter=20_000).fit(x_MD, y_M).coef_


def default_penalty(x_MD: Any) -> float:
    """rms(X) sqrt(log(D + 1) / M) / 2, which depends neither on y nor on its outliers.

    The penalty has to exceed the push of corrupted rows on the coordinates off the support, of
    standard deviation sqrt(p/M) and D of them; and to stay below that of clean rows, about
    (1 - p) sqrt(2/pi) / sqrt(k), for a column of unit variance. Measured on 8 draws each of
    (M, D, k) = (48, 60, 2), (60, 100, 3), (120, 200, 4), (200, 20, 3) and (200, 20, 20) with
    p = .1, .2, .3, factors of .4 to 1 in place of 1/2 recover all but 0 to 3 of 8 (.7 and 1 fail
    for k = 20 at p = .3), .2 all at p = .1 only.
    """
    x_MD = np.asarray(x_MD, np.float64)
    num_rows, dim = x_MD.shape
    return float(np.sqrt(np.square(x_MD).mean()) * np.sqrt(np.log(dim + 1) / num_rows) / 2)


def lad_lasso(x_MD: Any, y_M: Any, *, penalty: float | None = None) -> np.ndarray:
    """l1-penalised least absolute deviations, solved exactly by the simplex method of HiGHS.

        min over theta of  (1/M) ||y - X theta||_1 + penalty ||theta||_1

    as a linear programme in theta = a - b and y - X theta = u - v with a, b, u, v >= 0.
    scikit-learn's QuantileRegressor(quantile=.5, alpha=penalty / 2) solves the same one.

    Args:
        penalty: >= 0, by default `default_penalty(x_MD)`.
    Raises:
        ValueError: for a negative penalty.
        RuntimeError: if HiGHS gives up, with its message.
    """
    from scipy.optimize import linprog
    from scipy.sparse import eye_array, hstack

    x_MD, y_M = _arrays(x_MD, y_M)
    num_rows, dim = x_MD.shape
    if penalty is None:
        penalty = default_penalty(x_MD)
    if not penalty >= 0:
        raise ValueError(f"penalty={penalty}, expected at least 0")
    cost = np.concatenate([np.full(2 * dim, penalty), np.full(2 * num_rows, 1 / num_rows)])
    eye_MM = eye_array(num_rows)
    fits = hstack([x_MD, -x_MD, eye_MM, -eye_MM], format="csr")
    result = linprog(cost, A_eq=fits, b_eq=y_M, bounds=(0, None), method="highs-ds")
    if result.x is None:
        raise RuntimeError(f"lad_lasso: HiGHS found no solution: {result.message}")
    return result.x[:dim] - result.x[dim : 2 * dim]


def _arrays(x_MD: Any, y_M: Any) -> tuple[np.ndarray, np.ndarray]:
    """float64 on the host, checked: solvers hang or abort on NaN."""
    x_MD, y_M = np.asarray(x_MD, np.float64), np.asarray(y_M, np.float64)
    if x_MD.ndim != 2 or y_M.shape != x_MD.shape[:1]:
        raise ValueError(f"shapes {x_MD.shape} and {y_M.shape}, expected (M, D) and (M,)")
    for name, part in {"x_MD": x_MD, "y_M": y_M}.items():
        if not np.isfinite(part).all():
            raise ValueError(f"{name} has entries that are not finite")
    return x_MD, y_M

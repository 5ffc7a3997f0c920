"""Means and their confidence intervals over repetitions.

Axes: R repetitions (seeds)
"""

from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean and its confidence interval over repetitions."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def interval(value_R: np.ndarray, *, level: float = 0.95) -> Interval:
    """Student's t interval of the mean over the first axis: mean +- t s / sqrt(R), s unbiased.

    With one repetition the interval is unknown, NaN.

    Raises:
        ValueError: if `level` is not between 0 and 1.
    """
    from scipy import stats

    value_R = np.asarray(value_R, np.float64)
    if not 0 < level < 1:
        raise ValueError(f"level={level}, expected between 0 and 1")
    count, mean = len(value_R), value_R.mean(0)
    if count < 2:
        return Interval(mean, mean * np.nan, mean * np.nan)
    half = stats.t.ppf((1 + level) / 2, count - 1) * value_R.std(0, ddof=1) / np.sqrt(count)
    return Interval(mean, mean - half, mean + half)

"""Intervals against scipy's."""

import numpy as np
import pytest
import scipy.stats

from modgrok import statistics


def test_interval_is_scipys():
    value_RX = np.random.default_rng(0).normal(size=(6, 3))
    mean, low, high = statistics.interval(value_RX, level=0.9)
    for x in range(3):
        wanted = scipy.stats.ttest_1samp(value_RX[:, x], 0).confidence_interval(0.9)
        np.testing.assert_allclose([low[x], high[x]], wanted)
    np.testing.assert_allclose(mean, value_RX.mean(0))
    assert np.isnan(statistics.interval(value_RX[:1]).low).all()
    with pytest.raises(ValueError, match="level=2, expected between 0 and 1"):
        statistics.interval(value_RX, level=2)

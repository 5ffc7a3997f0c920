"""From arrays to the scores of a page: shares beyond shuffles, and intervals of ratios."""

import itertools

import numpy as np
import pytest
import scipy.stats

from launch import modgrok_inspect_scores as scoring
from modgrok import fourier


def test_neurons_beyond_their_shuffles_are_one_in_twenty_by_chance():
    """Of 40 shuffles and the neuron, all alike: p <= .05 is one of the two largest of 41."""
    rng = np.random.default_rng(0)
    arrays = {"neuron_deviation_LF": np.ones((2, 20_000))}
    arrays["neuron_deviation_LF"][0, :100] = arrays["neuron_deviation_LF"][1] = 0
    for kind in ("log", "additive"):
        fit_LF = rng.uniform(size=(2, 20_000))
        fit_LF[0, 7], fit_LF[0, 700] = 3, 2
        arrays[f"neuron_{kind}_RLF"] = fit_LF[None]
        arrays[f"neuron_{kind}_null_ZLF"] = rng.uniform(size=(40, 2, 20_000))
        arrays[f"neuron_{kind}_mode_LF2"] = np.broadcast_to(
            np.arange(20_000)[:, None], (2, 20_000, 2)
        )
    found = scoring._neurons(arrays)
    for kind in ("log", "additive"):
        assert found[kind]["beyond_shuffled"][0] == pytest.approx(2 / 41, abs=0.006)
        # Neuron 7 fits best and is dead; in the second layer all are.
        np.testing.assert_array_equal(found[kind]["best_r2"], [2, np.nan])
        np.testing.assert_array_equal(found[kind]["best_mode"][0], [700, 700])


@pytest.mark.parametrize(("kind", "kept"), [("additive", 1 / 6), ("log", 1 / 15)])
def test_renamings_of_five_tokens_that_keep_every_fit(kind, kept):
    """What the page says of p = 5, from all 120 of them."""
    order_Zp = np.array(list(itertools.permutations(range(5))))
    value_Fpp = np.random.default_rng(0).normal(size=(7, 5, 5))
    renamed = value_Fpp[:, order_Zp[:, :, None], order_Zp[:, None]]
    best_FZ = np.asarray(fourier.pair_shares(renamed, modulus=5, kind=kind)).max(-1)
    same_FZ = np.isclose(best_FZ, best_FZ[:, :1], atol=1e-6)  # the first one renames nothing
    np.testing.assert_allclose(same_FZ.mean(1), kept)


def test_the_interval_of_a_ratio_is_that_of_its_part_where_the_whole_is_fixed():
    rng = np.random.default_rng(0)
    part_RX, whole_R1 = rng.normal(size=(6, 3)), rng.uniform(1, 2, size=(6, 1))
    found = scoring.ratio_interval(part_RX, np.full((6, 1), -2.0))
    for x in range(3):
        wanted = scipy.stats.ttest_1samp(part_RX[:, x] / -2, 0).confidence_interval(0.95)
        np.testing.assert_allclose([found.low[x], found.high[x]], wanted)
    fixed = scoring.ratio_interval(3 * whole_R1, whole_R1)
    np.testing.assert_allclose(np.ravel(fixed), 3)  # no interval, however the whole varies
    assert np.isnan(scoring.ratio_interval(part_RX, np.zeros((6, 1)))).all()

"""Sweeps against runs one by one, and what their records say."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from robust_depth import method, sweep
from robust_depth.sweep import Grid, Records, Setting

GRID = Grid(
    num_rows=16,
    dim=12,
    sparsity=2,
    depths=(1, 2, 4),
    scales=(0.1, 0.3),
    fractions=(0.0, 0.2),
    truth="signed",
    magnitude=(0.5, 2.0),
    scheme="gaussian",
    num_steps=60,
    record_every=20,
)
KEYS = sweep.trial_keys(jax.random.key(4), 0, 4)


@pytest.fixture(scope="module")
def records():
    return sweep.run_trials(KEYS, GRID)


@pytest.mark.parametrize("schedule", ["constant", "inverse_sqrt", "polyak"])
def test_every_setting_is_a_run_of_the_method(schedule):
    step_size = {
        "constant": 0.01,
        "inverse_sqrt": method.inverse_sqrt(0.05),
        "polyak": method.polyak(0.3),
    }[schedule]
    # Polyak's steps are so long that the rounding of one sign soon grows.
    grid = dataclasses.replace(GRID, num_steps=15, record_every=5) if schedule == "polyak" else GRID
    keys = KEYS[:2]
    found = sweep.run_trials(keys, grid, step_size=step_size)
    assert found.error_TSR.shape == found.loss_TSR.shape == (2, 12, 4)
    options = {"num_steps": grid.num_steps, "record_every": grid.record_every}
    for (trial, at), _ in np.ndenumerate(np.zeros((2, 12))):
        setting = grid.settings[at]
        problem = sweep.trial_problem(keys[trial], grid, setting.fraction)
        start = sweep.trial_start(keys[trial], grid, setting)
        state, info_R = method.run(start, problem, step_size=step_size, **options)
        wanted_R = [*info_R.error, method.relative_error(state.weights, problem)]
        np.testing.assert_allclose(found.error_TSR[trial, at], wanted_R, rtol=1e-3, atol=1e-5)
        wanted_R = [*info_R.loss, method.l1_loss(state.weights, problem)]
        np.testing.assert_allclose(found.loss_TSR[trial, at], wanted_R, rtol=1e-4)


def test_settings_are_all_combinations_with_their_default_start():
    grid = Grid(depths=(1, 3), fractions=(0.0, 0.1))
    assert grid.settings == (
        Setting(1, 1e-3, 0.0),
        Setting(1, 1e-3, 0.1),
        Setting(3, 0.1, 0.0),
        Setting(3, 0.1, 0.1),
    )
    np.testing.assert_array_equal(GRID.record_steps, [0, 20, 40, 60])


def test_a_trial_is_the_same_in_any_company(records):
    later = sweep.run_trials(sweep.trial_keys(jax.random.key(4), 2, 3), GRID)
    np.testing.assert_array_equal(later.error_TSR[0], records.error_TSR[2])
    assert np.abs(records.error_TSR[0] - records.error_TSR[1]).max() > 1e-2


def test_batches_and_devices_change_no_number(records):
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    for options in ({"together": 2}, {"together": 3}, {"mesh": mesh}):
        found = sweep.run_trials(KEYS, GRID, **options)
        np.testing.assert_allclose(found.error_TSR, records.error_TSR, rtol=1e-3, atol=1e-5)


def test_every_option_of_the_grid_changes_the_result(records):
    changes = {
        "truth": "nonnegative",
        "magnitude": (0.5, 3.0),
        "outlier_kind": "sign_flip",
        "outlier_scale": 3.0,
        "noise_scale": 0.5,
        "scheme": "zero_first",
    }
    for name, value in changes.items():
        other = sweep.run_trials(KEYS[:1], dataclasses.replace(GRID, **{name: value}))
        assert np.abs(other.loss_TSR[0] - records.loss_TSR[0]).max() > 1e-3, name


def test_the_best_record_is_chosen_by_loss():
    nan = np.nan
    loss_TSR = np.array([[[3.0, 1.0, 2.0]], [[nan, 5.0, nan]]])
    error_TSR = np.array([[[0.1, 0.7, 0.3]], [[0.2, 0.4, nan]]])
    best_TS = Records(loss_TSR, error_TSR).best_error_TS()
    np.testing.assert_allclose(best_TS, [[0.7], [0.4]])


def test_success_counts_not_a_number_as_failure():
    error_TS = np.array([[0.01, np.nan], [0.06, 0.04], [0.04, 0.01]])
    np.testing.assert_allclose(sweep.success_rate(error_TS), [2 / 3, 2 / 3])
    np.testing.assert_allclose(sweep.success_rate(error_TS, threshold=0.02), [1 / 3, 1 / 3])


def test_memory_grows_with_records_trials_and_batches():
    def need(trials=1, together=1, **changes):
        grid = dataclasses.replace(GRID, **changes)
        return sweep.memory_bytes(grid, trials=trials, together=together)

    records = 4 * 2 * 12 * 4  # bytes of loss and error of a trial
    assert need(trials=11) - need(trials=1) == 10 * records
    assert need(record_every=10) - need() == 4 * 2 * 12 * 3
    assert need(together=3) > need(together=2) > need()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depths": (0,)}, "depth=0, expected a whole number, at least 1"),
        ({"depths": ()}, r"depths=\(\), expected one value or more"),
        ({"depths": (2, 2)}, r"depths=\(2, 2\), expected one value or more, each once"),
        ({"fractions": (0.1, 1.0)}, "outlier_fraction=1.0, expected from 0 to less than 1"),
        ({"sparsity": 13}, "sparsity=13, expected 1 to dim=12"),
        ({"num_rows": 0}, "num_rows=0, expected"),
        ({"record_every": 7}, "record_every=7 does not divide num_steps=60"),
        ({"truth": "any"}, "truth='any', expected one of"),
        ({"outlier_kind": "any"}, "outlier_kind='any', expected one of"),
        ({"scheme": "any"}, "scheme='any', expected one of"),
    ],
)
def test_wrong_grids(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(GRID, **changes)


def test_wrong_calls():
    mesh = Mesh(np.array(jax.devices()[:3]), ("data",))
    with pytest.raises(ValueError, match="4 trials do not divide over 3 devices"):
        sweep.run_trials(KEYS, GRID, mesh=mesh)
    with pytest.raises(ValueError, match="together=0, expected at least 1"):
        sweep.run_trials(KEYS, GRID, together=0)

"""The benchmark compares equal work: every peer makes our steps, and HiGHS has our minima."""

import json
import math

import jax
import numpy as np
import pytest

from benchmarks import robust_depth as bench
from benchmarks import robust_depth_flatness, timing
from benchmarks.robust_depth_peers import STEP_SIZE, Peer, known_peers, numpy_loop, numpy_steps
from robust_depth import method, sweep


@pytest.fixture(autouse=True)
def two_depths(monkeypatch):
    monkeypatch.setattr(bench, "DEPTHS", (1, 3))  # less to compile


@pytest.fixture
def keys_T():
    return sweep.trial_keys(jax.random.key(0), 0, 4)


@pytest.fixture
def work(keys_T):
    return bench.make_workload(keys_T, bench.make_grid(bench.CHECK_STEPS, bench.CHECK_SCALE))


def test_numpy_makes_the_steps_of_the_method(work):
    problem = method.Problem(work.x_TMD[0], work.y_TM[0], np.ones(work.x_TMD.shape[2], "float32"))
    for start_ND in work.starts:
        state, _ = method.run(start_ND, problem, step_size=STEP_SIZE, num_steps=30)
        theta_D = numpy_steps(work.x_TMD[0], work.y_TM[0], start_ND, 30)
        np.testing.assert_allclose(theta_D, state.weights.prod(0), rtol=1e-4, atol=1e-7)


def test_the_check_is_where_losses_move_at_every_depth(work):
    """A start that no step leaves would make all agree with anything."""
    before_TS, after_TS = (numpy_loop(work, steps) for steps in (0, bench.CHECK_STEPS))
    assert (np.abs(after_TS / before_TS - 1) > 20 * bench.CHECK_ERROR).all()


def test_another_method_is_refused(keys_T):
    other = Peer(lambda work, steps: numpy_loop(work, steps - 5))
    with pytest.raises(RuntimeError, match="shorter: a loss after 50 steps differs from ours by"):
        bench.loss_errors(keys_T, {"shorter": other})


def test_sweep_rows_are_of_equal_losses_and_scaled_to_a_step_and_run(monkeypatch):
    make_grid, scale = bench.make_grid, bench.CHECK_SCALE
    monkeypatch.setattr(bench, "make_grid", lambda steps, _=None: make_grid(steps, scale))
    # The steps of the check, hence its program.
    rows, rates = bench.measure_sweep(4, bench.CHECK_STEPS, repetitions=1, product_size=64)
    by_solver = {row["solver"]: row for row in rows}
    assert list(by_solver) == [bench.OURS, "ours, 1 device", *known_peers()]
    loop = by_solver["numpy, trial by trial"]
    assert (loop["trials"], loop["steps"]) == (1, 25)
    assert loop["nanoseconds"] == pytest.approx(1e9 * loop["seconds"] / (1 * 25 * 2))
    for row in rows:
        assert row["loss_error"] < 1e-4
        assert row["over_ours"] == pytest.approx(
            row["nanoseconds"] / by_solver[bench.OURS]["nanoseconds"]
        )
        floor = 4 * 60 * 100 / max(rates.values())
        assert row["floor_percent"] == pytest.approx(1e11 * floor / row["nanoseconds"])
    assert_tabled(rows, bench.SWEEP_COLUMNS)


@pytest.mark.slow
def test_flatness_rows_are_of_equal_minima():
    rows = robust_depth_flatness.measure(12, 16, 0.1, problems=3, timed=2, repetitions=1)
    assert [row["solver"] for row in rows] == ["ours, float32", "ours, float64", "HiGHS"]
    assert rows[1]["accurate"] == "yes"
    assert rows[1]["gap"] < 1e-4
    assert max(row["minimum_error"] for row in rows[:2]) < 1e-4
    assert [row["problems"] for row in rows] == [3, 3, 2]
    for row in rows:
        over = rows[2]["milliseconds"] / row["milliseconds"]
        assert row["highs_over_this"] == pytest.approx(over)
    assert_tabled(rows, robust_depth_flatness.COLUMNS)


def assert_tabled(rows, columns):
    assert timing.table(rows, columns).count("\n") == 1 + len(rows)
    for row in rows:
        assert row.keys() <= columns.keys() | {"first_seconds", "repetition_seconds", "converged"}
        assert all(math.isfinite(x) for x in row.values() if isinstance(x, float))
        assert min(row["repetition_seconds"]) > 0


def test_main_writes_its_tables_and_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "start_jax", lambda: None)  # the suite has started it already
    flags = ["--linear_trials", "4", "--linear_steps", "20", "40", "--repetitions=1"]
    bench.main(["--parts", "linear", *flags, f"--json={tmp_path / 'r.json'}"])
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["machine"]["simulated_devices"] >= bench.DEVICES
    pairs = [(row["trials"], row["steps"]) for row in record["linear"]]
    assert pairs == [(4, 20), (4, 40)]
    for row in record["linear"]:
        runs = 2 * row["trials"] * row["steps"]
        assert row["nanoseconds"] == pytest.approx(1e9 * row["seconds"] / runs)
    assert "| trials | steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--trials=3", "3 trials: must be a multiple of the 2 devices"),
        ("--steps=0", "--steps=0: must be at least 1"),
        ("--timed=60", "--timed=60: there are 50 problems"),
    ],
)
def test_wrong_flags_end_with_status_2(flag, message, capsys):
    with pytest.raises(SystemExit) as ending:
        bench.main([flag])
    assert ending.value.code == 2
    assert message in capsys.readouterr().err

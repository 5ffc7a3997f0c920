"""The programs of one setting: their numbers are the library's, wrong requests write nothing."""

import functools

import jax
import numpy as np
import programs
import pytest
from programs import fixture_for, summary

from launch import robust_depth_run
from robust_depth import baselines, sweep, theory

assert_refused = functools.partial(programs.assert_refused, program="robust_depth_run")
program = fixture_for(robust_depth_run, "--devices=1")

SMALL = (
    "--rows=24",
    "--dim=20",
    "--sparsity=2",
    "--depths=1,3",
    "--steps=400",
    "--record_every=20",
    "--trials=3",
)
GRID = sweep.Grid(num_rows=24, dim=20, sparsity=2, depths=(1, 3), num_steps=400, record_every=20)


@pytest.fixture(scope="module")
def records():
    key = jax.random.fold_in(jax.random.key(0), 0)
    return sweep.run_trials(sweep.trial_keys(key, 0, 3), GRID)


def test_the_numbers_are_those_of_the_library(program, tmp_path, records):
    answer = program(*SMALL, "--chunk=2", f"--workdir={tmp_path}/run")
    said = summary(answer)
    assert list(said)[:4] == ["program", "workdir", "seconds", "steps"]
    assert said["steps"] == 400
    error_TSR = np.asarray(records.error_TSR)
    enter_TS = np.asarray(theory.entry_time(records.error_TSR, GRID.record_steps))
    for at, depth in enumerate(("1", "3")):
        np.testing.assert_allclose(said["relative_error"][depth], error_TSR[:, at, -1], rtol=1e-4)
        np.testing.assert_allclose(
            said["best_relative_error"][depth], records.best_error_TS()[:, at], rtol=1e-4
        )
        assert said["success_rate"][depth] == np.mean(error_TSR[:, at, -1] < 0.05)
        wanted = [None if np.isinf(t) else t for t in enter_TS[:, at]]
        assert said["entry_time"][depth] == wanted
    with np.load(tmp_path / "run" / "records.npz") as saved:
        np.testing.assert_allclose(saved["loss_TSR"], records.loss_TSR, rtol=1e-4)
        np.testing.assert_array_equal(saved["step"], GRID.record_steps)
    for name in ("error", "loss"):
        assert (tmp_path / "run" / "figures" / f"{name}.png").stat().st_size > 1000
    assert "2/3 trials" in answer[2]
    assert "3/3 trials" in answer[2]

    problem = sweep.trial_problem(
        sweep.trial_keys(jax.random.fold_in(jax.random.key(0), 0), 2, 3)[0], GRID, np.float32(0.1)
    )
    x_MD, y_M, theta_D = map(np.asarray, problem)
    off = np.linalg.norm(baselines.lad_lasso(x_MD, y_M) - theta_D) / np.linalg.norm(theta_D)
    assert said["baselines"]["lad_lasso"][2] == pytest.approx(off, abs=1e-6)
    assert set(said["baselines"]) == {"least_squares", "huber", "ransac", "lad_lasso"}


def test_devices_change_nothing(program, tmp_path, records):
    flags = (*SMALL, "--nobaselines", "--nofigures", "--devices=2")  # 3 trials do not divide
    said = summary(program(*flags, f"--workdir={tmp_path}/run"))
    for at, depth in enumerate(("1", "3")):
        np.testing.assert_allclose(
            said["relative_error"][depth], records.error_TSR[:, at, -1], rtol=1e-3
        )


@pytest.mark.parametrize(
    "flag",
    [
        "--truth=signed",
        "--magnitude=1,3",
        "--outlier_kind=sign_flip",
        "--outlier_scale=2",
        "--noise_scale=1",
        "--outlier_fraction=0.3",
        "--scheme=balanced",
        "--init_scale=0.5",
        "--schedule=inverse_sqrt",
        "--step_size=0.02",
        "--seed=1",
    ],
)
def test_every_flag_changes_the_result(flag, program, tmp_path, records):
    flags = (*SMALL, "--nobaselines", "--nofigures", flag)
    said = summary(program(*flags, f"--workdir={tmp_path}/run"))
    found_TS = np.array([said["relative_error"][depth] for depth in ("1", "3")]).T
    assert np.abs(found_TS - records.error_TSR[..., -1]).max() > 1e-3


def test_the_rate_of_a_geometric_schedule(program, tmp_path):
    flags = (*SMALL, "--trials=1", "--nobaselines", "--nofigures", "--schedule=geometric")
    found = [
        summary(program(*flags, f"--step_rate={rate}", f"--workdir={tmp_path}/{rate}"))
        for rate in (0.9, 0.99)
    ]
    assert found[0]["relative_error"] != found[1]["relative_error"]


def test_divergence_stops_with_step_and_norm(program, tmp_path):
    flags = (*SMALL, "--depths=4", "--step_size=1000", "--init_scale=1", "--scheme=balanced")
    status, out, err = program(*flags, "--nobaselines", f"--workdir={tmp_path}/run")
    assert (status, out) == (1, "")
    last = err.splitlines()[-1]
    assert "--step_size=1000: at depth 4 the method diverged by step" in last
    assert "the sub-gradient had norm" in last


def test_a_finished_run_gives_its_result_again(program, tmp_path, monkeypatch):
    flags = (*SMALL, "--trials=2", "--nobaselines", f"--workdir={tmp_path}/run")
    said = summary(program(*flags, "--nofigures"))
    monkeypatch.setattr(sweep, "run_trials", None)  # nothing is computed
    again = summary(program(*flags, "--chunk=1"))
    assert again["relative_error"] == said["relative_error"]
    assert (tmp_path / "run" / "figures" / "error.png").exists()
    assert_refused(
        program(*flags, "--outlier_scale=3"), "holds a run with other settings: outlier_scale is"
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--depths=0,1",), "--depths=0,1: expected a comma-separated list, each an integer"),
        (("--depths=2,2",), "--depths=2,2: expected one number or more, each once"),
        (("--depths=",), "--depths=: expected one number or more, each once"),
        (("--outlier_fraction=1",), "--outlier_fraction=1: expected numbers from 0 to less than 1"),
        (("--outlier_fraction=-0.1",), "--outlier_fraction=-0.1: expected a finite number at lea"),
        (("--sparsity=21",), "--sparsity=21: expected 1 to --dim=20"),
        (("--record_every=30",), "--record_every=30: expected a divisor of --steps=400"),
        (("--magnitude=2,1",), "--magnitude=2,1: expected two numbers, the smaller first"),
        (("--magnitude=0,0",), "--magnitude=0,0: expected sizes above 0"),
        (("--step_size=0",), "--step_size=0: expected a number above 0"),
        (("--truth=any",), "--truth=any: expected one of nonnegative, signed"),
        (("--devices=9",), "--devices=9: there are 8 cpu devices"),
        (("--chunk=0",), "--chunk=0: expected an integer at least 1"),
        (("--memory_gib=1e-9",), "--chunk=64: a call needs"),
        (("--trials=100000", "--memory_gib=0.01"), "--trials=100000: the records need"),
    ],
)
def test_bad_flags(flags, words, program, tmp_path):
    assert_refused(program(*SMALL, *flags, f"--workdir={tmp_path}/run"), words)
    assert not (tmp_path / "run").exists()


def test_a_foreign_folder_is_refused(program, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    assert_refused(program(*SMALL, f"--workdir={tmp_path}"), "holds files but no config.json")
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]

"""Sweeps that are killed, cut into shards, extended and put together again."""

import functools
import json

import jax
import numpy as np
import programs
import pytest
from programs import contents, fixture_for, summary

from launch import robust_depth_common, robust_depth_sweep
from robust_depth import sweep

assert_refused = functools.partial(programs.assert_refused, program="robust_depth_sweep")
program = fixture_for(robust_depth_sweep, "--devices=1")

SMALL = (
    "--rows=16",
    "--dim=12",
    "--sparsity=1",
    "--depths=1,2",
    "--outlier_fractions=0,0.2",
    "--init_scales=0.1,0.3",
    "--steps=100",
    "--record_every=50",
    "--chunk=3",
)
GRID = sweep.Grid(
    num_rows=16,
    dim=12,
    sparsity=1,
    depths=(1, 2),
    fractions=(0.0, 0.2),
    scales=(0.1, 0.3),
    num_steps=100,
    record_every=50,
)


@pytest.fixture(scope="module")
def error_TSR():
    key = jax.random.fold_in(jax.random.key(0), 0)
    return np.asarray(sweep.run_trials(sweep.trial_keys(key, 0, 8), GRID).error_TSR)


def errors(folder):
    with np.load(folder / "sweep.npz") as saved:
        return saved["error_TSR"]


def test_the_numbers_are_those_of_the_library(program, tmp_path, error_TSR):
    answer = program(*SMALL, "--trials=8", f"--workdir={tmp_path}/run")
    said = summary(answer)
    np.testing.assert_allclose(errors(tmp_path / "run"), error_TSR, rtol=1e-4, atol=1e-6)
    assert [(row["depth"], row["scale"], row["fraction"]) for row in said["settings"]] == [
        tuple(setting) for setting in GRID.settings
    ]
    for at, row in enumerate(said["settings"]):
        assert row["success_rate"] == np.mean(error_TSR[:, at, -1] < 0.05)
        assert row["median_error"] == pytest.approx(np.median(error_TSR[:, at, -1]), rel=1e-4)
    names = sorted(path.name for path in (tmp_path / "run" / "chunks").iterdir())
    assert names[0] == "trials-00000000-00000003.npz"
    assert len(names) == 3
    for name in ("success", "error_p0", "error_p0.2"):
        assert (tmp_path / "run" / "figures" / f"{name}.png").stat().st_size > 1000
    assert "8/8 trials" in answer[2]


def test_a_killed_sweep_goes_on(program, tmp_path, error_TSR, monkeypatch):
    """Interrupted in its second chunk, it runs what is missing and a damaged chunk again."""
    flags = (*SMALL, "--trials=8", f"--workdir={tmp_path}/run", "--nofigures")
    real = sweep.run_trials

    def counted(keys_T, *args, **options):
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(keys_T.shape[0])
        return real(keys_T, *args, **options)

    monkeypatch.setattr(sweep, "run_trials", counted)
    calls, stop = [], 2
    assert program(*flags)[0] == 130
    assert not (tmp_path / "run" / "sweep.npz").exists()
    first = tmp_path / "run" / "chunks" / "trials-00000000-00000003.npz"
    first.write_bytes(first.read_bytes()[:100])
    calls, stop = [], 10
    answer = program(*flags)
    assert summary(answer)["trials_taken_over"] == 3
    assert calls == [3, 3]  # the damaged chunk, and the two trials that were missing
    assert "left aside, it cannot be read" in answer[2]
    np.testing.assert_allclose(errors(tmp_path / "run"), error_TSR, rtol=1e-4, atol=1e-6)


def test_shards_are_merged_and_extended(program, tmp_path, error_TSR):
    for name, first, trials in (("a", 0, 3), ("b", 5, 3)):
        flags = (f"--first_trial={first}", f"--trials={trials}", f"--workdir={tmp_path / name}")
        summary(program(*SMALL, *flags, "--nofigures"))
    before = contents(tmp_path / "a"), contents(tmp_path / "b")
    merge = f"--merge={tmp_path}/a,{tmp_path}/b"
    said = summary(program(*SMALL, "--trials=8", merge, f"--workdir={tmp_path}/all"))
    assert said["trials_taken_over"] == 6
    np.testing.assert_allclose(errors(tmp_path / "all"), error_TSR, rtol=1e-4, atol=1e-6)
    assert (contents(tmp_path / "a"), contents(tmp_path / "b")) == before


def test_other_chunks_are_the_same_sweep(program, tmp_path, error_TSR):
    flags = (*SMALL, "--trials=5", f"--workdir={tmp_path}/run", "--nofigures")
    summary(program(*flags))
    (tmp_path / "run" / "chunks" / "trials-00000003-00000005.npz").unlink()
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:1]))  # unfinished
    said = summary(program(*flags, "--chunk=1"))
    assert said["trials_taken_over"] == 3
    np.testing.assert_allclose(errors(tmp_path / "run"), error_TSR[:5], rtol=1e-4, atol=1e-6)


def test_diverged_trials_are_failures_and_counted(program, tmp_path):
    flags = ("--depths=4", "--init_scales=1", "--scheme=balanced", "--step_size=1000")
    flags = (*SMALL, *flags, "--outlier_fractions=0.2", "--trials=3", f"--workdir={tmp_path}/run")
    (row,) = summary(program(*flags, "--nofigures"))["settings"]
    assert (row["diverged"], row["success_rate"], row["median_error"]) == (3, 0, None)


def test_gaps():
    there_T = np.array([0, 0, 1, 0, 1, 1, 0], bool)
    assert robust_depth_sweep._gaps(there_T) == [(0, 2), (3, 4), (6, 7)]
    assert robust_depth_sweep._gaps(np.ones(3, bool)) == []
    assert robust_depth_common.spans(2, 9, 3) == [(2, 5), (5, 8), (8, 9)]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--outlier_fractions=0.1,1",), "--outlier_fractions=0.1,1: expected numbers from 0 to"),
        (("--outlier_fractions=0.1,0.1",), "--outlier_fractions=0.1,0.1: expected one number or"),
        (("--init_scales=",), "--init_scales=: expected one number or more"),
        (("--depths=0",), "--depths=0: expected a comma-separated list, each an integer"),
        (("--merge=/nonexistent",), "--merge=/nonexistent: expected the folder of a sweep"),
        (("--first_trial=-1",), "--first_trial=-1: expected an integer at least 0"),
    ],
)
def test_bad_flags(flags, words, program, tmp_path):
    assert_refused(program(*SMALL, *flags, f"--workdir={tmp_path}/run"), words)
    assert not (tmp_path / "run").exists()


def test_another_grid_is_not_merged(program, tmp_path):
    summary(program(*SMALL, "--trials=1", f"--workdir={tmp_path}/a", "--nofigures"))
    flags = (*SMALL, "--outlier_scale=3", f"--merge={tmp_path}/a", f"--workdir={tmp_path}/b")
    assert_refused(program(*flags), f"--merge={tmp_path}/a: holds a run with other settings: outl")
    config = tmp_path / "a" / "config.json"
    config.write_text(json.dumps({"program": "isvd_link"}))
    flags = (*SMALL, f"--merge={tmp_path}/a", f"--workdir={tmp_path}/b")
    assert_refused(program(*flags), "belongs to isvd_link; expected a folder of robust_depth_sweep")
    assert not (tmp_path / "b").exists()

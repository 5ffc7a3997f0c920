"""Tests of launch/modgrok_train.py, most of them in this process, on one of its devices."""

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from programs import contents
from training_runs import (
    TINY,
    assert_refused,
    assert_same_run,
    final_state,
    losses,
    reports,
    settings,
)

from launch import modgrok_config, modgrok_setup, rundir
from launch.checkpoints import Checkpoints

# What the program says ---------------------------------------------------------------------------


def test_the_last_line_keeps_the_contract(program, tmp_path):
    workdir = tmp_path / "run"
    status, out, err = program(*TINY, f"--workdir={workdir}", "--figures")
    assert status == 0
    assert out.count("\n") == 1
    result = json.loads(out)
    assert (result["program"], result["workdir"]) == ("modgrok_train", str(workdir))
    assert (result["steps"], result["resumed_from"]) == (8, None)
    for name in ("seen_task_train", "seen_task_heldout", "unseen_task_train"):
        assert 0 <= result[f"accuracy_{name}"] <= 1
    assert 0 <= result["accuracy_unseen_task_heldout"] <= 1
    assert result["loss"] == losses(workdir)[8]
    assert result["seconds"] > 0
    assert result["steps_per_second"] > 0
    assert result["best_step"] in (4, 8)
    assert err.rstrip().splitlines()[-1].endswith(f"--workdir={workdir}")
    figures = {path.name for path in (workdir / "figures").iterdir()}
    assert figures == {"training.png", "shots.png", "tasks.png"}
    assert json.loads((workdir / "config.json").read_text())["width"] == 16
    assert [json.loads(row)["step"] for row in reports(workdir) if "loss" in row] == [2, 4, 6, 8]
    with np.load(workdir / "evaluation.npz") as arrays:
        accuracy_WS = arrays["unseen_train_accuracy_WS"]
    # Half of the unseen tasks chose the checkpoint; the others are reported.
    assert result["accuracy_unseen_task_train"] == pytest.approx(accuracy_WS[1::2, -1].mean())


def test_a_finished_run_says_it_again_without_training(program, finished):
    before = reports(finished)
    status, out, err = program(*TINY, f"--workdir={finished}")
    result = json.loads(out)
    assert status == 0
    assert (result["steps"], result["resumed_from"]) == (8, 8)
    assert result["loss"] == losses(finished)[8]
    assert result["steps_per_second"] is None
    assert "resuming at step 8" in err
    assert reports(finished) == before


def test_quiet_leaves_only_the_result(program, finished):
    status, out, err = program(*TINY, f"--workdir={finished}", "--quiet")
    assert (status, err) == (0, "")
    assert json.loads(out)["steps"] == 8


def test_without_matplotlib_there_are_no_figures_and_no_failure(program, finished, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, err = program(*TINY, f"--workdir={finished}", "--figures")
    assert status == 0
    assert "matplotlib is missing; pip install 'deeper[figures]'" in err
    assert json.loads(out.splitlines()[-1])["steps"] == 8
    assert not (finished / "figures").exists()


def test_without_a_workdir_each_run_gets_a_folder(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda *_: "now")
    folders = [json.loads(program(*TINY, "--steps=2")[1])["workdir"] for _ in range(2)]
    assert folders == ["runs/modgrok_train-now", "runs/modgrok_train-now-2"]
    assert all((tmp_path / folder / "config.json").exists() for folder in folders)


def test_help_explains_every_flag(program):
    status, out, err = program("--help")
    assert (status, err) == (0, "")
    for field in dataclasses.fields(modgrok_config.TrainConfig):
        assert f"--{field.name}" in out or f"--[no]{field.name}" in out
        assert field.metadata["help"].split()[0] in out
    assert "--preset=demo|small|paper_d2|paper_d4|paper_d6" in out


# Bad input ---------------------------------------------------------------------------------------

DEMO = ("--preset=demo",)  # p=7, 40 tasks, batch 280, width 128, 4 heads, 1600 steps
BAD = [
    (["--p=8"], "--p=8: expected a prime; near it are 2, 3, 5, 7, 11, 13"),
    (["--p=1"], "--p=1: expected an integer at least 2"),
    (["--p=seven"], "--p=seven: expected an integer"),
    (["--num_tasks=47"], "--num_tasks=47: expected 1 to 46"),
    (["--num_tasks=0"], "--num_tasks=0: expected an integer at least 1"),
    (["--num_tasks=18", "--task_rule=rectangular"], "--num_tasks=18: expected a multiple of 4"),
    (
        ["--num_tasks=44", "--batch=44", "--task_rule=rectangular"],
        "--p=7 --num_tasks=44 --task_rule=rectangular",
    ),
    (["--task_rule=round"], "--task_rule=round: expected one of random, rectangular"),
    (["--batch=250"], "--batch=250: expected a multiple of --num_tasks=40"),
    (["--batch=40", "--devices=3"], "--batch=40: expected a multiple of the 3 devices"),
    (["--micro_batches=9"], "--micro_batches=9: expected a divisor of --batch=280"),
    (
        ["--micro_batches=70", "--devices=8"],
        "--batch=280: expected a multiple of the 8 devices x --micro_batches=70",
    ),
    (["--shots=40"], "--shots=40: expected at most 39, the inputs to train on"),
    (["--shots=1"], "--shots=1: expected an integer at least 2"),
    (["--width=130"], "--width=130: expected a multiple of 2 x --heads=4"),
    (["--heads=3"], "--width=128: expected a multiple of 2 x --heads=3"),
    (["--heads=0"], "--heads=0: expected an integer at least 1"),
    (["--input_fraction=0"], "--input_fraction=0: leaves 0 of p^2=49 inputs"),
    (["--input_fraction=1"], "--input_fraction=1: leaves 49 of p^2=49 inputs"),
    (["--input_fraction=0.001"], "--input_fraction=0.001: leaves 0 of p^2=49 inputs"),
    (["--input_fraction=1.5"], "--input_fraction=1.5: expected a finite number at least 0"),
    (["--warmup_steps=1600"], "--warmup_steps=1600: expected less than --schedule_steps=1600"),
    (["--lr=nan"], "--lr=nan: expected a finite number"),
    (["--eval_sequences=4"], "--eval_sequences=4: expected two numbers"),
    (["--preset=huge"], "--preset=huge: expected one of demo, small"),
    (["--widht=64"], "--widht: unknown flag; did you mean --width"),
    (["width=64"], "'width=64': unexpected argument"),
    (["--flagfile=nowhere.flags"], "--flagfile=nowhere.flags: No such file"),
    (["--parallel=threads"], "--parallel=threads: expected one of jit, pmap, shard_map"),
    (["--devices=9"], "--devices=9: there are 8 cpu devices; expected 1 to 8"),
    (["--platform_devices=4"], "--platform_devices=4: jax runs already"),
    (["--num_processes=2"], "--num_processes=2 --process_id=-1: give all three"),
    (["--coordinator_address=localhost:1"], "give all three"),
]


@pytest.mark.parametrize(("args", "message"), BAD, ids=[" ".join(args) for args, _ in BAD])
def test_bad_input(program, tmp_path, monkeypatch, args, message):
    from launch import loop

    def reached(*_, **__):
        raise AssertionError("it was about to compile")

    monkeypatch.setattr(loop, "run", reached)
    monkeypatch.setattr(modgrok_setup, "state_maker", reached)
    monkeypatch.chdir(tmp_path)
    devices = [] if any("devices" in arg for arg in args) else ["--devices=1"]
    assert_refused(program(*DEMO, "--workdir=run", "--devices=0", *devices, *args), message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda path: (path.write_text("x"), path)[1],
        lambda path: (path.mkdir(), (path / "thesis.tex").write_text("x"), path)[2],
        lambda _: Path("/proc/here"),
        lambda _: "gs://bucket/run",
    ],
    ids=["file", "foreign", "unwritable", "remote"],
)
def test_bad_workdir(program, tmp_path, make):
    workdir = make(tmp_path / "place")
    before = sorted(tmp_path.rglob("*"))
    assert_refused(program(*TINY, f"--workdir={workdir}"), f"--workdir={workdir}: ", "expected")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_in_which_another_process_writes_is_refused(program, finished):
    before = contents(finished)
    with rundir.hold(finished):
        answer = program(*TINY, f"--workdir={finished}", "--steps=12")
    assert_refused(answer, f"--workdir={finished}: another process is writing there")
    assert contents(finished) == before


def test_a_folder_of_other_settings_is_refused(program, finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    answer = program(*TINY, f"--workdir={finished}", "--lr=0.5", "--shots=5", "--quiet")
    assert_refused(answer, "lr is 0.001 there and 0.5 here", "shots is 6 there and 5 here")
    assert "quiet" not in answer[2]
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--p=9", "--p=9: expected a prime"),
        ("--multiprocess=auto", "--multiprocess=auto: no cluster was found"),
    ],
)
def test_a_usage_error_of_a_real_process(tmp_path, flag, message):
    began = time.monotonic()
    args = ["-m", "launch.modgrok_train", flag, f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=60)
    assert_refused((done.returncode, done.stdout, done.stderr), message)
    assert not (tmp_path / "run").exists()
    assert time.monotonic() - began < 30


# Options -----------------------------------------------------------------------------------------


@pytest.fixture
def variant(program, tmp_path):
    """variant(*flags) -> the folder and result of four steps with them."""

    def call(*args):
        status, out, err = program(*TINY, "--steps=4", f"--workdir={tmp_path / 'run'}", *args)
        assert status == 0, err
        return tmp_path / "run", json.loads(out)

    return call


@pytest.mark.parametrize("flag", ["--remat", "--micro_batches=2", "--eval_rows=7", "--keep=1"])
def test_options_that_must_not_change_the_numbers(variant, finished, flag):
    workdir, _ = variant(flag)
    wanted = losses(finished)
    np.testing.assert_allclose(losses(workdir)[4], wanted[4], rtol=1e-5)


@pytest.mark.parametrize(
    "flag",
    [
        *("--dtype=bfloat16", "--optimizer=muon", "--reference_sampling", "--seed=1"),
        *("--task_rule=rectangular", "--weight_decay=9", "--extra_tokens=3", "--mlp_ratio=2"),
    ],
)
def test_options_that_change_the_training(variant, finished, flag):
    workdir, _ = variant(flag)
    there, wanted = losses(workdir), losses(finished)
    assert abs(there[4] / wanted[4] - 1) > 1e-6
    assert np.isfinite(there[4])


def test_averaging_changes_what_is_tested_and_not_the_training(variant, finished):
    workdir, _ = variant("--ema=0")
    assert losses(workdir)[4] == losses(finished)[4]
    step, arrays = final_state(workdir, args=(*TINY, "--ema=0"))
    _, averaged = final_state(finished)
    assert step == 4
    assert not any(".ema" in name or name.startswith("0.ema") for name in arrays)
    assert len(averaged) > len(arrays)


def test_select_changes_who_decides(variant, finished):
    workdir, result = variant("--select=unseen_heldout")
    rows = [json.loads(row) for row in reports(workdir)]
    wanted = [json.loads(row) for row in reports(finished)]
    deciding = [row["accuracy_deciding"] for row in rows if "accuracy_deciding" in row]
    usual = [row["accuracy_deciding"] for row in wanted if "accuracy_deciding" in row]
    assert deciding != usual[:2]
    assert result["best_score"] == deciding[1]


def test_a_target_ends_the_run(variant):
    _, result = variant("--steps=8", "--target=0.0", "--eval_every=2")
    assert result["steps"] == 2


# Resuming ----------------------------------------------------------------------------------------


def test_an_extended_run_is_the_longer_run(program, finished, tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    assert program(*TINY, workdir, "--steps=4")[0] == 0
    status, out, _ = program(*TINY, workdir)
    assert status == 0
    assert json.loads(out)["resumed_from"] == 4
    assert_same_run(tmp_path / "run", finished)


def test_extending_would_change_a_schedule_that_ends_with_the_run(program, finished, tmp_path):
    args = [arg for arg in TINY if "schedule" not in arg]
    workdir = f"--workdir={tmp_path / 'run'}"
    assert program(*args, workdir, "--steps=4")[0] == 0
    answer = program(*args, workdir, "--steps=8")
    assert_refused(answer, "schedule_steps is 4 there and 8 here")


def newest(workdir):
    return max((Path(workdir) / "checkpoints" / "latest").iterdir())


def damage(checkpoint):
    """Alter bytes inside the largest file."""
    path = max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    for at in range(len(data) // 4, len(data), len(data) // 4):
        data[at] ^= 0xFF
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_passed_over(program, finished, tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    assert program(*TINY, workdir, "--steps=6")[0] == 0
    damage(newest(tmp_path / "run"))
    status, out, err = program(*TINY, workdir)
    assert status == 0
    assert "checkpoint of step 6 is damaged" in err
    assert "falling back to step 4" in err
    assert json.loads(out)["resumed_from"] == 4
    assert_same_run(tmp_path / "run", finished)


def test_all_checkpoints_damaged(program, tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    assert program(*TINY, workdir, "--steps=6")[0] == 0
    for checkpoint in (tmp_path / "run" / "checkpoints" / "latest").iterdir():
        damage(checkpoint)
    before = sorted(p for p in tmp_path.rglob("*"))
    contents = reports(tmp_path / "run")
    assert_refused(program(*TINY, workdir), "every checkpoint is damaged")
    assert sorted(p for p in tmp_path.rglob("*")) == before
    assert reports(tmp_path / "run") == contents


@pytest.fixture
def rebested(finished, tmp_path):
    """rebested(step, said) -> a copy of the finished run with another best checkpoint.

    It is of `step` and has zeros for weights; the latest, of step 8, says that it is of `said`.
    """

    def call(step, said):
        workdir = tmp_path / "run"
        shutil.copytree(finished, workdir)
        cfg = settings(*TINY)
        like = modgrok_setup.abstract_state(cfg, modgrok_setup.make_parts(cfg))
        with Checkpoints(workdir / "checkpoints") as store:
            state, key = store.restore(like).state
            zeros = state._replace(ema=jax.tree.map(np.zeros_like, state.ema))
            store.save_best(step, (zeros, key), {"best_step": step, "best_score": 0.9})
            store.save(8, (state, key), {"best_step": said, "best_score": 0.9})
        return workdir

    return call


def zeros_were_tested(workdir):
    """Whether every answer was as likely as any other in the test at the end."""
    with np.load(workdir / "evaluation.npz") as arrays:
        return np.allclose(arrays["unseen_train_loss_WS"], np.log(5), rtol=1e-6)


def test_a_best_checkpoint_is_what_is_tested_and_named(program, rebested):
    workdir = rebested(4, 4)
    result = json.loads(program(*TINY, f"--workdir={workdir}")[1])
    assert (result["best_step"], result["best_score"]) == (4, 0.9)
    assert zeros_were_tested(workdir)


@pytest.mark.parametrize(("steps", "best"), [(8, -1), (12, 12)])
def test_a_damaged_best_checkpoint_is_put_aside_and_another_chosen(program, rebested, steps, best):
    """By the tests to come; the run had one of .9, which they do not reach."""
    workdir = rebested(4, 4)
    (checkpoint,) = (workdir / "checkpoints" / "best").iterdir()
    damage(checkpoint)
    before = list(contents(checkpoint).values())
    flags = (*TINY, f"--workdir={workdir}", f"--steps={steps}")
    status, out, err = program(*flags)
    assert status == 0
    assert "checkpoint of step 4 is damaged" in err.split("resuming at step 8")[0]
    assert json.loads(out)["best_step"] == best
    assert not zeros_were_tested(workdir)
    (aside,) = (workdir / "checkpoints" / "damaged" / "best").iterdir()
    assert list(contents(aside).values()) == before  # nothing is deleted
    if best > 0:
        assert final_state(workdir, "best")[0] == best
    status, again, err = program(*flags)
    assert (status, "is damaged" in err) == (0, False)
    assert json.loads(again)["best_step"] == best


def test_a_damaged_best_checkpoint_that_is_the_latest_too_is_saved_again(program, rebested):
    workdir = rebested(8, 8)
    (checkpoint,) = (workdir / "checkpoints" / "best").iterdir()
    damage(checkpoint)
    status, out, _ = program(*TINY, f"--workdir={workdir}", "--target=0.9")
    assert status == 0
    assert (json.loads(out)["best_step"], json.loads(out)["best_score"]) == (8, 0.9)
    assert not zeros_were_tested(workdir)
    step, arrays = final_state(workdir, "best")
    assert step == 8
    assert arrays.keys() == final_state(workdir)[1].keys()
    for name, value in final_state(workdir)[1].items():
        np.testing.assert_array_equal(arrays[name], value)


@pytest.mark.parametrize(("steps", "best"), [(8, -1), (12, 12)])
def test_the_best_checkpoint_of_a_step_that_was_not_made_again(program, rebested, steps, best):
    """As a kill between saving the best and the latest leaves it, and then another --target."""
    workdir = rebested(10, 4)
    flags = (*TINY, f"--workdir={workdir}", f"--steps={steps}", "--target=0.01")
    status, out, _ = program(*flags)
    result = json.loads(out)
    assert status == 0
    assert (result["steps"], result["best_step"]) == (steps, best)
    assert not zeros_were_tested(workdir)


def test_a_loss_that_is_no_number(program, tmp_path):
    flags = (*TINY, "--lr=1e30", "--log_every=1", "--checkpoint_every=1")
    for _ in range(2):  # a restart meets it again, from the last good checkpoint
        status, out, err = program(*flags, f"--workdir={tmp_path / 'run'}")
        assert (status, out) == (1, "")
        last = err.splitlines()[-1]
        assert "modgrok_train: the loss of step 2 is nan; last good checkpoint: step 1;" in last
        assert "smaller --lr" in last
        step, arrays = final_state(tmp_path / "run")
        assert step == 1
        floats = [x for x in arrays.values() if x.dtype.kind == "f"]
        assert all(np.isfinite(x).all() for x in floats)

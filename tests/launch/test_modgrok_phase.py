"""Diagrams that are killed, extended, merged, damaged, and spread over devices."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import programs
import pytest
from programs import contents, fixture_for, summary

from launch import (
    modgrok_phase,
    modgrok_phase_config,
    modgrok_phase_folder,
    modgrok_train,
    rundir,
)
from launch.modgrok_phase_trainer import Trainer
from modgrok import phase

assert_refused = functools.partial(programs.assert_refused, program="modgrok_phase")
program = fixture_for(modgrok_phase, "--devices=1")
train = fixture_for(modgrok_train, "--devices=1")

SMALL = (
    *("--p=5", "--num_tasks=4,8", "--input_fraction=0.8", "--layers=1", "--width=16", "--heads=2"),
    *("--shots=3", "--batch=16", "--optimizer=adamw", "--lr=3e-3", "--ema=0", "--warmup_steps=2"),
    *("--steps=4", "--schedule_steps=50", "--eval_every=2", "--checkpoint_every=2"),
    *("--eval_sequences=4,4", "--num_unseen=16"),
)


def saved(folder):
    with np.load(folder / "phase.npz") as file:
        return dict(file)


def steps_reported(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["step"] for row in rows]


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished diagram of two runs, not to be altered."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    argv = ["modgrok_phase", *SMALL, f"--workdir={folder}", "--quiet", "--devices=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*argv, "--compilation_cache="])
        with pytest.raises(SystemExit) as ended:
            modgrok_phase.cli()
    assert not ended.value.code
    return folder


def test_what_it_leaves(whole):
    x = saved(whole)
    assert x["accuracy_GC4"].shape == (2, 2, 4)
    assert x["step_C"].tolist() == [2, 4]
    assert x["num_tasks_G"].tolist() == [4, 8]
    assert np.isfinite(x["loss_GC"]).all()
    assert not list((whole / "checkpoints").iterdir())
    for name in ("phase_L1_best", "phase_L1_last", "transience_L1"):
        assert (whole / "figures" / f"{name}.png").stat().st_size > 5000
    assert len((whole / "metrics.jsonl").read_text().splitlines()) == 3  # two tests, the result


def test_diverged_runs_have_no_accuracy(program, tmp_path):
    """Not those of class 0, which argmax takes of NaN."""
    said = summary(program(*SMALL, "--lr=1e30", f"--workdir={tmp_path}/run"))
    x = saved(tmp_path / "run")
    assert said["diverged"] == 2
    assert x["best_step_G"].tolist() == [-1, -1]
    for name in ("accuracy_GC4", "deciding_GC2", "best_G4", "last_G4"):
        assert np.isnan(x[name]).all(), name
    assert {row["best_unseen_train"] for row in said["runs"]} == {None}


@pytest.mark.slow
def test_a_run_is_that_of_modgrok_train(train, tmp_path, whole):
    flags = [x for x in SMALL if not x.startswith(("--num_tasks", "--eval_rows"))]
    summary(
        train(
            *flags,
            "--num_tasks=8",
            "--weight_decay=0.3",
            "--log_every=2",
            "--nofigures",
            f"--workdir={tmp_path}/run",
        )
    )
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    rows = [row for row in rows if "accuracy_seen_train" in row and row["step"]]
    x = saved(whole)
    for c, row in enumerate(rows):
        seen = [row["accuracy_seen_train"], row["accuracy_seen_heldout"]]
        np.testing.assert_allclose(x["accuracy_GC4"][1, c, :2], seen, atol=1e-6)
        chosen = x["deciding_GC2"][1, c, 0], x["accuracy_GC4"][1, c, 2]
        wanted = row["accuracy_deciding"], row["accuracy_reported"]
        np.testing.assert_allclose(chosen, wanted, atol=1e-6)
    assert len(rows) == 2


def test_new_rows_train_new_runs_alone(program, tmp_path, whole, monkeypatch):
    """Extended in its folder, and put together from two folders that stay as they are."""
    trained = []
    real = Trainer.train

    def counted(self, depth, share, stop):
        trained.append([cell.num_tasks for cell in share.cells])
        return real(self, depth, share, stop)

    monkeypatch.setattr(Trainer, "train", counted)
    shutil.copytree(whole, tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # torn by a kill
    flags = (*SMALL, f"--workdir={tmp_path}/run", "--nofigures")
    said = summary(program(*flags, "--num_tasks=1,2,4,8"))
    assert (said["runs_taken_over"], said["runs_trained"]) == (2, 2)
    assert trained == [[1, 2]]
    assert steps_reported(tmp_path / "run") == [1, 2, 3, 4, 5, 6]  # twice two tests and a result
    x = saved(tmp_path / "run")
    assert x["num_tasks_G"].tolist() == [1, 2, 4, 8]
    assert_equal(
        {name: x[name][2:] for name in ("accuracy_GC4", "loss_GC")},
        {name: saved(whole)[name] for name in ("accuracy_GC4", "loss_GC")},
    )
    summary(program(*flags, "--num_tasks=1,2,4,8"))  # finished: its result is reported once more
    assert steps_reported(tmp_path / "run") == [1, 2, 3, 4, 5, 6, 7]
    before = contents(tmp_path / "run"), contents(whole)
    flags = (*SMALL, f"--workdir={tmp_path}/merged", "--nofigures", "--num_tasks=1,2,4,8")
    said = summary(program(*flags, f"--merge={tmp_path}/run,{whole}"))
    assert (said["runs_taken_over"], said["runs_trained"]) == (4, 0)
    assert (contents(tmp_path / "run"), contents(whole)) == before
    assert_equal(saved(tmp_path / "merged"), x)
    # From here on the folder has them itself; settings that change numbers are refused.
    assert summary(program(*flags, "--num_tasks=4"))["runs_taken_over"] == 1
    assert_refused(program(*flags, "--lr=1e-3"), "holds a run with other settings: lr is")


def test_damaged_files_are_said_and_made_again(program, tmp_path, whole):
    folder = tmp_path / "run"
    flags = (*SMALL, f"--workdir={folder}", "--nofigures", f"--merge={whole}")
    summary(program(*flags))
    for path in (folder / "phase.npz", next((folder / "runs").glob("L1-n8*"))):
        path.write_bytes(path.read_bytes()[:-200])
    status, out, err = program(*flags)
    said = summary((status, out, err))
    assert err.count("cannot be read") == 2
    assert "this run is trained again" in err
    assert said["runs_trained"] == 0  # the merged folder has it
    assert len(list((folder / "damaged").iterdir())) == 2
    assert_equal(saved(folder), saved(whole))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: {"accuracy_C4": x["accuracy_C4"] + 7}, "not between 0 and 1"),
        (lambda x: {"deciding_C2": x["deciding_C2"] - 1.5}, "not between 0 and 1"),
        (lambda x: {"loss_C": x["loss_C"].astype(str)}, "not of floats"),
        (lambda x: {"accuracy_C4": x["accuracy_C4"].astype(int)}, "not of floats"),
        (lambda x: {"loss_C": x["loss_C"][1:]}, "other shapes"),
        (lambda x: {"run": "L1-n8-a0.8-w0.3-s0"}, "it is that of L1-n8"),
        (lambda x: {"accuracy_C4": x["accuracy_C4"] * np.nan}, None),  # diverged
    ],
)
def test_what_a_file_of_a_run_may_hold(change, words, tmp_path, whole, capsys):
    cfg = modgrok_phase_config.PhaseConfig(steps=4, eval_every=2)
    cell = modgrok_phase_config.Cell(1, 4, 0.8, 0.3, 0)
    (tmp_path / "runs").mkdir()
    with np.load(whole / "runs" / f"{cell.name}.npz") as file:
        x = dict(file)
    np.savez(tmp_path / "runs" / f"{cell.name}.npz", **x | change(x))
    kept = modgrok_phase_folder.finished_run(cfg, tmp_path, cell, own=True)
    assert (kept is None) == bool(words)
    said = capsys.readouterr().err
    assert words in said if words else not said


@pytest.mark.slow
def test_spread_over_devices(tmp_path, monkeypatch, capsys, whole):
    argv = ["modgrok_phase", "--compilation_cache=", "--devices=2", *SMALL, "--nofigures"]
    monkeypatch.setattr(sys, "argv", [*argv, f"--workdir={tmp_path}/run"])
    with pytest.raises(SystemExit) as ended:
        modgrok_phase.cli()
    assert not ended.value.code
    assert "on 2 x cpu" in capsys.readouterr().err
    for name, x in saved(tmp_path / "run").items():
        if x.dtype.kind == "f":
            np.testing.assert_allclose(x, saved(whole)[name], atol=1e-6)


LONG = (*SMALL, "--steps=400", "--schedule_steps=900", "--checkpoint_every=20", "--nofigures")
LONG = (*LONG, "--num_tasks=2,4,8")
straight = []  # of the run that nothing stopped, once it was needed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "chunk"), [(signal.SIGKILL, 16), (signal.SIGTERM, 2)], ids=["SIGKILL", "SIGTERM"]
)
def test_killed_inside_a_chunk_it_ends_with_the_same_bits(signum, chunk, program, tmp_path):
    """Killed once the first checkpoint is there; the other life takes it up, whole or in two."""
    long = (*LONG, f"--workdir={tmp_path}/run")
    command = [sys.executable, "-m", "launch.modgrok_phase", *long]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    child = subprocess.Popen(
        [*command, "--compilation_cache="], stderr=subprocess.PIPE, env=environment, text=True
    )
    try:
        end = time.monotonic() + 120
        while not list((tmp_path / "run").glob("checkpoints/*/latest/*-step-[0-9]*0")):
            assert time.monotonic() < end
            time.sleep(0.05)
        child.send_signal(signum)
        _, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == (-signal.SIGKILL if signum == signal.SIGKILL else 143), err
    if signum == signal.SIGTERM:
        assert "stopped by SIGTERM at step" in err
    said = program(*long, f"--chunk={chunk}")
    summary(said)
    assert said[2].count("resuming at step") == -(-3 // chunk)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    if not straight:
        summary(program(*LONG, f"--workdir={tmp_path}/straight"))
        straight.append(saved(tmp_path / "straight"))
    assert_equal(saved(tmp_path / "run"), straight[0])


def test_a_chunk_cut_off_goes_on_in_smaller_ones(program, tmp_path, whole, monkeypatch):
    """Killed, narrowed and with a smaller --chunk, killed while saving, widened again."""
    calls, save_arrays = [], rundir.RunDir.save_arrays

    def report(self, layers, step, records, seconds):
        calls.append((step, len(records["loss"])))
        if step == cut_at:
            raise KeyboardInterrupt

    def save(self, name, **arrays):
        if name == cut_file:
            raise KeyboardInterrupt
        save_arrays(self, name, **arrays)

    monkeypatch.setattr(Trainer, "_report", report)
    monkeypatch.setattr(rundir.RunDir, "save_arrays", save)
    flags = (*SMALL, f"--workdir={tmp_path}/run", "--nofigures")
    cut_at, cut_file = 4, None
    assert program(*flags)[0] == 130
    assert calls == [(2, 2), (4, 2)]
    cut_at, calls = None, []
    said = program(*flags, "--num_tasks=8", "--chunk=1")
    assert summary(said)["runs_trained"] == 1
    assert "resuming at step 2" in said[2]
    cut_file = "runs/L1-n4-a0.8-w0.3-s0"
    assert program(*flags, "--chunk=1")[0] == 130
    assert len(list((tmp_path / "run" / "checkpoints").glob("*/latest"))) == 1
    cut_file = None
    summary(program(*flags, "--chunk=1"))
    assert calls == [(4, 1)] * 3  # from step 2 each time
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    assert_equal(saved(tmp_path / "run"), saved(whole))


def test_old_figures_go_when_others_are_drawn(program, tmp_path, whole):
    shutil.copytree(whole, tmp_path / "run")
    arrays = saved(whole)
    two_decays = {**arrays, "weight_decay_G": np.array([0.3, 1e-5])}
    drawn = modgrok_phase._draw({"phase": arrays}), modgrok_phase._draw({"phase": two_decays})
    figures = tmp_path / "run" / "figures"
    for name in (*drawn[1], "phase_L12_best", "transience_L12", "mine", "phase_L1_best_mine"):
        (figures / f"{name}.png").touch()
    summary(program(*SMALL, f"--workdir={tmp_path}/run"))
    left = {path.stem for path in figures.iterdir()}
    assert left == {*drawn[0], "mine", "phase_L1_best_mine"}


def test_interrupted_and_with_damaged_checkpoints(program, tmp_path, whole, monkeypatch):
    """Cut off after its first checkpoint: goes on from it, from another one, or from the start."""
    calls = []

    def stop(self, layers, step, *args):
        calls.append(step)
        if step == 4 and cut:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_report", stop)
    for damaged, spare in ((False, False), (True, False), (True, True)):
        folder = tmp_path / f"run{damaged}{spare}"
        flags = (*SMALL, f"--workdir={folder}", "--nofigures")
        cut, calls = True, []
        assert program(*flags)[0] == 130
        (checkpoint,) = (folder / "checkpoints").glob("*/latest/*-step-2")
        if spare:
            shutil.copytree(checkpoint.parents[1], folder / "checkpoints" / "spare")
        if damaged:
            for path in checkpoint.rglob("*"):
                if path.is_file():
                    path.write_bytes(path.read_bytes()[:-3])
        cut, calls = False, []
        answer = program(*flags)
        summary(answer)
        assert calls == ([2, 4] if damaged and not spare else [4])
        assert ("begin again" in answer[2]) == damaged
        assert not list((folder / "checkpoints").iterdir())
        assert_equal(saved(folder), saved(whole))


def test_damaged_checkpoints_stay_when_their_chunk_is_finished(tmp_path):
    cell = modgrok_phase_config.Cell(1, 4, 0.8, 0.3, 0)
    chunk = tmp_path / "checkpoints" / "L1-x"
    (chunk / "damaged" / "latest").mkdir(parents=True)
    (chunk / "damaged" / "latest" / "weights").write_text("torn")
    (chunk / "runs.json").write_text(json.dumps([cell]))
    modgrok_phase_folder.remove_finished(tmp_path)
    assert chunk.exists()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / f"{cell.name}.npz").touch()
    modgrok_phase_folder.remove_finished(tmp_path)
    assert not chunk.exists()
    (kept,) = (tmp_path / "damaged").glob("*/latest/weights")
    assert kept.read_text() == "torn"


def test_a_large_chunk_is_tried_at_the_size_of_the_grid_at_most(
    program, tmp_path, whole, monkeypatch
):
    asked = []

    def bytes_of(plan, *, runs, **options):
        asked.append(runs)
        assert runs <= 2
        return 1

    monkeypatch.setattr(phase, "memory_bytes", bytes_of)
    shutil.copytree(whole, tmp_path / "run")
    said = program(*SMALL, f"--workdir={tmp_path}/run", "--nofigures", "--chunk=1000000000")
    assert summary(said)["runs_trained"] == 0
    assert max(asked) == 2


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        (slice(1), "holds a state unlike this run's"),
        (slice(None, None, -1), "its list of runs is not that of its checkpoint"),
    ],
)
def test_a_list_of_other_runs_than_the_checkpoint_holds(
    kept, words, program, tmp_path, whole, monkeypatch
):
    """Its chunk is put aside and begun again."""

    def stop(*args, **arrays):
        raise KeyboardInterrupt

    flags = (*SMALL, f"--workdir={tmp_path}/run", "--nofigures")
    with monkeypatch.context() as patch:
        patch.setattr(rundir.RunDir, "save_arrays", stop)
        assert program(*flags)[0] == 130
    (note,) = (tmp_path / "run" / "checkpoints").glob("*/runs.json")
    note.write_text(json.dumps(json.loads(note.read_text())[kept]))
    answer = program(*flags)
    assert summary(answer)["runs_trained"] == 2
    assert words in answer[2]
    assert len(list((tmp_path / "run" / "damaged").iterdir())) == 1
    np.testing.assert_allclose(
        saved(tmp_path / "run")["accuracy_GC4"], saved(whole)["accuracy_GC4"], atol=1e-6
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--num_tasks=4,6",), "--batch=16: expected a multiple of --num_tasks=6"),
        (("--num_tasks=4,4",), "--num_tasks=4,4: expected one number or more, each once"),
        (("--num_tasks=",), "--num_tasks=: expected one number or more"),
        (("--num_tasks=24",), "--num_tasks=24: expected 1 to 22, since p=5 has 24 tasks"),
        (("--input_fraction=0.8,1",), "--input_fraction=1: leaves 25 of p^2=25 inputs"),
        (("--layers=0",), "--layers=0: expected a comma-separated list, each an integer at least"),
        (("--eval_every=3",), "--eval_every=3: expected a divisor of --steps=4"),
        (("--eval_every=4",), "--eval_every=4: expected a divisor of --checkpoint_every=2"),
        (("--weight_decay=-1",), "--weight_decay=-1: expected a comma-separated list"),
        (("--memory_gib=1e-5",), "--memory_gib=1e-05: one run with --layers=1 needs about 0.0"),
        (("--merge=/nonexistent",), "--merge=/nonexistent: expected the folder of a diagram"),
        (("--seed=2147483647", "--seeds=2"), "--seeds=2: expected --seed and the next below"),
        (("--seeds=2000000000",), "--seeds=2000000000: makes 4000000000 runs of --num_tasks x"),
        (("--steps=100000000000",), "--steps=100000000000: expected an integer at least 1 and at"),
        (("--extra_tokens=100000000000",), "--extra_tokens=100000000000: expected an integer"),
    ],
)
def test_bad_flags(flags, words, program, tmp_path):
    assert_refused(program(*SMALL, *flags, f"--workdir={tmp_path}/run"), words)
    assert not (tmp_path / "run").exists()


def test_other_settings_are_not_merged(program, tmp_path, whole):
    flags = (*SMALL, "--shots=4", f"--merge={whole}", f"--workdir={tmp_path}/run")
    assert_refused(program(*flags), f"--merge={whole}: holds a run with other settings: shots is")
    assert not (tmp_path / "run").exists()


def test_groups_begin_with_what_was_begun(tmp_path):
    cells = [modgrok_phase_config.Cell(2, n, 0.8, 0.3, 0) for n in (4, 6, 8, 12, 16)]

    def groups(missing, chunk):
        found = modgrok_phase_folder.shares(tmp_path, missing, chunk)
        return [(group, slots, begun and begun.path.name) for group, slots, begun in found]

    def begin(name, some, checkpoint):
        folder = tmp_path / "checkpoints" / name
        (folder / "latest" / checkpoint).mkdir(parents=True)
        (folder / "runs.json").write_text(json.dumps(some))

    # A chunk without a whole checkpoint, or one for other runs, does not count.
    begin("L2-a", cells, "000001-step-90.orbax-checkpoint-tmp")
    begin("L2-b", [cells[0]._replace(layers=4)], "000001-step-90")
    assert groups(cells, 8) == [(cells, 5, None)]
    begin("L2-c", cells[2:4], "000003-step-20")
    rest = [(cells[:2], 2, None), (cells[4:], 2, None)]
    assert groups(cells, 2) == [(cells[2:4], 2, "L2-c"), *rest]
    # No more than asked for together, and what is missing of it.
    assert groups(cells, 1)[:2] == [(cells[2:3], 1, "L2-c"), (cells[3:4], 1, "L2-c")]
    assert groups(cells[:3], 8) == [(cells[2:3], 1, "L2-c"), (cells[:2], 2, None)]
    # Each run from where it got furthest.
    begin("L2-d", cells[4:1:-1], "000002-step-100")
    assert groups(cells, 2) == [
        (cells[4:2:-1], 2, "L2-d"),
        (cells[2:3], 2, "L2-d"),
        (cells[:2], 2, None),
    ]
    begin("L2-e", cells[3:4], "000002-step-120")
    assert groups(cells, 2)[:2] == [(cells[3:4], 1, "L2-e"), ([cells[4], cells[2]], 2, "L2-d")]
    # A list that cannot be read does not count.
    for note in (tmp_path / "checkpoints").glob("*/runs.json"):
        note.write_text("{")
    assert groups(cells, 8) == [(cells, 5, None)]


def test_the_presets_are_sound():
    for values in modgrok_phase_config.PRESETS.values():
        modgrok_phase_config.PhaseConfig(**values).validate()
    assert (
        len(
            modgrok_phase_config.cells(
                modgrok_phase_config.PhaseConfig(**modgrok_phase_config.PRESETS["paper"])
            )
        )
        == 49
    )

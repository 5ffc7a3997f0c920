"""Tests of launch/rundir.py: what it refuses, and that what it writes is whole and strict JSON."""

import errno
import importlib.util
import json
import os
import struct
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from launch import UsageError, rundir

CONFIG = {"p": 29, "lr": 0.001, "depths": (1, 2), "workdir": None, "steps": 100}


def snapshot(folder):
    return {
        path.relative_to(folder): (path.lstat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in (folder, *folder.rglob("*"))
    }


def check(path, config=CONFIG, *, program="train", **kwargs):
    return rundir.check(path, config, program=program, **kwargs)


def make(path, config=CONFIG, *, program="train", **kwargs):
    return rundir.RunDir(path, config, program=program, **kwargs)


def test_default_path_is_fresh(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20300102-030405")
    names = []
    for _ in range(3):
        path = rundir.default_path("train")
        assert not path.exists()
        make(path)
        names.append(path.as_posix())
    stem = "runs/train-20300102-030405"
    assert names == [stem, f"{stem}-2", f"{stem}-3"]


def test_new_folders_are_made_at_once(tmp_path, monkeypatch):
    """Of two programs that were given the same name the second takes another."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20300102-030405")
    real = rundir.default_path
    stale = [real("train")] * 2
    monkeypatch.setattr(rundir, "default_path", lambda name: (stale or [real(name)]).pop())
    names = [rundir.new_folder("train").as_posix() for _ in range(2)]
    stem = "runs/train-20300102-030405"
    assert names == [stem, f"{stem}-2"]
    assert all(os.path.isdir(name) for name in names)


def test_new_and_empty_folders_start_a_run(tmp_path):
    before = snapshot(tmp_path)
    assert not check(tmp_path)
    assert not check(tmp_path / "a" / "b")
    assert snapshot(tmp_path) == before
    (tmp_path / "config.json.tmp").write_text("{")  # killed while it wrote its first file
    assert not check(tmp_path)


def test_same_configuration_resumes(tmp_path):
    make(tmp_path / "x")
    before = snapshot(tmp_path)
    assert check(tmp_path / "x")
    assert check(tmp_path / "x", {**CONFIG, "steps": 200}, free=("steps",))
    assert snapshot(tmp_path) == before
    make(tmp_path / "x", {**CONFIG, "steps": 200})
    assert json.loads((tmp_path / "x" / "config.json").read_text())["steps"] == 200
    assert "--steps=200\n" in (tmp_path / "x" / "run.flags").read_text()


def test_other_configuration_is_refused_with_every_difference(tmp_path):
    make(tmp_path)
    other = {**CONFIG, "p": 31, "depths": (1, 3), "seed": 0, "steps": 5}
    del other["lr"]
    with pytest.raises(UsageError) as error:
        check(tmp_path, other, free=("steps",))
    for words in [
        "p is 29 there and 31 here",
        "depths is [1, 2] there and [1, 3] here",
        "lr is 0.001 there and absent here",
        "seed is absent there and 0 here",
    ]:
        assert words in str(error.value)
    assert "steps" not in str(error.value)


def test_folders_that_are_not_ours_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    make(tmp_path / "other", program="inspect")
    cases = {
        tmp_path: "holds files but no config.json",
        tmp_path / "notes.txt": "Not a directory",
        tmp_path / "notes.txt" / "x" / "y": "Not a directory",
        tmp_path / "link": "Not a directory",
        tmp_path / ("x" * 300): "File name too long",
        tmp_path / "other": "belongs to inspect; expected a folder of train",
        "/proc/deeper/run": "expected a folder that can be written",
        "": "expected a folder",
        "gs://bucket/run": "mounted",
        "s3:/bucket/run": "mounted",
    }
    before = snapshot(tmp_path)
    for path, words in cases.items():
        with pytest.raises(UsageError, match=words) as error:
            check(path)
        assert f"--workdir={path}" in str(error.value)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"p": 29}', "\xff", '{"program": null'])
def test_broken_config_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="latin1")
    with pytest.raises(UsageError, match=r"its config\.json cannot be read"):
        check(tmp_path)


def test_writer_false_does_nothing(tmp_path):
    with make(tmp_path / "x", writer=False) as run:
        run.scalars(1, {"loss": 1.0})
        run.truncate(0)
        run.save_arrays("a", x=np.ones(2))
        run.save_figure("f", None)
        assert run.history() == []
    assert not (tmp_path / "x").exists()


def test_config_is_complete(tmp_path):
    make(tmp_path / "a" / "b")
    stored = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
    assert stored == {"program": "train", **CONFIG, "depths": [1, 2]}


def test_a_setting_that_no_flagfile_can_hold_leaves_nothing_behind(tmp_path):
    with pytest.raises(UsageError, match="one line"):
        make(tmp_path / "x", {"note": "two\nlines"})
    assert not (tmp_path / "x").exists()


def test_a_folder_is_held_by_one_process_while_that_lives(tmp_path):
    program = """
import sys, time
from launch import rundir
with rundir.hold(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""
    folder = tmp_path / "new" / "run"
    command = [sys.executable, "-c", program, folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        words = rf"--workdir={folder}: another process is writing"
        with pytest.raises(UsageError, match=words), rundir.hold(folder):
            pytest.fail("held twice")
        other.kill()
    for _ in range(2):
        with rundir.hold(folder):
            pass
    assert not list(folder.iterdir())


def test_where_there_are_no_locks_nobody_is_kept_out(tmp_path, monkeypatch):
    asked = []

    def flock(folder, how):
        asked.append(os.fstat(folder).st_ino)
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with rundir.hold(tmp_path), rundir.hold(tmp_path):
        assert asked == 2 * [tmp_path.stat().st_ino]


def test_scalars_are_on_disk_at_return_and_strict_json(tmp_path):
    with make(tmp_path) as run:
        values = {
            "loss": jnp.float32(0.5),
            "bf16": jnp.bfloat16(0.25),
            "count": np.int64(7),
            "nan": np.float32("nan"),
            "inf": float("inf"),
            "solved": np.bool_(True),
            "by_shot": jnp.arange(3),
            "none": None,
        }
        run.scalars(np.int32(3), values)
        line = (tmp_path / "metrics.jsonl").read_text()
        assert json.loads(line, parse_constant=pytest.fail) == {
            "step": 3,
            "loss": 0.5,
            "bf16": 0.25,
            "count": 7,
            "nan": None,
            "inf": None,
            "solved": True,
            "by_shot": [0, 1, 2],
            "none": None,
        }
        assert run.history() == [json.loads(line)]
        with pytest.raises((TypeError, ValueError)):
            run.scalars(4, {"loss": "low"} | {"object": object()})
    seen = [(step, tag, x) for step, tag, x, _ in events(tmp_path) if tag]
    assert seen == [(3, "loss", 0.5), (3, "bf16", 0.25), (3, "count", 7), (3, "solved", 1)]


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="torch is not installed")
def test_reports_do_not_load_torch(tmp_path):
    program = """
import sys
from launch import rundir
with rundir.RunDir(sys.argv[1], {"p": 29}, program="train") as run:
    run.scalars(1, {"loss": 0.5})
assert "tensorboardX" in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program, tmp_path], check=True, timeout=300)
    assert [event[:3] for event in events(tmp_path)] == [(1, "loss", 0.5)]


def events(folder):
    """(step, tag, value, session status) of every TensorBoard event, in the order written."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.glob("events.out*"), key=lambda path: path.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += size + 16
            if event.HasField("session_log"):
                yield event.step, None, None, event.session_log.status
            for value in event.summary.value:
                yield event.step, value.tag, value.simple_value, None


def test_truncate_after_a_torn_line(tmp_path):
    with make(tmp_path) as run:
        for step in range(5):
            run.scalars(step, {"loss": step / 4})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # a kill in the middle of a write
    with make(tmp_path) as run:
        assert [row["step"] for row in run.history()] == [0, 1, 2, 3, 4]
        run.truncate(2)
        assert [row["step"] for row in run.history()] == [0, 1, 2]
        run.scalars(3, {"loss": 9.0})
        assert run.history()[-1] == {"step": 3, "loss": 9.0}
    # TensorBoard drops events from the step on that a new session starts with.
    assert list(events(tmp_path))[-2:] == [(3, None, None, 1), (3, "loss", 9.0, None)]
    with make(tmp_path) as run:
        run.truncate(-1)
        assert run.history() == []
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_a_torn_line_does_not_spoil_the_next_one(tmp_path):
    with make(tmp_path) as run:
        run.scalars(0, {})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "lo')
    with make(tmp_path) as run:
        run.scalars(2, {"loss": 1})
        assert run.history() == [{"step": 0}, {"step": 2, "loss": 1}]


def test_figures_and_arrays(tmp_path):
    from matplotlib.figure import Figure

    with make(tmp_path) as run:
        run.save_figure("curve", Figure())
        run.save_arrays("probe", a_2=np.ones(2), b=jnp.int32(3))
        run.save_arrays("probe", a_2=np.zeros(2), b=jnp.int32(4))
    assert (tmp_path / "figures" / "curve.png").read_bytes().startswith(b"\x89PNG")
    with np.load(tmp_path / "probe.npz") as arrays:
        np.testing.assert_array_equal(arrays["a_2"], np.zeros(2))
        assert arrays["b"] == 4
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(b""), "No data left"),
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), "not a zip file"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"NUMPY", b"GUMPY")), "CRC"),
        (lambda path: np.savez(path, a_2=np.array([object()])), "allow_pickle"),
        (lambda path: np.savez(path, b=np.ones(2)), "a_2 is not a file in the archive"),
    ],
)
def test_arrays_that_cannot_be_read(damage, reason, tmp_path):
    with make(tmp_path) as run:
        run.save_arrays("probe", a_2=np.ones(2), b=np.arange(3))
    path = tmp_path / "probe.npz"
    both = rundir.read_arrays(path)
    assert list(both) == ["a_2", "b"]
    np.testing.assert_array_equal(both["b"], [0, 1, 2])
    assert list(rundir.read_arrays(path, ["b"])) == ["b"]
    damage(path)
    with pytest.raises(rundir.Unreadable, match=reason):
        rundir.read_arrays(path, ["a_2"])


def test_nothing_put_aside_is_overwritten(tmp_path):
    """Not even once somebody has removed an earlier one."""
    aside, path = tmp_path / "damaged", tmp_path / "probe.npz"
    for content in ("a", "b"):
        path.write_text(content)
        rundir.put_aside(path, aside)
    (aside / "000-probe.npz").unlink()
    path.write_text("c")
    assert rundir.put_aside(path, aside) == aside / "002-probe.npz"
    assert {one.name: one.read_text() for one in aside.iterdir()} == {
        "001-probe.npz": "b",
        "002-probe.npz": "c",
    }


def test_files_are_whole_or_absent(tmp_path, monkeypatch):
    with make(tmp_path) as run:
        run.save_arrays("probe", x=np.ones(2))
        before = (tmp_path / "probe.npz").read_bytes()

        def killed(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run.save_arrays("probe", x=np.zeros(2))
        assert (tmp_path / "probe.npz").read_bytes() == before


def test_summary_line_is_one_line_of_strict_json(capsys, tmp_path):
    rundir.summary_line(
        {"loss": np.float32(0.5), "nan": float("nan"), "a": np.arange(2), "workdir": tmp_path}
    )
    out, err = capsys.readouterr()
    assert err == ""
    assert out.endswith("\n")
    assert out.count("\n") == 1
    wanted = {"loss": 0.5, "nan": None, "a": [0, 1], "workdir": str(tmp_path)}
    assert json.loads(out, parse_constant=pytest.fail) == wanted


def test_rounded_json():
    value = {"a": [np.float32(1 / 3), 123456.789, np.inf], 2: (True, 1234567, "x", None)}
    wanted = {"a": [0.33333, 123460.0, None], "2": [True, 1234567, "x", None]}
    assert rundir.plain(value, 5) == wanted
    assert rundir.plain(0.1 + 0.2) == 0.1 + 0.2


def test_a_table():
    shown = {None: "-", 0.5: ".5"}
    found = rundir.table(["a", "b"], [[None, 0.5]], shown.__getitem__)
    assert found == "| a | b |\n| --- | --- |\n| - | .5 |"


def test_what_is_said(capsys):
    rundir.speaker(True)("unheard")
    rundir.speaker(False)("heard")
    assert capsys.readouterr() == ("", "heard\n")


def test_summary_line_is_flushed():
    code = "import os, launch.rundir as r; r.summary_line({'a': 1}); os._exit(0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert json.loads(done.stdout) == {"a": 1}

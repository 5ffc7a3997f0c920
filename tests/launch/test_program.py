"""What every program that ends does with the folder of an earlier run, in one that only counts."""

import errno
import functools
import json
import tempfile

import numpy as np
import pytest
from programs import contents, summary

from launch import UsageError, program, rundir


def work(cfg, problem, folder, say):
    before = [row["step"] for row in folder.history()]
    folder.scalars(1 + max(before, default=0), {"before": len(before)})
    return {"before": len(before)}, {"counted": {"x_N": np.arange(1000)}}


def draw(arrays):
    return {"map_2": program.new_axes("", "x", "y")[0]}


PROGRAM = program.Program("count", lambda cfg: (), lambda cfg, say: None, work, draw)


@pytest.fixture
def run(tmp_path, capsys):
    """run(program, **settings) -> its summary."""

    def call(which, **settings):
        cfg = program.RunConfig(workdir=f"{tmp_path}/run", compilation_cache="", **settings)
        return summary((program.main(which, cfg), *capsys.readouterr()))

    return call


@pytest.mark.parametrize("again", [True, False])
def test_reports_of_a_run_that_is_taken_up(again, run, tmp_path):
    """Kept without `again`; else the folder of a run that did not end starts over."""
    counting = PROGRAM._replace(again=again)
    metrics = tmp_path / "run" / "metrics.jsonl"
    run(counting, figures=False)
    metrics.write_text(metrics.read_text().splitlines()[0] + '\n{"st')  # killed at its last line
    assert run(counting, figures=False)["before"] == (0 if again else 1)
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == ([1, 2] if again else [1, 2, 3])


@pytest.mark.parametrize("again", [True, False])
def test_a_folder_in_which_another_process_writes_is_refused(again, run, tmp_path):
    counting, folder = PROGRAM._replace(again=again), tmp_path / "run"
    run(counting, figures=False)
    (folder / "metrics.jsonl").write_text("")  # as if it had not ended
    before = contents(folder)
    with rundir.hold(folder), pytest.raises(UsageError, match=rf"{folder}: another process"):
        run(counting, figures=False)
    assert contents(folder) == before


def test_old_figures_go_when_new_ones_are_drawn(run, tmp_path):
    run(PROGRAM)
    figures = tmp_path / "run" / "figures"
    names = {"map_1", "map_2", "map_2_mine"}
    for name in names:
        (figures / f"{name}.png").touch()
    named = PROGRAM._replace(again=False, figures=r"map_\d+")
    for settings, gone in (({"figures": False}, set()), ({}, {"map_1"})):
        run(named, **settings)
        assert {path.stem for path in figures.iterdir()} == names - gone


def test_what_replaces_an_input_while_it_is_read_is_not_vouched_for(run, tmp_path):
    source = tmp_path / "input"
    source.write_text("old")
    reading = PROGRAM._replace(inputs=lambda cfg: (source,))
    writing = reading._replace(prepare=lambda cfg, say: source.write_text("new"))
    run(writing, figures=False)
    with pytest.raises(UsageError, match="holds a run whose input files have changed"):
        run(reading, figures=False)
    source.write_text("old")
    assert run(reading, figures=False)["before"] == 0


@pytest.mark.parametrize("figures", [True, False])
@pytest.mark.parametrize("damage", ["torn", "gone"])
def test_a_finished_run_without_its_arrays_is_refused(damage, figures, run, tmp_path):
    run(PROGRAM)
    assert run(PROGRAM)["before"] == 0
    path = tmp_path / "run" / "counted.npz"
    if damage == "torn":
        path.write_bytes(path.read_bytes()[:-50])
    else:
        path.unlink()
    before = contents(tmp_path / "run")
    with pytest.raises(UsageError, match=r"run: counted.npz cannot be read .*; expected the file"):
        run(PROGRAM, figures=figures)
    assert contents(tmp_path / "run") == before


merged = functools.partial(program.merged, program="count", free=("seed",), what="a count")


def test_folders_to_merge_are_only_read(run, tmp_path, monkeypatch):
    """As those of another machine, mounted to be read, have to be; blanks and commas do no harm."""
    run(PROGRAM, figures=False)

    def read_only(*args, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    cfg = program.RunConfig(seed=3, compilation_cache="")
    assert merged(cfg, f" {tmp_path}/run ,,{tmp_path}/run/,") == [tmp_path / "run"] * 2
    assert merged(cfg, "") == []


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("none", "none: expected the folder of a count, with config.json"),
        ("x" * 300, "x: expected the folder of a count, with config.json"),
        ("run", "run: holds a run with other settings: grain is 0 there and absent here"),
        ("other", "other: belongs to other; expected a folder of count"),
        ("torn", "torn: its config.json cannot be read"),
    ],
)
def test_what_cannot_be_merged(folder, words, run, tmp_path):
    run(PROGRAM, figures=False)
    for name, text in (("other", '{"program": "other"}'), ("torn", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text().replace('"seed"', '"grain"'))
    with pytest.raises(UsageError, match=words) as error:
        merged(program.RunConfig(), f"{tmp_path}/{folder}")
    assert str(error.value).startswith(f"--merge={tmp_path}/{folder}: ")

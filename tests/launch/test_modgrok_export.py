"""Exporting a run's model: the weights that were tested, under the reference's names."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from asserts import assert_trees_equal

from launch import UsageError, flags, modgrok_config, modgrok_export, modgrok_setup, modgrok_train
from launch.modgrok_export import ExportConfig
from modgrok import interop


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: its settings, with averaged weights."""
    workdir = tmp_path_factory.mktemp("run")
    small = modgrok_config.PRESETS["small"] | {"steps": 4, "warmup_steps": 1, "width": 16}
    small |= {"eval_every": 2, "checkpoint_every": 2, "log_every": 2, "final_sequences": 8}
    cfg = modgrok_config.TrainConfig(
        **small, workdir=str(workdir), figures=False, quiet=True, compilation_cache="", devices=1
    )
    assert modgrok_train.train(cfg, resuming=False)["steps"] == 4
    return cfg


@pytest.mark.parametrize("which", ["best", "latest"])
def test_what_is_written_is_what_was_tested(run, which, tmp_path, capsys):
    output = tmp_path / "model.safetensors"
    modgrok_export.main(ExportConfig(run.workdir, str(output), which))
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    restored, parts = modgrok_setup.restore(run, run.workdir, which, flag="--workdir")
    cfg, params = interop.load_reference(output)
    assert cfg == parts.model
    assert summary["step"] == restored.step
    assert summary["averaged"]
    assert_trees_equal(
        jax.tree.map(np.asarray, params), jax.tree.map(np.asarray, restored.state[0].ema)
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_settings_are_read_back(run):
    assert modgrok_export.run_settings(run.workdir) == run


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"workdir": "/nonexistent"}, "--workdir=/nonexistent: expected the folder of a"),
        ({"workdir": "x" * 300}, "--workdir=x+: expected the folder of a"),
        ({"output": "model.bin"}, r"--output=model.bin: expected one of .safetensors"),
        ({"output": "/nonexistent/m.npz"}, "--output=/nonexistent/m.npz: expected a folder"),
    ],
)
def test_wrong_requests(run, changes, words, tmp_path):
    values = {"workdir": run.workdir, "output": str(tmp_path / "m.npz")} | changes
    with pytest.raises(ValueError, match=words):
        ExportConfig(**values).validate()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prune": True}, "--prune: the run in .* has no gates"),
        ({"group": "5"}, "--group=5: the run in .* has no gates"),
        ({"group": "union"}, "--group=union: the run in .* has no gates"),
    ],
)
def test_what_asks_for_gates_is_refused_without_any(run, changes, words, tmp_path):
    output = "pruned" if "prune" in changes else "m.npz"
    with pytest.raises(UsageError, match=words):
        modgrok_export.main(ExportConfig(run.workdir, str(tmp_path / output), **changes))
    assert not any(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(run, tmp_path):
    cfg = ExportConfig(run.workdir, str(tmp_path / f"{'x' * 300}.npz"))
    cfg.validate()
    with pytest.raises(UsageError, match=r"--output=.*: File name too long; expected a place to"):
        modgrok_export.main(cfg)


def test_an_existing_file_stays_unless_told(run, tmp_path):
    output = tmp_path / "m.npz"
    output.write_text("mine")
    cfg = ExportConfig(run.workdir, str(output))
    with pytest.raises(ValueError, match="exists; --overwrite replaces it"):
        cfg.validate()
    forced = dataclasses.replace(cfg, overwrite=True)
    forced.validate()
    modgrok_export.main(forced)
    assert interop.load_reference(output)[0].width == 16


@pytest.mark.parametrize("quiet", [False, True])
def test_quiet_leaves_only_the_result(run, tmp_path, capsys, quiet):
    modgrok_export.main(ExportConfig(run.workdir, str(tmp_path / "m.npz"), quiet=quiet))
    said = capsys.readouterr()
    assert said.out.count("\n") == 1
    assert ("wrote" in said.err) != quiet


def test_another_programs_folder_and_an_empty_one_are_refused(run, tmp_path):
    (tmp_path / "config.json").write_text('{"program": "isvd_link"}')
    with pytest.raises(UsageError, match="belongs to isvd_link"):
        modgrok_export.run_settings(str(tmp_path))
    stored = {"program": "modgrok_train"} | dataclasses.asdict(run)
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UsageError, match="holds no best checkpoint yet"):
        modgrok_export.main(ExportConfig(str(tmp_path), str(tmp_path / "m.npz")))


def test_status_2_and_one_sentence_from_the_command_line(capsys):
    argv = ["modgrok_export", "--workdir=/nonexistent", "--output=m.npz"]
    with pytest.raises(SystemExit) as stop:
        flags.run(modgrok_export.main, ExportConfig, argv=argv)
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert not said.out
    assert len(said.err.splitlines()) == 1

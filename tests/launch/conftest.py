"""Runs of the training program in the process of the tests."""

import dataclasses
import sys

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from training_runs import TINY, settings

from launch import modgrok_train


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder of compiled programs for every run here; this process forgets it afterwards."""
    compilation_cache.reset_cache()
    yield str(tmp_path_factory.mktemp("cache"))
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    compilation_cache.reset_cache()


@pytest.fixture
def program(monkeypatch, capsys, cache):
    """program(*flags) -> (status, stdout, stderr), in this process."""

    def call(*args):
        argv = ["modgrok_train", f"--compilation_cache={cache}", "--devices=1", *args]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as ended:
            modgrok_train.cli()
        return (ended.value.code or 0, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    """The folder and settings of a finished TINY run, not to be altered."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    cfg = settings(*TINY, f"--workdir={workdir}", "--devices=1", f"--compilation_cache={cache}")
    assert modgrok_train.main(dataclasses.replace(cfg, quiet=True)) == 0
    return workdir

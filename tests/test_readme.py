"""What the README shows is run: short commands and all Python for real, long commands started."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from graph_files import real_data

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", README, re.DOTALL)
# These take minutes to days; their start shows that the command is right. The report's sections are
# run by tests/launch/test_robust_depth_report.py.
LONG = ("--preset=paper", "paper_d4_muon.flags", "memorise.flags", "robust_depth_report")
CORA = "--name=cora"  # needs the files of Planetoid
# Compiled as users compile them: one that trains and is resumed, and the one that computes longest.
# With the XLA_FLAGS of tests/conftest.py the others take less than half the time.
AS_USERS = ("modgrok_train --preset=small --workdir=runs/first", CORA)


def _commands() -> list[str]:
    lines = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
    return [line for line in lines if line.strip()]


def _environment(tmp_path: Path, command: str = "") -> dict[str, str]:
    of_tests = ["JAX_NUM_CPU_DEVICES"] + ["XLA_FLAGS"] * any(word in command for word in AS_USERS)
    own = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache"), "MPLBACKEND": "Agg"}
    return {k: v for k, v in os.environ.items() if k not in of_tests} | own


def _run(command: list[str], tmp_path: Path) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env=_environment(tmp_path, " ".join(command)),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
    return done


@pytest.mark.slow
def test_readme_runs_in_order(tmp_path):
    (tmp_path / "launch").symlink_to(ROOT / "launch")  # recipes are named relative to the clone
    ran = []
    for kind, text in BLOCKS:
        commands = [["-c", text]]
        if kind == "bash":
            lines = [line for line in text.splitlines() if line.startswith("python -m launch")]
            lines = [line for line in lines if not any(word in line for word in (*LONG, CORA))]
            commands = [shlex.split(line)[1:] for line in lines]
        ran += [_run(command, tmp_path) for command in commands]
    assert len(ran) >= 7
    assert (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "shots.png").stat().st_size > 10_000
    assert (tmp_path / "runs/links/embeddings.npz").exists()
    assert (tmp_path / "runs/depths/records.npz").exists()
    assert "resuming at step 40" in "".join(done.stderr for done in ran)


@pytest.mark.slow
def test_cora_is_classified(tmp_path):
    (tmp_path / "planetoid").symlink_to(real_data("planetoid"))
    (line,) = [line for line in _commands() if CORA in line]
    done = _run(shlex.split(line)[1:], tmp_path)
    assert json.loads(done.stdout.splitlines()[-1])["test_accuracy"] >= 0.82


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", [line for line in _commands() if any(word in line for word in LONG)]
)
def test_long_commands_start(line, tmp_path):
    if "--multiprocess=auto" in line:
        line = line.replace("--multiprocess=auto", "")  # there is no cluster to find
    line = re.sub(r"--workdir=\S+", f"--workdir={tmp_path / 'run'}", line)
    process = subprocess.Popen(
        [sys.executable, *shlex.split(line)[1:]],
        cwd=ROOT,
        env=_environment(tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        begun, seen = time.monotonic(), ""
        while "compiling first" not in seen:
            assert process.poll() is None, seen
            assert time.monotonic() - begun < 120, seen
            seen += process.stderr.readline()
        assert ("unseen tasks mod" if "modgrok" in line else "sections of size") in seen
    finally:
        process.kill()
        process.communicate()


def test_make_targets_exist():
    targets = re.findall(r"^make (\w+)$", README, re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        done = subprocess.run(
            ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "constraints.txt" in done.stdout or "-m" in done.stdout


def test_every_file_that_the_readme_names_exists():
    for path in re.findall(r"\]\((docs/[\w.]+)\)", README):
        assert (ROOT / path).is_file(), path
    for path in re.findall(r"--flagfile=(\S+)", README):
        assert (ROOT / path).is_file(), path


def test_ci_calls_the_tests_of_the_readme():
    assert re.search(r"^make .*\btest$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)

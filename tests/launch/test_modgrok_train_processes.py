"""Tests of launch/modgrok_train.py as processes: started as a user does, killed, signalled, two."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from training_runs import LONG, TINY, assert_same_run, final_state, losses, reports

from launch import rundir


class Process:
    """The program in a session of its own, its stderr in a file."""

    def __init__(self, *args, log):
        self.log = log
        with open(log, "wb") as stderr:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "launch.modgrok_train", *args],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
                env={k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"},
            )

    def wait_until(self, condition, timeout=120):
        """Look often, since what is waited for may last milliseconds."""
        end = time.monotonic() + timeout
        while not condition():
            assert self._popen.poll() is None, f"ended too early: {self.err()}"
            assert time.monotonic() < end, f"too slow: {self.err()}"
            time.sleep(0.0005)

    def err(self):
        return Path(self.log).read_text()

    def send(self, signum):
        self._popen.send_signal(signum)

    def end(self, timeout=150):
        """(status, stdout, stderr)."""
        try:
            out, _ = self._popen.communicate(timeout=timeout)
            return self._popen.returncode, out, self.err()
        finally:
            self.kill()

    def kill(self):
        if self._popen.poll() is None:
            os.killpg(self._popen.pid, signal.SIGKILL)


@pytest.fixture
def start(tmp_path, cache):
    """start(*flags) -> a Process; none outlives its test."""
    started = []

    def call(*args):
        log = tmp_path / f"stderr-{len(started)}"
        started.append(Process(f"--compilation_cache={cache}", *args, log=log))
        return started[-1]

    yield call
    for process in started:
        process.kill()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    """The folder of a LONG run in a process of its own."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    args = (*LONG, f"--workdir={workdir}", f"--compilation_cache={cache}")
    status, _, err = Process(*args, log=workdir.with_name("stderr")).end()
    assert status == 0, err
    return workdir


@pytest.mark.slow
def test_kill_at_any_moment_and_restart(start, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    latest, best = (workdir / "checkpoints" / slot for slot in ("latest", "best"))
    args = (*LONG, f"--workdir={workdir}")

    def names(folder):
        return os.listdir(folder) if folder.exists() else []

    def compiling(process):
        return lambda: "compiling first" in process.err()

    def between(process):
        return lambda: any(name.endswith("-step-40") for name in names(latest))

    def saving(process):
        return lambda: any(".orbax-checkpoint-tmp" in name for name in names(latest))

    def training(process):
        return lambda: "step 80/200" in process.err()

    def bested(process):
        before = names(best)
        return lambda: names(best) != before

    moments = [compiling, bested, between, saving, training]
    if not bested(None):
        moments.remove(bested)
    for moment in moments:
        process = start(*args)
        process.wait_until(moment(process))
        process.send(signal.SIGKILL)
        assert process.end()[0] == -signal.SIGKILL, f"it was over before: {moment.__name__}"
    status, out, err = start(*args).end()
    assert status == 0, err
    assert json.loads(out.splitlines()[-1])["resumed_from"] >= 40
    assert_same_run(workdir, uninterrupted, LONG)


@pytest.mark.slow
def test_signals_save_and_the_same_command_continues(start, uninterrupted, tmp_path):
    args = (*LONG, f"--workdir={tmp_path / 'run'}")
    for signum in (signal.SIGTERM, signal.SIGINT):
        process = start(*args)
        seen = "step 0/200" if signum == signal.SIGTERM else "resuming at step"
        process.wait_until(lambda process=process, seen=seen: seen in process.err())
        if signum == signal.SIGINT:  # into the loop, whose handlers are set by then
            before = len(reports(tmp_path / "run"))
            process.wait_until(lambda before=before: len(reports(tmp_path / "run")) > before)
        process.send(signum)
        status, out, err = process.end()
        assert (status, out) == (128 + signum, "")
        step, _ = final_state(tmp_path / "run", args=LONG)
        name = signal.Signals(signum).name
        last = f"modgrok_train: stopped by {name} at step {step}; the same command continues"
        assert err.splitlines()[-1].startswith(last)
        assert step < 200
    status, out, err = start(*args).end()
    assert status == 0, err
    assert json.loads(out.splitlines()[-1])["resumed_from"] == step
    assert_same_run(tmp_path / "run", uninterrupted, LONG)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def start_two(start):
    """start_two(*flags, own=(flags of 0, flags of 1)) -> two processes with two devices each."""

    def call(*args, own=((), ())):
        address = f"127.0.0.1:{free_port()}"
        shared = (*args, "--platform_devices=2", f"--coordinator_address={address}")
        return [
            start(*shared, "--num_processes=2", f"--process_id={rank}", *own[rank])
            for rank in (0, 1)
        ]

    return call


def assert_close_runs(workdir, wanted):
    """The same losses and parameters to 1e-5, which the order of sums allows."""
    there, here = losses(workdir), losses(wanted)
    assert there.keys() == here.keys()
    np.testing.assert_allclose(list(there.values()), list(here.values()), rtol=1e-5)
    (step, arrays), (wanted_step, wanted_arrays) = final_state(workdir), final_state(wanted)
    assert step == wanted_step
    for name in wanted_arrays:
        if "params" in name:
            np.testing.assert_allclose(arrays[name], wanted_arrays[name], rtol=1e-5, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["jit", "pmap", "shard_map"])
def test_two_processes_train_as_one_does(start_two, program, finished, tmp_path, mode):
    """jit alone; pmap goes on from where one process stopped; one goes on after shard_map."""
    workdir = f"--workdir={tmp_path / 'run'}"
    if mode == "pmap":
        assert program(*TINY, workdir, "--steps=4")[0] == 0
    steps = "--steps=4" if mode == "shard_map" else "--steps=8"
    two = start_two(*TINY, workdir, steps, f"--parallel={mode}")
    (status, out, err), (other_status, other_out, other_err) = [each.end() for each in two]
    assert (status, other_status) == (0, 0), err + other_err
    result = json.loads(out.splitlines()[-1])
    assert (result["devices"], result["resumed_from"]) == (4, 4 if mode == "pmap" else None)
    assert "{" not in other_out
    assert "step" not in other_err
    if mode == "shard_map":
        status, out, _ = program(*TINY, workdir)
        assert (status, json.loads(out)["resumed_from"]) == (0, 4)
    assert_close_runs(tmp_path / "run", finished)
    steps_once = [row["step"] for row in map(json.loads, reports(tmp_path / "run"))]
    assert steps_once == [row["step"] for row in map(json.loads, reports(finished))]
    # Process 0 alone writes them, in each life of the run.
    assert len(list((tmp_path / "run").glob("events.out.*"))) == (1 if mode == "jit" else 2)


@pytest.mark.slow
def test_sigterm_of_two_processes(start_two, tmp_path):
    """Both agree on a boundary, also when only one was told."""
    args = (*LONG, "--steps=100000", "--schedule_steps=100000", "--eval_every=1000")
    two = start_two(*args, f"--workdir={tmp_path / 'run'}")
    two[0].wait_until(lambda: len(losses(tmp_path / "run")) > 3 if started(tmp_path) else False)
    two[1].send(signal.SIGTERM)
    ended = [each.end() for each in two]
    assert [status for status, _, _ in ended] == [143, 143], ended
    step, _ = final_state(tmp_path / "run", args=args)
    for _, _, err in ended:
        assert f"stopped by SIGTERM at step {step}; the same command continues" in err


def started(tmp_path):
    return (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_processes_with_other_settings_are_refused(start_two, tmp_path):
    two = start_two(*TINY, f"--workdir={tmp_path / 'run'}", own=((), ("--lr=0.5",)))
    for status, out, err in [each.end() for each in two]:
        assert status == 2
        assert "{" not in out
        assert "--num_processes=2: they were started with different flags" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_in_a_held_folder_are_refused(start_two, tmp_path):
    folder = tmp_path / "run"
    with rundir.hold(folder):
        two = start_two(*TINY, f"--workdir={folder}")
        for status, out, err in [each.end() for each in two]:
            assert (status, "{" in out) == (2, False), err
            assert f"--workdir={folder}: another process is writing there" in err
    assert not list(folder.iterdir())

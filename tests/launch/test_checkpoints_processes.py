"""Checkpoints of processes that are killed, and of several that share one run."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import checkpoint_states
import jax
import pytest
from asserts import assert_trees_equal
from checkpoint_states import assert_is, make, plain, restore, save

saved, copied = checkpoint_states.saved, checkpoint_states.copied

# Reads of damaged checkpoints may end in this file, see test_checkpoints_damage.py.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


CHILD = """
import sys
sys.path[:0] = {path!r}
from checkpoint_states import LIKE, make
from launch.checkpoints import Checkpoints
with Checkpoints({folder!r}) as checkpoints:
    found = checkpoints.restore(LIKE)
    step = found.step if found else 0
    while True:
        step += 1
        checkpoints.save(step, make(step), {{"step": step}})
        checkpoints.save_best(step // 2, make(step // 2), {{"step": step // 2}})
        if step % 3 == 0:
            checkpoints.wait()
            print(step, flush=True)
"""


@pytest.mark.slow
def test_kill_at_any_moment(tmp_path):
    folder, done, draw = tmp_path / "run", 0, random.Random(0)
    code = CHILD.format(path=sys.path, folder=str(folder))
    leftovers = 0
    for _ in range(6):
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            on_disk = [int(child.stdout.readline()) for _ in range(2)]
            assert on_disk[0] > done  # it went on from where the one before was killed
            time.sleep(draw.uniform(0, 0.1))
        finally:
            child.send_signal(signal.SIGKILL)
            rest, _ = child.communicate(timeout=30)
        done = max([*on_disk, *map(int, rest.split())])
        leftovers += any("step" in path.name and "." in path.name for path in folder.glob("*/*"))
        found = restore(folder)
        assert_is(found, found.step)
        assert found.step >= done
        best = restore(folder, which="best")
        assert_is(best, best.step)
        assert best.step >= done // 2
        assert not (folder / "damaged").exists()
        done = found.step
    assert leftovers  # else no kill hit a save, and this test says little
    save(folder, done + 1)
    assert_is(restore(folder), done + 1)


PROCESS = """
import sys
sys.path[:0] = {path!r}
import jax
rank, mode = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize("127.0.0.1:{port}", 2, rank, initialization_timeout=60)
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from asserts import assert_trees_equal
from checkpoint_states import LIKE, assert_is, make, plain
from launch.checkpoints import Checkpoints, DamagedError
mesh = Mesh(jax.devices(), "d")
same = NamedSharding(mesh, PartitionSpec())
def place(x, sharding=same):
    return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])
with Checkpoints({folder!r}) as checkpoints:
    if mode == "damaged":
        try:
            checkpoints.restore(LIKE)
        except DamagedError:
            print("OUT damaged", flush=True)
        sys.exit(0)
    found = checkpoints.restore(LIKE)
    assert_is(found, 2)
    state = jax.tree.map(place, plain(make(3)))
    assert not state.params["w"].is_fully_addressable
    checkpoints.save(3, state, {{"step": 3}})
    bad = place(np.zeros(4), NamedSharding(mesh, PartitionSpec("d")))
    found = checkpoints.restore(jax.eval_shape(lambda: state))
    assert_trees_equal(found.state, plain(make(3)))
    if rank == 0:
        try:
            checkpoints.save(4, {{"bad": bad}}, {{}})
        except ValueError as error:
            assert "bad is split over processes" in str(error)
        else:
            sys.exit("no error")
    print("OUT good", flush=True)
"""


def run_two(folder, mode):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = PROCESS.format(path=sys.path, folder=str(folder), port=port)
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), mode],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
            start_new_session=True,
        )
        for rank in range(2)
    ]
    try:
        return [(p.communicate(timeout=90)[0], p.returncode) for p in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_two_processes_share_what_process_0_keeps(copied):
    for output, status in run_two(copied, "train"):
        assert status == 0, output
        assert "OUT good" in output
    found = restore(copied, jax.eval_shape(lambda: plain(make(3))))  # one process, other devices
    assert found.step == 3
    assert_trees_equal(found.state, plain(make(3)))
    for path in (copied / "latest").iterdir():
        shutil.rmtree(path)
        path.mkdir()
    for output, status in run_two(copied, "damaged"):
        assert status == 0, output
        assert "OUT damaged" in output

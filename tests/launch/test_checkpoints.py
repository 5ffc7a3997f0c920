"""Tests of launch/checkpoints.py and launch/hoststate.py: what is saved comes back, or is missed.

A state is a function of its step here, so any restored one can be checked against its own step.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asserts import assert_trees_equal
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from launch import UsageError, hoststate
from launch.checkpoints import Checkpoints, DamagedError

# Reads that outlive orbax's patience with a damaged checkpoint; on a busy machine some come late.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class State(NamedTuple):
    step: Any
    params: Any
    key: Any
    ema: Any


def make(step, *, dtype=jnp.float32, width=500):
    params = {"w": jnp.full((width, 2), step + 0.5, dtype), "blocks": [jnp.arange(4) * step]}
    return State(jnp.int32(step), params, jax.random.key(step), None)


LIKE = jax.eval_shape(lambda: make(0))


def is_key(leaf):
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def plain(state):
    """Random keys as their numbers, so that numpy can compare."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, state)


def assert_is(found, step):
    assert found.step == step
    assert found.meta == {"step": step}
    assert_trees_equal(plain(found.state), plain(make(step)))


def save(folder, *steps, keep=3, best=()):
    with Checkpoints(folder, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, make(step), {"step": step})
        for step in best:
            checkpoints.save_best(step, make(step), {"step": step})


def restore(folder, like=LIKE, **kwargs):
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore(like, **kwargs)


def steps(folder):
    return [int(path.name.split("-")[-1]) for path in sorted(folder.iterdir())]


def newest(folder):
    return max((folder / "latest").iterdir())


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save(folder, 1, 2, best=[2])
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_nothing_saved_nothing_written(tmp_path):
    assert restore(tmp_path / "x") is None
    assert restore(tmp_path / "x", which="best") is None
    assert not (tmp_path / "x").exists()


def test_every_kind_of_leaf_comes_back(tmp_path):
    state = {
        "bf16": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
        "bool": jnp.array([True, False]),
        "scalar": jnp.float32(0.1),
        "wide": np.array([2**40, -1]),
        "double": np.array(1 / 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "empty": np.zeros((0, 3), np.float32),
        "keys": jax.random.split(jax.random.key(1), 3),
        "rbg": jax.random.key(2, impl="rbg"),
        "none": None,
        "a/b": [(), (jnp.uint8(3),)],
        "int": 2**40,
        "float": 0.1,
        "flag": True,
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state, {"best": float("-inf"), "list": (1, "x", None)})
        found = checkpoints.restore(state)
    assert (found.step, found.meta) == (7, {"best": float("-inf"), "list": [1, "x", None]})
    assert_trees_equal(plain(found.state), plain(state))
    for got, wanted in zip(jax.tree.leaves(found.state), jax.tree.leaves(state), strict=True):
        assert getattr(got, "dtype", type(got)) == getattr(wanted, "dtype", type(wanted))
        assert is_key(got) or isinstance(got, np.ndarray | int | float)


def test_a_bare_array_is_a_state(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, jnp.arange(3), {})
        np.testing.assert_array_equal(checkpoints.restore(jnp.zeros(3, int)).state, [0, 1, 2])


def test_replicated_and_sharded_states(tmp_path):
    mesh = Mesh(jax.devices(), "d")
    state = {
        "same": jax.device_put(jnp.arange(3.0), NamedSharding(mesh, PartitionSpec())),
        "split": jax.device_put(jnp.arange(16.0), NamedSharding(mesh, PartitionSpec("d"))),
        "key": jax.device_put(jax.random.key(3), NamedSharding(mesh, PartitionSpec())),
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state, {})
        assert_trees_equal(plain(checkpoints.restore(state).state), plain(state))


def test_buffers_may_be_donated_when_save_returns(tmp_path):
    advance = jax.jit(lambda w: w + 1, donate_argnums=0)
    w = jnp.zeros(1 << 20)
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(3):
            checkpoints.save(step, w, {})
            address, donated = w.unsafe_buffer_pointer(), w
            w = advance(w)
            assert donated.is_deleted()
            assert w.unsafe_buffer_pointer() == address  # saving did not turn it into a copy
            assert checkpoints.restore(w).state.max() == step


def test_save_does_not_wait_for_the_disk(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        gate = threading.Event()
        checkpoints._thread.submit(gate.wait)
        checkpoints.save(1, make(1), {"step": 1})
        checkpoints.save_best(1, make(1), {"step": 1})
        assert not any(tmp_path.iterdir())
        gate.set()
        checkpoints.wait()
        assert steps(tmp_path / "latest") == steps(tmp_path / "best") == [1]


def test_latest_keeps_n_and_best_one(tmp_path):
    save(tmp_path / "a", 1, 2, 3, 4, best=[1, 3])
    save(tmp_path / "b", 1, 2, keep=1)
    assert steps(tmp_path / "a" / "latest") == [2, 3, 4]
    assert steps(tmp_path / "a" / "best") == [3]
    assert steps(tmp_path / "b" / "latest") == [2]
    assert_is(restore(tmp_path / "a"), 4)
    assert_is(restore(tmp_path / "a", which="best"), 3)


def test_a_step_may_be_saved_again_and_a_lower_one_too(tmp_path):
    save(tmp_path, 1, 2, 3, best=[3])
    save(tmp_path, 3, best=[3])
    assert steps(tmp_path / "latest") == [1, 2, 3]
    assert_is(restore(tmp_path), 3)
    assert_is(restore(tmp_path, which="best"), 3)
    save(tmp_path, 2, best=[1])
    assert steps(tmp_path / "latest") == [1, 2]
    assert_is(restore(tmp_path), 2)
    assert_is(restore(tmp_path, which="best"), 1)
    save(tmp_path, 0)
    assert_is(restore(tmp_path), 0)


def test_the_old_best_goes_only_when_the_new_one_is_there(tmp_path, monkeypatch):
    save(tmp_path, 1, best=[5])
    seen = []
    rmtree = shutil.rmtree

    def watched(path, *args, **kwargs):
        seen.append(restore(tmp_path, which="best").step)
        rmtree(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", watched)
    save(tmp_path, best=[5, 4])
    assert seen[-2:] == [5, 4]
    assert steps(tmp_path / "best") == [4]


def test_what_a_killed_save_leaves_is_ignored_and_swept(copied):
    left = copied / "latest" / "000009-step-9.orbax-checkpoint-tmp"
    left.mkdir()
    (copied / "latest" / "000001-step-0.old").mkdir()
    assert_is(restore(copied), 2)
    save(copied, 3)
    assert steps(copied / "latest") == [1, 2, 3]


def damage_in_the_middle(path):
    data = bytearray(path.read_bytes())
    at = len(data) // 2
    data[at : at + 4] = bytes(255 - byte for byte in data[at : at + 4])
    path.write_bytes(data)


def test_altered_bytes_anywhere_never_come_back_as_a_state(saved, tmp_path, capsys):
    fallbacks = silent = 0
    names = [path.relative_to(saved) for path in files(newest(saved))]
    for number, name in enumerate(names):
        size = (saved / name).stat().st_size
        for at in sorted({0, size // 3, size // 2, 2 * size // 3, max(0, size - 4)}):
            folder = Path(shutil.copytree(saved, tmp_path / f"{number}-{at}"))
            data = bytearray((folder / name).read_bytes())
            data[at : at + 4] = bytes(255 - byte for byte in data[at : at + 4])
            (folder / name).write_bytes(data)
            found = restore(folder)
            assert_is(found, found.step)
            fallbacks += found.step == 1
            silent += "bytes are not those" in capsys.readouterr().err
    assert fallbacks > len(names)
    assert silent  # orbax itself restores some of these without an error


def test_an_altered_number_in_the_header_is_noticed(copied, capsys):
    (header,) = (path for path in files(newest(copied)) if "header/metadata" in str(path))
    text = header.read_text()
    assert '"meta": {"step": 2}' in text
    header.write_text(text.replace('"meta": {"step": 2}', '"meta": {"step": 3}'))
    assert_is(restore(copied), 1)
    assert "bytes are not those" in capsys.readouterr().err


@pytest.mark.parametrize("harm", ["half", "nothing", "missing"])
def test_truncated_and_missing_files(saved, tmp_path, harm):
    fallbacks = 0
    for number, path in enumerate(files(newest(saved))):
        folder = Path(shutil.copytree(saved, tmp_path / str(number)))
        target = folder / path.relative_to(saved)
        if harm == "missing":
            target.unlink()
        else:
            os.truncate(target, target.stat().st_size // 2 if harm == "half" else 0)
        found = restore(folder)
        assert_is(found, found.step)
        fallbacks += found.step == 1
    assert fallbacks >= 3


def test_after_a_fallback_saving_goes_on(copied, capfd):
    bad = newest(copied)
    data = max(files(bad), key=lambda path: path.stat().st_size)
    damage_in_the_middle(data)
    content = data.read_bytes()
    assert_is(restore(copied), 1)
    err = capfd.readouterr().err
    assert "checkpoint of step 2 is damaged (" in err
    assert "falling back to step 1" in err
    assert err.count("\n") == 1
    (aside,) = (copied / "damaged" / "latest").iterdir()  # nothing is deleted
    assert (aside / data.relative_to(bad)).read_bytes() == content
    save(copied, 2)
    assert_is(restore(copied), 2)
    assert steps(copied / "latest") == [1, 2]
    damage_in_the_middle(max(files(newest(copied)), key=lambda path: path.stat().st_size))
    assert_is(restore(copied), 1)
    assert len(list((copied / "damaged" / "latest").iterdir())) == 2


def test_an_empty_folder_is_damage(copied, capsys):
    (copied / "latest" / "000003-step-3").mkdir()
    assert_is(restore(copied), 2)
    assert "step 3 is damaged (the folder is empty)" in capsys.readouterr().err


def test_if_all_are_damaged_it_says_so_every_time(copied):
    for path in (copied / "latest").iterdir():
        shutil.rmtree(path)
        path.mkdir()
    before = sorted(copied.rglob("*"))
    for _ in range(2):
        with pytest.raises(
            DamagedError, match=r"every checkpoint is damaged \(step 2: .*; step 1:"
        ):
            restore(copied)
        assert sorted(copied.rglob("*")) == before
    assert_is(restore(copied, which="best"), 2)


@pytest.mark.parametrize(
    ("like", "words"),
    [
        (
            make(0, dtype=jnp.bfloat16),
            r"params\.w is float32\[500, 2\] there and bfloat16\[500, 2\] here",
        ),
        (
            make(0, dtype=jnp.int32),
            r"params\.w is float32\[500, 2\] there and int32\[500, 2\] here",
        ),
        (make(0, width=501), r"params\.w is float32\[500, 2\] there and float32\[501, 2\] here"),
        (make(0)._replace(ema=jnp.zeros(2)), r"ema is absent there and float32\[2\] here"),
        (make(0)._replace(params={}), r"params\.w is float32\[500, 2\] there and absent here"),
        (make(0)._replace(key=jax.random.key(0, impl="rbg")), r"key is key<fry>\[\] there"),
        ({str(n): jnp.zeros(2) for n in range(9)}, r"and 10 more"),
    ],
)
def test_another_state_is_no_damage(copied, like, words):
    before = sorted(copied.rglob("*"))
    with pytest.raises(UsageError, match=words) as error:
        restore(copied, like)
    assert not isinstance(error.value, DamagedError)
    assert "checkpoint of step 2" in str(error.value)
    assert sorted(copied.rglob("*")) == before


def test_states_that_cannot_be_saved(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(TypeError, match="name: a state holds arrays"):
            checkpoints.save(0, {"name": "text"}, {})
        with pytest.raises(ValueError, match="two leaves"):
            checkpoints.save(0, {"a.b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, {})
        with pytest.raises(TypeError, match="JSON"):
            checkpoints.save(0, make(0), {"x": np.ones(2)})
    assert not any(tmp_path.iterdir())


def test_a_write_that_fails_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(tmp_path / "file" / "x")
    checkpoints.save(0, make(0), {})
    with pytest.raises(NotADirectoryError):
        checkpoints.close()
    checkpoints.close()


def test_digest_sees_names_dtypes_shapes_and_bytes():
    base = {"a": np.arange(4, dtype=np.int32), "b": np.zeros(2, np.float32)}
    variants = [
        base,
        {"b": base["a"], "a": base["b"]},
        {**base, "a": base["a"].reshape(2, 2)},
        {**base, "a": base["a"].view(np.uint32)},
        {**base, "b": np.array([0, 1e-45], np.float32)},
        {**base, "b": np.array([0, -0.0], np.float32)},
        {**base, "c": np.zeros(0)},
    ]
    digests = [hoststate.digest(about, arrays) for about in ("", "x") for arrays in variants]
    assert len(set(digests)) == len(digests)
    assert hoststate.digest("", dict(reversed(base.items()))) == digests[0]


CHILD = """
import sys
sys.path[:0] = {path!r}
import test_checkpoints as t
with t.Checkpoints({folder!r}) as checkpoints:
    found = checkpoints.restore(t.LIKE)
    step = found.step if found else 0
    while True:
        step += 1
        checkpoints.save(step, t.make(step), {{"step": step}})
        checkpoints.save_best(step // 2, t.make(step // 2), {{"step": step // 2}})
        if step % 3 == 0:
            checkpoints.wait()
            print(step, flush=True)
"""


@pytest.mark.slow
def test_kill_at_any_moment(tmp_path):
    folder, done, draw = tmp_path / "run", 0, random.Random(0)
    code = CHILD.format(path=[str(Path(__file__).parent), *sys.path], folder=str(folder))
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
import test_checkpoints as t, numpy as np, json
mesh = t.Mesh(jax.devices(), "d")
same = t.NamedSharding(mesh, t.PartitionSpec())
def place(x, sharding=same):
    return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])
with t.Checkpoints({folder!r}) as checkpoints:
    if mode == "damaged":
        try:
            checkpoints.restore(t.LIKE)
        except t.DamagedError:
            print("OUT damaged", flush=True)
        sys.exit(0)
    found = checkpoints.restore(t.LIKE)
    t.assert_is(found, 2)
    state = jax.tree.map(place, t.plain(t.make(3)))
    assert not state.params["w"].is_fully_addressable
    checkpoints.save(3, state, {{"step": 3}})
    bad = place(np.zeros(4), t.NamedSharding(mesh, t.PartitionSpec("d")))
    found = checkpoints.restore(jax.eval_shape(lambda: state))
    t.assert_trees_equal(found.state, t.plain(t.make(3)))
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
    path = [str(Path(__file__).parent), *sys.path]
    code = PROCESS.format(path=path, folder=str(folder), port=port)
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


def test_headers_are_readable_without_us(saved):
    (header,) = (path for path in files(newest(saved)) if "header/metadata" in str(path))
    stored = json.loads(header.read_text())
    assert stored["leaves"]["params.w"] == {"dtype": "float32", "shape": [500, 2], "key": None}
    assert stored["leaves"]["key"]["key"] == "threefry2x32"

"""launch/checkpoints.py and launch/hoststate.py: what is saved comes back."""

import json
import shutil
import threading

import checkpoint_states
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asserts import assert_trees_equal
from checkpoint_states import assert_is, files, is_key, make, newest, plain, restore, save, steps
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from launch import hoststate
from launch.checkpoints import Checkpoints

saved, copied = checkpoint_states.saved, checkpoint_states.copied


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


def test_headers_are_readable_without_us(saved):
    (header,) = (path for path in files(newest(saved)) if "header/metadata" in str(path))
    stored = json.loads(header.read_text())
    assert stored["leaves"]["params.w"] == {"dtype": "float32", "shape": [500, 2], "key": None}
    assert stored["leaves"]["key"]["key"] == "threefry2x32"

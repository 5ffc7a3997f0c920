"""Checkpoints of states that are functions of their step: any restored one can be checked."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from asserts import assert_trees_equal

from launch.checkpoints import Checkpoints


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

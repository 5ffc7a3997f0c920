"""A state on the host: its leaves by name, as numpy arrays.

A state is a pytree of arrays, typed random keys and Python numbers. A leaf is described by dtype,
shape and, for a random key, the name of its generator: {"dtype", "shape", "key"}.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

Leaves = Mapping[str, Mapping[str, Any]]


def _named(tree: Any) -> list[tuple[str, Any]]:
    named = [
        (jax.tree_util.keystr(path, simple=True, separator=".") or "state", leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    if len(dict(named)) < len(named):
        raise ValueError("two leaves of the state have one name; its keys must not contain a dot")
    return named


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def describe(state: Any) -> dict[str, dict[str, Any]]:
    """The description of each leaf; of an abstract key it lacks the generator."""
    leaves = {}
    for name, leaf in _named(state):
        array = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        concrete_key = _is_key(leaf) and isinstance(leaf, jax.Array)
        if not _is_key(leaf) and array.dtype.kind in "OSU":
            raise TypeError(f"{name}: a state holds arrays, numbers and random keys, got {leaf!r}")
        key = str(jax.random.key_impl(leaf)) if concrete_key else None
        leaves[name] = {"dtype": str(array.dtype), "shape": list(array.shape), "key": key}
    return leaves


def differences(there: Leaves, here: Leaves) -> str:
    """Which leaves differ in dtype or shape, the first three in words; empty if none do."""

    def shown(leaf: Mapping[str, Any] | None) -> str:
        return f"{leaf['dtype']}{leaf['shape']}" if leaf else "absent"

    found = [
        f"{name} is {shown(there.get(name))} there and {shown(here.get(name))} here"
        for name in sorted(there.keys() | here.keys())
        if shown(there.get(name)) != shown(here.get(name))
    ]
    return ", ".join(found[:3]) + (f", and {len(found) - 3} more" if len(found) > 3 else "")


def copy(state: Any) -> dict[str, np.ndarray]:
    """Copies of all leaves that outlive donated buffers; of random keys, their data.

    A leaf that spans processes has to be replicated. Real copies, since on CPU `np.asarray` shares
    the buffer, which pins it and makes a later donation copy instead.
    """
    local = {}
    for name, leaf in _named(state):
        if isinstance(leaf, jax.Array):
            if leaf.is_fully_replicated:
                leaf = leaf.addressable_data(0)
            elif not leaf.is_fully_addressable:
                raise ValueError(f"{name} is split over processes; replicate the state to save it")
            leaf = jax.random.key_data(leaf) if _is_key(leaf) else leaf
            leaf.copy_to_host_async()  # all transfers begin before the first is waited for
        local[name] = leaf
    return {name: np.array(leaf, order="C") for name, leaf in local.items()}


def digest(about: str, arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over `about` and every array's name, dtype, shape and bytes."""
    sha = hashlib.sha256(about.encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        sha.update(f"{name} {array.dtype} {array.shape}".encode())
        sha.update(array.reshape(-1).view(np.uint8).data)
    return sha.hexdigest()


def rebuild(like: Any, leaves: Leaves, arrays: Mapping[str, np.ndarray]) -> Any:
    """The state with the structure of `like` from process 0's arrays, on every process."""
    alone, values = jax.process_count() == 1, []
    for name, leaf in _named(like):
        value: Any = arrays[name] if alone else _shared(arrays.get(name), leaves[name])
        if leaves[name]["key"]:
            value = jax.random.wrap_key_data(value, impl=leaves[name]["key"])
        values.append(type(leaf)(value) if isinstance(leaf, int | float) else value)
    return jax.tree.unflatten(jax.tree.structure(like), values)


def _shared(array: np.ndarray | None, leaf: Mapping[str, Any]) -> np.ndarray:
    data = from_process_0(b"" if array is None else array.tobytes())
    if leaf["key"]:
        return np.frombuffer(data, np.uint32).reshape(*leaf["shape"], -1)
    return np.frombuffer(data, jnp.dtype(leaf["dtype"])).reshape(leaf["shape"])


def from_process_0(data: bytes) -> bytes:
    """What process 0 has, on every process; all of them must call."""
    if jax.process_count() == 1:
        return data
    # Two numbers, since the widest integer that jax has by default is int32.
    sizes = np.array(divmod(len(data), 1 << 30), np.int32)
    high, low = map(int, multihost_utils.broadcast_one_to_all(sizes))
    size = (high << 30) + low
    # The others' bytes do not matter, their number does.
    buffer = np.frombuffer(data.ljust(size)[:size], np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes()

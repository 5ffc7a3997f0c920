"""Devices, processes, and one training step spread over them.

Data parallelism: the state is replicated over a mesh with one axis, "data", and each device works
on its own rows of the batch. One function serves all three forms, see `wrap`.
"""

import functools
import hashlib
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from launch import UsageError

AXIS = "data"
Mode = Literal["jit", "pmap", "shard_map"]


def start(
    *,
    platform_devices: int = 0,
    coordinator_address: str = "",
    num_processes: int = 0,
    process_id: int = -1,
    multiprocess: Literal["off", "auto"] = "off",
    compilation_cache: str = "",
) -> None:
    """Set up jax before its first operation.

    Args:
        platform_devices: simulate this many CPU devices in each process; 0 takes what there is.
        coordinator_address, num_processes, process_id: host:port of process 0, how many processes,
            which one this is. All three, or none.
        multiprocess: "auto" finds these from the environment (Cloud TPU, SLURM, Open MPI,
            Kubernetes); "off" never starts `jax.distributed` unasked.
        compilation_cache: folder of compiled programs, shared by runs; "" for none.
    Raises:
        UsageError: if the settings contradict each other or jax has already started.
    """
    explicit = (bool(coordinator_address), num_processes > 0, process_id >= 0)
    if any(explicit) and not all(explicit):
        raise UsageError(
            f"--coordinator_address={coordinator_address} --num_processes={num_processes} "
            f"--process_id={process_id}: give all three to start several processes by hand, "
            "or none"
        )
    if coordinator_address and not re.fullmatch(r".+:\d+", coordinator_address):
        raise UsageError(
            f"--coordinator_address={coordinator_address}: expected host:port of process 0"
        )
    if all(explicit) and process_id >= num_processes:
        raise UsageError(
            f"--process_id={process_id}: expected 0 to {num_processes - 1}, "
            f"one less than --num_processes={num_processes}"
        )
    if platform_devices:
        try:
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", platform_devices)
        except RuntimeError:  # too late, which is harmless if the count is the wanted one
            if jax.local_device_count() != platform_devices:
                raise UsageError(
                    f"--platform_devices={platform_devices}: jax runs already, with "
                    f"{jax.local_device_count()} devices; expected that number, or 0"
                ) from None
    if all(explicit):
        jax.distributed.initialize(coordinator_address, num_processes, process_id)
    elif multiprocess == "auto":
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise UsageError(
                f"--multiprocess=auto: no cluster was found ({error}); expected Cloud TPU, SLURM, "
                "Open MPI or Kubernetes, or --coordinator_address, --num_processes, --process_id"
            ) from error
    if compilation_cache:
        jax.config.update("jax_compilation_cache_dir", compilation_cache)
        # Small models compile in under the default second, many times over.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if jax.process_count() > 1:
        # CPU processes must meet for the first time within 30 seconds. Here they are together;
        # after compiling, on a busy machine, they are not.
        multihost_utils.sync_global_devices("start")


def is_first() -> bool:
    """Whether this process writes files and prints the result."""
    return jax.process_index() == 0


def is_alone() -> bool:
    return jax.process_count() == 1


def check_same(settings: str) -> None:
    """UsageError on every process if one of them was started with other settings."""
    if jax.process_count() > 1:
        sha = np.frombuffer(hashlib.sha256(settings.encode()).digest(), np.uint8)
        if len(np.unique(multihost_utils.process_allgather(sha), axis=0)) > 1:
            raise UsageError(
                f"--num_processes={jax.process_count()}: they were started with different flags; "
                "expected the same ones, up to --process_id"
            )


def make_mesh(num_devices: int = 0) -> Mesh:
    """A mesh over the first `num_devices` devices of all processes; 0 takes all of them.

    Raises: UsageError if there are not so many.
    """
    devices = jax.devices()
    if num_devices > len(devices):
        raise UsageError(
            f"--devices={num_devices}: there are {len(devices)} {devices[0].platform} devices; "
            f"expected 1 to {len(devices)}, or 0 for all (--platform_devices simulates more)"
        )
    if num_devices and jax.process_count() > 1 and num_devices < len(devices):
        raise UsageError(f"--devices={num_devices}: several processes use all {len(devices)}")
    return Mesh(np.array(devices[: num_devices or None]), (AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
    """The leading axis spread over devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Every leaf on every device of the mesh; all processes hold the same values."""
    everywhere = replicated(mesh)

    def put(x: Any) -> jax.Array:
        if jax.process_count() == 1:
            return jax.device_put(x, everywhere)
        if hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                put(jax.random.key_data(x)), impl=jax.random.key_impl(x)
            )
        # Devices of other processes can be filled by those only, each from its own copy.
        local = on_host(x)
        return jax.make_array_from_callback(local.shape, everywhere, lambda index: local[index])

    return jax.tree.map(put, tree)


def on_host(tree: Any) -> Any:
    """Numpy copies of replicated arrays, also of those that span processes."""

    def read(x: Any) -> Any:
        return np.asarray(x.addressable_data(0) if isinstance(x, jax.Array) else x)

    return jax.tree.map(read, tree)


def wrap(chunk: Callable[..., Any], mesh: Mesh, mode: Mode) -> Callable[..., Any]:
    """`run(state, *args, num_steps=n) -> (state, metrics)` over the devices of `mesh`.

    `chunk(state, *args, num_steps, axis_name=None, batch_sharding=None)` returns replicated
    values: given `axis_name` it averages over that axis, given `batch_sharding` it constrains its
    batch to it. The state is donated; arguments and results are replicated.

    The default, "jit", leaves the partition to XLA. "pmap" and "shard_map" say it by hand; pmap is
    in maintenance mode and is built on the other two.
    """
    if mode == "jit":

        def call(state: Any, *args: Any, num_steps: int) -> Any:
            return chunk(state, *args, num_steps=num_steps, batch_sharding=rows(mesh))

    elif mode == "shard_map":

        def call(state: Any, *args: Any, num_steps: int) -> Any:
            body = functools.partial(chunk, num_steps=num_steps, axis_name=AXIS)
            everywhere = PartitionSpec()
            return jax.shard_map(body, mesh=mesh, in_specs=everywhere, out_specs=everywhere)(
                state, *args
            )

    elif mode == "pmap":
        return _by_pmap(chunk, mesh)
    else:
        raise UsageError(f"--parallel={mode}: expected one of jit, pmap, shard_map")
    return jax.jit(
        call, static_argnames="num_steps", donate_argnums=0, out_shardings=replicated(mesh)
    )


def _by_pmap(chunk: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    @functools.cache
    def compiled(num_steps: int, num_args: int) -> Callable[..., Any]:
        def body(_: jax.Array, state: Any, *args: Any) -> Any:
            return chunk(state, *args, num_steps=num_steps, axis_name=AXIS)

        return jax.pmap(
            body,
            axis_name=AXIS,
            in_axes=(0, *(None,) * (1 + num_args)),
            out_axes=None,
            devices=list(mesh.devices.flat),
            donate_argnums=1,
        )

    # pmap wants an argument with an entry for each device of this process.
    index = np.arange(len(mesh.local_devices))

    def call(state: Any, *args: Any, num_steps: int) -> Any:
        results = compiled(num_steps, len(args))(index, state, *args)
        return results if is_alone() else jax.tree.map(whole, results)

    def whole(x: jax.Array) -> jax.Array:
        # What pmap returns spans the devices of this process only.
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = whole(jax.random.key_data(x))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        parts = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, replicated(mesh), parts)

    return call

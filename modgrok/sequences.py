"""Sequences of worked examples, drawn on the device inside the compiled step.

Axes: B batch, T tokens (3 for each shot), S shots, W tasks, M inputs, X any.
"""

from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp


def check_batch(batch: int, num_tasks: int) -> None:
    """Raises ValueError unless `batch` gives every task the same number of sequences."""
    if batch < 1 or batch % num_tasks:
        nearest = max(1, round(batch / num_tasks)) * num_tasks
        raise ValueError(
            f"batch={batch} is not a multiple of the {num_tasks} tasks, each of which gets "
            f"the same number of sequences; the nearest that is: {nearest}"
        )


def sample_sequences(
    key: jax.Array,
    task_W2: jax.Array,
    input_M2: jax.Array,
    *,
    modulus: int,
    shots: int,
    batch: int,
    paired: bool = True,
    num_tasks: jax.Array | int | None = None,
    num_inputs: jax.Array | int | None = None,
) -> jax.Array:
    """Balanced sequences x1 y1 z1 x2 y2 z2 ... with z = a x + b y mod p.

    Every task gets batch / W sequences; rows are task-major, so row r belongs to task
    r // (batch / W). Inputs are uniform on `input_M2` with replacement. With `paired`, every
    task sees the same batch / W lists of inputs; otherwise each sequence draws its own.

    Args:
        key: random key, spent here.
        task_W2: task vectors (a, b).   input_M2: pairs (x, y).
        modulus: p.   shots: S, examples in a sequence.   batch: B, a multiple of W.
        num_tasks, num_inputs: use the first so many rows of `task_W2`, of `input_M2`: the same
            numbers as with the other rows cut off. They may be traced, so that sets of several
            sizes, padded, share a program; a traced `num_tasks` has to divide B, which nobody
            checks. `num_tasks` needs `paired`, and jax_threefry_partitionable (jax's default).
    Returns:
        tokens_BT, int32, T = 3 S. The model reads all but the last token.
    Raises:
        ValueError: if `batch` is not a multiple of W (or of a concrete `num_tasks`), or
            `shots` < 1, or `num_tasks` comes without what it needs.
    Source: He et al. (2024), section 2; the batches of its code.
    """
    if shots < 1:
        raise ValueError(f"shots={shots}, expected at least 1")
    if num_inputs is None:
        num_inputs = input_M2.shape[0]
    if num_tasks is not None:
        if not paired:
            raise ValueError("num_tasks needs paired=True: unpaired draws depend on the shape")
        if not getattr(jax.config, "jax_threefry_partitionable", True):
            raise ValueError(
                "num_tasks needs jax_threefry_partitionable=True: else draws depend on the shape"
            )
        if isinstance(num_tasks, Integral):
            check_batch(batch, num_tasks)
        # The lists of a smaller table are the first ones of a larger: a number depends on its
        # flat index alone (jax's threefry is partitionable). So all batches draw B of them.
        index_BS = jax.random.randint(key, (batch, shots), 0, num_inputs, jnp.int32)
        row_B, repeats = jnp.arange(batch), batch // num_tasks
        xy_BS2 = jnp.asarray(input_M2, jnp.int32)[index_BS[row_B % repeats]]
        ab_B12 = jnp.asarray(task_W2, jnp.int32)[row_B // repeats][:, None]
        z_BS = (ab_B12 * xy_BS2).sum(-1) % modulus
        return jnp.concatenate([xy_BS2, z_BS[..., None]], axis=-1).reshape(batch, 3 * shots)
    num_tasks = task_W2.shape[0]
    check_batch(batch, num_tasks)
    repeats = batch // num_tasks
    drawn_W = (1,) if paired else (num_tasks,)
    shape_WRS = (*drawn_W, repeats, shots)
    # int32 by name: with x64 on, the default draws other inputs.
    index_WRS = jax.random.randint(key, shape_WRS, 0, num_inputs, jnp.int32)
    x_WRS, y_WRS = jnp.unstack(jnp.asarray(input_M2, jnp.int32)[index_WRS], axis=-1)
    a_W11, b_W11 = jnp.asarray(task_W2, jnp.int32).T[..., None, None]
    z_WRS = (a_W11 * x_WRS + b_W11 * y_WRS) % modulus
    xyz_WRS3 = jnp.stack(jnp.broadcast_arrays(x_WRS, y_WRS, z_WRS), axis=-1)
    return xyz_WRS3.reshape(batch, 3 * shots)


def answers(tokens_BT: jax.Array) -> jax.Array:
    """The scored tokens z_BS: every third one. z_1 is answered after no example (0-shot)."""
    return tokens_BT[:, 2::3]


def spread(x_BX: Any, row_sharding: jax.sharding.Sharding | None) -> Any:
    """Within jit: an array, or a tree of them, with rows spread over devices unless None."""
    if row_sharding is None:
        return x_BX
    return jax.lax.with_sharding_constraint(x_BX, row_sharding)


def in_batches(x_BX: Any, rows: int, row_sharding: jax.sharding.Sharding | None = None) -> Any:
    """The rows of an array, or of each of a tree, in batches of `rows` at most: (N, rows, ...).

    Batches are as long as is needed for all rows and for the devices to have equal shares. The
    last one is filled up with copies of the first row, whose results the caller cuts off again.
    """
    total = len(jax.tree.leaves(x_BX)[0])
    devices = 1 if row_sharding is None else row_sharding.num_devices
    rows = -(-min(rows, total) // devices) * devices

    def cut(x_BX):
        padded = jnp.concatenate([x_BX, jnp.repeat(x_BX[:1], -total % rows, axis=0)])
        return padded.reshape(-1, rows, *x_BX.shape[1:])

    return jax.tree.map(cut, x_BX)

"""Pairs of prompts that differ in one label, for activation patching.

Axes: B sequences  T tokens  S shots  W tasks  M inputs
Source: designed here, after He et al. (2024).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from modgrok.tasks import check_modulus, inverses


class Prompts(NamedTuple):
    """Pairs of prompts that differ in one label, on which the answer hangs."""

    clean_BT: jax.Array
    corrupt_BT: jax.Array
    clean_B: jax.Array  # the answer that Ratio Matching gives to each
    corrupt_B: jax.Array


def prompt_inputs(
    input_M2: np.ndarray, *, modulus: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which inputs can make the pairs of `matched_prompts`; numpy alone.

    Returns:
        (example_M, query_MM, other_MM), bool: inputs that may be the one example on the query's
        line, and for each example the queries and the other examples that go with it.
    Raises:
        ValueError: if no line through the origin has two of the inputs and one off it.
    """
    check_modulus(modulus)
    input_M2 = np.asarray(input_M2)
    nonzero_M = (input_M2 != 0).any(1)
    cross_MM = np.outer(input_M2[:, 0], input_M2[:, 1])
    on_MM = ((cross_MM - cross_MM.T) % modulus == 0) & nonzero_M & nonzero_M[:, None]
    query_MM = on_MM & ~np.eye(len(input_M2), dtype=bool)
    other_MM = ~on_MM & nonzero_M
    example_M = nonzero_M & query_MM.any(1) & other_MM.any(1)
    if not example_M.any():
        raise ValueError(
            f"input_M2: none of {len(input_M2)} inputs has another on its line and one off it; "
            "expected one at least"
        )
    return example_M, query_MM, other_MM


def matched_prompts(
    key: jax.Array,
    task_W2: jax.Array,
    input_M2: np.ndarray,
    *,
    modulus: int,
    shots: int,
    match: int,
    batch: int,
) -> Prompts:
    """Prompts whose last query is on the line of one example, and only that one.

    The clean prompt follows a task; in the corrupt one the label of example `match` is another,
    uniform. With (x, y) = c (x_i, y_i) the clean answer is c z_i. The query is another input than
    the example; no other example is on its line, nor (0, 0).

    Args:
        key: spent here; draws tasks from `task_W2` and inputs from `input_M2`, which is concrete.
        shots: S, the query is the last.   match: from 0 to S - 2.
    Raises:
        ValueError: if `match` is no earlier shot, or `prompt_inputs` refuses the inputs.
    """
    if not 0 <= match < shots - 1:
        raise ValueError(f"match={match}, expected from 0 to {shots - 2}, before the query")
    return _matched_prompts(
        key,
        task_W2,
        np.asarray(input_M2),
        prompt_inputs(input_M2, modulus=modulus),
        modulus=modulus,
        shots=shots,
        match=match,
        batch=batch,
    )


@functools.partial(jax.jit, static_argnames=("modulus", "shots", "match", "batch"))
def _matched_prompts(key, task_W2, input_M2, masks, *, modulus, shots, match, batch):
    usable_M, query_MM, other_MM = masks
    task_W2, input_M2 = jnp.asarray(task_W2, jnp.int32), jnp.asarray(input_M2, jnp.int32)
    keys = jax.random.split(key, 5)

    def choose(key, mask_BM, shape):
        return jax.random.categorical(key, jnp.where(mask_BM, 0.0, -jnp.inf), shape=shape)

    example_B = choose(keys[0], usable_M, (batch,))
    query_B = choose(keys[1], query_MM[example_B], (batch,))
    index_SB = choose(keys[2], other_MM[example_B], (shots, batch))
    index_BS = index_SB.at[match].set(example_B).at[-1].set(query_B).T
    a_B1, b_B1 = task_W2[jax.random.randint(keys[3], (batch,), 0, task_W2.shape[0])].T[..., None]
    x_BS, y_BS = jnp.moveaxis(input_M2[index_BS], -1, 0)
    z_BS = (a_B1 * x_BS + b_B1 * y_BS) % modulus
    shift_B = jax.random.randint(keys[4], (batch,), 1, modulus, jnp.int32)
    # (x, y) = c (x_i, y_i), so the answer moves by c times the shift.
    inverse_p = jnp.asarray(inverses(modulus))
    x_B, y_B, xi_B, yi_B = x_BS[:, -1], y_BS[:, -1], x_BS[:, match], y_BS[:, match]
    ratio_B = jnp.where(xi_B != 0, x_B * inverse_p[xi_B], y_B * inverse_p[yi_B]) % modulus
    clean_BT = jnp.stack([x_BS, y_BS, z_BS], axis=-1).reshape(batch, 3 * shots)
    at = 3 * match + 2
    corrupt_BT = clean_BT.at[:, at].set((clean_BT[:, at] + shift_B) % modulus)
    clean_B = z_BS[:, -1]
    return Prompts(clean_BT, corrupt_BT, clean_B, (clean_B + ratio_B * shift_B) % modulus)

"""Which queries are answered after k examples, and which algorithm would have answered these.

For a context of k examples every one of the p^2 queries is asked. Ratio Matching knows those on the
line of an example through the origin, and (0, 0); modular regression those in the span of the
examples, which is everything once two are independent. The instrument takes any function of
sequences, so that the oracles go through it as networks do.

Axes: C contexts  S shots  T tokens (3 S)  K numbers of examples k  p residues (x, then y)
Source: He et al. (2024), figure 5 and its code.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from modgrok import interpret, oracles
from modgrok.tasks import check_modulus


class Grids(NamedTuple):
    """Grids over queries (x, y) after k examples."""

    right_KCpp: jax.Array  # probability of the right answer: 1, 0, or 1 / ties
    ratio_KCpp: jax.Array  # bool: Ratio Matching knows the answer
    regression_KCpp: jax.Array  # bool: modular regression does


class Overlap(NamedTuple):
    """How a grid of right answers lies on a mask; for each k and context, see `overlap`."""

    precision_KC: jax.Array
    recall_KC: jax.Array
    outside_KC: jax.Array


def shot_grids(
    predict: Callable[[jax.Array], jax.Array],
    context_CT: jax.Array,
    task_C2: jax.Array,
    shot_K: np.ndarray,
    *,
    modulus: int,
    rows: int = 128,
    row_sharding: NamedSharding | None = None,
) -> Grids:
    """Ask every query after k examples, for each k and context.

    The answer is the argmax over all that `predict` returns, ties shared. A plain function is
    traced once for each object; a `jax.tree_util.Partial` of arrays once for all.

    Args:
        predict: whole sequences tokens_BT -> logits or probabilities of the answers, (B, S, V).
            The answer to shot k must not depend on later tokens.
        context_CT: whole sequences, of which the first k examples count.
        task_C2: (a, b) of each.   shot_K: numbers of examples k, from 0 to S - 1; concrete.
        rows: sequences in one call of `predict`, which bounds memory.
        row_sharding: spreads these over devices.
    Raises:
        ValueError: if contexts are not whole sequences, one a task, or a k is not one of these.
    """
    check_modulus(modulus)
    if context_CT.ndim != 2 or context_CT.shape[1] % 3 or context_CT.shape[0] != len(task_C2):
        raise ValueError(
            f"context_CT has shape {context_CT.shape}, expected {len(task_C2)} whole sequences, "
            "one for each task"
        )
    shots, shot_K = context_CT.shape[1] // 3, np.asarray(shot_K)
    if ((shot_K < 0) | (shot_K >= shots) | (shot_K % 1 != 0)).any():
        raise ValueError(f"shot_K={shot_K.tolist()}, expected whole numbers from 0 to {shots - 1}")
    predict = oracles.as_partial(predict)
    options = {"modulus": modulus, "rows": rows, "row_sharding": row_sharding}
    return _shot_grids(predict, context_CT, task_C2, shot_K, **options)


@functools.partial(jax.jit, static_argnames=("modulus", "rows", "row_sharding"))
def _shot_grids(predict, context_CT, task_C2, shot_K, *, modulus, rows, row_sharding):
    query_N2 = jnp.stack(jnp.divmod(jnp.arange(modulus**2, dtype=jnp.int32), modulus), axis=1)

    def ask(shot, context_T, task_2, query_2):
        tokens_T = jax.lax.dynamic_update_slice(context_T, query_2, (3 * shot,))
        scores_SV = predict(tokens_T[None])[0]
        z = (task_2 * query_2).sum() % modulus
        return oracles.expected_accuracy(scores_SV[shot][None, None], z[None, None])[0, 0]

    def one(shot, context_T, task_2):
        right_N = interpret.map_rows(
            lambda query_2: ask(shot, context_T, task_2, query_2),
            query_N2,
            rows=rows,
            row_sharding=row_sharding,
        )
        ratio_N, regression_N = known(context_T, query_N2, shot, modulus=modulus)
        return (x.reshape(modulus, modulus) for x in (right_N, ratio_N, regression_N))

    context_CT, task_C2, shot_K = (jnp.asarray(x, jnp.int32) for x in (context_CT, task_C2, shot_K))
    return jax.lax.map(
        lambda shot: Grids(
            *jax.lax.map(lambda pair: tuple(one(shot, *pair)), (context_CT, task_C2))
        ),
        shot_K,
    )


def known(
    context_T: jax.Array, query_N2: jax.Array, shot: jax.Array | int, *, modulus: int
) -> tuple[jax.Array, jax.Array]:
    """Whether Ratio Matching, and modular regression, know the answers after `shot` examples.

    Returns:
        (ratio_N, regression_N), bool. The first implies the second.
    """
    example_S2 = jnp.stack([context_T[::3], context_T[1::3]], axis=1)
    shown_S = jnp.arange(example_S2.shape[0], dtype=jnp.int32) < shot
    nonzero_S = (example_S2 != 0).any(1) & shown_S

    def cross(a_X2, b_X2):
        return (a_X2[:, None, 0] * b_X2[:, 1] - a_X2[:, None, 1] * b_X2[:, 0]) % modulus

    origin_N = (query_N2 == 0).all(1)
    on_line_NS = (cross(query_N2, example_S2) == 0) & nonzero_S
    ratio_N = origin_N | on_line_NS.any(1)
    independent_SS = (cross(example_S2, example_S2) != 0) & nonzero_S[:, None] & nonzero_S
    return ratio_N, ratio_N | independent_SS.any()


def overlap(right_KCpp: jax.Array, mask_KCpp: jax.Array) -> Overlap:
    """Precision, recall, and what is right beyond the mask.

    - precision: share of the right answers that are in the mask, NaN if none is right;
    - recall: share of the mask that is right;
    - outside: share of the rest that is right, NaN if the mask is everything. An algorithm that
      knows the mask and guesses elsewhere has recall 1 and outside 1 / p, and its precision is
      m / (m + (1 - m) / p) with m the share of queries in the mask, less than 1.
    """
    mask = jnp.asarray(mask_KCpp, jnp.float32)
    inside_KC = (right_KCpp * mask).sum((-2, -1))
    beyond_KC = (right_KCpp * (1 - mask)).sum((-2, -1))
    return Overlap(
        inside_KC / (inside_KC + beyond_KC),
        inside_KC / mask.sum((-2, -1)),
        beyond_KC / (1 - mask).sum((-2, -1)),
    )

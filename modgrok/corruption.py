"""What becomes of the answers when labels of the examples are made wrong.

The instruments take any function of sequences, as those of `modgrok.grids` do.

Axes: B sequences  T tokens  S shots  N pairs of numbers
Source: He et al. (2024), label corruption of its notebook.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from modgrok import oracles, sequences
from modgrok.tasks import check_modulus


class Corruption(NamedTuple):
    """Accuracy after one label was made wrong; see `label_corruption`."""

    accuracy_SS: jax.Array  # corrupted shot, then asked shot; NaN unless the second is later
    clean_S: jax.Array
    matched: jax.Array  # mean change where the corrupted shot is on the query's line
    unmatched: jax.Array  # mean change where it is not


def label_corruption(
    predict: Callable[[jax.Array], jax.Array],
    tokens_BT: jax.Array,
    key: jax.Array,
    *,
    modulus: int,
    row_sharding: jax.sharding.Sharding | None = None,
) -> Corruption:
    """Make the label of one shot wrong, for each shot in turn, and ask all later ones.

    The label is shifted by a uniform 1 .. p - 1; right answers stay those of the task.

    Args:
        predict: as in `grids.shot_grids`.   key: spent here.
    Returns:
        `Corruption`: the map of accuracies, and the mean change of accuracy over all later
        queries that are on the line of the corrupted shot (`oracles.matches`), and over the
        others. Ratio Matching looks at no shot off the line: its second number is 0. The part of
        the map that is not asked is NaN, so that jax_debug_nans raises.
    Raises:
        ValueError: if `tokens_BT` are not whole sequences.
    """
    check_modulus(modulus)
    _check_sequences(tokens_BT)
    predict = oracles.as_partial(predict)
    return _label_corruption(predict, tokens_BT, key, modulus=modulus, row_sharding=row_sharding)


@functools.partial(jax.jit, static_argnames=("modulus", "row_sharding"))
def _label_corruption(predict, tokens_BT, key, *, modulus, row_sharding):
    tokens_BT = sequences.spread(tokens_BT, row_sharding)
    batch, shots = tokens_BT.shape[0], tokens_BT.shape[1] // 3
    z_BS = sequences.answers(tokens_BT)
    shift_SB = jax.random.randint(key, (shots, batch), 1, modulus, jnp.int32)
    match_BSS = oracles.matches(tokens_BT, modulus)
    shot_S = jnp.arange(shots, dtype=jnp.int32)

    def right(tokens_BT):
        return oracles.expected_accuracy(predict(tokens_BT), z_BS)

    clean_BS = right(tokens_BT)

    def one(shot_shift):
        shot, shift_B = shot_shift
        wrong_B = (tokens_BT[:, 3 * shot + 2] + shift_B) % modulus
        change_BS = right(tokens_BT.at[:, 3 * shot + 2].set(wrong_B)) - clean_BS
        later_S = (shot_S > shot).astype(jnp.float32)
        matched_BS = jnp.where(match_BSS[:, :, shot], later_S, 0)
        other_BS = later_S - matched_BS
        sums = [((change_BS * w).sum(), w.sum()) for w in (matched_BS, other_BS)]
        accuracy_S = jnp.where(later_S > 0, (clean_BS + change_BS).mean(0), jnp.nan)
        return accuracy_S, sums

    accuracy_SS, sums = jax.lax.map(one, (shot_S, shift_SB))
    matched, unmatched = (change_S.sum() / count_S.sum() for change_S, count_S in sums)
    return Corruption(accuracy_SS, clean_BS.mean(0), matched, unmatched)


def _check_sequences(tokens_BT: jax.Array) -> None:
    if tokens_BT.ndim != 2 or tokens_BT.shape[1] % 3:
        raise ValueError(f"tokens_BT has shape {tokens_BT.shape}, expected rows of whole shots")


def corrupt_several(
    predict: Callable[[jax.Array], jax.Array],
    tokens_BT: jax.Array,
    key: jax.Array,
    count_N2: np.ndarray,
    *,
    modulus: int,
    row_sharding: jax.sharding.Sharding | None = None,
) -> jax.Array:
    """Accuracy after k examples, j of them with wrong labels at random places: accuracy_N.

    Unlike the paper's notebook, the query's own label is never among them.

    Args:
        predict: as in `grids.shot_grids`.   key: spent here.
        count_N2: pairs (k, j), 0 <= j <= k < S; concrete.
    Raises:
        ValueError: if a pair is not one of these, or `tokens_BT` are not whole sequences.
    """
    check_modulus(modulus)
    _check_sequences(tokens_BT)
    counts = np.asarray(count_N2)
    shots = tokens_BT.shape[1] // 3
    if ((counts[:, 1] < 0) | (counts[:, 1] > counts[:, 0]) | (counts[:, 0] >= shots)).any():
        raise ValueError(
            f"count_N2={counts.tolist()}, expected pairs (k, j) with 0 <= j <= k < {shots}"
        )
    predict = oracles.as_partial(predict)
    return _corrupt_several(
        predict,
        tokens_BT,
        key,
        jnp.asarray(counts, jnp.int32),
        modulus=modulus,
        row_sharding=row_sharding,
    )


@functools.partial(jax.jit, static_argnames=("modulus", "row_sharding"))
def _corrupt_several(predict, tokens_BT, key, count_N2, *, modulus, row_sharding):
    tokens_BT = sequences.spread(tokens_BT, row_sharding)
    z_BS = sequences.answers(tokens_BT)
    key_place, key_shift = jax.random.split(key)
    # The j smallest of k random numbers are j random places, nested in j.
    number_BS = jax.random.uniform(key_place, z_BS.shape, jnp.float32)
    shift_BS = jax.random.randint(key_shift, z_BS.shape, 1, modulus, jnp.int32)

    def one(count_2):
        k, j = count_2
        shown_S = jnp.arange(z_BS.shape[1], dtype=jnp.int32) < k
        rank_BS = jnp.where(shown_S, number_BS, 2.0).argsort(1).argsort(1).astype(j.dtype)
        wrong_BS = jnp.where(shown_S & (rank_BS < j), (z_BS + shift_BS) % modulus, z_BS)
        return oracles.expected_accuracy(predict(tokens_BT.at[:, 2::3].set(wrong_BS)), z_BS)[
            :, k
        ].mean()

    return jax.lax.map(one, count_N2)

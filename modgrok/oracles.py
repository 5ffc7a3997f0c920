"""What can be known about the next answer: Ratio Matching and Bayes-optimal prediction.

Shot k sees the examples 0..k-1 and the query (x_k, y_k). Two predictors answer it:
- **Ratio Matching** looks for one earlier example (x_i, y_i) on the query's line through the
  origin, (x_k, y_k) = c (x_i, y_i), and answers c z_i. Otherwise it guesses.
- **Bayes** keeps every task that agrees with all examples and answers what most of them say. With
  all p^2 tasks it is the best that any rule can do on tasks it never saw; with the training tasks
  as pool it is the best that a learner of exactly this list can do.

Both return a distribution of the answer. `ratio_matching_accuracy` and `bayes_accuracy` are what
their accuracy comes to on average, in closed form.

Axes: B sequences  T tokens (x y z x y z ...)  S shots  W tasks of the pool  M inputs  p residues
      J lines through the origin of Z_p^2 (there are p + 1)
Source: He, Doshi, Das, Gromov, "Learning to grok", NeurIPS 2024, arXiv 2406.02550; the closed
forms are ours, and derived where they stand.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from modgrok.tasks import check_modulus, inverses


def matches(tokens_BT: jax.Array, modulus: int) -> jax.Array:
    """Whether the input of an earlier shot is on the query's line: match_BSS, query before example.

    On one line through the origin means x y_i = y x_i mod p; inputs (0, 0) match nothing.
    """
    check_modulus(modulus)
    x_BS, y_BS = tokens_BT[:, ::3], tokens_BT[:, 1::3]
    cross_BSS = x_BS[:, :, None] * y_BS[:, None] - y_BS[:, :, None] * x_BS[:, None]
    nonzero_BS = (x_BS != 0) | (y_BS != 0)
    earlier_SS = jnp.tri(x_BS.shape[1], k=-1, dtype=bool)
    both_BSS = nonzero_BS[:, :, None] & nonzero_BS[:, None]
    return (cross_BSS % modulus == 0) & both_BSS & earlier_SS


@partial(jax.jit, static_argnames="modulus")
def ratio_matching(tokens_BT: jax.Array, modulus: int) -> jax.Array:
    """Predictive distribution of Ratio Matching at every shot, probs_BSp.

    All mass on c z_i where an earlier example (x_i, y_i) != 0 has (x, y) = c (x_i, y_i) mod p, for
    the earliest such i (they agree unless labels are corrupted); on 0 where (x, y) = 0; else
    uniform. `matches` says which are on one line; c = x / x_i, or y / y_i where x_i = 0.
    """
    x_BS, y_BS, z_BS = _split_tokens(tokens_BT, modulus)
    nonzero_BS = (x_BS != 0) | (y_BS != 0)
    match_BSS = matches(jnp.asarray(tokens_BT, jnp.int32), modulus)
    first_BS = match_BSS.argmax(-1)
    x0_BS, y0_BS, z0_BS = (jnp.take_along_axis(v, first_BS, 1) for v in (x_BS, y_BS, z_BS))

    inverse_p = jnp.asarray(inverses(modulus))
    ratio_BS = jnp.where(x0_BS != 0, x_BS * inverse_p[x0_BS], y_BS * inverse_p[y0_BS]) % modulus
    answer_BS = jnp.where(nonzero_BS, ratio_BS * z0_BS % modulus, 0)
    one_hot_BSp = jax.nn.one_hot(answer_BS, modulus, dtype=jnp.float32)
    known_BS = match_BSS.any(-1) | ~nonzero_BS
    return jnp.where(known_BS[..., None], one_hot_BSp, 1 / modulus)


@partial(jax.jit, static_argnames="modulus")
def bayes(tokens_BT: jax.Array, modulus: int, pool_W2: jax.Array | None = None) -> jax.Array:
    """Posterior predictive distribution at every shot, probs_BSp.

    P(z) is the share of tasks with a x + b y = z among those that agree with all earlier examples.
    The prior is uniform over pool_W2, by default all p^2 tasks. Where no task of the pool is left,
    the prediction is uniform. Memory stays bounded: about a million pairs of a sequence and a task
    are worked on at a time.
    """
    shots_BS = _split_tokens(tokens_BT, modulus)
    if pool_W2 is None:
        a_W, b_W = jnp.divmod(jnp.arange(modulus**2, dtype=jnp.int32), modulus)
    else:
        _check_pairs("pool_W2", pool_W2)
        a_W, b_W = jnp.asarray(pool_W2, jnp.int32).T

    def observe(alive_W, shot):
        x, y, z = shot
        answer_W = (x * a_W + y * b_W) % modulus
        votes_p = jnp.zeros(modulus, alive_W.dtype).at[answer_W].add(alive_W)
        return jnp.where(answer_W == z, alive_W, 0), votes_p

    def count_votes(shots_S):
        # ones_like the data, not ones: inside shard_map the carry then varies as the data does.
        all_alive_W = jnp.ones_like(shots_S[0], jnp.float32, shape=a_W.shape)
        return jax.lax.scan(observe, all_alive_W, shots_S)[1]

    votes_BSp = jax.lax.map(count_votes, shots_BS, batch_size=max(1, 2**20 // a_W.size))
    total_BS1 = votes_BSp.sum(-1, keepdims=True)
    return jnp.where(total_BS1 > 0, votes_BSp / jnp.maximum(total_BS1, 1), 1 / modulus)


def predict(key: jax.Array, probs_BSp: jax.Array) -> jax.Array:
    """The likeliest answer z_BS, ties broken uniformly at random; `key` is spent here."""
    logits_BSp = jnp.where(_likeliest(probs_BSp), 0.0, -jnp.inf)
    return jax.random.categorical(key, logits_BSp).astype(jnp.int32)


def expected_accuracy(probs_BSp: jax.Array, z_BS: jax.Array) -> jax.Array:
    """Probability that `predict` answers z, for each sequence and shot: 1 / ties, or 0."""
    best_BSp = _likeliest(probs_BSp)
    hit_BS = jnp.take_along_axis(best_BSp, z_BS[..., None], axis=-1)[..., 0]
    return jnp.where(hit_BS, 1 / best_BSp.sum(-1, dtype=jnp.float32), 0)


def as_partial(predict: Callable[[jax.Array], jax.Array]) -> Partial:
    """A function as an argument of jit: one program for each object, or for all of one Partial."""
    return predict if isinstance(predict, Partial) else Partial(predict)


def ratio_matching_accuracy(
    modulus: int, shots: int, input_M2: np.ndarray | None = None
) -> np.ndarray:
    """Mean accuracy of Ratio Matching after k = 0..shots-1 examples, accuracy_S in float64.

    With n_j of N inputs on line j (the origin not counted) and n_0 on the origin, all drawn
    uniformly with replacement, a query is answered for certain with probability
        r_k = n_0 / N + sum_j (n_j / N) (1 - (1 - n_j / N)^k),    accuracy r_k + (1 - r_k) / p,
    the last term from guessing, where tasks are uniform over Z_p^2.

    Args:
        input_M2: the inputs that sequences draw from; by default all p^2.
    """
    k_S1 = np.arange(shots)[:, None]
    origin, line_J = _line_shares(modulus, input_M2)
    known_S = origin + (line_J * (1 - (1 - line_J) ** k_S1)).sum(1)
    return known_S + (1 - known_S) / modulus


def bayes_accuracy(modulus: int, shots: int, input_M2: np.ndarray | None = None) -> np.ndarray:
    """Best mean accuracy after k = 0..shots-1 examples, tasks uniform over Z_p^2; accuracy_S.

    A query in the span of the examples has a certain answer, any other a uniform one. The span is
    {0} with probability q_0^k, line j with (q_0 + q_j)^k - q_0^k, else everything, where q are the
    shares of `input_M2` (by default all of Z_p^2) on the origin and on each line.
    """
    k_S1 = np.arange(shots)[:, None]
    origin, line_J = _line_shares(modulus, input_M2)
    on_origin_S1 = origin**k_S1
    on_line_SJ = (origin + line_J) ** k_S1 - on_origin_S1
    unknown_S = on_origin_S1[:, 0] * (1 - origin) + (on_line_SJ * (1 - origin - line_J)).sum(1)
    return 1 - unknown_S * (1 - 1 / modulus)


def _line_shares(modulus: int, input_M2: np.ndarray | None) -> tuple[float, np.ndarray]:
    """Shares of the inputs at the origin and on each of the p + 1 lines through it."""
    check_modulus(modulus)
    if input_M2 is None:
        return 1 / modulus**2, np.full(modulus + 1, (modulus - 1) / modulus**2)
    _check_pairs("input_M2", input_M2)
    x_M, y_M = np.asarray(input_M2, np.int64).T
    inverse_p = inverses(modulus)
    slope_M = np.where(x_M != 0, y_M * inverse_p[x_M] % modulus, modulus)  # p: the line x = 0
    at_origin_M = (x_M == 0) & (y_M == 0)
    counts_J = np.bincount(slope_M[~at_origin_M], minlength=modulus + 1)
    return at_origin_M.mean(), counts_J / len(x_M)


def _split_tokens(tokens_BT: jax.Array, modulus: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    check_modulus(modulus)
    if tokens_BT.ndim != 2 or tokens_BT.shape[1] % 3:
        raise ValueError(
            f"tokens_BT has shape {tokens_BT.shape}, expected (sequences, 3 * shots): "
            "x y z x y z ..."
        )
    x_BS, y_BS, z_BS = (jnp.asarray(tokens_BT[:, i::3], jnp.int32) for i in range(3))
    return x_BS, y_BS, z_BS


def _check_pairs(name: str, pairs: jax.Array | np.ndarray) -> None:
    if pairs.ndim != 2 or pairs.shape[0] == 0 or pairs.shape[1] != 2:
        raise ValueError(
            f"{name} has shape {pairs.shape}, expected (rows, 2) with at least one row"
        )


def _likeliest(probs_BSp: jax.Array) -> jax.Array:
    return probs_BSp == probs_BSp.max(-1, keepdims=True)

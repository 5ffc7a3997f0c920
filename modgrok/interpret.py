"""What a model attends to and what its activations stand for: scores with closed definitions.

The instruments look at a `Subject`: a network, or one of `modgrok.controls`, which are rules in the
clothes of a network. They are pure functions of its activations; which inputs are shown to it is
decided by the caller.

Positions: x, y and z of shot s (from 0) are tokens 3 s, 3 s + 1 and 3 s + 2. The answer z is
predicted at y.

Axes: B sequences  T tokens read (3 S - 1)  S shots  L layers  H heads  K head size  D width
      F neurons  V vocab  p residues  N = p^2 inputs (x, y), x first  C components  G features
      3 the positions x, y, z of one shot  R shuffles
Source: He et al. (2024), figures 1d, 1e, attention maps and cosine similarity, and their code;
definitions are ours.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import Partial

from modgrok.model import Config, Params, apply
from modgrok.oracles import matches
from modgrok.sequences import in_batches, spread
from modgrok.tasks import check_modulus, inverses

# Up to this modulus renamed tokens have few partitions into ratios; at 11 there are 90720.
_FEW_PARTITIONS = 7


class Subject(NamedTuple):
    """What is looked at. A pytree, so that it goes through jit without a new program for each."""

    predict: Partial  # tokens_BT, whole sequences -> logits or probabilities of answers, (B, S, V)
    capture: Partial  # tokens_BT, whole sequences -> Activations
    out_LHKD: jax.Array  # what turns a head's output into its part of the residual stream
    embedding_VD: jax.Array


class AttentionScores(NamedTuple):
    """Mean weights, from 0 to 1, of each head; see `attention_scores`."""

    previous_LH: jax.Array
    own_x_LH: jax.Array
    first_LH: jax.Array
    ratio_LH: jax.Array
    ratio_choice_LH: jax.Array
    offset_LH3T: jax.Array


class Features(NamedTuple):
    """Activations at the three positions of one shot, for every input (x, y) of that shot."""

    head_LHN3D: jax.Array  # heads' parts of the residual stream
    hidden_LN3F: jax.Array  # MLP neurons
    residual_LN3D: jax.Array  # residual stream after each block


class Components(NamedTuple):
    """Principal components of the rows of each feature, the largest first."""

    score_GNC: jax.Array  # coordinates of the rows, centred
    explained_GC: jax.Array  # share of the variance; all 0 if there is none


class RatioScores(NamedTuple):
    """Mean cosine similarity within and between classes of equal x / y, see `ratio_similarity`."""

    within_G: jax.Array
    between_G: jax.Array
    null_RG: jax.Array  # within minus between, after the non-zero tokens exchanged their names


def _network_answers(params, gate, cfg, tokens_BT):
    return apply(params, tokens_BT, cfg, gate=gate)


def _network_activations(params, gate, cfg, tokens_BT):
    return apply(params, tokens_BT, cfg, positions="all", capture=True, gate=gate)[1]


def network(params: Params, cfg: Config, gate: jax.Array | None = None) -> Subject:
    """A decoder as a subject; `gate` as in `modgrok.model.Transformer`."""
    return Subject(
        Partial(_network_answers, params, gate, cfg),
        Partial(_network_activations, params, gate, cfg),
        params["blocks"]["out"],
        params["embedding"],
    )


@functools.partial(jax.jit, static_argnames="modulus")
def attention_scores(
    attention_LBHTT: jax.Array, tokens_BT: jax.Array, *, modulus: int
) -> AttentionScores:
    """What each head looks at, averaged over sequences and queries.

    With a[t, s] the weight of query t on key s:

    - previous: a[t, t - 1], mean over t >= 1.
    - own_x: a[y, x] of one shot, mean over shots: does the answer's position see its own x?
    - first: a[t, 0], mean over t >= 1: weight that rests on the first token, a sink.
    - ratio: at y, the sum of a[y, z_i] over earlier shots i with (x_i, y_i) on the line of (x, y)
      through the origin, both not 0, mean over the queries that have one: copying back. Under
      uniform attention it is `ratio_LH` of `uniform_attention`, the baseline.
    - ratio_choice: the same sum over a[y, z_i] of *all* earlier shots, as a ratio of the two means:
      given that a head looks at earlier answers, does it choose the matching ones? Same baseline.
    - offset[c, d]: a[t, t - d], mean over queries t = c mod 3 (x, y, z) with t >= d; 0 if none.

    Args:
        attention_LBHTT: weights, query before key, as `Activations` have them.
        tokens_BT: whole sequences of one token more, which is not looked at.
    Returns:
        `AttentionScores`; ratio is NaN if no query has a matching shot, ratio_choice also for a
        head that never looks at earlier answers (and jax_debug_nans then raises).
    Raises:
        ValueError: if the two have other lengths, or `modulus` is no prime.
    """
    length = attention_LBHTT.shape[-1]
    if tokens_BT.shape[1] != length + 1 or tokens_BT.shape[1] % 3:
        raise ValueError(
            f"tokens_BT has shape {tokens_BT.shape} and attention {attention_LBHTT.shape}, "
            "expected whole sequences of 3 S tokens and weights of the 3 S - 1 that are read"
        )
    check_modulus(modulus)
    mean_LHTT = attention_LBHTT.mean(1)
    at_y_LBHST = attention_LBHTT[..., 1::3, :]
    answers_LBHSS = at_y_LBHST[..., 2::3]
    shots = answers_LBHSS.shape[-2]
    answers_LBHSS = jnp.pad(answers_LBHSS, [(0, 0)] * 4 + [(0, shots - answers_LBHSS.shape[-1])])
    match_BSS = matches(tokens_BT, modulus)
    has_BS = match_BSS.any(-1)
    matched_LH = jnp.einsum("lbhst,bst->lh", answers_LBHSS, match_BSS.astype(jnp.float32))
    earlier_LH = jnp.einsum("lbhst,bs->lh", answers_LBHSS, has_BS.astype(jnp.float32))
    count = has_BS.sum().astype(jnp.float32)
    by_offset = [jnp.diagonal(mean_LHTT, -d, 2, 3) for d in range(length)]
    offset_LH3T = jnp.stack([_by_phase(x, d) for d, x in enumerate(by_offset)], axis=-1)
    return AttentionScores(
        by_offset[1].mean(-1),
        by_offset[1][..., ::3].mean(-1),
        mean_LHTT[..., 1:, 0].mean(-1),
        matched_LH / count,
        matched_LH / earlier_LH,
        offset_LH3T,
    )


def _by_phase(weight_LHX: jax.Array, offset: int) -> jax.Array:
    """Means over queries offset, offset + 1, ... by query mod 3."""
    parts = [weight_LHX[..., (phase - offset) % 3 :: 3] for phase in range(3)]
    means = [x.mean(-1) if x.shape[-1] else jnp.zeros(x.shape[:-1], x.dtype) for x in parts]
    return jnp.stack(means, axis=-1)


def uniform_attention(batch: int, length: int) -> jax.Array:
    """Causal attention that looks at everything alike, (1, B, 1, T, T): the baseline of scores."""
    lower_TT = jnp.tri(length, dtype=jnp.float32)
    return jnp.broadcast_to(
        lower_TT / lower_TT.sum(-1, keepdims=True), (1, batch, 1, *(length,) * 2)
    )


def input_grid(context_T: jax.Array, task_2: jax.Array, *, modulus: int, shot: int) -> jax.Array:
    """The same sequence with every input at one shot, and its right answer: tokens_NT.

    Args:
        context_T: a whole sequence.   task_2: its task (a, b).   shot: from 0; not the last one,
            since the answer to the last one is not read.
    Returns:
        p^2 sequences, x slowest, cut off after the shot that follows.
    Raises:
        ValueError: if `shot` is not one of these.
    """
    check_modulus(modulus)
    shots = context_T.shape[0] // 3
    if not 0 <= shot < shots - 1:
        raise ValueError(f"shot={shot}, expected from 0 to {shots - 2}, before the last one")
    x_N, y_N = jnp.divmod(jnp.arange(modulus**2, dtype=jnp.int32), modulus)
    z_N = (task_2[0] * x_N + task_2[1] * y_N) % modulus
    tokens_NT = jnp.tile(jnp.asarray(context_T[: 3 * shot + 6], jnp.int32), (modulus**2, 1))
    return tokens_NT.at[:, 3 * shot : 3 * shot + 3].set(jnp.stack([x_N, y_N, z_N], axis=1))


def map_rows(
    one: Callable[[jax.Array], Any],
    value_NX: jax.Array,
    *,
    rows: int,
    row_sharding: NamedSharding | None = None,
) -> Any:
    """`one` of each row, results stacked; `rows` of them at a time, which bounds memory.

    Args:
        row_sharding: spreads the rows of a time over devices. Every device has all results.
    """
    if row_sharding is None:
        return jax.lax.map(one, value_NX, batch_size=rows)
    results = jax.lax.map(
        lambda part: jax.vmap(one)(spread(part, row_sharding)),
        in_batches(value_NX, rows, row_sharding),
    )
    results = spread(results, NamedSharding(row_sharding.mesh, PartitionSpec()))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[: len(value_NX)], results)


@functools.partial(jax.jit, static_argnames=("shot", "rows", "row_sharding"))
def grid_features(
    subject: Subject,
    tokens_NT: jax.Array,
    *,
    shot: int,
    rows: int = 128,
    row_sharding: NamedSharding | None = None,
) -> Features:
    """Activations at x, y and z of `shot`, for the sequences of `input_grid`.

    Args:
        rows, row_sharding: as in `map_rows`. Change no number.
    Raises:
        ValueError: if the sequences have no shot after `shot`.
    """
    if not 0 <= shot < tokens_NT.shape[1] // 3 - 1:
        raise ValueError(
            f"shot={shot}, expected from 0 to {tokens_NT.shape[1] // 3 - 2} in sequences of "
            f"{tokens_NT.shape[1]} tokens, before the last one"
        )
    at = slice(3 * shot, 3 * shot + 3)

    def one(tokens_T):
        seen = subject.capture(tokens_T[None])
        return tuple(x[:, 0, at] for x in (seen.head_LBTHK, seen.hidden_LBTF, seen.residual_LBTD))

    head_NL3HK, hidden_NL3F, residual_NL3D = map_rows(
        one, tokens_NT, rows=rows, row_sharding=row_sharding
    )
    head_LHN3D = jnp.einsum(
        "nlphk,lhkd->lhnpd",
        head_NL3HK.astype(jnp.float32),
        subject.out_LHKD.astype(jnp.float32),
    )
    hidden_LN3F = jnp.moveaxis(hidden_NL3F, 0, 1).astype(jnp.float32)
    return Features(head_LHN3D, hidden_LN3F, jnp.moveaxis(residual_NL3D, 0, 1))


@functools.partial(jax.jit, static_argnames="components")
def principal_components(feature_GND: jax.Array, *, components: int) -> Components:
    """Exact principal components of the centred rows of each feature.

    Centred rows are U S V^T; scores are U S, the explained share is S^2 / sum S^2. Of each
    component's two signs the one is taken that makes its largest score positive.

    Args:
        feature_GND: for figure 1d, heads' parts at x and y put side by side, D = 2 x width.
    Raises:
        ValueError: if there are fewer rows or channels than `components`.
    """
    rows, width = feature_GND.shape[-2:]
    if not 1 <= components <= min(rows, width):
        raise ValueError(f"components={components}, expected from 1 to {min(rows, width)}")

    def one(feature_ND):
        feature_ND = jnp.asarray(feature_ND, jnp.float32)
        u_NX, s_X, _ = jnp.linalg.svd(feature_ND - feature_ND.mean(0), full_matrices=False)
        score_NC = (u_NX * s_X)[:, :components]
        largest_C = jnp.take_along_axis(score_NC, jnp.abs(score_NC).argmax(0)[None], 0)[0]
        power_X = s_X**2
        # What rounding leaves of rows that are all the same is no component.
        varies = power_X.sum() > 1e-10 * (feature_ND**2).sum()
        share_X = jnp.where(varies, power_X / jnp.where(varies, power_X.sum(), 1), 0)
        return Components(score_NC * jnp.sign(largest_C), share_X[:components])

    return jax.lax.map(one, feature_GND)


def similarity(feature_ND: jax.Array) -> jax.Array:
    """Cosine similarities of the rows, each standardised over its channels first; (N, N), -1 to 1.

    That is the correlation of channels. A row without variance is similar to nothing, 0.
    """
    unit_ND = _unit(feature_ND)
    return jnp.einsum("nd,md->nm", unit_ND, unit_ND, precision="highest")


def _unit(feature_ND: jax.Array) -> jax.Array:
    """Rows centred over channels, of length 1; the standard deviation cancels."""
    feature_ND = jnp.asarray(feature_ND, jnp.float32)
    centred_ND = feature_ND - feature_ND.mean(-1, keepdims=True)
    square_N1 = (centred_ND**2).sum(-1, keepdims=True)
    # What rounding leaves of a constant row is no variance.
    varies_N1 = square_N1 > 1e-10 * (feature_ND**2).sum(-1, keepdims=True)
    return jnp.where(varies_N1, centred_ND / jnp.sqrt(jnp.where(varies_N1, square_N1, 1)), 0)


@functools.partial(jax.jit, static_argnames=("modulus", "num"))
def ratio_similarity(
    feature_GND: jax.Array, key: jax.Array, *, modulus: int, num: int
) -> RatioScores:
    """Does x / y decide which inputs look alike?

    Among the (p - 1)^2 inputs with x, y != 0, the mean of `similarity` over pairs of different
    inputs with equal x / y (within), and over pairs whose ratio, x and y all differ (between). Two
    inputs of one ratio never share x or y, so a feature of x alone, or of y alone, has the same
    mean in both up to what single tokens happen to have. The null gives the non-zero tokens other
    names, x and y alike, and takes within minus between of the classes that result: as many, as
    large, none with a shared token, one of them x = y. Of a feature that depends on x and y
    through tokens without an order, the p-value (1 + #null >= found) / (1 + R) is at most .05
    one time in twenty or less. One that reads z = a x + b y is no such feature, and has none.

    Multiplications and powers of all tokens keep the classes. So p = 5 and 7 have 2 and 59 other
    partitions, and the null has each at most once.

    Args:
        feature_GND: rows are all p^2 inputs, x slowest.   num: R, or fewer if p = 5 or 7.
    Raises:
        ValueError: if p < 5, for which there are no pairs between, or rows are not p^2.
    """
    check_modulus(modulus)
    if modulus < 5:
        raise ValueError(f"modulus={modulus} leaves no pairs between ratios, expected 5 or more")
    if feature_GND.shape[-2] != modulus**2:
        raise ValueError(
            f"feature_GND has shape {feature_GND.shape}, expected p^2 = {modulus**2} rows each"
        )
    side = modulus - 1
    ratio = _ratios(modulus)
    orders = _renamings(key, modulus, num)
    orders = jnp.concatenate([jnp.arange(side, dtype=orders.dtype)[None], orders])

    def one(feature_ND):
        unit_xyD = _unit(feature_ND).reshape(modulus, modulus, -1)[1:, 1:]
        count, self_pairs = side**2, (unit_xyD**2).sum()

        def alike(sum_XD):  # sum of similarities over ordered pairs of different rows
            return (sum_XD**2).sum() - self_pairs

        every = alike(unit_xyD.sum((0, 1))[None])
        tokens = alike(unit_xyD.sum(0)) + alike(unit_xyD.sum(1))

        def score(order):
            labels = jnp.asarray(ratio)[order][:, order].ravel()
            within = alike(jax.ops.segment_sum(unit_xyD.reshape(count, -1), labels, side))
            pairs = count * (side - 1)
            between = every - tokens - within
            return within / pairs, between / (count * (count - 1) - 3 * pairs)

        within_R, between_R = jax.lax.map(score, orders)
        return RatioScores(within_R[0], between_R[0], (within_R - between_R)[1:])

    scores = jax.lax.map(one, feature_GND)
    return scores._replace(null_RG=scores.null_RG.T)


def _ratios(modulus: int) -> np.ndarray:
    """x / y - 1 of the non-zero tokens, x in rows."""
    nonzero = np.arange(1, modulus)
    return nonzero[:, None] * inverses(modulus)[nonzero] % modulus - 1


def _renamings(key: jax.Array, modulus: int, num: int) -> jax.Array:
    """Permutations, each from 0 to p - 2, of the non-zero tokens."""
    if modulus > _FEW_PARTITIONS:
        keys = jax.random.split(key, num)
        return jax.vmap(lambda k: jax.random.permutation(k, modulus - 1))(keys)
    orders = _partitions(modulus)[1:]
    return jnp.asarray(orders)[jax.random.permutation(key, len(orders))[:num]]


@functools.cache
def _partitions(modulus: int) -> np.ndarray:
    """One permutation for each way to part pairs of tokens into ratios, the usual way first."""
    ratio, found = _ratios(modulus), {}
    for order in itertools.permutations(range(modulus - 1)):
        labels = ratio[np.ix_(order, order)].ravel().tolist()
        found.setdefault(tuple(map(labels.index, labels)), order)
    return np.array(list(found.values()))

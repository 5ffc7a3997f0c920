"""What changes when something inside a network, or in what it reads, is changed.

Ablation and activation patching change activations (`modgrok.model.Patch`), label corruption the
examples, the logit lens where the network is read. Whatever is varied (which head, which layer and
position, which shot) is a leading axis, treated `chunk` at a time.

Axes: B sequences  T tokens read (3 S - 1)  S shots  L layers  H heads  F neurons
      X heads or neurons  V vocab  G groups that are silenced  N pairs of numbers
      R repetitions (seeds)
Source: He et al. (2024): label corruption and logit lens as in its notebook; ablation and patching
designed here, since of theirs only flags are left.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from modgrok import interpret, oracles, sequences
from modgrok.model import Activations, Config, Params, Patch, apply, unembed
from modgrok.tasks import check_modulus

Kind = Literal["zero", "mean", "resample"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Site = Literal["head", "hidden"]
_FIELDS = {"head": "head_LBTHK", "hidden": "hidden_LBTF"}


class Scores(NamedTuple):
    """Means over sequences, for each shot; leading axes are what was varied."""

    accuracy_S: jax.Array  # argmax over the whole vocabulary
    loss_S: jax.Array  # nats


class Prompts(NamedTuple):
    """Pairs of prompts that differ in one label, on which the answer hangs."""

    clean_BT: jax.Array
    corrupt_BT: jax.Array
    clean_B: jax.Array  # the answer that Ratio Matching gives to each
    corrupt_B: jax.Array


class Recovery(NamedTuple):
    """Mean logit of the clean answer minus that of the corrupt one, at the last shot."""

    clean: jax.Array
    corrupt: jax.Array
    patched: jax.Array  # leading axes are what was patched

    @property
    def share(self) -> jax.Array:
        """(patched - corrupt) / (clean - corrupt): 0 nothing, 1 all of the effect came back.

        Its noise grows without bound where clean - corrupt is small: look at that first.
        """
        return (self.patched - self.corrupt) / (self.clean - self.corrupt)


class Corruption(NamedTuple):
    """Accuracy after one label was made wrong; see `label_corruption`."""

    accuracy_SS: jax.Array  # corrupted shot, then asked shot; NaN unless the second is later
    clean_S: jax.Array
    matched: jax.Array  # mean change where the corrupted shot is on the query's line
    unmatched: jax.Array  # mean change where it is not


class Interval(NamedTuple):
    """A mean and its confidence interval over repetitions."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def interval(value_R: np.ndarray, *, level: float = 0.95) -> Interval:
    """Student's t interval of the mean over the first axis: mean +- t s / sqrt(R), s unbiased.

    With one repetition the interval is unknown, NaN.
    """
    from scipy import stats

    value_R = np.asarray(value_R, np.float64)
    if not 0 < level < 1:
        raise ValueError(f"level={level} must be between 0 and 1")
    count, mean = len(value_R), value_R.mean(0)
    if count < 2:
        return Interval(mean, mean * np.nan, mean * np.nan)
    half = stats.t.ppf((1 + level) / 2, count - 1) * value_R.std(0, ddof=1) / np.sqrt(count)
    return Interval(mean, mean - half, mean + half)


def answer_scores(logits_BSV: jax.Array, tokens_BT: jax.Array) -> Scores:
    """Accuracy and loss of each shot, means over sequences."""
    z_BS = sequences.answers(tokens_BT)
    loss_BS = optax.softmax_cross_entropy_with_integer_labels(logits_BSV, z_BS)
    right_BS = (logits_BSV.argmax(-1).astype(z_BS.dtype) == z_BS).astype(jnp.float32)
    return Scores(right_BS.mean(0), loss_BS.mean(0))


def one_at_a_time(layers: int, size: int) -> jax.Array:
    """A mask_GLX for each head (or neuron) of each layer, layers first: G = L X."""
    return jnp.eye(layers * size, dtype=bool).reshape(-1, layers, size)


def ablate(
    params: Params,
    tokens_BT: jax.Array,
    mask_GLX: jax.Array,
    key: jax.Array,
    *,
    cfg: Config,
    site: Site = "head",
    kind: Kind = "zero",
    gate: jax.Array | None = None,
    chunk: int = 8,
    row_sharding: jax.sharding.Sharding | None = None,
) -> Scores:
    """Accuracy and loss with groups of heads or neurons silenced, each group alone.

    Args:
        tokens_BT: whole sequences.
        mask_GLX: which heads (site="head") or neurons ("hidden") of which layers make a group; see
            `one_at_a_time`.
        key: chooses the other sequence of kind="resample", spent here.
        kind: what an output is replaced by, at every position: "zero"; "mean", its mean over the
            sequences at that position; "resample", its value there in another sequence (rows are
            turned by one offset, uniform from 1 to B - 1).
        gate: as in `modgrok.model.Transformer`.
        chunk: groups in one forward pass, which bounds memory. Changes no number.
        row_sharding: spreads the sequences over devices.
    Returns:
        `Scores` with leading axis G. Of the untouched network: an empty group.
    """
    if kind not in KINDS or site not in _FIELDS:
        raise ValueError(f"kind={kind!r}, site={site!r}: wanted one of {KINDS}, {tuple(_FIELDS)}")
    size = cfg.heads if site == "head" else cfg.mlp_ratio * cfg.width
    if mask_GLX.ndim != 3 or mask_GLX.shape[1:] != (cfg.layers, size):
        raise ValueError(
            f"mask_GLX has shape {mask_GLX.shape}, wanted (groups, {cfg.layers}, {size}) for "
            f"site={site!r}"
        )
    if kind == "resample" and tokens_BT.shape[0] < 2:
        raise ValueError("kind='resample' needs two sequences or more, got 1")
    # The kind is data, so that all three are one program.
    options = {"cfg": cfg, "site": site, "chunk": chunk, "row_sharding": row_sharding}
    return _ablate(params, tokens_BT, mask_GLX, key, KINDS.index(kind), gate, **options)


@functools.partial(jax.jit, static_argnames=("cfg", "site", "chunk", "row_sharding"))
def _ablate(params, tokens_BT, mask_GLX, key, kind, gate, *, cfg, site, chunk, row_sharding):
    tokens_BT = spread(tokens_BT, row_sharding)
    seen = getattr(_activations(params, tokens_BT, cfg, gate), _FIELDS[site])
    offset = jax.random.randint(key, (), 1, max(2, tokens_BT.shape[0]), jnp.int32)
    values = (
        jnp.zeros_like,
        lambda x: jnp.broadcast_to(x.mean(1, keepdims=True), x.shape),
        lambda x: jnp.roll(x, offset, axis=1),
    )
    value = jax.lax.switch(kind, values, seen)

    def one(mask_LX):
        trailing = (1,) if site == "head" else ()
        mask = mask_LX.reshape(cfg.layers, 1, 1, -1, *trailing)
        logits = _logits(params, tokens_BT, cfg, gate, Patch(**{site: (mask, value)}))
        return answer_scores(logits[:, 1::3], tokens_BT)

    return jax.lax.map(one, mask_GLX, batch_size=chunk)


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
            f"input_M2: none of {len(input_M2)} inputs has another on its line and one off it"
        )
    return example_M, query_MM, other_MM


def matched_prompts(
    key: jax.Array,
    task_W2: jax.Array,
    input_M2: jax.Array,
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
        key: spent here; draws tasks from `task_W2` and inputs from `input_M2`.
        shots: S, the query is the last.   match: from 0 to S - 2.
    Raises:
        ValueError: if `match` is no earlier shot, or `prompt_inputs` refuses the inputs.
    """
    if not 0 <= match < shots - 1:
        raise ValueError(f"match={match} must be between 0 and {shots - 2}, before the query")
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
    inverse_p = jnp.asarray([0] + [pow(v, -1, modulus) for v in range(1, modulus)], jnp.int32)
    x_B, y_B, xi_B, yi_B = x_BS[:, -1], y_BS[:, -1], x_BS[:, match], y_BS[:, match]
    ratio_B = jnp.where(xi_B != 0, x_B * inverse_p[xi_B], y_B * inverse_p[yi_B]) % modulus
    clean_BT = jnp.stack([x_BS, y_BS, z_BS], axis=-1).reshape(batch, 3 * shots)
    at = 3 * match + 2
    corrupt_BT = clean_BT.at[:, at].set((clean_BT[:, at] + shift_B) % modulus)
    clean_B = z_BS[:, -1]
    return Prompts(clean_BT, corrupt_BT, clean_B, (clean_B + ratio_B * shift_B) % modulus)


@functools.partial(jax.jit, static_argnames=("cfg", "site", "start", "chunk", "row_sharding"))
def patch_activations(
    params: Params,
    prompts: Prompts,
    *,
    cfg: Config,
    site: Literal["residual", "head"] = "residual",
    start: int = 0,
    gate: jax.Array | None = None,
    chunk: int = 8,
    row_sharding: jax.sharding.Sharding | None = None,
) -> Recovery:
    """Put activations of the clean prompt into the run on the corrupt one, one place at a time.

    Args:
        prompts: pairs that differ in one label.
        site: "residual", the stream after each layer at each position: patched has axes LT;
            "head", the output of each head at all positions: LH.
        start: the first position of the stream that is patched, from 0 to T - 1. Before the first
            token that differs both runs are the same, so that nothing can come of it.
        chunk, row_sharding: as in `ablate`.
    Returns:
        `Recovery`, whose `share` is the normalised logit difference.
    """
    if site not in ("residual", "head"):
        raise ValueError(f"site={site!r} is not one of 'residual', 'head'")
    length = prompts.clean_BT.shape[1] - 1
    if not 0 <= start < length:
        raise ValueError(f"start={start} must be between 0 and {length - 1}, a position")
    clean_BT, corrupt_BT = (spread(x, row_sharding) for x in prompts[:2])

    def difference(logits_BTV):
        last_BV = logits_BTV[:, -1]
        clean_B, corrupt_B = (
            jnp.take_along_axis(last_BV, z_B[:, None], axis=1)[:, 0] for z_B in prompts[2:]
        )
        return (clean_B - corrupt_B).mean()

    logits, seen = apply(params, clean_BT, cfg, positions="all", capture=True, gate=gate)
    value = seen.residual_LBTD if site == "residual" else seen.head_LBTHK
    size = value.shape[2] if site == "residual" else cfg.heads

    def one(mask_LX):
        shape = (1, size, 1) if site == "residual" else (1, 1, size, 1)
        patch = Patch(**{site: (mask_LX.reshape(cfg.layers, *shape), value)})
        return difference(_logits(params, corrupt_BT, cfg, gate, patch))

    before = difference(_logits(params, corrupt_BT, cfg, gate, Patch()))
    start = start if site == "residual" else 0
    mask_GLX = one_at_a_time(cfg.layers, size).reshape(cfg.layers, size, cfg.layers, size)
    patched_G = jax.lax.map(
        one, mask_GLX[:, start:].reshape(-1, cfg.layers, size), batch_size=chunk
    )
    patched_LX = jnp.concatenate(
        [jnp.full((cfg.layers, start), before), patched_G.reshape(cfg.layers, -1)], axis=1
    )
    return Recovery(difference(logits), before, patched_LX)


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
        queries that are on the line of the corrupted shot (`interpret.matches`), and over the
        others. Ratio Matching looks at no shot off the line: its second number is 0.
    """
    check_modulus(modulus)
    predict = predict if isinstance(predict, Partial) else Partial(predict)
    return _label_corruption(predict, tokens_BT, key, modulus=modulus, row_sharding=row_sharding)


@functools.partial(jax.jit, static_argnames=("modulus", "row_sharding"))
def _label_corruption(predict, tokens_BT, key, *, modulus, row_sharding):
    tokens_BT = spread(tokens_BT, row_sharding)
    batch, shots = tokens_BT.shape[0], tokens_BT.shape[1] // 3
    z_BS = sequences.answers(tokens_BT)
    shift_SB = jax.random.randint(key, (shots, batch), 1, modulus, jnp.int32)
    match_BSS = interpret.matches(tokens_BT, modulus)
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


def corrupt_several(
    predict: Callable[[jax.Array], jax.Array],
    tokens_BT: jax.Array,
    key: jax.Array,
    count_N2: jax.Array,
    *,
    modulus: int,
    row_sharding: jax.sharding.Sharding | None = None,
) -> jax.Array:
    """Accuracy after k examples, j of them with wrong labels at random places: accuracy_N.

    Unlike the paper's notebook, the query's own label is never among them.

    Args:
        predict: as in `grids.shot_grids`.   key: spent here.
        count_N2: pairs (k, j), 0 <= j <= k < S.
    """
    check_modulus(modulus)
    counts = np.asarray(count_N2)
    shots = tokens_BT.shape[1] // 3
    if ((counts[:, 1] < 0) | (counts[:, 1] > counts[:, 0]) | (counts[:, 0] >= shots)).any():
        raise ValueError(f"count_N2: wanted pairs (k, j) with 0 <= j <= k < {shots}")
    predict = predict if isinstance(predict, Partial) else Partial(predict)
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
    tokens_BT = spread(tokens_BT, row_sharding)
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


@functools.partial(jax.jit, static_argnames=("cfg", "row_sharding"))
def logit_lens(
    params: Params,
    tokens_BT: jax.Array,
    *,
    cfg: Config,
    gate: jax.Array | None = None,
    row_sharding: jax.sharding.Sharding | None = None,
) -> Scores:
    """Scores of the final norm and unembedding applied before the first block and after each.

    Returns:
        `Scores` with leading axis L + 1; the last are the network's own.
    """
    tokens_BT = spread(tokens_BT, row_sharding)
    seen = _activations(params, tokens_BT, cfg, gate)
    stream_LBTD = jnp.concatenate([seen.embedding_BTD[None], seen.residual_LBTD])
    return jax.lax.map(
        lambda h_BTD: answer_scores(unembed(params, h_BTD[:, 1::3], cfg), tokens_BT), stream_LBTD
    )


def spread(tokens_BT: jax.Array, row_sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Within jit: the sequences, spread over devices unless `row_sharding` is None."""
    if row_sharding is None:
        return jnp.asarray(tokens_BT)
    return jax.lax.with_sharding_constraint(tokens_BT, row_sharding)


def _activations(params, tokens_BT, cfg, gate) -> Activations:
    return apply(params, tokens_BT, cfg, positions="all", capture=True, gate=gate)[1]


def _logits(params, tokens_BT, cfg, gate, patch: Patch) -> jax.Array:
    return apply(params, tokens_BT, cfg, positions="all", gate=gate, patch=patch)

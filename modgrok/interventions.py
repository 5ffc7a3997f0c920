"""What changes when something inside a network is changed.

Ablation and activation patching change activations (`modgrok.model.Patch`), the logit lens where
the network is read. Whatever is varied (which head, which layer and position) is a leading axis,
treated `chunk` at a time. Prompts to patch are in `modgrok.prompts`; what changes with the examples
that are read is in `modgrok.corruption`.

Axes: B sequences  T tokens read (3 S - 1)  S shots  L layers  H heads  F neurons
      X heads or neurons  V vocab  G groups that are silenced
Source: He et al. (2024): logit lens as in its notebook; ablation and patching designed here, since
of theirs only flags are left.
"""

import functools
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from modgrok import sequences
from modgrok.model import Activations, Config, Params, Patch, apply, unembed
from modgrok.prompts import Prompts
from modgrok.sequences import spread

Kind = Literal["zero", "mean", "resample"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Site = Literal["head", "hidden"]
_FIELDS = {"head": "head_LBTHK", "hidden": "hidden_LBTF"}


class Scores(NamedTuple):
    """Means over sequences, for each shot; leading axes are what was varied."""

    accuracy_S: jax.Array  # argmax over the whole vocabulary
    loss_S: jax.Array  # nats


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
    Raises:
        ValueError: if `kind` or `site` is unknown, `mask_GLX` has another shape, or one sequence
            is to be replaced by another.
    """
    if kind not in KINDS or site not in _FIELDS:
        raise ValueError(f"kind={kind!r}, site={site!r}, expected of {KINDS}, {tuple(_FIELDS)}")
    size = cfg.heads if site == "head" else cfg.mlp_ratio * cfg.width
    if mask_GLX.ndim != 3 or mask_GLX.shape[1:] != (cfg.layers, size):
        raise ValueError(
            f"mask_GLX has shape {mask_GLX.shape}, expected (groups, {cfg.layers}, {size}) for "
            f"site={site!r}"
        )
    if kind == "resample" and tokens_BT.shape[0] < 2:
        raise ValueError(
            f"kind='resample' with tokens_BT of shape {tokens_BT.shape}, expected two rows or more"
        )
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
    Raises:
        ValueError: if `site` is unknown, or `start` is no position.
    """
    if site not in ("residual", "head"):
        raise ValueError(f"site={site!r}, expected 'residual' or 'head'")
    length = prompts.clean_BT.shape[1] - 1
    if not 0 <= start < length:
        raise ValueError(f"start={start}, expected a position from 0 to {length - 1}")
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


def _activations(params, tokens_BT, cfg, gate) -> Activations:
    return apply(params, tokens_BT, cfg, positions="all", capture=True, gate=gate)[1]


def _logits(params, tokens_BT, cfg, gate, patch: Patch) -> jax.Array:
    return apply(params, tokens_BT, cfg, positions="all", gate=gate, patch=patch)

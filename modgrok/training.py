"""Training: state, optimiser, one step, and a compiled chunk of many steps.

Axes: B batch, T tokens, S shots, V vocab, W tasks, M inputs, C steps of a chunk.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from modgrok import latent_depth, sequences
from modgrok.latent_depth import LatentConfig
from modgrok.model import Config, Params, apply, init_params


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimiser settings; defaults are the paper's.

    Attributes:
        name: "adamw", or "muon" for the blocks' matrices with AdamW on the rest (ours; with weight
            decay and few tasks it generalises in about half the steps).
        lr: peak learning rate of all parameters, or with Muon of the blocks' matrices.
        weight_decay: decoupled, times the learning rate; matrices and the tied embedding, not
            layer norms.
        embedding_lr, embedding_decay: with Muon, AdamW's on the embedding (and, without decay,
            on layer norms).
        warmup_steps, schedule_steps: linear from .01 to 1, then cosine to .1 at `schedule_steps`.
        b1, b2: AdamW's moments.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1.5e-4
    weight_decay: float = 2.0
    embedding_lr: float = 2e-3
    embedding_decay: float = 1.0
    warmup_steps: int = 10_000
    schedule_steps: int = 200_000
    b1: float = 0.9
    b2: float = 0.98

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "muon"):
            raise ValueError(f"name={self.name!r}, expected 'adamw' or 'muon'")
        if not 0 <= self.warmup_steps < self.schedule_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps}, expected at least 0 and less than "
                f"schedule_steps={self.schedule_steps}"
            )
        for field in ("lr", "weight_decay", "embedding_lr", "embedding_decay"):
            if not 0 <= getattr(self, field) < float("inf"):
                raise ValueError(f"{field}={getattr(self, field)}, expected finite and at least 0")

    def factor(self, step: jax.Array | int) -> jax.Array:
        """Learning rate at `step` (the first is 0) over its peak."""
        step = jnp.asarray(step, jnp.float32)
        warm = 0.01 + 0.99 * step / max(self.warmup_steps, 1)
        share = (step - self.warmup_steps) / (self.schedule_steps - self.warmup_steps)
        cosine = 0.1 + 0.45 * (1 + jnp.cos(jnp.pi * jnp.clip(share, 0, 1)))
        return jnp.where(step < self.warmup_steps, warm, cosine)


class TrainState(NamedTuple):
    """What the next step needs."""

    step: jax.Array  # int32, updates made so far
    params: Params
    opt_state: optax.OptState
    ema: Params | None  # running average of params, if asked for

    @property
    def tested(self) -> Params:
        """The parameters that tests and exports take: the average if there is one."""
        return self.params if self.ema is None else self.ema


class Metrics(NamedTuple):
    """What a human wants to see of one step, on its own batch before the update."""

    loss: jax.Array  # nats an answer
    accuracy: jax.Array  # fraction of answers, argmax over the whole vocabulary
    grad_norm: jax.Array


class GatedMetrics(NamedTuple):
    """`Metrics` of a step with latent depth, and its gates before the update."""

    loss: jax.Array  # nats an answer under the sampled gates, penalties left out
    accuracy: jax.Array
    grad_norm: jax.Array  # of the weights, gates left out
    expected_depth: jax.Array  # blocks, mean over groups
    kl: jax.Array  # nats a gate, unweighted
    gate_entropy: jax.Array  # bits a gate
    gate_variance: jax.Array  # mean of q (1 - q)


def _decays(params: Params) -> Params:
    """True for matrices and the embedding, False for layer norms."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not any(getattr(k, "key", "").startswith("ln_") for k in path), params
    )


def make_optimizer(
    config: OptimizerConfig,
    *,
    weight_decay: jax.Array | float | None = None,
    latent: LatentConfig | None = None,
) -> optax.GradientTransformation:
    """AdamW as in the paper's code, or Muon (Jordan et al., 2024) by optax.

    Build it once and reuse it: a new object is a new program under jit. `weight_decay` stands in
    for that of `config`; inside a jitted function it may be traced. With `latent` the parameters
    have gates, which get Adam at its own rate and never decay.
    """
    if latent is not None:
        weights = make_optimizer(config, weight_decay=weight_decay)
        return optax.partition({"weights": weights, "gates": optax.adam(latent.lr)}, _gate_labels)
    if weight_decay is None:
        weight_decay = config.weight_decay

    def rate(peak):
        return lambda step: peak * config.factor(step)

    def adamw(peak, decay):
        return optax.adamw(rate(peak), config.b1, config.b2, weight_decay=decay, mask=_decays)

    if config.name == "adamw":
        return adamw(config.lr, weight_decay)
    muon = optax.contrib.muon(
        rate(config.lr),
        weight_decay=weight_decay,
        muon_weight_dimension_numbers=_muon_dimensions,
    )
    return optax.partition(
        {"muon": muon, "adamw": adamw(config.embedding_lr, config.embedding_decay)}, _muon_labels
    )


_MUON_AXES = {
    "qkv": ((1,), (3, 4)),
    "out": ((1, 2), (3,)),
    "fc": ((1,), (2,)),
    "proj": ((1,), (2,)),
}


def _muon_dimensions(tree: Params) -> Params:
    """Axes in and out of each stacked matrix; the rest (layer; query, key, value) are a batch."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: optax.contrib.MuonDimensionNumbers(*_MUON_AXES[path[-1].key]), tree
    )


def _muon_labels(params: Params) -> Params:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "muon" if path[-1].key in _MUON_AXES else "adamw", params
    )


def _gate_labels(params: Params) -> Params:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "gates" if path[0].key == "gates" else "weights", params
    )


def init_state(
    key: jax.Array,
    cfg: Config,
    tx: optax.GradientTransformation,
    *,
    ema: bool = False,
    latent: LatentConfig | None = None,
) -> TrainState:
    """State before the first step; `key` is spent on the parameters.

    With `latent` they have an entry "gates", which `tx` has to know of (see `make_optimizer`).
    """
    params = init_params(key, cfg)
    if latent is not None:
        params = {**params, "gates": latent_depth.init_gates(latent, cfg)}
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), average)


def answer_loss(
    params: Params, tokens_BT: jax.Array, cfg: Config, **options: jax.Array | bool | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Mean cross-entropy of the answers, and (loss_BS, correct_BS), all float32.

    Nats, softmax over the whole vocabulary, the answer after no example included. Options are
    those of `model.apply`: gates.
    """
    logits_BSV = apply(params, tokens_BT, cfg, **options)
    z_BS = sequences.answers(tokens_BT)
    loss_BS = optax.softmax_cross_entropy_with_integer_labels(logits_BSV, z_BS)
    correct_BS = (jax.lax.argmax(logits_BSV, 2, jnp.int32) == z_BS).astype(jnp.float32)
    return loss_BS.mean(), (loss_BS, correct_BS)


def train_step(
    state: TrainState,
    tokens_BT: jax.Array,
    *,
    cfg: Config,
    tx: optax.GradientTransformation,
    micro_batches: int = 1,
    ema_decay: float | None = None,
    axis_name: str | None = None,
    latent: LatentConfig | None = None,
    gate_key: jax.Array | None = None,
    group_B: jax.Array | None = None,
) -> tuple[TrainState, Metrics | GatedMetrics]:
    """One update on a batch.

    Args:
        tokens_BT: this device's rows.
        micro_batches: cut the batch into this many parts and add up their gradients, for cards
            that are too small for it whole.
        ema_decay: weight of the old average in `state.ema`, which must then exist.
        axis_name: average gradients and metrics over this mapped axis (pmap, shard_map).
        latent: train gates (`latent_depth`), of which `init_state` made the parameters.
        gate_key: with `latent`, key of this step's gates, the same on every device; spent.
        group_B: with several groups, the group of each of these rows.
    Raises:
        ValueError: if the rows do not divide by `micro_batches`, or `ema_decay` and `state.ema`
            disagree, or gates lack a key or groups, or `latent_depth.check_groups` refuses these.
    """
    _check_step(state, tokens_BT, cfg, micro_batches, ema_decay, latent, gate_key, group_B)
    noise_GL = None
    if latent is not None:
        noise_GL = latent_depth.logistic_noise(gate_key, latent.groups, cfg.layers)

    params = state.params
    if axis_name is not None:
        # shard_map sums gradients of what it knows to be replicated, which would make the mean
        # below too large by the number of devices; told that they vary, it does not.
        params = jax.tree.map(functools.partial(_varying, axis_name=axis_name), params)

    def gradients(tokens_BT, group_B=None):
        if latent is not None:
            return latent_depth.gradients(
                lambda params, gate: answer_loss(params, tokens_BT, cfg, gate=gate),
                params,
                group_B,
                latent=latent,
                noise_GL=noise_GL,
                step=state.step,
            )
        value_and_grad = jax.value_and_grad(answer_loss, has_aux=True)
        (loss, (_, correct_BS)), grads = value_and_grad(params, tokens_BT, cfg)
        return loss, correct_BS.mean(), grads

    rows = (tokens_BT,) if group_B is None else (tokens_BT, group_B)
    loss, accuracy, grads = _accumulated(gradients, rows, micro_batches)
    if axis_name is not None:
        loss, accuracy, grads = jax.lax.pmean((loss, accuracy, grads), axis_name)

    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema_decay is not None:
        ema = optax.incremental_update(params, ema, 1.0 - ema_decay)
    metrics = _metrics(state.params, grads, loss, accuracy, latent)
    return TrainState(state.step + 1, params, opt_state, ema), metrics


def _check_step(state, tokens_BT, cfg, micro_batches, ema_decay, latent, gate_key, group_B):
    rows = tokens_BT.shape[0]
    if micro_batches < 1 or rows % micro_batches:
        raise ValueError(f"micro_batches={micro_batches} does not divide the {rows} rows")
    if (ema_decay is None) != (state.ema is None):
        raise ValueError(f"ema_decay={ema_decay}, but the state has ema={state.ema is not None}")
    if latent is None:
        return
    latent.check(cfg)
    if gate_key is None or (group_B is None) != (latent.groups == 1):
        raise ValueError(
            f"latent depth needs gate_key, and group_B for several groups: got "
            f"{'no' if gate_key is None else 'a'} gate_key and "
            f"{'no' if group_B is None else 'a'} group_B for groups={latent.groups}"
        )
    if group_B is not None:
        latent_depth.check_groups(group_B, rows, latent.groups)


def _accumulated(
    gradients: Callable[..., Any], rows: tuple[jax.Array, ...], micro_batches: int
) -> Any:
    """The mean of `gradients(*rows)` over parts of the rows."""
    if micro_batches == 1:
        return gradients(*rows)
    # Every n-th row, not a block of rows: sharded rows then stay where they are, and each device
    # has its share of every part.
    parts = jax.tree.map(lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1), rows)

    def add(total, rows):
        return jax.tree.map(jnp.add, total, gradients(*rows)), None

    first = gradients(*jax.tree.map(lambda x: x[0], parts))
    total, _ = jax.lax.scan(add, first, jax.tree.map(lambda x: x[1:], parts))
    return jax.tree.map(lambda x: x / micro_batches, total)


def _metrics(
    params: Params,
    grads: Params,
    loss: jax.Array,
    accuracy: jax.Array,
    latent: LatentConfig | None,
) -> Metrics | GatedMetrics:
    """Of the parameters before the update."""
    if latent is None:
        return Metrics(loss, accuracy, optax.tree.norm(grads))
    gates = latent_depth.posterior(params)
    return GatedMetrics(
        loss,
        accuracy,
        optax.tree.norm({name: g for name, g in grads.items() if name != "gates"}),
        gates.expected_depth_G.mean(),
        latent_depth.kl_divergence(params["gates"]["logits_GL"], latent).mean(),
        gates.entropy_G.mean(),
        gates.variance_G.mean(),
    )


def _varying(x: jax.Array, axis_name: str) -> jax.Array:
    return jax.lax.pcast(x, axis_name, to="varying")


@functools.partial(
    jax.jit,
    static_argnames=[
        "cfg",
        "tx",
        "num_steps",
        "batch",
        "shots",
        "modulus",
        "micro_batches",
        "ema_decay",
        "axis_name",
        "batch_sharding",
        "latent",
    ],
)
def train_chunk(
    state: TrainState,
    key: jax.Array,
    task_W2: jax.Array,
    input_M2: jax.Array,
    *,
    cfg: Config,
    tx: optax.GradientTransformation,
    num_steps: int,
    batch: int,
    shots: int,
    modulus: int,
    micro_batches: int = 1,
    ema_decay: float | None = None,
    axis_name: str | None = None,
    batch_sharding: jax.sharding.Sharding | None = None,
    latent: LatentConfig | None = None,
    group_W: jax.Array | None = None,
) -> tuple[TrainState, Metrics | GatedMetrics]:
    """`num_steps` updates in one program: batches are drawn on the device, nothing waits.

    Step s draws its batch with fold_in(key, s), so cutting a run into other chunks, resuming it,
    or running it on other devices gives the same batches.

    The state is not donated, so the old and the new one are in memory at once. To donate it, jit
    again: `jax.jit(functools.partial(train_chunk, cfg=..., tx=..., ...), donate_argnums=0)`.

    Args:
        key: key of the whole run; not spent, pass the same one each time.
        batch: B of all devices together, a multiple of the W tasks.
        axis_name: as in `train_step`; each device draws all B rows of integers and keeps its own.
        batch_sharding: under plain jit, how rows are spread over devices.
        latent: as in `train_step`.   group_W: with several groups, the group of each task. That
            ids are from 0 to G - 1 cannot be seen inside jit: ask `latent_depth.check_groups`.
    Returns:
        The state, and `Metrics` with a leading axis of `num_steps`.
    Raises:
        ValueError: as `sample_sequences` and `train_step`; if `group_W` has another length than
            `task_W2`, or `batch` does not divide over the devices.
    """
    if group_W is not None and latent is not None:
        latent_depth.check_groups(group_W, task_W2.shape[0], latent.groups)

    def body(state, _):
        tokens_BT = sequences.sample_sequences(
            jax.random.fold_in(key, state.step),
            task_W2,
            input_M2,
            modulus=modulus,
            shots=shots,
            batch=batch,
        )
        rows = tokens_BT
        if group_W is not None:
            repeats = batch // task_W2.shape[0]
            rows = (tokens_BT, jnp.repeat(group_W, repeats, total_repeat_length=batch))
        if axis_name is not None:
            devices = jax.lax.axis_size(axis_name)
            if batch % devices:
                raise ValueError(f"batch={batch} does not divide over {devices} devices")
            share = batch // devices
            start = jax.lax.axis_index(axis_name) * share
            rows = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, share), rows)
        rows = sequences.spread(rows, batch_sharding)
        tokens_BT, group_B = (rows, None) if group_W is None else rows
        return train_step(
            state,
            tokens_BT,
            cfg=cfg,
            tx=tx,
            micro_batches=micro_batches,
            ema_decay=ema_decay,
            axis_name=axis_name,
            latent=latent,
            gate_key=None if latent is None else latent_depth.step_key(key, state.step),
            group_B=group_B,
        )

    return jax.lax.scan(body, state, length=num_steps)

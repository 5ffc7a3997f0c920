"""Latent depth: which blocks of a deep decoder to keep is learned with its weights.

Block l becomes x + z_l F_l(x), with z_l ~ Bernoulli(q_l) and q_l = sigmoid(A_l). Every group of
tasks has its own row of logits A and all share the weights; one group is plain depth selection.
A group id tells the model about its task, so in-context learning is judged with one group only.

The logits are parameters, params["gates"]["logits_GL"]; `training` samples, regularises and
updates them. Nothing here reads a device.

Axes: G groups, L layers, W tasks, B rows of a batch.
Source: Li, Cooper Stickland, Tang, Kong, "Deep Transformers with Latent Depth", NeurIPS 2020, arXiv
2009.13102, and its code. What is changed here, and why, is in docs/latent_depth.md.
"""

import dataclasses
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from modgrok.layers import attention_parts
from modgrok.model import Config, Params

PRIORS = ("uniform", "aggregated", "beta")
_TINY = 1e-7
_HUGE = 1e38  # float32 ends not far above
# Steps are numbered from 0 to 2^31, so that no batch is drawn with this key.
_GATES = np.uint32(2**32 - 1)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Posterior, objective and schedule of the gates. Static under jit.

    Attributes:
        groups: G.
        target_depth: K, what the expected depth is driven to; None leaves depth to the prior.
        prior: of a gate: "uniform" is 1/2, "aggregated" the mean of q over groups, held fixed,
            "beta" a density Beta(*beta) of q, both numbers at least 1 and not both 1.
        kl_weight, depth_weight, share_weight, entropy_weight: of the terms of `penalty`, in nats.
            A closed gate opens again only while more than entropy_weight / (2 depth_weight)
            blocks are missing of target_depth.
        soft_steps: steps with soft samples; then they are 0 or 1, with straight-through gradients.
        anneal_steps: the weight of the KL rises from 0 over so many steps after the soft ones; the
            weights of the other terms over so many after that.
        tau: temperature of the samples. P(z > 1/2) = q at any; gradients are divided by it.
        init: first value of all logits; 2 is q = .88.
        lr: learning rate of the logits, constant; Adam, without decay.
        loop: "joint" takes all groups in one pass, "groups" one after another, and the terms that
            are of all groups after them, as the paper does: G times the work, the same gradient.
    """

    groups: int = 1
    target_depth: float | None = None
    prior: Literal["uniform", "aggregated", "beta"] = "uniform"
    beta: tuple[float, float] = (1.0, 2.0)
    kl_weight: float = 0.01
    depth_weight: float = 1.25
    share_weight: float = 0.0
    entropy_weight: float = 2.5
    soft_steps: int = 500
    anneal_steps: int = 500
    tau: float = 5.0
    init: float = 2.0
    lr: float = 0.02
    loop: Literal["joint", "groups"] = "joint"

    def __post_init__(self) -> None:
        for name, least in (("groups", 1), ("soft_steps", 0), ("anneal_steps", 0)):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < least:
                raise ValueError(f"{name}={value}, expected a whole number, at least {least}")
        if self.prior not in PRIORS:
            raise ValueError(f"prior={self.prior!r}, expected one of {', '.join(PRIORS)}")
        if self.loop not in ("joint", "groups"):
            raise ValueError(f"loop={self.loop!r}, expected 'joint' or 'groups'")
        object.__setattr__(self, "beta", tuple(self.beta))  # a list has no hash
        if len(self.beta) != 2 or not min(self.beta) >= 1 or not 2 < sum(self.beta) < _HUGE:
            raise ValueError(
                f"beta={self.beta}, expected two finite numbers of at least 1, not both 1: else "
                "its density has no single greatest value"
            )
        if not abs(self.init) < _HUGE:
            raise ValueError(f"init={self.init}, expected a finite number of float32")
        for name in ("kl_weight", "depth_weight", "share_weight", "entropy_weight", "lr"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}, expected finite and at least 0")
        if not 0 < self.tau < float("inf"):
            raise ValueError(f"tau={self.tau}, expected finite and above 0")
        if self.target_depth is not None and not self.target_depth > 0:
            raise ValueError(f"target_depth={self.target_depth}, expected above 0, or None")

    @property
    def ramp_end(self) -> int:
        """First step at which every weight is whole."""
        return self.soft_steps + max(2 * self.anneal_steps, 1)

    def check(self, cfg: Config) -> None:
        """Raises ValueError if the decoder cannot have these gates."""
        if cfg.norm != "pre":
            raise ValueError(f"norm={cfg.norm!r}, expected 'pre' with latent depth")
        if self.target_depth is not None and self.target_depth > cfg.layers:
            raise ValueError(
                f"target_depth={self.target_depth:g}, expected at most layers={cfg.layers}"
            )


class Posterior(NamedTuple):
    """What the gates of a model say. `depth` is in blocks, `entropy` in bits a gate."""

    inclusion_GL: jax.Array  # q, from 0 to 1
    keep_GL: jax.Array  # A > 0
    expected_depth_G: jax.Array  # sum of q
    kept_G: jax.Array  # int32, blocks with A > 0
    entropy_G: jax.Array  # mean over layers
    variance_G: jax.Array  # mean over layers of q (1 - q), .25 undecided, 0 decided


def init_gates(latent: LatentConfig, cfg: Config) -> Params:
    """The entry "gates" of the parameters: all logits at `latent.init`."""
    latent.check(cfg)
    return {"logits_GL": jnp.full((latent.groups, cfg.layers), latent.init, jnp.float32)}


# Samples


def step_key(key: jax.Array, step: jax.Array) -> jax.Array:
    """Key of the gates at `step` of the run whose batches fold steps into `key`."""
    return jax.random.fold_in(jax.random.fold_in(key, _GATES), step)


def logistic_noise(key: jax.Array, groups: int, layers: int) -> jax.Array:
    """noise_GL, float32, differences of two Gumbel numbers; group g draws with fold_in(key, g)."""

    def draw(group):
        return jax.random.logistic(jax.random.fold_in(key, group), (layers,), jnp.float32)

    return jax.vmap(draw)(jnp.arange(groups, dtype=jnp.uint32))


def concrete(
    logits_GL: jax.Array, noise_GL: jax.Array, *, tau: float, hard: jax.Array | bool
) -> jax.Array:
    """Samples z_GL of the gates: s = sigmoid((A + noise) / tau), or 1[s > 1/2].

    P(z = 1) = sigmoid(A) at any tau. Hard samples pass the gradient of the soft ones.

    Source: the paper's binary concrete samples, straight-through as in its code.
    """
    soft_GL = jax.nn.sigmoid((logits_GL + noise_GL) / tau)
    # s - stop_gradient(s) is 0 exactly, so that z is exactly 0 or 1.
    through_GL = soft_GL - jax.lax.stop_gradient(soft_GL)
    hard_GL = (logits_GL + noise_GL > 0).astype(soft_GL.dtype) + through_GL
    return jnp.where(hard, hard_GL, soft_GL)


def sample_gates(key: jax.Array, params: Params) -> jax.Array:
    """z_GL of zeros and ones from the posterior; `key` is spent."""
    logits_GL = params["gates"]["logits_GL"]
    return concrete(logits_GL, logistic_noise(key, *logits_GL.shape), tau=1.0, hard=True)


def rounded(logits_XL: jax.Array) -> jax.Array:
    """The gates that a model is tested with: z = 1[A > 0], float32."""
    return (logits_XL > 0).astype(jnp.float32)


def shared_logits(logits_GL: jax.Array) -> jax.Array:
    """logits_L of a task that is in no group: the mean over groups."""
    return logits_GL.mean(0)


def check_groups(group_X: jax.Array | np.ndarray, num: int, groups: int) -> None:
    """Raises ValueError unless these are `num` ids from 0 to groups - 1.

    Inside jit, where ids are traced, their number is all that can be looked at.
    """
    if np.shape(group_X) != (num,):
        raise ValueError(f"groups have shape {np.shape(group_X)}, expected ({num},)")
    if isinstance(group_X, jax.core.Tracer):
        return
    ids = np.asarray(group_X)  # of an array on a device np.min is traced inside jit
    if not num or ids.dtype.kind not in "iu":
        raise ValueError(f"{num} groups of dtype {ids.dtype}, expected one whole number or more")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= groups:
        raise ValueError(f"groups from {low} to {high}, expected ids from 0 to {groups - 1}")


def rows_of(gate_GL: jax.Array, group_B: jax.Array | None) -> jax.Array:
    """The `gate` of `model.apply` for rows of these groups: (L, B), or (L,) of a single group."""
    if gate_GL.shape[0] == 1:
        return gate_GL[0]
    if group_B is None:
        raise ValueError(f"{gate_GL.shape[0]} groups, expected the group of each task or row")
    return gate_GL[jnp.asarray(group_B)].T


def task_gates(params: Params, group_W: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Rounded gates (of the trained tasks, of unseen ones), as `evaluation.evaluate` takes them.

    Args:
        group_W: group of each trained task; not needed for one group.
    Returns:
        ((L,) for one group, else (W, L)), and (L,): unseen tasks have the mean of the logits.
    Raises:
        ValueError: if there are several groups and no `group_W`, or `check_groups` refuses it.
    """
    logits_GL = params["gates"]["logits_GL"]
    if group_W is not None:
        check_groups(group_W, len(group_W), logits_GL.shape[0])
    seen = rounded(rows_of(logits_GL, group_W).T)
    return seen, rounded(shared_logits(logits_GL))


# The objective


def ramps(latent: LatentConfig, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Shares (of the KL's weight, of the other weights) at `step`, from 0 to 1.

    The paper's code begins below 0 and has a jump at the end of the second; these have neither.
    """
    step = jnp.asarray(step, jnp.float32)
    length = max(latent.anneal_steps, 1)
    after = step - latent.soft_steps
    return jnp.clip(after / length, 0, 1), jnp.clip((after - latent.anneal_steps) / length, 0, 1)


def kl_divergence(logits_GL: jax.Array, latent: LatentConfig) -> jax.Array:
    """kl_GL in nats, at least 0, in closed form: nothing is sampled.

    uniform, aggregated: KL(Bernoulli(q) | Bernoulli(p)), 0 where q = p. p is 1/2, or the mean of q
    over groups without gradient.
    beta: -log of the density Beta(a, b) at q over its value at the mode m = (a - 1) / (a + b - 2),
    which is (a + b - 2) KL(Bernoulli(m) | Bernoulli(q)), 0 where q = m.
    """
    log_q_GL, log_not_GL = jax.nn.log_sigmoid(logits_GL), jax.nn.log_sigmoid(-logits_GL)
    if latent.prior == "beta":
        on, off = latent.beta[0] - 1, latent.beta[1] - 1
        total = on + off
        at_mode = float(sum(x * np.log(x / total) for x in (on, off) if x))
        return at_mode - on * log_q_GL - off * log_not_GL
    q_GL = jax.nn.sigmoid(logits_GL)
    if latent.prior == "uniform":
        log_p = log_not_p = -float(np.log(2))
    else:
        # Means of exp(log q), so that 1 - p keeps its digits where q is near 1.
        count = float(np.log(logits_GL.shape[0]))
        log_p = jax.nn.logsumexp(jax.lax.stop_gradient(log_q_GL), axis=0) - count
        log_not_p = jax.nn.logsumexp(jax.lax.stop_gradient(log_not_GL), axis=0) - count
    return q_GL * (log_q_GL - log_p) + (1 - q_GL) * (log_not_GL - log_not_p)


def shared_penalty(logits_GL: jax.Array, latent: LatentConfig) -> jax.Array:
    """The terms that are of all groups together, weighted, in nats.

    depth: (sum of u - K)^2 / L, with u_L the mean of q over groups. A square that is not divided
        would begin at 7,744 nats with 100 blocks, K = 12 and all gates open.
    share: mean over layers of -u ln u, least where the groups agree on each layer.
    entropy: mean of q (1 - q), least where gates are decided. The paper's square of sampled
        depths has such a part; that of the expected depth has not.
    """
    layers = logits_GL.shape[1]
    q_GL = jax.nn.sigmoid(logits_GL)
    u_L = q_GL.mean(0)
    total = latent.entropy_weight * (q_GL * (1 - q_GL)).mean()
    total += latent.share_weight * jax.scipy.special.entr(jnp.clip(u_L, _TINY)).mean()
    if latent.target_depth is not None:
        total += latent.depth_weight * (u_L.sum() - latent.target_depth) ** 2 / layers
    return total


def penalty(logits_GL: jax.Array, latent: LatentConfig, step: jax.Array) -> jax.Array:
    """What is added to the loss at `step`, nats: the KL, mean over gates, and `shared_penalty`."""
    early, late = ramps(latent, step)
    kl = latent.kl_weight * kl_divergence(logits_GL, latent).mean()
    return early * kl + late * shared_penalty(logits_GL, latent)


def gradients(
    loss_fn: Callable[..., Any],
    params: Params,
    group_B: jax.Array | None,
    *,
    latent: LatentConfig,
    noise_GL: jax.Array,
    step: jax.Array,
) -> tuple[jax.Array, jax.Array, Params]:
    """Loss (without penalties), accuracy and gradients (with them) of one batch.

    Args:
        loss_fn: (params, gate) -> (mean loss, (loss_BS, correct_BS)).
        group_B: group of each row; not needed for one group.
    Source: the paper's algorithm 1. `latent.loop` says in which order.
    """

    def gates(params):
        logits_GL = params["gates"]["logits_GL"]
        hard = step >= latent.soft_steps
        return logits_GL, concrete(logits_GL, noise_GL, tau=latent.tau, hard=hard)

    def joint(params):
        logits_GL, z_GL = gates(params)
        loss, (_, correct_BS) = loss_fn(params, rows_of(z_GL, group_B))
        return loss + penalty(logits_GL, latent, step), (loss, correct_BS.mean())

    if latent.loop == "joint" or latent.groups == 1:
        (_, (loss, accuracy)), grads = jax.value_and_grad(joint, has_aux=True)(params)
        return loss, accuracy, grads

    early, late = ramps(latent, step)

    def own(params, group):
        """Of one group: its share of the loss, under its gates for all rows, and its KL."""
        logits_GL, z_GL = gates(params)
        _, (loss_BS, correct_BS) = loss_fn(params, z_GL[group])
        mine_B1 = (group_B == group)[:, None]
        loss = jnp.where(mine_B1, loss_BS, 0).mean()
        kl = kl_divergence(logits_GL, latent)[group].mean() / latent.groups
        accuracy = jnp.where(mine_B1, correct_BS, 0).mean()
        return loss + early * latent.kl_weight * kl, (loss, accuracy)

    def add(total, group):
        (_, scores), grads = jax.value_and_grad(own, has_aux=True)(params, group)
        return jax.tree.map(jnp.add, total, (scores, grads)), None

    (_, scores), grads = jax.value_and_grad(own, has_aux=True)(params, 0)
    others = jnp.arange(1, latent.groups, dtype=jnp.int32)
    ((loss, accuracy), grads), _ = jax.lax.scan(add, (scores, grads), others)
    outer = jax.grad(lambda a: late * shared_penalty(a, latent))(params["gates"]["logits_GL"])
    logits_GL = grads["gates"]["logits_GL"] + outer
    return loss, accuracy, {**grads, "gates": {"logits_GL": logits_GL}}


# What was learned


def posterior(params: Params) -> Posterior:
    """Inclusion of every layer in every group, and how deep and how decided that is."""
    logits_GL = params["gates"]["logits_GL"]
    q_GL = jax.nn.sigmoid(logits_GL)
    nats_GL = -(q_GL * jax.nn.log_sigmoid(logits_GL) + (1 - q_GL) * jax.nn.log_sigmoid(-logits_GL))
    keep_GL = logits_GL > 0
    return Posterior(
        q_GL,
        keep_GL,
        q_GL.sum(1),
        keep_GL.sum(1, dtype=jnp.int32),
        nats_GL.mean(1) / np.float32(np.log(2)),
        (q_GL * (1 - q_GL)).mean(1),
    )


def overlap(keep_GL: jax.Array) -> jax.Array:
    """Mean over pairs of groups of (layers that both keep) / (layers that either keeps), 0 to 1.

    1 if there is one group or none keeps any.
    """
    keep_GL = jnp.asarray(keep_GL, bool)
    groups = keep_GL.shape[0]
    if groups == 1:
        return jnp.float32(1)
    both_GG = (keep_GL[:, None] & keep_GL).sum(-1)
    either_GG = (keep_GL[:, None] | keep_GL).sum(-1)
    share_GG = jnp.where(either_GG > 0, both_GG / jnp.maximum(either_GG, 1), 1.0)
    return share_GG[np.triu_indices(groups, 1)].mean().astype(jnp.float32)


def prune(tree: Any, keep_L: np.ndarray) -> Any:
    """`tree` without the blocks that are not kept, and without gates.

    `tree` may be parameters or anything made of trees like them: averages, an optimiser's state.
    Runs on concrete `keep_L`, since it decides shapes.

    Raises:
        ValueError: if no block is kept, or `keep_L` is not of as many layers.
    """
    index_K = np.flatnonzero(np.asarray(keep_L))
    if not len(index_K):
        raise ValueError(
            "keep_L keeps no block: every gate is closed, there is nothing to prune to"
        )

    def is_model(x):
        return isinstance(x, dict) and "blocks" in x

    def cut(x):
        if x.shape[0] != len(keep_L):
            raise ValueError(f"keep_L has {len(keep_L)} layers, the blocks {x.shape[0]}")
        return x[index_K]

    def one(x):
        if not is_model(x):
            return x
        rest = {name: value for name, value in x.items() if name not in ("blocks", "gates")}
        return {**rest, "blocks": jax.tree.map(cut, x["blocks"])}

    return jax.tree.map(one, tree, is_leaf=is_model)


def pruned_config(cfg: Config, keep_L: np.ndarray) -> Config:
    """`cfg` with as many layers as are kept; ValueError if `keep_L` is not of its layers."""
    return dataclasses.replace(cfg, layers=_count(keep_L, cfg))


def _count(keep_L: Sequence[bool], cfg: Config) -> int:
    if len(keep_L) != cfg.layers:
        raise ValueError(f"keep_L has {len(keep_L)} layers, expected {cfg.layers}")
    return int(np.sum(np.asarray(keep_L, bool)))


def forward_flops(cfg: Config, *, shots: int, keep_L: Sequence[bool] | None = None) -> int:
    """Flops of the matrix products of one sequence's forward pass, blocks that are kept only.

    2 for each multiply-add. Counts what the pruned network (`prune`) computes: in the attention the
    pairs that `layers.attention_parts` leaves (of short sequences all, and not the causal ones
    alone), the last kept block at answer positions only. (Left out is its saving on the first
    block, whose projections are of V ids and not of B T tokens: it depends on the batch. The whole
    network with skip=True has neither saving: blocks it computes are at all positions.)
    """
    kept = cfg.layers if keep_L is None else _count(keep_L, cfg)
    length, width = 3 * shots - 1, cfg.width
    every = np.arange(length)
    answers = every[1::3]

    def block(query_T):
        parts = attention_parts(length, query_T)
        pairs = sum(len(query_T[rows]) * stop for rows, stop in parts)
        projections = width**2 * (2 * length + (2 + 2 * cfg.mlp_ratio) * len(query_T))
        return projections + 2 * width * pairs

    total = cfg.vocab * width * len(answers)
    if kept:
        total += (kept - 1) * block(every) + block(answers)
    return 2 * total


def block_norms(grads: Params) -> jax.Array:
    """norm_L: the Euclidean norm of the gradient of each block's parameters."""
    squares = [(g**2).sum(range(1, g.ndim)) for g in jax.tree.leaves(grads["blocks"])]
    return jnp.sqrt(sum(squares))

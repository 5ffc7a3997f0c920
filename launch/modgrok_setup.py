"""From the settings of a modgrok run to its tasks, model, optimiser and checkpoints."""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import modgrok
from launch import UsageError
from launch.checkpoints import Checkpoints, Restored, Slot
from launch.modgrok_config import GROUPS, TrainConfig, group_file
from modgrok import task_groups as groups

# Of `modgrok.LatentConfig`; each is a flag --gate_NAME.
_GATE_FIELDS = (
    *("prior", "beta", "kl_weight", "depth_weight", "share_weight", "entropy_weight"),
    *("soft_steps", "anneal_steps", "tau", "init", "lr", "loop"),
)


class Parts(NamedTuple):
    """What the settings of a run build, all of it static under jit."""

    model: modgrok.Config
    tx: optax.GradientTransformation
    latent: modgrok.LatentConfig | None  # None without gates


def prepare_data(cfg: TrainConfig) -> tuple[modgrok.TaskSplit, modgrok.InputSplit]:
    """Tasks and inputs; UsageError if they cannot be had."""
    rectangles = cfg.num_tasks // 4 if cfg.task_rule == "rectangular" else 0
    count = {"num_rectangles": rectangles, "num_random": cfg.num_tasks - 4 * rectangles}
    try:
        if cfg.reference_sampling:
            tasks = modgrok.reference_tasks(
                cfg.seed, modulus=cfg.p, num_unseen=cfg.num_unseen, **count
            )
            inputs = modgrok.reference_inputs(modulus=cfg.p, fraction=cfg.input_fraction)
        else:
            keys = jax.random.split(key_for(cfg, 0), 2)
            exists = cfg.p**2 - cfg.exclude_zero - cfg.num_tasks
            tasks = modgrok.sample_tasks(
                keys[0],
                modulus=cfg.p,
                num_unseen=min(cfg.num_unseen, exists),
                exclude_zero=cfg.exclude_zero,
                **count,
            )
            inputs = modgrok.split_inputs(keys[1], modulus=cfg.p, fraction=cfg.input_fraction)
    except ValueError as error:
        raise UsageError(
            f"--p={cfg.p} --num_tasks={cfg.num_tasks} --task_rule={cfg.task_rule} "
            f"--input_fraction={cfg.input_fraction:g}: {error}"
        ) from error
    return tasks, inputs


def key_for(cfg: TrainConfig, purpose: int) -> jax.Array:
    """0 data, 1 parameters, 2 batches, 3 tests on the way, 4 the last test, 5 task groups."""
    return jax.random.fold_in(jax.random.key(cfg.seed), purpose)


def task_groups(
    cfg: TrainConfig,
    tasks: modgrok.TaskSplit,
    *,
    workdir: str | os.PathLike[str] | None = None,
) -> np.ndarray | None:
    """group_W of the trained tasks, None if all are one group; UsageError if they are no groups.

    In place of a file counts the copy that the run in `workdir` has of it.
    """
    if not cfg.latent_depth or cfg.task_groups == "none":
        return None
    group_W = _task_groups(cfg, tasks, workdir)
    if not group_W.any():
        raise UsageError(
            f"--task_groups={cfg.task_groups}: puts all {len(group_W)} tasks into one group; "
            "expected two groups or more, or none"
        )
    return group_W


def _task_groups(
    cfg: TrainConfig, tasks: modgrok.TaskSplit, workdir: str | os.PathLike[str] | None
) -> np.ndarray:
    flag = f"--task_groups={cfg.task_groups}"
    path = None
    try:
        if cfg.task_groups == "ratio":
            return groups.by_ratio(tasks.train_W2, cfg.p)
        if cfg.task_groups == "rectangle":
            return groups.by_rectangle(len(tasks.train_W2))
        if cfg.task_groups == "random":
            return groups.at_random(key_for(cfg, 5), cfg.num_tasks, cfg.gate_groups)
        path = group_file(cfg)
        if workdir is not None and (Path(workdir) / GROUPS).exists():
            path = Path(workdir) / GROUPS
        return groups.given(json.loads(path.read_text()), tasks.train_W2)
    except OSError as error:
        raise UsageError(
            f"{flag}: {error.strerror}; expected none, ratio, rectangle, random, or a JSON file"
        ) from error
    except ValueError as error:
        where = f"{path}: " if path not in (None, group_file(cfg)) else ""
        raise UsageError(f"{flag}: {where}{error}") from error


def model_config(cfg: TrainConfig) -> modgrok.Config:
    """The decoder."""
    return modgrok.Config(
        vocab=cfg.p + cfg.extra_tokens,
        width=cfg.width,
        heads=cfg.heads,
        layers=cfg.layers,
        mlp_ratio=cfg.mlp_ratio,
        norm=cfg.norm,
        dtype=cfg.dtype,
        remat=cfg.remat,
    )


def optimizer_config(cfg: TrainConfig) -> modgrok.OptimizerConfig:
    """Of the weights; gates have an optimiser of their own."""
    return modgrok.OptimizerConfig(
        name=cfg.optimizer,
        lr=cfg.lr,
        weight_decay=cfg.weight_decay,
        embedding_lr=cfg.embedding_lr,
        embedding_decay=cfg.embedding_decay,
        warmup_steps=cfg.warmup_steps,
        schedule_steps=cfg.schedule_steps,
    )


def make_parts(cfg: TrainConfig, group_W: np.ndarray | None = None) -> Parts:
    """What a run with these settings and groups of tasks is made of."""
    latent = None
    if cfg.latent_depth:
        latent = modgrok.LatentConfig(
            groups=1 if group_W is None else int(max(group_W)) + 1,
            target_depth=cfg.target_depth,
            **{name: getattr(cfg, f"gate_{name}") for name in _GATE_FIELDS},
        )
    tx = modgrok.make_optimizer(optimizer_config(cfg), latent=latent)
    return Parts(model_config(cfg), tx, latent)


def state_maker(cfg: TrainConfig, parts: Parts) -> Callable[..., Any]:
    """make(key of parameters, key of batches) -> the state of a run, which is what is saved.

    The key of the batches is part of it: a resumed run draws with the stored one.
    """
    init = functools.partial(
        modgrok.init_state, cfg=parts.model, tx=parts.tx, ema=cfg.ema > 0, latent=parts.latent
    )
    return jax.jit(lambda key, batches: (init(key), batches))


def abstract_state(cfg: TrainConfig, parts: Parts) -> Any:
    """Shapes and dtypes of that state."""
    return jax.eval_shape(state_maker(cfg, parts), key_for(cfg, 1), key_for(cfg, 2))


def restore(
    cfg: TrainConfig, workdir: str | os.PathLike[str], which: Slot, *, flag: str
) -> tuple[Restored, Parts]:
    """A checkpoint of the run in `workdir`, made with `cfg`, and the parts of that run.

    Raises: UsageError, which begins with `flag`, if there is none or it cannot be restored.
    """
    group_W = None
    if cfg.latent_depth:
        group_W = task_groups(cfg, prepare_data(cfg)[0], workdir=workdir)
    parts = make_parts(cfg, group_W)
    try:
        with Checkpoints(Path(workdir) / "checkpoints") as checkpoints:
            restored = checkpoints.restore(abstract_state(cfg, parts), which=which)
    except UsageError as error:
        raise UsageError(f"{flag}={workdir}: {error}") from error
    if restored is None:
        other = ", or --which=latest" if which == "best" else ""
        raise UsageError(
            f"{flag}={workdir}: holds no {which} checkpoint yet; expected a run that has saved "
            f"one{other}"
        )
    return restored, parts

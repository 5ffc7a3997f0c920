"""Settings of a modgrok run: flags and presets. `modgrok_setup` has what they build.

Importing this needs no jax, so that --help and a wrong flag answer at once.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Literal

from launch import UsageError
from launch.flags import field
from launch.program import default_cache

PROGRAM = "modgrok_train"
MOST = 2**31 - 1  # steps: counted in int32 on devices


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run. Defaults are the demo's."""

    workdir: str = field("", "folder of the run; empty: a new dated one in runs/", group="Run")
    seed: int = field(0, "seed of tasks, inputs, parameters and batches", min=0, max=2**31 - 1)
    quiet: bool = field(False, "no progress on stderr")
    figures: bool = field(True, "draw figures at the end (needs matplotlib)")

    p: int = field(7, "modulus, a prime", min=2, max=1009, group="Tasks z = a x + b y mod p")
    num_tasks: int = field(40, "task vectors (a, b) trained on", unit="tasks", min=1)
    task_rule: Literal["random", "rectangular"] = field(
        "random", "how they are chosen: any, or the corners of rectangles (num_tasks = 4 m)"
    )
    num_unseen: int = field(256, "at most this many unseen tasks are tested on", min=2)
    input_fraction: float = field(0.8, "share alpha of the p^2 inputs trained on", min=0, max=1)
    exclude_zero: bool = field(True, "leave out the task (0, 0)")
    reference_sampling: bool = field(
        False, "choose tasks and inputs as the paper's code does from --seed"
    )
    extra_tokens: int = field(
        0, "unused entries of the vocabulary", unit="tokens", min=0, max=2**30
    )

    shots: int = field(18, "examples in a sequence", min=2, group="Model")
    width: int = field(128, "channels of the residual stream", min=2)
    heads: int = field(4, "attention heads", min=1)
    layers: int = field(2, "blocks", min=1)
    mlp_ratio: int = field(4, "MLP neurons over width", min=1)
    norm: Literal["pre", "post"] = field("pre", "layer norms before a block's branches, or after")
    dtype: Literal["float32", "bfloat16"] = field("float32", "type of matrix products")
    remat: bool = field(False, "recompute blocks in the backward pass to save memory")

    steps: int = field(1600, "updates", unit="steps", min=1, max=MOST, group="Training")
    batch: int = field(280, "sequences of all devices, a multiple of num_tasks", min=1)
    micro_batches: int = field(1, "parts that a batch is cut into to save memory", min=1)
    optimizer: Literal["adamw", "muon"] = field("muon", "update rule; the paper's is adamw")
    lr: float = field(0.03, "peak learning rate (muon: of the blocks' matrices)", min=0)
    weight_decay: float = field(0.3, "decoupled, times the learning rate", min=0)
    embedding_lr: float = field(2e-3, "muon: AdamW's peak rate for everything else", min=0)
    embedding_decay: float = field(1.0, "muon: decay of the embedding", min=0)
    warmup_steps: int = field(50, "linear rise of the learning rate", unit="steps", min=0)
    schedule_steps: int | None = field(
        None, "where its cosine ends; none: at --steps", unit="steps", min=1, max=MOST
    )
    ema: float = field(
        0.99, "decay of averaged weights, which are then evaluated; 0: none", min=0, max=0.99999
    )

    latent_depth: bool = field(
        False, "learn which blocks to keep: a gate on each", group="Latent depth"
    )
    target_depth: float | None = field(
        None, "drive the expected depth here; none: leave it to the prior", unit="blocks", min=0
    )
    task_groups: str = field(
        "none",
        "gates for each group of tasks: none (one group), ratio (of b/a), rectangle, random, or a "
        "JSON file, a list of groups, each a list of tasks [a, b]",
    )
    gate_groups: int = field(4, "number of random groups, equal in size", min=2)
    gate_prior: Literal["uniform", "aggregated", "beta"] = field(
        "uniform", "of a gate: 1/2, the mean over groups, or a Beta density"
    )
    gate_beta: tuple[float, ...] = field(
        (1.0, 2.0), "the two numbers of that density", min=1, max=1e6
    )
    gate_kl_weight: float = field(0.01, "of the mean divergence from the prior", min=0)
    gate_depth_weight: float = field(1.25, "of (depth - target_depth)^2 / layers", min=0)
    gate_share_weight: float = field(0.0, "of the term that makes groups agree", min=0)
    gate_entropy_weight: float = field(2.5, "of the mean of q (1 - q)", min=0)
    gate_soft_steps: int | None = field(
        None, "soft samples first; none: a tenth of --schedule_steps", unit="steps", min=0
    )
    gate_anneal_steps: int | None = field(
        None,
        "rise of the divergence's weight, then of the others'; none: a fifth of --schedule_steps",
        unit="steps",
        min=0,
    )
    gate_tau: float = field(5.0, "temperature of the samples", min=1e-3)
    gate_init: float = field(2.0, "first logit of every gate", min=-1e6, max=1e6)
    gate_lr: float = field(0.02, "Adam's rate of the logits, constant, without decay", min=0)
    gate_loop: Literal["joint", "groups"] = field(
        "joint", "groups in one pass, or one after another"
    )

    eval_every: int = field(
        100, "test the four sets", unit="steps", min=1, max=MOST, group="Evaluation"
    )
    eval_sequences: tuple[int, ...] = field(
        (24, 48), "sequences of each seen and of each unseen task, on each input set", min=1
    )
    final_sequences: int = field(256, "the same for all tasks, at the end", min=1)
    eval_rows: int = field(1024, "sequences in one forward pass of a test", min=1)
    select: Literal["unseen_train", "unseen_heldout"] = field(
        "unseen_train", "set whose even tasks choose the best checkpoint"
    )
    target: float | None = field(
        None, "stop once the best of that accuracy is here; none: train to the end", min=0, max=1
    )

    checkpoint_every: int = field(200, "save", unit="steps", min=1, max=MOST, group="Files")
    keep: int = field(3, "checkpoints kept besides the best", min=1)
    log_every: int = field(50, "write loss and read signals", unit="steps", min=1)
    compilation_cache: str = field(default_cache(), "folder of compiled programs; empty: none")

    parallel: Literal["jit", "pmap", "shard_map"] = field(
        "jit", "how devices share a batch; all give the same numbers", group="Devices"
    )
    devices: int = field(0, "devices to use; 0: all", min=0)
    platform_devices: int = field(0, "simulate this many CPU devices; 0: no", min=0, max=512)
    multiprocess: Literal["off", "auto"] = field(
        "off", "auto: find the other hosts (Cloud TPU, SLURM, Open MPI, Kubernetes)"
    )
    coordinator_address: str = field("", "host:port of process 0, to start several by hand")
    num_processes: int = field(0, "how many processes there are then", min=0)
    process_id: int = field(-1, "which of them this is, from 0", min=-1)

    def __post_init__(self) -> None:
        if self.schedule_steps is None:
            object.__setattr__(self, "schedule_steps", self.steps)
        for name, part in (("gate_soft_steps", 10), ("gate_anneal_steps", 5)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.schedule_steps // part)

    def validate(self) -> None:
        """Everything that can be known without jax; raises ValueError naming the flag."""
        p, total = self.p, self.p**2
        if any(p % d == 0 for d in range(2, int(p**0.5) + 1)):
            primes = [q for q in range(max(2, p - 8), p + 9) if all(q % d for d in range(2, q))]
            near = ", ".join(map(str, primes))
            raise ValueError(f"--p={p}: expected a prime; near it are {near}")
        there = total - 1 if self.exclude_zero and not self.reference_sampling else total
        if self.num_tasks > there - 2:
            raise ValueError(
                f"--num_tasks={self.num_tasks}: expected 1 to {there - 2}, since p={p} has "
                f"{there} tasks and two have to stay unseen"
            )
        if self.task_rule == "rectangular" and self.num_tasks % 4:
            raise ValueError(
                f"--num_tasks={self.num_tasks}: expected a multiple of 4 with "
                "--task_rule=rectangular (or give --task_rule=random)"
            )
        train = round(total * self.input_fraction)
        if not 0 < train < total:
            raise ValueError(
                f"--input_fraction={self.input_fraction:g}: leaves {train} of p^2={total} inputs "
                f"to train on; expected 1 to {total - 1}, so {0.5 / total:.2g} to "
                f"{1 - 0.5 / total:.4g}"
            )
        if self.shots > train:
            raise ValueError(
                f"--shots={self.shots}: expected at most {train}, the inputs to train on with "
                f"--p={p} --input_fraction={self.input_fraction:g}"
            )
        if self.batch % self.num_tasks:
            low = self.batch // self.num_tasks * self.num_tasks
            near = " or ".join(str(b) for b in (low, low + self.num_tasks) if b)
            raise ValueError(
                f"--batch={self.batch}: expected a multiple of --num_tasks={self.num_tasks}, "
                f"so that every task gets as many sequences; nearest: {near}"
            )
        if self.batch % self.micro_batches:
            raise ValueError(
                f"--micro_batches={self.micro_batches}: expected a divisor of --batch={self.batch}"
            )
        if self.width % self.heads or self.width // self.heads % 2:
            raise ValueError(
                f"--width={self.width}: expected a multiple of 2 x --heads={self.heads}, "
                "since rotary positions pair the channels of a head"
            )
        if self.warmup_steps >= self.schedule_steps:
            raise ValueError(
                f"--warmup_steps={self.warmup_steps}: expected less than "
                f"--schedule_steps={self.schedule_steps}"
            )
        if self.latent_depth:
            self._validate_gates()
        elif self.target_depth is not None or self.task_groups != "none":
            raise ValueError(
                f"--target_depth={self.target_depth} --task_groups={self.task_groups}: expected "
                "--latent_depth with them"
            )
        if len(self.eval_sequences) != 2:
            raise ValueError(
                f"--eval_sequences={','.join(map(str, self.eval_sequences))}: expected two "
                "numbers, for seen and for unseen tasks"
            )

    def _validate_gates(self) -> None:
        if self.norm != "pre":
            raise ValueError(f"--norm={self.norm}: expected pre with --latent_depth")
        if self.target_depth is not None and not 0 < self.target_depth <= self.layers:
            raise ValueError(
                f"--target_depth={self.target_depth:g}: expected above 0 and at most "
                f"--layers={self.layers}"
            )
        if self.task_groups == "rectangle" and self.task_rule != "rectangular":
            raise ValueError("--task_groups=rectangle: expected --task_rule=rectangular with it")
        if self.task_groups == "random" and self.num_tasks % self.gate_groups:
            raise ValueError(
                f"--gate_groups={self.gate_groups}: expected a divisor of "
                f"--num_tasks={self.num_tasks}, so that groups are equal"
            )
        if self.gate_prior == "aggregated" and self.task_groups == "none":
            raise ValueError(
                "--gate_prior=aggregated: expected --task_groups with it; the mean over one group "
                "is the group itself"
            )
        if len(self.gate_beta) != 2 or sum(self.gate_beta) <= 2:
            raise ValueError(
                f"--gate_beta={','.join(f'{x:g}' for x in self.gate_beta)}: expected two numbers, "
                "not both 1"
            )


# What may change from one life of a run to the next; the numbers do not depend on it.
FREE = (
    "workdir",
    "quiet",
    "figures",
    "steps",
    "target",
    "final_sequences",
    "eval_rows",
    "keep",
    "compilation_cache",
    "parallel",
    "devices",
    "platform_devices",
    "multiprocess",
    "coordinator_address",
    "num_processes",
    "process_id",
)

# A run's own copy of its file of task groups.
GROUPS = "task_groups.json"

# Flags that earlier versions did not have, with what they did: their folders resume.
LATER = (
    *("norm", "latent_depth", "target_depth", "task_groups", "gate_groups", "gate_prior"),
    *("gate_beta", "gate_kl_weight", "gate_depth_weight", "gate_share_weight"),
    *("gate_entropy_weight", "gate_soft_steps", "gate_anneal_steps", "gate_tau", "gate_init"),
    *("gate_lr", "gate_loop"),
)

_PAPER = {
    "p": 29,
    "task_rule": "rectangular",
    "reference_sampling": True,
    "extra_tokens": 18,
    "shots": 32,
    "width": 512,
    "dtype": "bfloat16",
    "steps": 200_000,
    "optimizer": "adamw",
    "lr": 1.5e-4,
    "weight_decay": 2.0,
    "warmup_steps": 10_000,
    "ema": 0.0,
    "eval_every": 1000,
    "eval_sequences": (16, 16),
    "final_sequences": 64,
    "checkpoint_every": 1000,
    "log_every": 100,
}
PRESETS: dict[str, dict[str, object]] = {
    "demo": {"target": 0.77},
    "small": {
        "p": 5,
        "num_tasks": 16,
        "shots": 6,
        "width": 32,
        "steps": 40,
        "batch": 32,
        "warmup_steps": 10,
        "eval_every": 20,
        "eval_sequences": (8, 8),
        "final_sequences": 16,
        "checkpoint_every": 20,
        "log_every": 10,
    },
    "paper_d2": {**_PAPER, "layers": 2, "num_tasks": 512, "batch": 1024, "seed": 2}
    | {"input_fraction": 0.6},
    "paper_d4": {**_PAPER, "layers": 4, "num_tasks": 384, "batch": 1536, "seed": 1},
    "paper_d6": {**_PAPER, "layers": 6, "num_tasks": 384, "batch": 1536, "seed": 1},
}


def group_file(cfg: TrainConfig) -> Path | None:
    """The JSON file of task groups, if they are not by a rule."""
    named = cfg.latent_depth and cfg.task_groups not in ("none", "ratio", "rectangle", "random")
    return Path(cfg.task_groups) if named else None


def check_groups(cfg: TrainConfig, workdir: str | os.PathLike[str]) -> None:
    """UsageError if the run in `workdir` was begun with other groups than its file has now."""
    path, own = group_file(cfg), Path(workdir) / GROUPS
    if path is None or not own.exists() or not path.exists():
        return
    try:
        begun_with = json.loads(own.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"--workdir={workdir}: {own} cannot be read ({error})") from error
    try:
        same = json.loads(path.read_text()) == begun_with
    except (OSError, ValueError):
        same = False
    if not same:
        raise UsageError(
            f"--task_groups={path}: is not what the run in {workdir} was begun with; expected the "
            f"groups of {own}, or another --workdir"
        )

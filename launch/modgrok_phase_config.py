"""Settings of a phase diagram: flags, presets, the runs that it has, and what they build.

A run of the diagram is the run that modgrok_train makes with the same --num_tasks,
--input_fraction, --layers, --weight_decay and --seed. Importing this needs no jax.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from launch import modgrok_config, program
from launch.flags import field
from launch.modgrok_config import TrainConfig

PROGRAM = "modgrok_phase"
MOST_RUNS = 20_000  # each is a file, and has tasks and inputs to choose before the first step


class Cell(NamedTuple):
    """What tells a run of the diagram from the others."""

    layers: int
    num_tasks: int
    input_fraction: float
    weight_decay: float
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        return (
            f"L{self.layers}-n{self.num_tasks}-a{self.input_fraction!r}-w{self.weight_decay!r}"
            f"-s{self.seed}"
        )


def _same(name: str, default: Any = None) -> Any:
    """The flag of modgrok_train."""
    one = TrainConfig.__dataclass_fields__[name]
    value = one.default if default is None else default
    return dataclasses.field(default=value, metadata=one.metadata)


@dataclasses.dataclass(frozen=True)
class PhaseConfig(program.SpreadConfig):
    """Every setting of a diagram."""

    num_tasks: tuple[int, ...] = field(
        (9, 18, 28, 36), "numbers n of tasks trained on", min=1, group="Grid"
    )
    input_fraction: tuple[float, ...] = field(
        (0.4, 0.8), "shares alpha of the p^2 inputs trained on", min=0, max=1
    )
    layers: tuple[int, ...] = field((2,), "blocks", min=1)
    weight_decay: tuple[float, ...] = field(
        (0.3,), "decoupled, times the learning rate; more than one: a diagram of each", min=0
    )
    seeds: int = field(1, "seeds of each setting: --seed and those that follow it", min=1)
    merge: str = field(
        "", "folders of diagrams, by commas: their finished runs that the grid has are taken"
    )

    p: int = _same("p")
    task_rule: Literal["random", "rectangular"] = _same("task_rule")
    num_unseen: int = _same("num_unseen")
    exclude_zero: bool = _same("exclude_zero")
    reference_sampling: bool = _same("reference_sampling")
    extra_tokens: int = _same("extra_tokens")

    shots: int = _same("shots", 14)
    width: int = _same("width")
    heads: int = _same("heads")
    mlp_ratio: int = _same("mlp_ratio")
    dtype: Literal["float32", "bfloat16"] = _same("dtype")
    remat: bool = _same("remat")

    steps: int = _same("steps", 1200)
    batch: int = dataclasses.field(
        default=252,
        metadata={
            **TrainConfig.__dataclass_fields__["batch"].metadata,
            "help": "sequences of one run, a multiple of every number in --num_tasks",
        },
    )
    optimizer: Literal["adamw", "muon"] = _same("optimizer")
    lr: float = _same("lr")
    embedding_lr: float = _same("embedding_lr")
    embedding_decay: float = _same("embedding_decay")
    warmup_steps: int = _same("warmup_steps")
    schedule_steps: int | None = _same("schedule_steps")
    ema: float = _same("ema")

    eval_every: int = _same("eval_every")
    eval_sequences: tuple[int, ...] = _same("eval_sequences")
    eval_rows: int = _same("eval_rows")
    select: Literal["unseen_train", "unseen_heldout"] = field(
        "unseen_train", "set whose even tasks choose the step that counts as the best"
    )
    threshold: float = field(0.5, "accuracy at which a transition is drawn", min=0, max=1)

    checkpoint_every: int = field(
        100,
        "save, a multiple of --eval_every",
        unit="steps",
        min=1,
        max=modgrok_config.MOST,
        group="Files and memory",
    )
    chunk: int = field(16, "at most this many runs of one program at a time", unit="runs", min=1)
    memory_gib: float = field(
        4.0, "memory that they may need on a device (simulated ones: on all)", unit="GiB", min=0
    )

    def __post_init__(self) -> None:
        if self.schedule_steps is None:
            object.__setattr__(self, "schedule_steps", self.steps)

    def validate(self) -> None:
        """Everything that can be known without jax; raises ValueError naming the flag."""
        for flag in ("num_tasks", "input_fraction", "layers", "weight_decay"):
            values = getattr(self, flag)
            if not values or len(set(values)) != len(values):
                text = ",".join(f"{value:g}" for value in values)
                raise ValueError(f"--{flag}={text}: expected one number or more, each once")
        grid = (self.num_tasks, self.input_fraction, self.layers, self.weight_decay)
        runs = math.prod(map(len, grid)) * self.seeds
        if runs > MOST_RUNS:
            raise ValueError(
                f"--seeds={self.seeds}: makes {runs} runs of --num_tasks x --input_fraction x "
                f"--layers x --weight_decay x --seeds, expected at most {MOST_RUNS} in a folder"
            )
        if self.seed + self.seeds > 2**31:
            raise ValueError(f"--seeds={self.seeds}: expected --seed and the next below 2^31")
        for flag, whole in (("eval_every", "steps"), ("eval_every", "checkpoint_every")):
            if getattr(self, whole) % getattr(self, flag):
                raise ValueError(
                    f"--{flag}={getattr(self, flag)}: expected a divisor of "
                    f"--{whole}={getattr(self, whole)}"
                )
        for cell in cells(self):
            train_config(self, cell).validate()


# What may change in a folder: which runs the diagram has, and what their numbers do not depend on.
FREE = (
    *("num_tasks", "input_fraction", "layers", "weight_decay", "seed", "seeds", "merge"),
    *("select", "threshold", "eval_rows", "checkpoint_every", "chunk", "memory_gib"),
)

_PAPER = {
    **modgrok_config.PRESETS["paper_d2"],
    **{"num_tasks": (8, 16, 32, 64, 128, 256, 512), "weight_decay": (2.0,)},
    **{"input_fraction": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8), "layers": (2,), "seed": 1},
    **{"memory_gib": 70.0, "chunk": 49},
}
PRESETS: dict[str, dict[str, object]] = {
    "quick": {
        "p": 5,
        "num_tasks": (4, 12),
        "input_fraction": (0.6, 0.8),
        "shots": 6,
        "width": 32,
        "steps": 40,
        "batch": 24,
        "warmup_steps": 10,
        "eval_every": 20,
        "eval_sequences": (8, 8),
        "checkpoint_every": 20,
    },
    "paper": {name: x for name, x in _PAPER.items() if name in PhaseConfig.__dataclass_fields__},
}


def cells(cfg: PhaseConfig) -> list[Cell]:
    """The runs of the diagram, those of one depth together."""
    return [
        Cell(layers, num_tasks, fraction, decay, cfg.seed + more)
        for layers in cfg.layers
        for more in range(cfg.seeds)
        for decay in cfg.weight_decay
        for fraction in cfg.input_fraction
        for num_tasks in cfg.num_tasks
    ]


def train_config(cfg: PhaseConfig, cell: Cell) -> TrainConfig:
    """The settings of modgrok_train for one run."""
    own = {f.name for f in dataclasses.fields(PhaseConfig)} - set(FREE)
    shared = own & {f.name for f in dataclasses.fields(TrainConfig)}
    return TrainConfig(
        **{name: getattr(cfg, name) for name in sorted(shared)},
        **cell._asdict(),
        eval_rows=cfg.eval_rows,
    )


def make_plan(cfg: PhaseConfig, layers: int) -> Any:
    """The `modgrok.phase.Plan` of one depth."""
    from launch import modgrok_setup
    from modgrok import phase

    one = train_config(cfg, next(cell for cell in cells(cfg) if cell.layers == layers))
    return phase.Plan(
        modgrok_setup.model_config(one),
        modgrok_setup.optimizer_config(one),  # whose decay gives way to each run's own
        modulus=cfg.p,
        shots=cfg.shots,
        batch=cfg.batch,
        ema_decay=cfg.ema or None,
        sequences_per_task=tuple(cfg.eval_sequences),
        rows=cfg.eval_rows,
    )


def stack(cfg: PhaseConfig, group: Sequence[Cell], sizes: tuple[int, int, int, int]) -> Any:
    """(keys of the parameters, `modgrok.phase.Runs`) of some runs, padded to `sizes`."""
    import jax.numpy as jnp

    from launch import modgrok_setup
    from modgrok import phase

    configs = [train_config(cfg, cell) for cell in group]
    data = [modgrok_setup.prepare_data(config) for config in configs]
    keys = [[modgrok_setup.key_for(config, at) for at in (1, 2, 3)] for config in configs]
    runs = phase.stack_runs(
        [tasks for tasks, _ in data],
        [inputs for _, inputs in data],
        weight_decay=[cell.weight_decay for cell in group],
        batch_keys=[of_batches for _, of_batches, _ in keys],
        test_keys=[of_tests for _, _, of_tests in keys],
        sizes=sizes,
    )
    return jnp.stack([of_params for of_params, _, _ in keys]), runs

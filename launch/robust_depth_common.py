"""What the robust_depth programs share: the flags of a problem, and trials cut into chunks.

Importing this needs no jax, so that --help and a wrong flag answer at once.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from launch import UsageError, program
from launch.flags import field

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class ProblemConfig(program.SpreadConfig):
    rows: int = field(60, "measurements M", min=1, group="Problem y = X theta + s")
    dim: int = field(100, "coordinates D of theta", min=1)
    sparsity: int = field(3, "entries k of the truth that are not zero", min=1)
    truth: Literal["nonnegative", "signed"] = field("nonnegative", "signs of these entries")
    magnitude: tuple[float, ...] = field((1.0, 1.0), "their sizes are uniform between these", min=0)
    outlier_kind: Literal["gaussian", "sign_flip", "adversarial"] = field(
        "gaussian", "what corrupts a row: noise, the sign against it, or another sparse vector"
    )
    outlier_scale: float = field(10.0, "its size", min=0)
    noise_scale: float = field(0.0, "standard deviation of normal noise on every row", min=0)

    steps: int = field(10_000, "steps of the method", unit="steps", min=1, group="Method")
    step_size: float = field(0.01, "eta, or the first one of a schedule", min=0)
    schedule: Literal["constant", "geometric", "inverse_sqrt"] = field(
        "constant", "eta, eta rate^t, or eta / sqrt(t + 1)"
    )
    step_rate: float = field(0.9995, "rate of the geometric schedule", min=0, max=1)
    scheme: Literal["zero_first", "balanced", "gaussian", "random_sign"] = field(
        "zero_first", "start: first layer 0; all layers alpha; alpha N(0, 1); alpha or -alpha"
    )
    record_every: int = field(100, "measure loss and error", unit="steps", min=1)

    trials: int = field(20, "problems and starts", unit="trials", min=1, group="Trials")
    chunk: int = field(
        64, "trials of one call, then progress is shown and kept", unit="trials", min=1
    )
    threshold: float = field(0.05, "relative error below which a trial has succeeded", min=0)
    memory_gib: float = field(4.0, "memory that a call may need", unit="GiB", min=0)

    def validate(self) -> None:
        if self.sparsity > self.dim:
            raise ValueError(f"--sparsity={self.sparsity}: expected 1 to --dim={self.dim}")
        if self.steps % self.record_every:
            raise ValueError(
                f"--record_every={self.record_every}: expected a divisor of --steps={self.steps}"
            )
        if len(self.magnitude) != 2 or self.magnitude[0] > self.magnitude[1]:
            raise ValueError(
                f"--magnitude={','.join(f'{m:g}' for m in self.magnitude)}: expected two numbers, "
                "the smaller first"
            )
        if self.magnitude[1] == 0:
            raise ValueError("--magnitude=0,0: expected sizes above 0, or there is no truth")
        if self.step_size == 0:
            raise ValueError("--step_size=0: expected a number above 0")


def check_values(flag: str, values: Sequence[Any], *, least: float, below: float = np.inf) -> None:
    """ValueError unless there are some, each once, from `least` to less than `below`."""
    text = ",".join(f"{value:g}" for value in values)
    if not values or len(set(values)) != len(values):
        raise ValueError(f"--{flag}={text}: expected one number or more, each once")
    if min(values) < least or max(values) >= below:
        end = "" if below == np.inf else f" to less than {below:g}"
        raise ValueError(f"--{flag}={text}: expected numbers from {least:g}{end}")


def make_grid(
    cfg: ProblemConfig,
    *,
    depths: Sequence[int],
    fractions: Sequence[float],
    scales: Sequence[float | None] = (None,),
) -> Any:
    """The `robust_depth.sweep.Grid` of these flags; UsageError if it needs too much memory."""
    from robust_depth import sweep

    grid = sweep.Grid(
        num_rows=cfg.rows,
        dim=cfg.dim,
        sparsity=cfg.sparsity,
        depths=tuple(depths),
        fractions=tuple(fractions),
        scales=tuple(scales),
        truth=cfg.truth,
        magnitude=cfg.magnitude,
        outlier_kind=cfg.outlier_kind,
        outlier_scale=cfg.outlier_scale,
        noise_scale=cfg.noise_scale,
        scheme=cfg.scheme,
        num_steps=cfg.steps,
        record_every=cfg.record_every,
    )
    one, all_of_them = (
        sweep.memory_bytes(grid, trials=trials) / _GIB
        for trials in (min(cfg.chunk, cfg.trials), cfg.trials)
    )
    if one > cfg.memory_gib:
        raise UsageError(
            f"--chunk={cfg.chunk}: a call needs {one:.3g} GiB, more than "
            f"--memory_gib={cfg.memory_gib:g}; give a smaller --chunk or a larger --record_every"
        )
    if all_of_them > cfg.memory_gib:
        raise UsageError(
            f"--trials={cfg.trials}: the records need {all_of_them:.3g} GiB, more than "
            f"--memory_gib={cfg.memory_gib:g}; give fewer --trials or a larger --record_every"
        )
    return grid


def step_size(cfg: ProblemConfig) -> Any:
    """The `robust_depth.method.StepSize` of these flags."""
    from robust_depth import method

    if cfg.schedule == "geometric":
        return method.geometric(cfg.step_size, cfg.step_rate)
    return getattr(method, cfg.schedule)(cfg.step_size)


def chunks(
    cfg: ProblemConfig, grid: Any, spans: Sequence[tuple[int, int]]
) -> Iterator[tuple[tuple[int, int], dict[str, np.ndarray]]]:
    """Run the trials of each span; (span, the arrays of `robust_depth.sweep.Records`)."""
    import jax

    from launch import parallel
    from robust_depth import sweep

    mesh = parallel.make_mesh(cfg.devices)
    size = max((stop - start for start, stop in spans), default=0)
    size = -(-size // mesh.size) * mesh.size  # one shape, which the devices divide
    spread = {"mesh": mesh, "axis": parallel.AXIS} if mesh.size > 1 else {}
    key = program.key_for(cfg, 0)
    for start, stop in spans:
        keys_T = sweep.trial_keys(key, start, start + size)
        records = sweep.run_trials(keys_T, grid, step_size=step_size(cfg), **spread)
        whole = jax.device_get(records._asdict())
        yield (start, stop), {name: part[: stop - start] for name, part in whole.items()}


def spans(first: int, last: int, size: int) -> list[tuple[int, int]]:
    """(start, stop) of what lies between `first` and `last`, at most `size` at a time."""
    return [(start, min(start + size, last)) for start in range(first, last, size)]


def progress(say: Callable[..., None], total: int) -> Callable[[int, str], None]:
    """tell(trials done, text): how far it is, and the time left."""
    began = time.monotonic()

    def tell(done: int, text: str) -> None:
        left = (time.monotonic() - began) * (total / done - 1)
        say(f"{done}/{total} trials  {text}  {left:.0f} s left")

    return tell

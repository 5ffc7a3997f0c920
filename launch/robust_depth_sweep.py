"""Thousands of trials of deep diagonal networks: depths x starts x outlier fractions.

Trials are kept in chunks as they are done, so that a killed sweep goes on where it was. A sweep can
be cut into shards (--first_trial, --trials), run anywhere, and put together: --merge takes the
trials that other folders of the same grid hold, and what is missing is computed; so is a sweep
extended. Files: sweep.npz (loss and error of each trial and setting by step), chunks/. stdout ends
with one line of JSON.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from launch import program, robust_depth_common, rundir
from launch.flags import field

PROGRAM = "robust_depth_sweep"
PRESETS: dict[str, dict[str, object]] = {
    "quick": {"trials": 20, "outlier_fractions": (0.0, 0.1, 0.2, 0.3), "steps": 10_000},
    "full": {"trials": 200, "outlier_fractions": (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)},
}
_CHUNK = re.compile(r"trials-(\d+)-(\d+)\.npz")
_ARRAYS = ("loss_TSR", "error_TSR")
_SPAN = ("first_trial", "trials", "chunk", "merge", "memory_gib", "threshold")


@dataclasses.dataclass(frozen=True)
class SweepConfig(robust_depth_common.ProblemConfig):
    depths: tuple[int, ...] = field((1, 2, 3, 4, 5), "layers N", min=1, group="Grid")
    outlier_fractions: tuple[float, ...] = field((0.1,), "shares p of corrupted rows", min=0)
    init_scales: tuple[float, ...] | None = field(
        None, "sizes alpha of the start; none: measured ones, by depth", min=0
    )
    first_trial: int = field(0, "number of the first trial of this shard", min=0)
    merge: str = field("", "folders of sweeps of this grid, by commas, whose trials are taken over")

    def validate(self) -> None:
        super().validate()
        robust_depth_common.check_values("depths", self.depths, least=1)
        robust_depth_common.check_values(
            "outlier_fractions", self.outlier_fractions, least=0, below=1
        )
        if self.init_scales is not None:
            robust_depth_common.check_values("init_scales", self.init_scales, least=0)


def _prepare(cfg: SweepConfig, say: Callable[..., None]) -> tuple[list[Path], Any]:
    """The folders to merge, and the grid."""
    others = program.merged(cfg, cfg.merge, program=PROGRAM, free=_SPAN, what="a sweep")
    grid = robust_depth_common.make_grid(
        cfg,
        depths=cfg.depths,
        fractions=cfg.outlier_fractions,
        scales=cfg.init_scales or (None,),
    )
    return others, grid


def _work(
    cfg: SweepConfig,
    problem: tuple[list[Path], Any],
    folder: rundir.RunDir,
    say: Callable[..., None],
) -> tuple[dict[str, Any], program.Arrays]:
    from robust_depth import sweep

    others, grid = problem
    shape = (len(grid.settings), len(grid.record_steps))
    first, last = cfg.first_trial, cfg.first_trial + cfg.trials
    whole = {name: np.full((cfg.trials, *shape), np.nan, grid.dtype) for name in _ARRAYS}
    there_T = np.zeros(cfg.trials, bool)
    for source in (folder.path, *others):
        for start, part in _kept_chunks(source, shape, say):
            stop = start + len(part["error_TSR"])
            low, high = max(start, first), min(stop, last)
            if low < high:
                for name in _ARRAYS:
                    whole[name][low - first : high - first] = part[name][low - start : high - start]
                there_T[low - first : high - first] = True
    found = int(there_T.sum())
    if found:
        say(f"{found} of {cfg.trials} trials are there already")
    spans = [
        span
        for start, stop in _gaps(there_T)
        for span in robust_depth_common.spans(first + start, first + stop, cfg.chunk)
    ]
    if spans:
        say(f"{cfg.trials - found} trials x {len(grid.settings)} settings; compiling first")
    tell, done = robust_depth_common.progress(say, cfg.trials - found), 0
    for (start, stop), part in robust_depth_common.chunks(cfg, grid, spans):
        (folder.path / "chunks").mkdir(exist_ok=True)
        folder.save_arrays(f"chunks/trials-{start:08d}-{stop:08d}", **part)
        for name in _ARRAYS:
            whole[name][start - first : stop - first] = part[name]
        done += stop - start
        rate_S = sweep.success_rate(part["error_TSR"][..., -1], threshold=cfg.threshold)
        folder.scalars(start, {"trials": stop - start, "success_rate": float(rate_S.mean())})
        tell(done, f"{rate_S.mean():.2f} of the last {stop - start} succeeded")
    return _result(cfg, grid, whole, found), {"sweep": _arrays(grid, whole)}


def _kept_chunks(
    source: Path, shape: tuple[int, int], say: Callable[..., None]
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(first trial, arrays) of each chunk that a folder holds whole."""
    for path in sorted((source / "chunks").glob("trials-*.npz")):
        match = _CHUNK.fullmatch(path.name)
        if not match:
            continue
        start, stop = map(int, match.groups())
        try:
            part = rundir.read_arrays(path, _ARRAYS)
            if any(x.shape != (stop - start, *shape) for x in part.values()):
                raise rundir.Unreadable("its arrays have other shapes")
        except rundir.Unreadable as error:
            say(f"{path}: left aside, it cannot be read ({error}); its trials are run again")
            continue
        yield start, part


def _gaps(there_T: np.ndarray) -> list[tuple[int, int]]:
    """Spans of False."""
    edges = np.flatnonzero(np.diff(np.r_[True, there_T, True].astype(int)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def _arrays(grid: Any, whole: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        **whole,
        "step": grid.record_steps,
        "depth": np.array([s.depth for s in grid.settings]),
        "init_scale": np.array([s.scale for s in grid.settings]),
        "outlier_fraction": np.array([s.fraction for s in grid.settings]),
    }


def _result(
    cfg: SweepConfig, grid: Any, whole: dict[str, np.ndarray], found: int
) -> dict[str, Any]:
    from robust_depth import sweep

    records = sweep.Records(whole["loss_TSR"], whole["error_TSR"])
    last_TS, best_TS = records.error_TSR[..., -1], np.asarray(records.best_error_TS())
    rows = [
        {
            **setting._asdict(),
            "success_rate": float(sweep.success_rate(last_T, threshold=cfg.threshold)),
            "best_success_rate": float(sweep.success_rate(best_T, threshold=cfg.threshold)),
            "median_error": float(np.median(np.nan_to_num(last_T, nan=np.inf))),
            "diverged": int((~np.isfinite(last_T)).sum()),
        }
        for setting, last_T, best_T in zip(grid.settings, last_TS.T, best_TS.T, strict=True)
    ]
    return {
        "steps": cfg.steps,
        "settings": rows,
        "trials": cfg.trials,
        "first_trial": cfg.first_trial,
        "trials_taken_over": found,
    }


def _draw(arrays: program.Arrays) -> dict[str, Any]:
    from robust_depth import figures, sweep

    x = arrays["sweep"]
    depths, fractions = np.unique(x["depth"]), np.unique(x["outlier_fraction"])
    drawn = {}
    last_TS = x["error_TSR"][..., -1]
    # Of several starts the best one at each depth.
    rate_SF = np.array(
        [
            [
                sweep.success_rate(
                    last_TS[:, (x["depth"] == depth) & (x["outlier_fraction"] == fraction)]
                ).max()
                for fraction in fractions
            ]
            for depth in depths
        ]
    )
    drawn["success"] = figures.success_map(rate_SF, depths, fractions)
    for fraction in fractions:
        at_S = x["outlier_fraction"] == fraction
        labels = [
            f"N = {depth}, start {scale:g}"
            for depth, scale in zip(x["depth"][at_S], x["init_scale"][at_S], strict=True)
        ]
        drawn[f"error_p{fraction:g}"] = figures.error_curves(
            x["step"],
            x["error_TSR"][:, at_S],
            labels,
            title=f"Outlier fraction {fraction:g}: median and quartiles",
            threshold=0.05,
        )
    return drawn


_PROGRAM = program.Program(
    PROGRAM, lambda cfg: (), _prepare, _work, _draw, free=("chunk", "memory_gib", "merge")
)


def cli() -> None:
    program.cli(_PROGRAM, SweepConfig, PRESETS, __doc__)


if __name__ == "__main__":
    cli()

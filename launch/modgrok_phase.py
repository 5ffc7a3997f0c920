"""The phase diagram: tasks x inputs x depth, all runs of one depth in one compiled program.

Every run is the one that modgrok_train makes with the same flags. Finished runs are kept, and a
chunk of runs is saved on its way, so the same command takes up a diagram that was stopped; with
more rows, columns, depths or seeds it trains the new runs alone, and --merge takes finished ones
from other folders. Files: runs/ (all that were ever trained here), and of those that the flags name
phase.npz (the four sets of every run by step) and figures/. stdout ends with one line of JSON.
Presets: quick (seconds) and paper (7 x 7 runs; a GPU).
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launch import UsageError, modgrok_phase_folder, program, rundir
from launch.modgrok_phase_config import (
    FREE,
    PRESETS,
    PROGRAM,
    Cell,
    PhaseConfig,
    cells,
    make_plan,
    train_config,
)

_GIB = 2**30


def _prepare(cfg: PhaseConfig, say: Callable[..., None]) -> tuple[list[Path], dict[int, Any]]:
    """The folders to merge, and the `modgrok_phase_trainer.Depth` of each number of layers."""
    import jax

    from launch import parallel
    from launch.modgrok_phase_trainer import Depth
    from launch.modgrok_setup import prepare_data
    from modgrok import phase

    others = program.merged(cfg, cfg.merge, program=PROGRAM, free=FREE, what="a diagram")
    # Tasks and inputs do not depend on depth or decay; every choice is tried before a compilation.
    settings = {cell._replace(layers=1, weight_decay=0.0) for cell in cells(cfg)}
    data = [prepare_data(train_config(cfg, cell)) for cell in settings]
    sizes = tuple(max(len((*t, *i)[at]) for t, i in data) for at in range(4))
    mesh = parallel.make_mesh(cfg.devices)
    platform = jax.devices()[0].platform
    together = phase.default_together(platform)
    shared = mesh.size if platform == "cpu" else 1  # simulated devices have one memory
    depths = {}
    for layers in cfg.layers:
        plan = make_plan(cfg, layers)

        def gib(runs: int, plan: Any = plan) -> float:
            need = phase.memory_bytes(plan, runs=runs, together=together, num_tasks=sizes[:2])
            return shared * need / _GIB

        if gib(1) > cfg.memory_gib:
            again = dataclasses.replace(plan, cfg=dataclasses.replace(plan.cfg, remat=True))
            remat = ", or --remat" if gib(1, again) < gib(1) else ""  # on a CPU in deep models
            raise UsageError(
                f"--memory_gib={cfg.memory_gib:g}: one run with --layers={layers} needs about "
                f"{gib(1):.3g} GiB{f' on {shared} devices' if shared > 1 else ''}; expected at "
                f"least that, or a smaller --batch, --width, --eval_rows or --devices{remat}"
            )
        chunk = min(cfg.chunk, len(cells(cfg)) // len(cfg.layers))
        most = next(c for c in range(-(-chunk // mesh.size), 0, -1) if gib(c) <= cfg.memory_gib)
        depths[layers] = Depth(plan, sizes, min(most * mesh.size, max(chunk, mesh.size)))
    return others, depths


def _work(
    cfg: PhaseConfig,
    problem: tuple[list[Path], dict[int, Any]],
    folder: rundir.RunDir,
    say: Callable[..., None],
) -> tuple[dict[str, Any], program.Arrays]:
    from launch.loop import StopRequest
    from launch.modgrok_phase_trainer import Trainer

    others, depths = problem
    modgrok_phase_folder.check_result(folder.path)
    wanted = cells(cfg)
    kept = _kept_runs(cfg, wanted, folder, others)
    found = len(kept)
    if found:
        say(f"{found} of {len(wanted)} runs are there already")
    modgrok_phase_folder.remove_finished(folder.path)
    trainer = Trainer(cfg, folder, say, len(wanted) - found)
    with StopRequest() as stop:
        for layers, depth in depths.items():
            here = [cell for cell in wanted if cell.layers == layers]
            # Once more for runs whose checkpoint was damaged: from another one, or the start.
            while missing := [cell for cell in here if cell not in kept]:
                for share in modgrok_phase_folder.shares(folder.path, missing, depth.chunk):
                    kept |= trainer.train(depth, share, stop)
    arrays = _arrays(cfg, wanted, kept)
    return _result(cfg, wanted, arrays, found), {"phase": arrays}


def _kept_runs(
    cfg: PhaseConfig,
    wanted: Sequence[Cell],
    folder: rundir.RunDir,
    others: Sequence[Path],
) -> dict[Cell, dict[str, np.ndarray]]:
    """The finished runs of our folder, and of others, which ours then holds as well."""
    kept: dict[Cell, dict[str, np.ndarray]] = {}
    merged = []
    for source in (folder.path, *others):
        own = source == folder.path
        for cell in wanted:
            if cell in kept:
                continue
            if part := modgrok_phase_folder.finished_run(cfg, source, cell, own=own):
                kept[cell] = part
                if not own:
                    merged.append(cell)
    (folder.path / "runs").mkdir(exist_ok=True)
    for cell in merged:
        modgrok_phase_folder.save_run(folder, cell, kept[cell])
    return kept


def _arrays(
    cfg: PhaseConfig, wanted: Sequence[Cell], kept: dict[Cell, dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    from modgrok import phase

    step_C = np.arange(cfg.eval_every, cfg.steps + 1, cfg.eval_every)
    loss_GC, accuracy_GC4, deciding_GC2 = (
        np.stack([kept[cell][name] for cell in wanted]) for name in modgrok_phase_folder.ARRAYS
    )
    summary = phase.summarise(step_C, accuracy_GC4, deciding_GC2, by=cfg.select)
    grid = {
        name: np.array(x) for name, x in zip(Cell._fields, zip(*wanted, strict=True), strict=True)
    }
    best, last = (
        phase.phases(x, threshold=cfg.threshold) for x in (summary.best_G4, summary.last_G4)
    )
    return {
        **{f"{name}_G": x for name, x in grid.items()},
        "step_C": step_C,
        "loss_GC": loss_GC,
        "accuracy_GC4": accuracy_GC4,
        "deciding_GC2": deciding_GC2,
        **summary._asdict(),
        "best_phase_G": best,
        "last_phase_G": last,
        "modulus": np.array(cfg.p),
        "threshold": np.array(cfg.threshold),
        "select": np.array(cfg.select),
    }


def _result(
    cfg: PhaseConfig, wanted: Sequence[Cell], x: dict[str, np.ndarray], found: int
) -> dict[str, Any]:
    from modgrok import phase
    from modgrok.evaluation import SETS

    rows = [
        {
            **cell._asdict(),
            "best_step": int(x["best_step_G"][g]),
            **{f"best_{name}": float(v) for name, v in zip(SETS, x["best_G4"][g], strict=True)},
            **{f"last_{name}": float(v) for name, v in zip(SETS, x["last_G4"][g], strict=True)},
            "best_phase": phase.PHASES[x["best_phase_G"][g]],
            "last_phase": phase.PHASES[x["last_phase_G"][g]],
            "diverged": not np.isfinite([x["loss_GC"][g, -1], *x["last_G4"][g]]).all(),
        }
        for g, cell in enumerate(wanted)
    ]
    return {
        "steps": cfg.steps,
        "runs": rows,
        "runs_taken_over": found,
        "runs_trained": len(wanted) - found,
        "diverged": sum(row["diverged"] for row in rows),
        "chance": 1 / cfg.p,
    }


def _draw(arrays: program.Arrays) -> dict[str, Any]:
    from modgrok import phase_figures

    return phase_figures.all_figures(arrays["phase"])


_PROGRAM = program.Program(
    PROGRAM,
    lambda cfg: (),
    _prepare,
    _work,
    _draw,
    free=FREE,
    again=False,
    figures=r"phase_L\d+(_w[^_]+)?_(best|last)|transience_L\d+(_w[^_]+)?",
)


def cli() -> None:
    program.cli(_PROGRAM, PhaseConfig, PRESETS, __doc__)


if __name__ == "__main__":
    cli()

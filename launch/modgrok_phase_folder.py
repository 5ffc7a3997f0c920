"""What the folder of a phase diagram holds: finished runs, and chunks that were begun.

    runs/NAME.npz                   a finished run
    checkpoints/NAME/runs.json      the runs of a chunk in work, in the order of its checkpoints
    checkpoints/NAME/latest/        these
    damaged/                        what could not be read

Importing this needs no jax.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from launch import rundir
from launch.modgrok_phase_config import Cell, PhaseConfig

ARRAYS = ("loss_C", "accuracy_C4", "deciding_C2")  # of a run's file


class Begun(NamedTuple):
    """A chunk with a checkpoint in its folder, and the runs that it holds, in their order."""

    path: Path
    cells: list[Cell]


class Share(NamedTuple):
    """Runs to train in one program of `slots` places: at least as many.

    They go on from `begun`, whose checkpoint holds them, or begin at the start.
    """

    cells: list[Cell]
    slots: int
    begun: Begun | None


def put_aside(folder: Path, damaged: Path) -> Path:
    return rundir.put_aside(damaged, folder / "damaged")


def check_result(folder: Path) -> None:
    """Put a damaged phase.npz aside; it is made anew of runs/."""
    result = folder / "phase.npz"
    if result.exists():
        try:
            rundir.read_arrays(result)
        except rundir.Unreadable as error:
            aside = put_aside(folder, result)
            text = f"{result}: cannot be read ({error}); moved to {aside}, made again of runs/"
            print(text, file=sys.stderr)


def save_run(folder: rundir.RunDir, cell: Cell, arrays: dict[str, np.ndarray]) -> None:
    folder.save_arrays(f"runs/{cell.name}", run=np.array(cell.name), **arrays)


def finished_run(
    cfg: PhaseConfig, folder: Path, cell: Cell, *, own: bool
) -> dict[str, np.ndarray] | None:
    """The arrays of a run, if the folder holds them whole; nothing moves in one not our `own`."""
    path = folder / "runs" / f"{cell.name}.npz"
    if not os.path.exists(path):
        return None
    try:
        name = str(rundir.read_arrays(path).get("run", cell.name))  # not in those of old versions
        if name != cell.name:
            raise rundir.Unreadable(f"it is that of {name}")
        part = rundir.read_arrays(path, ARRAYS)
        _check_arrays(part, cfg.steps // cfg.eval_every)
    except rundir.Unreadable as error:
        aside = f"moved to {put_aside(folder, path)}" if own else "left aside"
        text = f"{path}: {aside}, it cannot be read ({error}); this run is trained again"
        print(f"{text}, unless another of the folders has it", file=sys.stderr)
        return None
    return part


def _check_arrays(part: dict[str, np.ndarray], tests: int) -> None:
    if [part[name].shape for name in ARRAYS] != [(tests,), (tests, 4), (tests, 2)]:
        raise rundir.Unreadable("its arrays have other shapes")
    if not all(np.issubdtype(x.dtype, np.floating) for x in part.values()):
        raise rundir.Unreadable("its arrays are not of floats")
    if any(((x < 0) | (x > 1.0001)).any() for x in (part["accuracy_C4"], part["deciding_C2"])):
        raise rundir.Unreadable("its accuracies are not between 0 and 1")  # NaN: it diverged


def shares(folder: Path, missing: Sequence[Cell], chunk: int) -> Iterator[Share]:
    """Runs to train together, at most `chunk`: first those of chunks that were begun."""
    left = list(missing)
    for begun in _begun_chunks(folder):
        part = [cell for cell in begun.cells if cell in left]
        left = [cell for cell in left if cell not in part]
        yield from _equal_shares(part, chunk, begun)
    yield from _equal_shares(left, chunk, None)


def _equal_shares(cells: list[Cell], chunk: int, begun: Begun | None) -> Iterator[Share]:
    """All filled up to the same size: they are one program."""
    count = -(-len(cells) // chunk)
    for part in np.array_split(np.arange(len(cells)), count) if count else ():
        yield Share([cells[at] for at in part], -(-len(cells) // count), begun)


def _begun_chunks(folder: Path) -> list[Begun]:
    """The one with the latest checkpoint first: a run may be in several, of other chunks."""
    found = []
    for note in _notes(folder):
        names = [one.name for one in note.parent.glob("latest/*")]
        steps = [int(m[1]) for name in names if (m := re.fullmatch(r"\d+-step-(\d+)", name))]
        if steps and (cells := _listed_cells(note)):
            found.append((max(steps), Begun(note.parent, cells)))
    return [begun for _, begun in sorted(found, key=lambda pair: -pair[0])]


def _notes(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("*/runs.json"))


def _listed_cells(note: Path) -> list[Cell]:
    try:
        return [Cell(*values) for values in json.loads(note.read_text())]
    except (OSError, ValueError, TypeError):
        return []  # without its list a chunk is begun again


def remove_finished(folder: Path) -> None:
    """Remove the checkpoints of chunks whose runs are all finished, asked for or not.

    Damaged ones among them go to the diagram's own damaged/.
    """
    for note in _notes(folder):
        files = [folder / "runs" / f"{cell.name}.npz" for cell in _listed_cells(note)]
        if files and all(file.exists() for file in files):
            if (note.parent / "damaged").exists():
                put_aside(folder, note.parent / "damaged")
            shutil.rmtree(note.parent)

"""The phase diagram: tasks x inputs x depth, all runs of one depth in one compiled program.

Every run is the one that modgrok_train makes with the same flags. Finished runs are kept, and a
chunk of runs is saved on its way, so the same command takes up a diagram that was stopped; with
more rows, columns, depths or seeds it trains the new runs alone, and --merge takes finished ones
from other folders. Files: runs/ (all that were ever trained here), and of those that the flags name
phase.npz (the four sets of every run by step) and figures/. stdout ends with one line of JSON.
Presets: quick (seconds) and paper (7 x 7 runs; a GPU).
"""

import dataclasses
import functools
import hashlib
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from launch import UsageError, program, rundir
from launch.modgrok_phase_config import (
    FREE,
    PRESETS,
    PROGRAM,
    Cell,
    PhaseConfig,
    cells,
    make_plan,
    stack,
    train_config,
)

_GIB = 2**30
_SETS = ("seen_train", "seen_heldout", "unseen_train", "unseen_heldout")
_ARRAYS = ("loss_C", "accuracy_C4", "deciding_C2")  # of a run's file


class _Depth(NamedTuple):
    """The runs of one depth: what compiles them, and how many go together."""

    plan: Any
    sizes: tuple[int, int, int, int]
    chunk: int


class _Begun(NamedTuple):
    """A chunk with a checkpoint in its folder, and the runs that it holds, in their order."""

    path: Path
    cells: list[Cell]


class _Share(NamedTuple):
    """Runs to train together, filled up to `slots`, from the checkpoint that has them."""

    cells: list[Cell]
    slots: int
    begun: _Begun | None


def _prepare(cfg: PhaseConfig, say: Callable[..., None]) -> dict[int, _Depth]:
    import jax

    from launch import parallel
    from launch.modgrok_config import prepare_data
    from modgrok import phase

    for folder in _others(cfg):
        _check_same_settings(cfg, folder)
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
        most = next(
            c for c in range(max(1, -(-cfg.chunk // mesh.size)), 0, -1) if gib(c) <= cfg.memory_gib
        )
        depths[layers] = _Depth(plan, sizes, min(most * mesh.size, max(cfg.chunk, mesh.size)))
    return depths


def _others(cfg: PhaseConfig) -> list[Path]:
    return [Path(text.strip()) for text in cfg.merge.split(",") if text.strip()]


def _check_same_settings(cfg: PhaseConfig, folder: Path) -> None:
    if not (folder / rundir.CONFIG).is_file():
        raise UsageError(f"--merge={folder}: expected the folder of a diagram, with config.json")
    try:
        rundir.check(folder, dataclasses.asdict(cfg), program=PROGRAM, free=(*program.FREE, *FREE))
    except UsageError as error:
        raise UsageError(str(error).replace("--workdir=", "--merge=", 1)) from error


def _work(
    cfg: PhaseConfig, depths: dict[int, _Depth], folder: rundir.RunDir, say: Callable[..., None]
) -> tuple[dict[str, Any], program.Arrays]:
    from launch.loop import StopRequest

    _look_at_result(folder.path, say)
    wanted = cells(cfg)
    kept: dict[Cell, dict[str, np.ndarray]] = {}
    merged = []
    for source in (folder.path, *_others(cfg)):
        for cell in wanted:
            if cell not in kept and (part := _kept(cfg, source, cell, say, source == folder.path)):
                kept[cell] = part
                if source != folder.path:
                    merged.append(cell)
    (folder.path / "runs").mkdir(exist_ok=True)
    for cell in merged:
        folder.save_arrays(f"runs/{cell.name}", **kept[cell])
    found = len(kept)
    if found:
        say(f"{found} of {len(wanted)} runs are there already")
    _clean(folder.path)
    trainer = _Trainer(cfg, folder, say, len(wanted) - found)
    with StopRequest() as stop:
        for layers, depth in depths.items():
            here = [cell for cell in wanted if cell.layers == layers]
            # Once more for runs whose checkpoint was damaged: from another one, or the start.
            while missing := [cell for cell in here if cell not in kept]:
                for share in _groups(folder.path, missing, depth.chunk):
                    kept |= trainer.train(depth, *share, stop)
    arrays = _arrays(cfg, wanted, kept)
    return _result(cfg, wanted, arrays, found), {"phase": arrays}


def _look_at_result(path: Path, say: Callable[..., None]) -> None:
    """Put a damaged phase.npz aside; it is made anew of runs/."""
    result = path / "phase.npz"
    if result.exists():
        try:
            with open(result, "rb") as opened, np.load(opened) as file:
                dict(file)
        except Exception as error:  # damaged archives raise errors of many types
            aside = _put_aside(path, result)
            say(f"{result}: cannot be read ({error}); moved to {aside}, made again of runs/")


def _put_aside(path: Path, damaged: Path) -> Path:
    folder = path / "damaged"
    folder.mkdir(exist_ok=True)
    return damaged.rename(folder / f"{len(list(folder.iterdir())):03d}-{damaged.name}")


def _kept(
    cfg: PhaseConfig, source: Path, cell: Cell, say: Callable[..., None], own: bool
) -> dict[str, np.ndarray] | None:
    """The arrays of a finished run, if a folder holds them whole."""
    path = source / "runs" / f"{cell.name}.npz"
    if not path.exists():
        return None
    tests = cfg.steps // cfg.eval_every
    try:
        with open(path, "rb") as opened, np.load(opened) as file:
            part = {name: file[name] for name in _ARRAYS}
        if [part[name].shape for name in _ARRAYS] != [(tests,), (tests, 4), (tests, 2)]:
            raise ValueError("its arrays have other shapes")
        if not all(np.issubdtype(x.dtype, np.floating) for x in part.values()):
            raise ValueError("its arrays are not of floats")
        if any(((x < 0) | (x > 1.0001)).any() for x in (part["accuracy_C4"], part["deciding_C2"])):
            raise ValueError("its accuracies are not between 0 and 1")  # NaN: it diverged
    except Exception as error:  # damaged archives raise errors of many types
        aside = f"moved to {_put_aside(source, path)}" if own else "left aside"
        say(f"{path}: {aside}, it cannot be read ({error}); this run is trained again")
        return None
    return part


def _groups(path: Path, missing: Sequence[Cell], chunk: int) -> Iterator[_Share]:
    """Runs to train together, at most `chunk`: first those of chunks that were begun."""
    left = list(missing)
    for begun in _begun(path):
        part = [cell for cell in begun.cells if cell in left]
        left = [cell for cell in left if cell not in part]
        yield from _shares(part, chunk, begun)
    yield from _shares(left, chunk, None)


def _shares(cells: list[Cell], chunk: int, begun: _Begun | None) -> Iterator[_Share]:
    """Equal ones, all filled up to the same size: they are one program."""
    shares = -(-len(cells) // chunk)
    for part in np.array_split(np.arange(len(cells)), shares) if shares else ():
        yield _Share([cells[at] for at in part], -(-len(cells) // shares), begun)


def _begun(path: Path) -> list[_Begun]:
    """The one with the latest checkpoint first: a run may be in several, of other chunks."""
    found = []
    for note in sorted((path / "checkpoints").glob("*/runs.json")):
        names = [one.name for one in note.parent.glob("latest/*")]
        steps = [int(m[1]) for name in names if (m := re.fullmatch(r"\d+-step-(\d+)", name))]
        if steps and (cells := _listed(note)):
            found.append((max(steps), _Begun(note.parent, cells)))
    return [begun for _, begun in sorted(found, key=lambda pair: -pair[0])]


def _listed(note: Path) -> list[Cell]:
    try:
        return [Cell(*values) for values in json.loads(note.read_text())]
    except (OSError, ValueError, TypeError):
        return []  # without its list a chunk is begun again


def _clean(path: Path) -> None:
    """Remove the checkpoints of chunks whose runs are all finished, asked for or not."""
    for note in sorted((path / "checkpoints").glob("*/runs.json")):
        files = [path / "runs" / f"{cell.name}.npz" for cell in _listed(note)]
        if files and all(file.exists() for file in files):
            shutil.rmtree(note.parent)


@functools.cache
def _advance() -> Callable[..., Any]:
    """`modgrok.phase.advance` with the state donated; made once, so compiled once a depth."""
    import jax

    from modgrok import phase

    static = ("plan", "num_steps", "together", "mesh", "axis")
    return jax.jit(phase.advance.__wrapped__, static_argnames=static, donate_argnums=0)


class _Trainer:
    """Trains chunks of runs, saves and reports them."""

    def __init__(
        self, cfg: PhaseConfig, folder: rundir.RunDir, say: Callable[..., None], runs: int
    ) -> None:
        self._cfg, self._folder, self._say, self._runs = cfg, folder, say, runs
        self._done = 0  # runs finished by this process
        self._tests = max((row["step"] for row in folder.history()), default=0)  # reports so far
        self._spent = 0.0  # seconds, compilation left out
        self._advanced = 0  # runs x tests that these seconds were for
        self._compiled: set[tuple[int, int]] = set()  # layers, slots

    def train(
        self, depth: _Depth, group: list[Cell], slots: int, begun: _Begun | None, stop: Any
    ) -> dict[Cell, Any]:
        """The arrays of every run of the group, which are also saved.

        Of no run if what was begun is damaged, or holds other runs than its list names; it is then
        put aside.
        """
        import jax

        from launch import parallel
        from launch.checkpoints import Checkpoints
        from modgrok import phase

        cfg, folder = self._cfg, self._folder
        mesh = parallel.make_mesh(cfg.devices)
        slots = -(-slots // mesh.size) * mesh.size  # copies of the last run fill them up
        fill = [*group, *group[-1:] * (slots - len(group))]
        keys_G, runs = stack(cfg, fill, depth.sizes)
        phase.check_batch(depth.plan, runs)
        place = parallel.rows(mesh) if mesh.size > 1 else mesh.devices.flat[0]
        spread = {"mesh": mesh, "axis": parallel.AXIS} if mesh.size > 1 else {}
        runs = jax.device_put(runs, place)

        real = len(group)
        names = [cell.name for cell in group]
        digest = hashlib.sha256(" ".join(names).encode()).hexdigest()[:12]
        path = folder.path / "checkpoints" / f"L{group[0].layers}-{digest}"
        source = begun or _Begun(path, group)
        keys_like = jax.ShapeDtypeStruct((len(source.cells),), keys_G.dtype)
        like = jax.eval_shape(functools.partial(phase.init, plan=depth.plan), keys_like)
        try:
            with Checkpoints(source.path) as store:
                restored = store.restore((like, _records(cfg, len(source.cells))))
        except UsageError as error:  # damaged, or not the state of as many runs
            aside = _put_aside(folder.path, source.path)
            text = "these runs go on from an earlier one, or begin again"
            print(f"{error}; moved to {aside}, {text}", file=sys.stderr)
            restored = None
        if begun and not restored:
            return {}
        with Checkpoints(path, keep=2) as store:
            start = restored.step if restored else 0
            if restored:
                at_G = np.array([source.cells.index(cell) for cell in fill])
                state, records = restored.state
                records = {name: x[at_G[:real]] for name, x in records.items()}
                state = jax.tree.map(lambda x: np.asarray(x)[at_G], state)
            else:
                state, records = phase.init(keys_G, plan=depth.plan), _records(cfg, real)
            path.mkdir(parents=True, exist_ok=True)
            folder.save_text(f"checkpoints/{path.name}/runs.json", json.dumps(group))
            state = jax.device_put(state, place)
            at = f"resuming at step {start}" if start else "compiling first"
            self._say(
                f"{real} runs of depth {group[0].layers} ({depth.plan.cfg.num_params:,} parameters "
                f"each) on {mesh.size} x {mesh.devices.flat[0].platform}; {at}"
            )
            for step in range(start + cfg.eval_every, cfg.steps + 1, cfg.eval_every):
                began = time.monotonic()
                state, record = _advance()(
                    state, runs, plan=depth.plan, num_steps=cfg.eval_every, **spread
                )
                record = jax.device_get(record)
                now = step // cfg.eval_every - 1
                for name, values in zip(("loss", "accuracy", "deciding"), record, strict=True):
                    records[name][:, now] = values[:real]
                seconds = time.monotonic() - began
                program_is = (group[0].layers, slots)
                fresh = program_is not in self._compiled  # then they include its compilation
                self._compiled.add(program_is)
                self._report(group[0].layers, step, records, None if fresh else seconds)
                signum = stop.poll()
                if step < cfg.steps and (step % cfg.checkpoint_every == 0 or signum is not None):
                    store.save(step, (jax.tree.map(lambda x: x[:real], state), records), {})
                if signum is not None and step < cfg.steps:
                    store.wait()
                    self._end(signum, f"at step {step} of {cfg.steps}")
        values = [records[name] for name in ("loss", "accuracy", "deciding")]
        done = {}
        for g, cell in enumerate(group):
            done[cell] = {name: x[g] for name, x in zip(_ARRAYS, values, strict=True)}
            folder.save_arrays(f"runs/{cell.name}", **done[cell])
        _clean(folder.path)
        self._done += real
        if (signum := stop.poll()) is not None and self._done < self._runs:
            self._end(signum, f"with {self._done} runs done")
        return done

    def _end(self, signum: int, where: str) -> None:
        from launch.loop import Interrupted

        error = Interrupted(signum, where)
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        raise SystemExit(error.status)

    def _report(
        self, layers: int, step: int, records: dict[str, np.ndarray], seconds: float | None
    ) -> None:
        cfg, (runs, at) = self._cfg, (len(records["loss"]), step // self._cfg.eval_every - 1)
        mean_4 = [_mean(column) for column in records["accuracy"][:, at].T]
        loss = _mean(records["loss"][:, at])
        self._tests += 1
        numbers = {f"accuracy_{name}": x for name, x in zip(_SETS, mean_4, strict=True)}
        row = {"layers": layers, "runs": runs, "steps": step, "loss": loss, **numbers}
        self._folder.scalars(self._tests, row)
        text = (
            f"depth {layers}  step {step}/{cfg.steps}  loss {loss:.3f}  mean of {runs} runs: seen "
            f"tasks {mean_4[0]:.2f} ({mean_4[1]:.2f} held-out inputs), unseen {mean_4[2]:.2f} "
            f"({mean_4[3]:.2f})"
        )
        if seconds is not None:
            self._spent += seconds
            self._advanced += runs
            here = self._runs - self._done - runs * step / cfg.steps
            left = here * cfg.steps / cfg.eval_every * self._spent / self._advanced
            text += f"  {left / 60:.1f} min left"
        self._say(text)


def _records(cfg: PhaseConfig, runs: int) -> dict[str, np.ndarray]:
    """Of tests that are to come."""
    sizes = {"loss": (), "accuracy": (4,), "deciding": (2,)}
    shape = (runs, cfg.steps // cfg.eval_every)
    return {name: np.full((*shape, *size), np.nan, np.float32) for name, size in sizes.items()}


def _mean(x_G: np.ndarray) -> float:
    """Of the runs that have not diverged."""
    return float(x_G[np.isfinite(x_G)].mean()) if np.isfinite(x_G).any() else float("nan")


def _arrays(
    cfg: PhaseConfig, wanted: Sequence[Cell], kept: dict[Cell, dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    from modgrok import phase

    step_C = np.arange(cfg.eval_every, cfg.steps + 1, cfg.eval_every)
    loss_GC, accuracy_GC4, deciding_GC2 = (
        np.stack([kept[cell][name] for cell in wanted]) for name in _ARRAYS
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

    rows = [
        {
            **cell._asdict(),
            "best_step": int(x["best_step_G"][g]),
            **{f"best_{name}": float(v) for name, v in zip(_SETS, x["best_G4"][g], strict=True)},
            **{f"last_{name}": float(v) for name, v in zip(_SETS, x["last_G4"][g], strict=True)},
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


def main(cfg: PhaseConfig) -> int:
    return program.main(_PROGRAM, cfg)


def cli() -> None:
    program.cli(_PROGRAM, PhaseConfig, PRESETS, __doc__)


if __name__ == "__main__":
    cli()

"""Trains the runs of a phase diagram by chunks: one program a chunk, saved on its way."""

import functools
import hashlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from launch import UsageError, parallel, rundir
from launch import modgrok_phase_folder as phase_folder
from launch.checkpoints import Checkpoints, Restored
from launch.loop import Interrupted, StopRequest
from launch.modgrok_phase_config import PROGRAM, Cell, PhaseConfig, stack
from launch.modgrok_phase_folder import ARRAYS, Begun, Share
from modgrok import phase
from modgrok.evaluation import SETS

_RECORDS = ("loss", "accuracy", "deciding")  # as a checkpoint names ARRAYS


class Depth(NamedTuple):
    """The runs of one depth: what compiles them, and how many go together."""

    plan: phase.Plan
    sizes: tuple[int, int, int, int]
    chunk: int


@functools.cache
def _advance() -> Callable[..., Any]:
    """`modgrok.phase.advance` with the state donated; made once, so compiled once a depth."""
    static = ("plan", "num_steps", "together", "mesh", "axis")
    return jax.jit(phase.advance.__wrapped__, static_argnames=static, donate_argnums=0)


class Trainer:
    """Trains shares of a diagram, saves and reports them; `num_runs` are to be trained in all."""

    def __init__(
        self, cfg: PhaseConfig, folder: rundir.RunDir, say: Callable[..., None], num_runs: int
    ) -> None:
        self._cfg, self._folder, self._say, self._num_runs = cfg, folder, say, num_runs
        self._mesh = parallel.make_mesh(cfg.devices)
        self._done = 0  # runs finished by this process
        self._tests = max((row["step"] for row in folder.history()), default=0)  # reports so far
        self._spent = 0.0  # seconds, compilation left out
        self._advanced = 0  # runs x tests that these seconds were for
        self._compiled: set[tuple[int, int]] = set()  # layers, slots

    def train(
        self, depth: Depth, share: Share, stop: StopRequest
    ) -> dict[Cell, dict[str, np.ndarray]]:
        """The arrays of every run of the share, which are also saved.

        Of no run if what was begun is damaged, or holds other runs than its list names; it is then
        put aside.

        Raises: SystemExit, with the state saved, if a signal came and there is more to do.
        """
        cfg, cells = self._cfg, share.cells
        digest = hashlib.sha256(" ".join(cell.name for cell in cells).encode()).hexdigest()[:12]
        path = self._folder.path / "checkpoints" / f"L{cells[0].layers}-{digest}"
        source = share.begun or Begun(path, cells)
        restored = self._restored(depth.plan, source)
        if share.begun and not restored:
            return {}
        slots = -(-share.slots // self._mesh.size) * self._mesh.size
        fill = [*cells, *cells[-1:] * (slots - len(cells))]  # copies of the last run fill them up
        start, state, records, runs = self._started(depth, cells, fill, source, restored)
        on_mesh = {"mesh": self._mesh, "axis": parallel.AXIS} if self._mesh.size > 1 else {}
        with Checkpoints(path, keep=2) as store:
            path.mkdir(parents=True, exist_ok=True)
            self._folder.save_text(f"checkpoints/{path.name}/runs.json", json.dumps(cells))
            self._greet(depth.plan, cells, start)
            for step in range(start + cfg.eval_every, cfg.steps + 1, cfg.eval_every):
                began = time.monotonic()
                state, record = _advance()(
                    state, runs, plan=depth.plan, num_steps=cfg.eval_every, **on_mesh
                )
                for name, x in zip(_RECORDS, jax.device_get(record), strict=True):
                    records[name][:, step // cfg.eval_every - 1] = x[: len(cells)]
                seconds = self._timed(cells[0].layers, slots, time.monotonic() - began)
                self._report(cells[0].layers, step, records, seconds)
                signum = stop.poll()
                if step < cfg.steps and (step % cfg.checkpoint_every == 0 or signum is not None):
                    ours = jax.tree.map(lambda x: x[: len(cells)], state)
                    store.save(step, (ours, records), {"runs": [cell.name for cell in cells]})
                if signum is not None and step < cfg.steps:
                    store.wait()
                    self._end(signum, f"at step {step} of {cfg.steps}")
        return self._finished(cells, records, stop)

    def _restored(self, plan: phase.Plan, source: Begun) -> Restored | None:
        """What was saved of these runs; put aside, with a sentence, if it cannot be used."""
        num_runs = len(source.cells)
        keys = jax.ShapeDtypeStruct((num_runs,), jax.random.key(0).dtype)
        like = jax.eval_shape(functools.partial(phase.init, plan=plan), keys)
        try:
            with Checkpoints(source.path) as store:
                restored = store.restore((like, _records_to_come(self._cfg, num_runs)))
            names = [cell.name for cell in source.cells]  # old versions did not save them
            if restored and restored.meta.get("runs", names) != names:
                raise UsageError(f"{source.path}: its list of runs is not that of its checkpoint")
            return restored
        except UsageError as error:  # damaged, or not the state of as many runs
            aside = phase_folder.put_aside(self._folder.path, source.path)
            text = "these runs go on from an earlier one, or begin again"
            print(f"{error}; moved to {aside}, {text}", file=sys.stderr)
            return None

    def _started(
        self,
        depth: Depth,
        cells: list[Cell],
        fill: list[Cell],
        source: Begun,
        restored: Restored | None,
    ) -> tuple[int, Any, dict[str, np.ndarray], phase.Runs]:
        """(step, state, records, runs): records of `cells`, the others of `fill`, on devices."""
        keys_G, runs = stack(self._cfg, fill, depth.sizes)
        phase.check_batch(depth.plan, runs)
        if restored:
            start, (state, records) = restored.step, restored.state
            at_G = np.array([source.cells.index(cell) for cell in fill])
            records = {name: x[at_G[: len(cells)]] for name, x in records.items()}
            state = jax.tree.map(lambda x: np.asarray(x)[at_G], state)
        else:
            start, state = 0, phase.init(keys_G, plan=depth.plan)
            records = _records_to_come(self._cfg, len(cells))
        mesh = self._mesh
        place = parallel.rows(mesh) if mesh.size > 1 else mesh.devices.flat[0]
        return start, jax.device_put(state, place), records, jax.device_put(runs, place)

    def _finished(
        self, cells: list[Cell], records: dict[str, np.ndarray], stop: StopRequest
    ) -> dict[Cell, dict[str, np.ndarray]]:
        """The arrays of each run, saved; their checkpoints go."""
        done = {}
        for g, cell in enumerate(cells):
            done[cell] = {
                name: records[record][g] for name, record in zip(ARRAYS, _RECORDS, strict=True)
            }
            phase_folder.save_run(self._folder, cell, done[cell])
        phase_folder.remove_finished(self._folder.path)
        self._done += len(cells)
        if (signum := stop.poll()) is not None and self._done < self._num_runs:
            self._end(signum, f"with {self._done} runs done")
        return done

    def _greet(self, plan: phase.Plan, cells: list[Cell], start: int) -> None:
        mesh = self._mesh
        runs = "1 run" if len(cells) == 1 else f"{len(cells)} runs"
        self._say(
            f"{runs} of depth {cells[0].layers} ({plan.cfg.num_params:,} parameters "
            f"each) on {mesh.size} x {mesh.devices.flat[0].platform}; "
            + (f"resuming at step {start}" if start else "compiling first")
        )

    def _timed(self, layers: int, slots: int, seconds: float) -> float | None:
        """None of the first call of a program, which includes its compilation."""
        fresh = (layers, slots) not in self._compiled
        self._compiled.add((layers, slots))
        return None if fresh else seconds

    def _end(self, signum: int, where: str) -> None:
        error = Interrupted(signum, where)
        print(f"{PROGRAM}: {error} (--workdir={self._folder.path})", file=sys.stderr)
        raise SystemExit(error.status)

    def _report(
        self, layers: int, step: int, records: dict[str, np.ndarray], seconds: float | None
    ) -> None:
        cfg, (runs, at) = self._cfg, (len(records["loss"]), step // self._cfg.eval_every - 1)
        mean_4 = [_mean(column) for column in records["accuracy"][:, at].T]
        loss = _mean(records["loss"][:, at])
        self._tests += 1
        numbers = {f"accuracy_{name}": x for name, x in zip(SETS, mean_4, strict=True)}
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
            here = self._num_runs - self._done - runs * step / cfg.steps
            left = here * cfg.steps / cfg.eval_every * self._spent / self._advanced
            text += f"  {left / 60:.1f} min left"
        self._say(text)


def _records_to_come(cfg: PhaseConfig, num_runs: int) -> dict[str, np.ndarray]:
    sizes = dict(zip(_RECORDS, ((), (4,), (2,)), strict=True))
    shape = (num_runs, cfg.steps // cfg.eval_every)
    return {name: np.full((*shape, *size), np.nan, np.float32) for name, size in sizes.items()}


def _mean(x_G: np.ndarray) -> float:
    """Of the runs that have not diverged."""
    return float(x_G[np.isfinite(x_G)].mean()) if np.isfinite(x_G).any() else float("nan")

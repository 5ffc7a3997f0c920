"""Checkpoints of a run: the latest few and the best one, on orbax.

    latest/000007-step-1400   numbered in the order written, so that a run that went back to an
    best/000003-step-1200     earlier step, or meets one again, is never in its own way
    damaged/                  what could not be restored, put aside

A state is any pytree of arrays, typed random keys and Python numbers, the same on every device.
`save` copies it to host memory and returns; one thread of process 0 writes it, under a temporary
name until complete. Process 0 also reads, and gives what it read to the others, so neither device
nor process count need be those of the run that saved.

Orbax restores altered bytes and casts dtypes without a word. Each checkpoint therefore carries its
leaves' names, dtypes and shapes and a SHA-256 digest, which `restore` holds it to.
"""

import gc
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from launch import UsageError, hoststate, rundir

Slot = Literal["latest", "best"]


class DamagedError(UsageError):
    """There are checkpoints, and none of them can be restored."""


class Restored(NamedTuple):
    step: int
    state: Any  # the structure asked for, with host arrays
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints in `directory`, which the first save creates; `keep` of the latest stay.

    Every process calls every method; only process 0 touches the directory.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 3) -> None:
        self._directory = Path(directory).absolute()
        self._keep = {"latest": keep, "best": 1}
        self._writer = jax.process_index() == 0
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._pending: list[Future[None]] = []
        self._orbax = _make_orbax()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Save as the latest; `state` may be donated as soon as this returns. `meta` is JSON.

        Checkpoints of this step and later ones are superseded: they go once this one is on disk.
        """
        self._save("latest", step, state, meta)

    def save_best(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Save as the best, in place of the one before."""
        self._save("best", step, state, meta)

    def _save(self, slot: Slot, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        if not self._writer:
            return
        self._settle(1)  # at most one copy waits behind the one that is being written
        meta = json.loads(json.dumps(meta))
        header = {"step": int(step), "meta": meta, "leaves": hoststate.describe(state)}
        arrays = hoststate.copy(state)
        self._pending.append(self._thread.submit(self._write, slot, header, arrays))

    def _write(self, slot: Slot, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        folder, step = self._directory / slot, header["step"]
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if path.suffix == ".old" or ".orbax-checkpoint-tmp" in path.name:
                shutil.rmtree(path)  # left by a process that was killed
        older = _entries(folder)
        number = 1 + max((entry.number for entry in older), default=0)
        self._orbax.save(
            folder / f"{number:06d}-step-{step}",
            args=ocp.args.Composite(
                header=ocp.args.JsonSave({**header, "sha256": _digest(header, arrays)}),
                # Orbax refuses empty arrays; the header has all that there is to know about them.
                state=ocp.args.PyTreeSave({name: a for name, a in arrays.items() if a.size}),
            ),
        )
        earlier = [entry for entry in reversed(older) if entry.step < step]
        for entry in set(older) - set(earlier[: self._keep[slot] - 1]):
            # First the name, then the files: a kill must not leave half a checkpoint under it.
            shutil.rmtree(entry.path.rename(entry.path.with_suffix(".old")))

    def restore(
        self, like: Any, *, which: Slot = "latest", dispensable: bool = False
    ) -> Restored | None:
        """The newest sound checkpoint, or None if there are none at all.

        `like` gives structure, shapes and dtypes; its leaves may be abstract. Newer checkpoints
        that are damaged are put aside, with a sentence on stderr; with `dispensable` all of
        them, where none is sound, and the answer is None.

        Raises: DamagedError if all are damaged and not `dispensable`; UsageError if the state is
            not one like `like`.
        """
        self.wait()
        header: dict[str, Any] | None = None
        arrays: dict[str, np.ndarray] = {}
        if self._writer:
            try:
                header, arrays = self._newest_sound(which, dispensable)
            except (DamagedError, OSError) as error:  # to be raised on every process
                header = {"error": str(error)}
        header = json.loads(hoststate.from_process_0(json.dumps(header).encode()))
        if header is None:
            return None
        if "error" in header:
            raise DamagedError(header["error"])
        if differ := hoststate.differences(header["leaves"], hoststate.describe(like)):
            raise UsageError(
                f"{self._directory}: the checkpoint of step {header['step']} holds a state unlike "
                f"this run's: {differ}; expected the same names, shapes and dtypes"
            )
        state = hoststate.rebuild(like, header["leaves"], arrays)
        return Restored(header["step"], state, header["meta"])

    def _newest_sound(
        self, slot: Slot, dispensable: bool
    ) -> tuple[dict[str, Any] | None, dict[str, np.ndarray]]:
        damaged: list[tuple[_Entry, str]] = []
        for entry in reversed(_entries(self._directory / slot)):
            try:
                header, arrays = self._read(entry.path)
            except Exception as error:  # whatever is wrong with it, an older one may do
                damaged.append((entry, _short(error)))
                continue
            self._set_aside(slot, damaged, f"falling back to step {entry.step}")
            return header, arrays
        if damaged and dispensable:
            self._set_aside(slot, damaged, f"there is no {slot} one now")
        elif damaged:
            reasons = "; ".join(f"step {entry.step}: {reason}" for entry, reason in damaged)
            raise DamagedError(
                f"{self._directory / slot}: every checkpoint is damaged ({reasons}); expected a "
                "sound one: bring back a copy, or start again in another folder"
            )
        return None, {}

    def _set_aside(self, slot: Slot, damaged: list[tuple["_Entry", str]], then: str) -> None:
        for entry, reason in damaged:
            aside = rundir.put_aside(entry.path, self._directory / "damaged" / slot)
            print(
                f"checkpoint of step {entry.step} is damaged ({reason}); moved it to {aside}, "
                f"{then}",
                file=sys.stderr,
            )

    def _read(self, path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        if not any(path.iterdir()):
            raise ValueError("the folder is empty")
        stored = self._load(path)
        header, arrays = stored["header"], dict(stored["state"])
        for name, leaf in header["leaves"].items():
            if 0 in leaf["shape"]:
                arrays[name] = np.zeros(leaf["shape"], jnp.dtype(leaf["dtype"]))
        if header["sha256"] != _digest(header, arrays):
            raise ValueError("its bytes are not those that were saved")
        return header, arrays

    def _load(self, path: Path) -> Any:
        """What orbax reads, or ValueError with its reason.

        At the first unreadable leaf orbax closes its event loop; the reads of the others then
        complain on stderr, pages long. Wait for them, unheard.
        """
        args = ocp.args.Composite(header=ocp.args.JsonRestore(), state=ocp.args.PyTreeRestore())
        hook, log = sys.unraisablehook, logging.getLogger("asyncio")
        sys.unraisablehook, log.disabled = lambda late: None, True
        try:
            try:
                return self._orbax.restore(path, args=args)
            except Exception as error:  # orbax has no narrower class for what it cannot read
                reason = f"{type(error).__name__}: {error}"
            time.sleep(0.1)
            gc.collect()
        finally:
            sys.unraisablehook, log.disabled = hook, False
        raise ValueError(reason)

    def _settle(self, limit: int) -> None:
        """Wait until at most `limit` writes are under way; raises what a write raised."""
        while len(self._pending) > limit:
            self._pending.pop(0).result()

    def wait(self) -> None:
        """Return when everything saved is on disk."""
        self._settle(0)

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._orbax.close()


class _Entry(NamedTuple):
    number: int
    step: int
    path: Path


def _entries(folder: Path) -> list[_Entry]:
    """Complete checkpoints in `folder`, in the order written."""
    paths = folder.iterdir() if folder.exists() else ()
    found = [(re.fullmatch(r"(\d+)-step-(\d+)", path.name), path) for path in paths]
    return sorted(_Entry(int(m[1]), int(m[2]), path) for m, path in found if m)


def _short(error: Exception) -> str:
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:200]


def _digest(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    about = {key: header[key] for key in ("step", "meta", "leaves")}
    return hoststate.digest(json.dumps(about, sort_keys=True), arrays)


def _make_orbax() -> ocp.Checkpointer:
    """A checkpointer that only process 0 takes part in."""
    alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
        # Trained weights hardly compress, and trying takes the cores that a CPU run trains on.
        state=ocp.PyTreeCheckpointHandler(multiprocessing_options=alone, use_compression=False),
        header=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
    )
    return ocp.Checkpointer(handler, multiprocessing_options=alone)

"""The folder of a run: what was asked for, what was measured, what was drawn.

    config.json     every setting, complete     run.flags       the same, to run again
    metrics.jsonl   one line a report           events.out.*    the same, for TensorBoard
    figures/*.png   *.npz                       checkpoints/    (written by `launch.checkpoints`)

`check` refuses a folder before anything is written, `hold` keeps other processes out of it, and
`RunDir` writes, on one process only. Files appear whole or not at all, so a run may be killed at
any moment.
"""

import fcntl
import functools
import json
import math
import os
import re
import sys
import tempfile
import time
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from launch import UsageError, flags

CONFIG, METRICS = "config.json", "metrics.jsonl"


def default_path(program: str) -> Path:
    """A folder under runs/ that does not exist yet, named by program and time."""
    stem = Path("runs") / f"{program}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, count = stem, 1
    while path.exists():
        count += 1
        path = stem.with_name(f"{stem.name}-{count}")
    return path


def new_folder(program: str) -> Path:
    """A fresh folder under runs/, made at once: two runs may start in the same second."""
    while True:
        path = default_path(program)
        with suppress(FileExistsError):
            path.mkdir(parents=True)
            return path


def check(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    *,
    program: str,
    free: Collection[str] = (),
    later: Mapping[str, Any] = types.MappingProxyType({}),
) -> bool:
    """Whether a run with `config` in `path` continues an earlier one; UsageError if it must not.

    Settings named in `free` may differ from the earlier run's; those that it did not know yet have
    their value in `later`. Writes nothing.
    """
    text = os.fspath(path)
    if not text or re.match(r"[A-Za-z][\w+.-]+:/", text):
        raise UsageError(
            f"--workdir={text}: expected a folder of this machine (remote storage has to be "
            "mounted: give the path of the mount)"
        )
    try:
        existing = next(p for p in (Path(text), *Path(text).absolute().parents) if _exists(p))
        if not existing.is_dir():
            raise NotADirectoryError(0, "Not a directory")
        # Mode bits say nothing to root, and nothing about /proc or a read-only disk. A temporary
        # file that never gets a name tells, and leaves no trace.
        with tempfile.TemporaryFile(dir=existing):
            names = set(os.listdir(text)) if _exists(Path(text)) else set()
    except OSError as error:
        raise UsageError(
            f"--workdir={text}: {error.strerror}; expected a folder that can be written"
        ) from error
    if not names - {CONFIG + ".tmp"}:  # what a run killed in its first moment leaves
        return False
    if CONFIG not in names:
        raise UsageError(
            f"--workdir={text}: holds files but no {CONFIG}; expected a new or empty folder, "
            "or one that an earlier run made"
        )
    check_settings(text, config, program=program, free=free, later=later)
    return True


def _exists(path: Path) -> bool:
    """Like Path.exists, but a name under a file, or too long a one, stays an error."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def hold(path: str | os.PathLike[str]) -> Iterator[None]:
    """Make the folder and keep other processes from writing there; UsageError if one does.

    The hold ends with the process, however that ends. On a file system without locks nobody is
    kept out.
    """
    Path(path).mkdir(parents=True, exist_ok=True)
    folder = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"--workdir={path}: another process is writing there; expected its end, or another "
                "folder"
            ) from None
        except OSError:
            pass
        yield
    finally:
        os.close(folder)


def check_settings(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    *,
    program: str,
    free: Collection[str] = (),
    later: Mapping[str, Any] = types.MappingProxyType({}),
) -> None:
    """UsageError unless a run of `program` with `config` made the folder, which is only read.

    `free` and `later` as in `check`.
    """
    config = plain(config)
    try:
        stored = {**plain(later), **json.loads((Path(path) / CONFIG).read_text())}
        owner = stored.pop("program")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UsageError(
            f"--workdir={path}: its {CONFIG} cannot be read ({error}); repair it or choose "
            "another folder"
        ) from error
    if owner != program:
        raise UsageError(f"--workdir={path}: belongs to {owner}; expected a folder of {program}")
    differ = [
        f"{key} is {_shown(stored, key)} there and {_shown(config, key)} here"
        for key in sorted(stored.keys() | config.keys())
        if key not in free and _shown(stored, key) != _shown(config, key)
    ]
    if differ:
        raise UsageError(
            f"--workdir={path}: holds a run with other settings: {', '.join(differ)}; "
            "give the same settings to continue it, or choose another folder"
        )


def _shown(config: Mapping[str, Any], key: str) -> str:
    return json.dumps(config[key], sort_keys=True) if key in config else "absent"


def plain(value: Any, digits: int | None = None) -> Any:
    """`value` as strict JSON has it: no arrays, tuples or paths, null for NaN and infinity.

    With `digits`, floats are rounded to so many significant ones.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, digits) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return value if digits is None else float(f"{value:.{digits}g}")
    array = np.asarray(value)
    exact = array if array.dtype.kind in "biu" else array.astype(np.float64)
    return plain(exact.tolist(), digits)


def table(
    head: Sequence[str], rows: Sequence[Sequence[Any]], cell: Callable[..., str] = str
) -> str:
    """A Markdown table; `cell` makes text of what is in a row."""
    lines = [head, ["---"] * len(head), *(map(cell, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def speaker(quiet: bool) -> Callable[..., None]:
    """say(text), which prints a line on stderr at once, or nothing if `quiet`."""
    return (lambda *_: None) if quiet else functools.partial(print, file=sys.stderr, flush=True)


def can_draw(say: Callable[..., None]) -> bool:
    """Whether matplotlib is there; if not, `say` tells what brings it."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        say("no figures: matplotlib is missing; pip install 'deeper[figures]' brings it")
        return False
    return True


def summary_line(result: Mapping[str, Any]) -> None:
    """Print `result` as one line of JSON on stdout: the last words of a program."""
    print(json.dumps(plain(result), allow_nan=False), flush=True)


class Unreadable(Exception):
    """A file of arrays is not there, or is damaged; the text says why."""


def read_arrays(
    path: str | os.PathLike[str], names: Collection[str] | None = None
) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, all of them or those of `names`.

    Raises: Unreadable, whatever is wrong with the file.
    """
    try:
        with open(path, "rb") as opened, np.load(opened) as file:
            return {name: file[name] for name in (file.files if names is None else names)}
    except Exception as error:  # damaged archives raise errors of many types
        raise Unreadable(str(error)) from error


def put_aside(path: Path, folder: Path) -> Path:
    """Move what is damaged into `folder`, under a number that nothing there has; its new path."""
    folder.mkdir(parents=True, exist_ok=True)
    found = (re.match(r"(\d+)-", other.name) for other in folder.iterdir())
    number = 1 + max((int(m[1]) for m in found if m), default=-1)
    return path.rename(folder / f"{number:03d}-{path.name}")


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """Write a file that appears under its name when complete."""
    part = path.with_name(path.name + ".tmp")
    with open(part, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())  # else a power cut may keep the new name and lose the content
    os.replace(part, path)


@contextmanager
def _absent(package: str) -> Iterator[None]:
    """Let imports do without a package, unless it has been imported before."""
    hidden = package not in sys.modules
    if hidden:
        sys.modules[package] = None
    try:
        yield
    finally:
        if hidden:
            del sys.modules[package]


class RunDir:
    """Writes a run's folder; with `writer=False` (every process but one) it does nothing.

    `config` is the whole configuration (`dataclasses.asdict`), one entry for each flag.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: Mapping[str, Any],
        *,
        program: str,
        writer: bool = True,
    ) -> None:
        self.path = Path(path)
        self._writer = writer
        self._events: Any = None
        self._purge_step: int | None = None
        self._flush_at = 0.0
        if not writer:
            return
        flagfile = f"# {program}\n{flags.to_flagfile(config)}"
        self.path.mkdir(parents=True, exist_ok=True)
        with _whole(self.path / CONFIG) as file:
            text = json.dumps({"program": program, **plain(config)}, indent=2, allow_nan=False)
            file.write(text.encode() + b"\n")
        with _whole(self.path / "run.flags") as file:
            file.write(flagfile.encode())
        self._keep(math.inf)

    def __enter__(self) -> "RunDir":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Report numbers (in metrics.jsonl also lists of them) at `step`.

        The line is written at return, the event within a second of reports. Report a step before
        saving its checkpoint: a run that resumes from it reports later ones only.
        """
        if not self._writer:
            return
        numbers = plain(values)
        with open(self.path / METRICS, "ab") as file:
            file.write(json.dumps({"step": int(step), **numbers}).encode() + b"\n")
        single = {name: x for name, x in numbers.items() if isinstance(x, int | float)}
        self._write_event(step, single)

    def _write_event(self, step: int, numbers: Mapping[str, float]) -> None:
        # Below SummaryWriter, whose queue and thread make a flush no promise.
        with _absent("torch"):  # which it would import where it can: two seconds, for nothing
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog
            from tensorboardX.proto.summary_pb2 import Summary

        if self._events is None:
            self._events = EventsWriter(str(self.path / "events"), f".{time.time_ns()}")
            if self._purge_step is not None:
                # Makes TensorBoard drop what an earlier, longer life of the run wrote.
                start = SessionLog(status=SessionLog.START)
                self._events.write_event(Event(step=self._purge_step, session_log=start))
        values = [Summary.Value(tag=name, simple_value=x) for name, x in numbers.items()]
        now, summary = time.time(), Summary(value=values)
        self._events.write_event(Event(wall_time=now, step=step, summary=summary))
        if now >= self._flush_at:  # syncs the disk, some milliseconds
            self._events.flush()
            self._flush_at = now + 1

    def truncate(self, step: int) -> None:
        """Forget reports after `step`, the one resumed from (-1: all of them)."""
        if not self._writer:
            return
        self._keep(step)
        self._purge_step = step + 1
        self.close()

    def _keep(self, step: float) -> None:
        """Rewrite metrics.jsonl without later steps and without a line that a kill tore."""
        lines = [json.dumps(line).encode() for line in self.history() if line["step"] <= step]
        with _whole(self.path / METRICS) as file:
            file.write(b"".join(line + b"\n" for line in lines))

    def history(self) -> list[dict[str, Any]]:
        """Everything reported so far, oldest first."""
        path, rows = self.path / METRICS, []
        for line in path.read_bytes().splitlines() if self._writer and path.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and "step" in row:
                rows.append(row)
        return rows

    def save_figure(self, name: str, figure: Any) -> None:
        """Write a matplotlib figure to figures/name.png."""
        if self._writer:
            (self.path / "figures").mkdir(exist_ok=True)
            with _whole(self.path / "figures" / f"{name}.png") as file:
                figure.savefig(file, format="png")

    def save_arrays(self, name: str, **arrays: Any) -> None:
        """Write arrays to name.npz."""
        if self._writer:
            with _whole(self.path / f"{name}.npz") as file:
                np.savez(file, **arrays)

    def save_text(self, name: str, text: str) -> None:
        """Write a text file of that name."""
        if self._writer:
            with _whole(self.path / name) as file:
                file.write(text.encode())

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None

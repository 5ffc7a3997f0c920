"""A program that computes a result and ends: the flags of a run, its folder, files and last line.

A program gives three functions: `prepare` reads and checks the input, `work` computes the result
and the arrays to keep, `draw` makes figures of those arrays. `run` calls them in this order, writes
nothing before the input is known to be good, and gives a finished folder's result again.

Importing this needs no jax, so that --help and a wrong flag answer at once.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np

from launch import UsageError, flags, rundir
from launch.flags import field

Arrays = Mapping[str, Mapping[str, Any]]  # of each file NAME.npz
# What may differ when the same folder is given again; the numbers do not depend on it.
FREE = (
    "workdir",
    "quiet",
    "figures",
    "compilation_cache",
    "platform_devices",
    "parallel",
    "devices",
)


def default_cache() -> str:
    """A folder of this user's, for compiled programs."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(root, "deeper", "xla")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The settings that every program has."""

    workdir: str = field("", "folder of the run; empty: a new dated one in runs/", group="Run")
    seed: int = field(0, "seed of everything that is random", min=0, max=2**31 - 1)
    quiet: bool = field(False, "no progress on stderr")
    figures: bool = field(True, "draw figures at the end (needs matplotlib)")
    compilation_cache: str = field(default_cache(), "folder of compiled programs; empty: none")
    platform_devices: int = field(0, "simulate this many CPU devices; 0: no", min=0, max=512)
    parallel: Literal["jit"] = field("jit", "how devices share the work: as the compiler decides")


@dataclasses.dataclass(frozen=True)
class SpreadConfig(RunConfig):
    """Of programs that spread their work over devices."""

    devices: int = field(0, "devices to spread the work over; 0: all", min=0)


class Program(NamedTuple):
    """A program: its name, the files it reads, and the three functions described above.

    `status` says what to exit with, and why on stderr, once the result is printed; `free` names
    further flags on which the numbers do not depend. Without `again` a finished folder goes
    through `work` again, which takes what is there and does what is new; what was reported stays.
    `figures` is a pattern of names: such figures go when those drawn now are others.
    """

    name: str
    inputs: Callable[[Any], Iterable[Path]]
    prepare: Callable[[Any, Callable[..., None]], Any]
    work: Callable[[Any, Any, rundir.RunDir, Callable[..., None]], tuple[dict[str, Any], Arrays]]
    draw: Callable[[Arrays], Mapping[str, Any]]
    status: Callable[[Any, dict[str, Any]], int] = lambda cfg, result: 0
    free: tuple[str, ...] = ()
    again: bool = True
    figures: str = ""


def main(program: Program, cfg: RunConfig) -> int:
    """Run, or give the result of the finished run in the same folder again."""
    began = time.monotonic()
    settings = dataclasses.asdict(cfg)
    flags.to_flagfile(settings)  # refuses what could not be written down
    path, free = cfg.workdir or rundir.default_path(program.name), (*FREE, *program.free)
    known = rundir.check(path, settings, program=program.name, free=free)
    say = rundir.speaker(cfg.quiet)
    row = _finished_row(Path(cfg.workdir)) if known and program.again else None
    if row:
        result = _again(program, cfg, row)
        say(f"{cfg.workdir}: holds this run, finished; its result again")
    else:
        result = _anew(program, cfg, say)
    workdir = result.pop("workdir")
    head = {"program": program.name, "workdir": workdir, "seconds": time.monotonic() - began}
    rundir.summary_line({**head, **result})
    return program.status(cfg, result)


def _anew(program: Program, cfg: RunConfig, say: Callable[..., None]) -> dict[str, Any]:
    # LAPACK's threads wait by spinning on the cores that XLA wants. jax, imported here, loads it.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from launch import parallel

    parallel.start(platform_devices=cfg.platform_devices, compilation_cache=cfg.compilation_cache)
    if isinstance(cfg, SpreadConfig):
        parallel.make_mesh(cfg.devices)  # refuses what is not there
    # Before they are read: what replaces them meanwhile is not what the result is of.
    read = digest(program.inputs(cfg))
    problem = program.prepare(cfg, say)
    workdir = cfg.workdir or str(rundir.new_folder(program.name))
    saved = {**dataclasses.asdict(cfg), "workdir": workdir}
    with (
        _named(workdir),
        rundir.hold(workdir),
        rundir.RunDir(workdir, saved, program=program.name) as folder,
    ):
        if program.again:
            folder.truncate(-1)
        result, arrays = program.work(cfg, problem, folder, say)
        for name, values in arrays.items():
            folder.save_arrays(name, **values)
        if cfg.figures:
            _draw(program, folder, arrays, say)
        steps = 1 + max((row["step"] for row in folder.history()), default=-1)
        last = {"files": list(arrays), "input": read, "finished": True}
        folder.scalars(steps, {**result, **last})
    say(f"files and figures: {workdir}")
    return {"workdir": workdir, **result}


@contextlib.contextmanager
def _named(workdir: str) -> Iterator[None]:
    """Ctrl-C names the folder, which a command without --workdir would not find again."""
    try:
        yield
    except KeyboardInterrupt:
        text = f"; the same command with --workdir={workdir} takes it up again"
        raise KeyboardInterrupt(text) from None


def _again(program: Program, cfg: RunConfig, row: dict[str, Any]) -> dict[str, Any]:
    """The result of a finished run; figures are drawn if they were not."""
    path = Path(cfg.workdir)
    if row.pop("input", None) != digest(program.inputs(cfg)):
        raise UsageError(
            f"--workdir={cfg.workdir}: holds a run whose input files have changed since, or are "
            "gone; expected the same files, or another folder"
        )
    files = row.pop("files", [])
    for name in files:
        _load(cfg, name, ())  # opened alone: the result is not given without its arrays
    if cfg.figures and not (path / "figures").is_dir():
        saved = dataclasses.asdict(cfg)
        with rundir.hold(path), rundir.RunDir(path, saved, program=program.name) as folder:
            _draw(program, folder, {name: _load(cfg, name) for name in files}, lambda *_: None)
    return {"workdir": cfg.workdir, **row}


def _finished_row(path: Path) -> dict[str, Any] | None:
    """The last report of a run that ended, without writing anything."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        row = json.loads((path / rundir.METRICS).read_bytes().splitlines()[-1])
        if isinstance(row, dict) and row.pop("finished", False):
            row.pop("step")
            return row
    return None


def _load(cfg: RunConfig, name: str, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    path = Path(cfg.workdir) / f"{name}.npz"
    try:
        return rundir.read_arrays(path, names)
    except rundir.Unreadable as error:
        raise UsageError(
            f"--workdir={cfg.workdir}: {path.name} cannot be read ({error}); expected the file "
            "that the run wrote, or another folder"
        ) from error


def merged(
    cfg: RunConfig, text: str, *, program: str, free: Collection[str], what: str
) -> list[Path]:
    """The folders that --merge names, by commas; UsageError if one is not `what`, with `cfg`.

    `free` names flags of the program on which its kept results do not depend.
    """
    folders = [Path(part.strip()) for part in text.split(",") if part.strip()]
    for folder in folders:
        if not os.path.isfile(folder / rundir.CONFIG):  # of Path it raises, say, of long names
            raise UsageError(
                f"--merge={folder}: expected the folder of {what}, with {rundir.CONFIG}"
            )
        settings = dataclasses.asdict(cfg)
        try:
            rundir.check_settings(folder, settings, program=program, free=(*FREE, *free))
        except UsageError as error:
            raise UsageError(str(error).replace("--workdir=", "--merge=", 1)) from error
    return folders


def digest(paths: Iterable[Path]) -> str:
    """Of the content of files; one that cannot be read counts as such."""
    sha = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb") as file:
                sha.update(hashlib.file_digest(file, "sha256").digest())
        except OSError:
            sha.update(b"none")
    return sha.hexdigest()


def _draw(
    program: Program, folder: rundir.RunDir, arrays: Arrays, say: Callable[..., None]
) -> None:
    if not rundir.can_draw(say):
        return
    drawn = program.draw(arrays)
    for name, figure in drawn.items():
        folder.save_figure(name, figure)
    for path in sorted((folder.path / "figures").glob("*.png")):
        if path.stem not in drawn and re.fullmatch(program.figures, path.stem):
            path.unlink()


def cli(program: Program, cls: type, presets: flags.Presets, doc: str | None) -> NoReturn:
    """The command line of a program; `main`, with a sentence and a status for Ctrl-C and NaN."""

    def guarded(cfg: RunConfig) -> int:
        try:
            return main(program, cfg)
        except KeyboardInterrupt as stop:
            print(f"{program.name}: stopped, without a result{stop}", file=sys.stderr)
            return 130
        except FloatingPointError as error:
            print(f"{program.name}: {error}", file=sys.stderr)
            return 1

    flags.run(guarded, cls, presets=presets, doc=doc)


def key_for(cfg: RunConfig, purpose: int) -> Any:
    """0 a choice before the result; 1, 2, ... the random starts."""
    import jax

    return jax.random.fold_in(jax.random.key(cfg.seed), purpose)


def new_axes(title: str, xlabel: str, ylabel: str) -> tuple[Any, Any]:
    """A figure without pyplot, and its only axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return figure, axes

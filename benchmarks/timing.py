"""What every benchmark shares: interleaved repetitions, medians, memory, a table and JSON.

Candidates take turns, so a machine that slows down for a minute slows all of them. Medians ignore
the repetition that somebody else's job disturbed.
"""

import importlib.metadata
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Timing(NamedTuple):
    """Seconds of one candidate: the first call, which compiles, and each repetition."""

    first: float
    repetitions: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.repetitions)

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median."""
        return (max(self.repetitions) - min(self.repetitions)) / self.median


def interleave(
    candidates: Mapping[str, Callable[[], Any]], *, repetitions: int = 5, pause: float = 0.05
) -> dict[str, Timing]:
    """Times each candidate `repetitions` times, in turns, after one call that is not counted.

    A turn is two calls, and the second one counts: while the others ran, caches were emptied and,
    on machines that reclaim idle memory, pages taken away. A call ends when the JAX arrays that it
    returns are ready. Before each one the machine rests for `pause` seconds, because idle OpenMP
    threads spin for a while on the cores of the next candidate. Each round starts with another
    candidate.
    """
    if repetitions < 1:
        raise ValueError(f"repetitions={repetitions} must be at least 1")
    names = list(candidates)
    first = {name: _seconds(candidates[name], pause) for name in names}
    seconds = {name: [] for name in names}
    for round_ in range(repetitions):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            _seconds(candidates[name], pause)
            seconds[name].append(_seconds(candidates[name], pause))
    return {name: Timing(first[name], tuple(seconds[name])) for name in names}


def _seconds(call: Callable[[], Any], pause: float) -> float:
    import jax  # not at the top: child processes that measure another library load none of ours

    time.sleep(pause)
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Rows as a Markdown table; `columns` maps keys to headings. Numbers get 4 digits."""
    lines = [list(columns.values())]
    lines += [[_cell(row.get(key)) for key in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_mib() -> float:
    """The largest memory that this process has had."""
    # ru_maxrss of a child that was started by vfork begins at its parent's peak (Linux).
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def machine(*packages: str) -> dict[str, Any]:
    """Where numbers come from: processor, cores, load before the run, threads, versions."""
    info = Path("/proc/cpuinfo")
    models = (
        [x for x in info.read_text().splitlines() if "model name" in x] if info.exists() else []
    )
    return {
        "processor": models[0].split(":")[1].strip() if models else platform.processor(),
        "cores": cores(),
        "load_average": os.getloadavg()[0],
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def write_json(path: str | Path, record: Mapping[str, Any]) -> None:
    """Writes the record, keys in their order."""
    Path(path).write_text(json.dumps(record, indent=1) + "\n")

"""What the experiments of robust_depth_report share: sizes, shapes, tables and medians.

They are in `robust_depth_diagonal` and `robust_depth_beyond`. A section's `run` is given a `Size`
and a key and returns numpy arrays; `read` makes of them a table, what was found, and whether it
agrees with the claim ("agrees", "disagrees" or "mixed"); `draw` makes a figure. Numbers are medians
over trials unless said otherwise.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from launch import rundir
from robust_depth import sweep

Arrays = Mapping[str, np.ndarray]
DEPTHS = (1, 2, 3, 4, 5)
# D, M, k, steps
SETTINGS = ((60, 48, 2, 8000), (100, 60, 3, 10_000), (200, 120, 4, 10_000))


class Size(NamedTuple):
    """How much is run."""

    trials: int
    settings: int  # how many of SETTINGS
    radii: int


SIZES = {"quick": Size(10, 1, 8), "full": Size(50, 3, 16)}


class Reading(NamedTuple):
    """What a section found."""

    table: str
    found: str
    verdict: str
    numbers: dict[str, Any]


class Section(NamedTuple):
    title: str
    claim: str
    run: Callable[[Size, jax.Array], Arrays]
    read: Callable[[Arrays], Reading]
    draw: Callable[[Arrays], Any] | None = None


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown, of numbers to three digits."""
    return rundir.table(head, rows, _cell)


def _cell(value: Any) -> str:
    if isinstance(value, float | np.floating):
        return "-" if np.isnan(value) else "never" if np.isinf(value) else f"{value:.3g}"
    return str(value)


def spread(values: Any) -> str:
    """Median (first quartile - third quartile)."""
    low, middle, high = (_cell(quantile(values, share)) for share in (0.25, 0.5, 0.75))
    return f"{middle} ({low} - {high})"


def quantile(values: Any, share: float = 0.5) -> float:
    """One of the values, so that infinite ones do no harm; what is not a number is the worst."""
    values = np.asarray(values, float)
    worst = np.where(np.isnan(values), np.inf, values)
    return float(np.quantile(worst, share, method="inverted_cdf"))


def records(grid: sweep.Grid, key: jax.Array, trials: int) -> Arrays:
    """Loss and error of every trial and setting of a grid, by step."""
    found = sweep.run_trials(sweep.trial_keys(key, 0, trials), grid)
    return {
        "loss": np.asarray(found.loss_TSR),
        "error": np.asarray(found.error_TSR),
        "step": grid.record_steps,
        "depth": np.array([s.depth for s in grid.settings]),
        "fraction": np.array([s.fraction for s in grid.settings]),
    }

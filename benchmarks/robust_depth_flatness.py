"""Flatness of many problems in one call, beside HiGHS: a part of benchmarks.robust_depth.

Axes: B problems, N layers, M rows, D coordinates.
"""

import functools
from typing import Any

import jax
import numpy as np

from benchmarks import timing
from robust_depth import models, sweep
from robust_depth.box import box_minimum_lp
from robust_depth.flatness import flatness, reachable_box

SIZES = ((48, 60), (120, 200))  # rows, dim
RADII = (0.03, 0.3)
DROP_ERROR = 1e-4
DEPTH = 3
COLUMNS = {
    "rows": "rows",
    "dim": "dim",
    "radius": "radius",
    "solver": "solver",
    "problems": "problems timed",
    "milliseconds": "ms / problem",
    "spread_percent": "spread %",
    "highs_over_this": "HiGHS / this",
    "steps": "most steps",
    "gap": "gap / drop",
    "drop_error": "difference / drop",
    "minimum_error": "/ minimum",
    "accurate": "accurate",
}


@functools.partial(jax.jit, static_argnums=2)
def flat(w_BND: jax.Array, problem: Any, radius: float) -> Any:
    return jax.vmap(lambda w_ND, one: flatness(w_ND, one, radius))(w_BND, problem)


def measure_all(**counts: int) -> list[dict[str, Any]]:
    return [row for size in SIZES for radius in RADII for row in measure(*size, radius, **counts)]


def measure(
    rows: int, dim: int, radius: float, *, problems: int, timed: int, repetitions: int
) -> list[dict[str, Any]]:
    """Balanced true solutions of `problems` problems; HiGHS is timed on the first `timed`."""
    with jax.enable_x64(True):
        grid = sweep.Grid(num_rows=rows, dim=dim, dtype="float64")
        keys_B = sweep.trial_keys(jax.random.key(0), 0, problems)
        problem = jax.vmap(lambda key: sweep.trial_problem(key, grid, 0.1))(keys_B)
        w_BND = jax.vmap(lambda theta: models.balanced_solution(theta, DEPTH))(problem.theta_D)
        low_BD, high_BD = map(np.asarray, jax.vmap(lambda w: reachable_box(w, radius))(w_BND))
        hosted = jax.tree.map(np.asarray, problem)
        data = {
            "ours, float32": jax.tree.map(lambda x: x.astype("float32"), (w_BND, problem)),
            "ours, float64": (w_BND, problem),
        }

    def single(name: str) -> Any:
        with jax.enable_x64(name.endswith("64")):
            return flat(*data[name], radius)

    def highs(count: int) -> np.ndarray:
        ones = [jax.tree.map(lambda x, b=b: x[b], hosted) for b in range(count)]
        boxes = zip(ones, low_BD, high_BD, strict=False)  # as many as the shortest has
        with jax.enable_x64(True):  # or its check of the box rounds
            return np.array([box_minimum_lp(*one)[0] for one in boxes])

    theta_BD = np.asarray(w_BND).prod(1)
    loss_B = np.abs(np.einsum("bmd,bd->bm", hosted.x_MD, theta_BD) - hosted.y_M).mean(1)
    minimum_B = highs(problems)
    calls = {name: functools.partial(single, name) for name in data}
    calls["HiGHS"] = functools.partial(highs, timed)
    times = timing.interleave(calls, repetitions=repetitions)
    counts = dict.fromkeys(data, problems) | {"HiGHS": timed}
    found = []
    for name, timer in times.items():
        row = {
            "rows": rows,
            "dim": dim,
            "radius": radius,
            "solver": name,
            "problems": counts[name],
            "milliseconds": 1e3 * timer.median / counts[name],
            "spread_percent": 100 * timer.spread,
            "highs_over_this": times["HiGHS"].median / timed * counts[name] / timer.median,
            "repetition_seconds": timer.repetitions,
        }
        found.append(row | (compared(single(name), loss_B, minimum_B) if name in data else {}))
    return found


def compared(flat_B: Any, loss_B: np.ndarray, minimum_B: np.ndarray) -> dict[str, Any]:
    """Ours, with the losses at the solutions and the minima of HiGHS."""
    flat_B = jax.tree.map(np.asarray, flat_B)
    # Drops, as the difference of two losses would cancel, and minima.
    drop_B, best_B = flat_B.drop.astype("float64"), flat_B.minimum.astype("float64")
    drop_error = float(np.abs(drop_B / (loss_B - minimum_B) - 1).max())
    return {
        "steps": int(flat_B.steps.max()),
        "gap": float((flat_B.gap / flat_B.drop).max()),
        "drop_error": drop_error,
        "minimum_error": float(np.abs(best_B / minimum_B - 1).max()),
        "accurate": "yes" if drop_error < DROP_ERROR else "NO",
        "converged": bool(flat_B.converged.all()),
    }

"""Experiments d1 to d4 of robust_depth_report: matrices, ReLU networks, baselines, cost."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch import robust_depth_sections as sections
from launch.robust_depth_sections import (
    Arrays,
    Reading,
    Section,
    Size,
    quantile,
    records,
    spread,
    table,
)
from robust_depth import baselines, figures, method, models, problems, sweep

# d1 and d2 ---------------------------------------------------------------------------------------

MATRIX_SCALES = {1: 0.0, 2: 1e-3, 3: 0.03, 4: 0.2}


def _run_matrix(size: Size, key: jax.Array) -> Arrays:
    def trial(key: jax.Array, depth: int) -> tuple[jax.Array, jax.Array]:
        key_problem, key_start = jax.random.split(key)
        problem = problems.sample_matrix_sensing(key_problem, num_rows=80, dim=10, rank=1)
        start = models.init_matrix(key_start, depth=depth, dim=10, scale=MATRIX_SCALES[depth])
        options = {"step_size": 0.01, "num_steps": 10_000, "record_every": 100}
        state, info_R = method.run(start, problem, model=method.MATRIX, **options)
        best = method.relative_error(state.best_weights, problem, model=method.MATRIX)
        return info_R.error, best

    found: dict[str, np.ndarray] = {"step": np.arange(0, 10_000, 100)}
    for depth in MATRIX_SCALES:
        error_TR, best_T = jax.jit(jax.vmap(functools.partial(trial, depth=depth)))(
            jax.random.split(key, size.trials)
        )
        found[f"error_{depth}"], found[f"best_{depth}"] = np.asarray(error_TR), np.asarray(best_T)
    return found


def _read_matrix(a: Arrays) -> Reading:
    rows, last = [], {}
    for depth, scale in MATRIX_SCALES.items():
        error_TR = a[f"error_{depth}"]
        last[depth] = quantile(error_TR[:, -1])
        parts = (error_TR.min(1), error_TR[:, -1], a[f"best_{depth}"])
        rows.append([depth, scale, *map(spread, parts)])
    agrees = last[1] > 0.5 and last[2] > 0.5 and last[3] < 0.05 and last[4] < 0.05
    text = (
        "n = 10, rank 1, M = 80, p = .1. One factor fails; two come close and leave again when "
        "left running; three and four stay: final errors "
        + ", ".join(f"{e:.2g} (N = {n})" for n, e in last.items())
        + ". The smallest loss does not tell the right moment for N = 2."
    )
    head = ["N", "alpha", "smallest error", "error at the end", "error at the smallest loss"]
    verdict = "agrees" if agrees else "mixed"
    return Reading(table(head, rows), text, verdict, {"last_error": last})


def _draw_matrix(a: Arrays) -> Any:
    error_TSR = np.stack([a[f"error_{depth}"] for depth in MATRIX_SCALES], axis=1)
    labels = [f"N = {depth}" for depth in MATRIX_SCALES]
    title = "Deep matrix recovery: median and quartiles"
    return figures.error_curves(a["step"], error_TSR, labels, title=title)


def _run_relu(size: Size, key: jax.Array) -> Arrays:
    def trial(key: jax.Array, depth: int) -> tuple[jax.Array, jax.Array]:
        key_problem, key_start = jax.random.split(key)
        problem = problems.sample_relu_teacher(key_problem, num_rows=200, dim=8, width=4)
        start = models.init_relu(key_start, depth=depth, dim=8, width=32)
        unit = jnp.abs(problem.test_y_M).mean()

        def test_error(weights: Any) -> jax.Array:
            return jnp.abs(
                models.predict_relu(weights, problem.test_x_MD) - problem.test_y_M
            ).mean()

        def record(state: method.State, _: None) -> tuple[method.State, jax.Array]:
            error = test_error(state.weights) / unit
            options = {"step_size": 0.01, "num_steps": 100, "record_every": 100}
            return method.run(state, problem, model=method.RELU, **options)[0], error

        state, error_R = jax.lax.scan(record, method.init(start), length=80)
        return jnp.append(error_R, test_error(state.weights) / unit), state.best_loss

    found: dict[str, np.ndarray] = {"step": np.arange(0, 8001, 100)}
    for depth in (1, 2, 3, 4):
        error_TR, loss_T = jax.jit(jax.vmap(functools.partial(trial, depth=depth)))(
            jax.random.split(key, size.trials)
        )
        found[f"error_{depth}"], found[f"loss_{depth}"] = np.asarray(error_TR), np.asarray(loss_T)
    return found


def _read_relu(a: Arrays) -> Reading:
    rows, best, last = [], {}, {}
    for depth in (1, 2, 3, 4):
        error_TR = a[f"error_{depth}"]
        best[depth], last[depth] = (quantile(part) for part in (error_TR.min(1), error_TR[:, -1]))
        parts = (error_TR.min(1), error_TR[:, -1], a[f"loss_{depth}"])
        rows.append([depth, *map(spread, parts)])
    deeper = best[4] <= best[3] <= best[2] and last[4] <= last[3] <= last[2]
    text = (
        "Networks of width 32 on 200 labels of a teacher of width 4, p = .1; mean absolute error "
        "on clean test labels over their mean size. Best along the run and at the end: "
        + ", ".join(f"{best[n]:.2g} and {last[n]:.2g} (N = {n})" for n in best)
        + ". No depth is best throughout: what holds for linear models is not seen as such."
    )
    head = ["N", "smallest test error", "test error at the end", "smallest training loss"]
    verdict = "agrees" if deeper else "mixed"
    return Reading(table(head, rows), text, verdict, {"best": best, "last": last})


def _draw_relu(a: Arrays) -> Any:
    error_TSR = np.stack([a[f"error_{depth}"] for depth in (1, 2, 3, 4)], axis=1)
    labels = [f"N = {depth}" for depth in (1, 2, 3, 4)]
    title = "Deep ReLU networks: median and quartiles"
    return figures.error_curves(
        a["step"], error_TSR, labels, title=title, ylabel="relative test error"
    )


# d3 and d4 ---------------------------------------------------------------------------------------

SOLVERS = ("least_squares", "huber", "ransac", "lasso", "lad_lasso")
COSTS = ((8, 2000), (16, 2000), (32, 2000), (8, 4000), (8, 8000))  # trials, steps


def _baseline_grid() -> sweep.Grid:
    dim, rows, sparsity, steps = sections.SETTINGS[1]
    return sweep.Grid(
        num_rows=rows,
        dim=dim,
        sparsity=sparsity,
        truth="signed",
        num_steps=steps,
        record_every=steps,
    )


def _run_baselines(size: Size, key: jax.Array) -> Arrays:
    grid = _baseline_grid()
    keys = sweep.trial_keys(key, 0, size.trials)
    found: dict[str, Any] = {f"{kind}_{name}": [] for name in SOLVERS for kind in ("error", "ms")}
    for trial_key in keys:
        problem = sweep.trial_problem(trial_key, grid, 0.1)
        x_MD, y_M, theta_D = map(np.asarray, problem)
        for name in SOLVERS:
            began = time.perf_counter()
            off_D = np.asarray(getattr(baselines, name)(x_MD, y_M)) - theta_D
            found[f"ms_{name}"].append(1e3 * (time.perf_counter() - began))
            found[f"error_{name}"].append(np.linalg.norm(off_D) / np.linalg.norm(theta_D))
    trials = records(grid, key, size.trials)
    return {name: np.array(x) for name, x in found.items()} | {
        "error": trials["error"][..., -1],
        "depth": trials["depth"],
    }


def _read_baselines(a: Arrays) -> Reading:
    rows = [[name, spread(a[f"error_{name}"]), spread(a[f"ms_{name}"])] for name in SOLVERS]
    rows += [
        [f"sub-gradient method, N = {n}", spread(error_T), "see d4"]
        for n, error_T in zip(a["depth"], a["error"].T, strict=True)
    ]
    best = min(SOLVERS, key=lambda name: quantile(a[f"error_{name}"]))
    text = (
        f"D = 100, M = 60, k = 3, p = .1, signed truth. The best baseline is {best}; depth is a "
        "phenomenon to study, and l1-penalised least absolute deviations the better tool."
    )
    better = quantile(a["error_lad_lasso"]) < quantile(a["error"][:, 1:])
    head = ["solver", "relative error", "milliseconds"]
    verdict = "agrees" if better else "disagrees"
    return Reading(table(head, rows), text, verdict, {"best_baseline": best})


def _run_cost(size: Size, key: jax.Array) -> Arrays:
    found: dict[str, Any] = {"trials": [], "steps": [], "seconds": []}
    dim, rows, sparsity, _ = sections.SETTINGS[1]
    for trials, steps in COSTS:
        grid = sweep.Grid(
            num_rows=rows, dim=dim, sparsity=sparsity, num_steps=steps, record_every=steps
        )
        keys = sweep.trial_keys(key, 0, trials)
        jax.block_until_ready(sweep.run_trials(keys, grid))
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            jax.block_until_ready(sweep.run_trials(keys, grid))
            seconds.append(time.perf_counter() - began)
        for name, value in zip(found, (trials, steps, np.median(seconds)), strict=True):
            found[name].append(value)
    return {name: np.array(values) for name, values in found.items()}


def _read_cost(a: Arrays) -> Reading:
    each = a["seconds"] / (a["trials"] * a["steps"] * len(sections.DEPTHS))
    rows = [
        [int(trials), int(steps), float(s), float(1e9 * t)]
        for trials, steps, s, t in zip(a["trials"], a["steps"], a["seconds"], each, strict=True)
    ]
    ratio = float(each.max() / each.min())
    text = (
        "Depths 1 to 5 at once, one device, compiled. The time of a step and run differs by a "
        f"factor of {ratio:.2f} between the smallest and the largest: cost is linear in both."
    )
    head = ["trials", "steps", "seconds", "ns per step and run"]
    verdict = "agrees" if ratio < 1.5 else "mixed"
    return Reading(table(head, rows), text, verdict, {"largest_ratio": ratio})


SECTIONS: dict[str, Section] = {
    "d1": Section(
        "Deep matrix recovery",
        "What holds for diagonal networks is seen in deep matrix recovery.",
        _run_matrix,
        _read_matrix,
        _draw_matrix,
    ),
    "d2": Section(
        "Deep ReLU networks",
        "What holds for diagonal networks is seen in deep ReLU networks.",
        _run_relu,
        _read_relu,
        _draw_relu,
    ),
    "d3": Section(
        "Baselines",
        "l1-penalised least absolute deviations solves these instances (not a claim of the paper).",
        _run_baselines,
        _read_baselines,
    ),
    "d4": Section(
        "Cost",
        "Cost is linear in trials and steps (a claim of this package).",
        _run_cost,
        _read_cost,
    ),
}

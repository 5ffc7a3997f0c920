"""The experiments of robust_depth_report: each computes arrays, and reads them into a text.

A section's `run` is given a `Size` and a key and returns numpy arrays; `read` makes of them a
table, what was found, and whether it agrees with the claim ("agrees", "disagrees" or "mixed");
`draw` makes a figure. Numbers are medians over trials unless said otherwise.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robust_depth import baselines, figures, flatness, method, models, problems, sweep, theory

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
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


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


def _records(grid: sweep.Grid, key: jax.Array, trials: int) -> Arrays:
    records = sweep.run_trials(sweep.trial_keys(key, 0, trials), grid)
    return {
        "loss": np.asarray(records.loss_TSR),
        "error": np.asarray(records.error_TSR),
        "step": grid.record_steps,
        "depth": np.array([s.depth for s in grid.settings]),
        "fraction": np.array([s.fraction for s in grid.settings]),
    }


# b1 ----------------------------------------------------------------------------------------------


def _run_success(size: Size, key: jax.Array) -> Arrays:
    found = {}
    for index, (dim, rows, sparsity, steps) in enumerate(SETTINGS[: size.settings]):
        for truth in problems.TRUTHS:
            grid = sweep.Grid(
                num_rows=rows,
                dim=dim,
                sparsity=sparsity,
                truth=truth,
                fractions=(0.1,) if index else (0.0, 0.1, 0.2, 0.3),
                num_steps=steps,
                record_every=steps,
            )
            part = _records(grid, key, size.trials)
            for name in ("error", "depth", "fraction"):
                found[f"{name}_{index}_{truth}"] = part[name]
    return found


def _read_success(a: Arrays) -> Reading:
    rows, right = [], []
    for index, (dim, num_rows, sparsity, steps) in enumerate(SETTINGS):
        for truth in problems.TRUTHS:
            if f"error_{index}_{truth}" not in a:
                continue
            last_TS = a[f"error_{index}_{truth}"][..., -1]
            depth_S, fraction_S = a[f"depth_{index}_{truth}"], a[f"fraction_{index}_{truth}"]
            for fraction in np.unique(fraction_S):
                at_S = fraction_S == fraction
                rate_S = sweep.success_rate(last_TS[:, at_S])
                order = np.argsort(depth_S[at_S])
                setting = f"{dim}, {num_rows}, {sparsity}, {steps}"
                rows.append([setting, truth, float(fraction), *map(float, rate_S[order])])
                if fraction == 0.1:
                    right.append(rate_S[order][0] == 0 and (rate_S[order][1:] == 1).all())
    trials = a["error_0_signed"].shape[0]
    text = (
        f"Share of {trials} trials with a final relative error below .05. At p = .1 a single layer "
        f"fails in every trial and depths 2 to 5 succeed in every one in {sum(right)} of "
        f"{len(right)} settings."
    )
    head = ["D, M, k, steps", "truth", "p", *(f"N = {n}" for n in DEPTHS)]
    verdict = "agrees" if all(right) else "mixed"
    return Reading(table(head, rows), text, verdict, {"settings_as_claimed": sum(right)})


def _draw_success(a: Arrays) -> Any:
    last_TS = a["error_0_nonnegative"][..., -1]
    depth_S, fraction_S = a["depth_0_nonnegative"], a["fraction_0_nonnegative"]
    depths, fractions = np.unique(depth_S), np.unique(fraction_S)
    rate_SF = [
        [
            float(sweep.success_rate(last_TS[:, (depth_S == n) & (fraction_S == p)]).item())
            for p in fractions
        ]
        for n in depths
    ]
    return figures.success_map(rate_SF, depths, fractions)


# b2 ----------------------------------------------------------------------------------------------

STAY_SCALE, STAY_STEPS = 0.1, 60_000


def _run_stay(size: Size, key: jax.Array) -> Arrays:
    dim, rows, sparsity, _ = SETTINGS[0]
    grid = sweep.Grid(
        num_rows=rows,
        dim=dim,
        sparsity=sparsity,
        depths=(1, 2, 3, 4),
        scales=(STAY_SCALE,),
        fractions=(0.1, 0.2, 0.3),
        num_steps=STAY_STEPS,
        record_every=STAY_STEPS // 400,
    )
    return _records(grid, key, size.trials)


def _read_stay(a: Arrays) -> Reading:
    rows = []
    entry_TS, exit_TS = (
        np.asarray(time_of(a["error"], a["step"], threshold=0.5))
        for time_of in (theory.entry_time, theory.exit_time)
    )
    for at, (depth, fraction) in enumerate(zip(a["depth"], a["fraction"], strict=True)):
        error_TR = a["error"][:, at]
        cells = [error_TR.min(1), error_TR[:, -1], entry_TS[:, at], exit_TS[:, at]]
        rows.append([int(depth), float(fraction), *map(spread, cells)])
    last = {
        int(n): quantile(a["error"][:, at, -1])
        for at, (n, p) in enumerate(zip(a["depth"], a["fraction"], strict=True))
        if p == 0.1
    }
    falls = last[2] > last[3] > last[4]
    head = ["N", "p", "smallest error", "error at the end", "entry (steps)", "exit (steps)"]
    text = (
        f"Every layer but the first starts at {STAY_SCALE}, {int(a['step'][-1])} steps. The error "
        "at the end, at p = .1, is "
        + ", ".join(f"{e:.2g} at N = {n}" for n, e in last.items())
        + ". Entry and exit are the first record below .5, and above it again."
    )
    return Reading(table(head, rows), text, "agrees" if falls else "mixed", {"last_error": last})


def _draw_stay(a: Arrays) -> Any:
    at_S = a["fraction"] == 0.1
    labels = [f"N = {n}" for n in a["depth"][at_S]]
    title = "Depth lengthens the stay: median and quartiles, p = 0.1"
    return figures.error_curves(a["step"], a["error"][:, at_S], labels, title=title)


# b3 ----------------------------------------------------------------------------------------------


def _run_entry(size: Size, key: jax.Array) -> Arrays:
    dim, rows, sparsity = 60, 80, 4
    found: dict[str, np.ndarray] = {}
    for depth, steps in ((2, 8000), (3, 12_000), (4, 24_000)):
        # In the regime of the law: alpha <= .1 |theta*|^(1/N).
        scale = {2: 0.01, 3: 0.1, 4: 0.118}[depth]
        grid = sweep.Grid(
            num_rows=rows,
            dim=dim,
            sparsity=sparsity,
            depths=(depth,),
            scales=(scale,),
            scheme="balanced",
            num_steps=steps,
            record_every=steps // 800,
        )
        part = _records(grid, key, size.trials)
        keys = sweep.trial_keys(key, 0, size.trials)
        theta_TD = jax.vmap(lambda key, g=grid: sweep.trial_problem(key, g, 0.1).theta_D)(keys)
        law = functools.partial(
            theory.predicted_entry, depth=depth, scale=scale, step_size=0.01, outlier_fraction=0.1
        )
        found[f"predicted_{depth}"] = np.asarray(jax.vmap(law)(theta_TD))
        found[f"measured_{depth}"] = np.asarray(
            theory.entry_time(part["error"][:, 0], part["step"])
        )
    return found


def _read_entry(a: Arrays) -> Reading:
    rows, ratios = [], {}
    for depth in (2, 3, 4):
        predicted_T, measured_T = a[f"predicted_{depth}"], a[f"measured_{depth}"]
        ratios[depth] = quantile(measured_T) / quantile(predicted_T)
        rows.append([depth, spread(predicted_T), spread(measured_T), ratios[depth]])
    close = all(abs(ratio - 1) < 0.25 for ratio in ratios.values())
    text = (
        "Balanced start with alpha = .1 |theta*|^(1/N) at most, M = 20 k. The measured median is "
        + ", ".join(f"{r:.2f} (N = {n})" for n, r in ratios.items())
        + " times the predicted one."
    )
    head = ["N", "predicted steps", "measured steps", "ratio of medians"]
    return Reading(table(head, rows), text, "agrees" if close else "disagrees", {"ratio": ratios})


def _draw_entry(a: Arrays) -> Any:
    predicted, measured = (
        {f"N = {n}": a[f"{name}_{n}"] for n in (2, 3, 4)} for name in ("predicted", "measured")
    )
    return figures.entry_times(predicted, measured)


# b4 and b5 ---------------------------------------------------------------------------------------

SOLUTIONS = {"balanced": models.balanced_solution, "unbalanced": models.unbalanced_solution}


def _problem_batch(size: Size, key: jax.Array, dtype: str = "float32") -> problems.Problem:
    dim, rows, sparsity, _ = SETTINGS[0]
    sample = functools.partial(
        problems.sample_regression,
        num_rows=rows,
        dim=dim,
        sparsity=sparsity,
        truth="signed",
        dtype=dtype,
    )
    return jax.vmap(sample)(jax.random.split(key, size.trials))


def _curves(batch: problems.Problem, radii: np.ndarray) -> dict[tuple[str, int], flatness.Flatness]:
    """Both solutions of every depth; those of one depth share a program."""
    curve = jax.vmap(flatness.flatness_curve, in_axes=(0, 0, None))
    return {
        (name, depth): curve(
            jax.vmap(functools.partial(make, depth=depth))(batch.theta_D), batch, jnp.asarray(radii)
        )
        for depth in DEPTHS
        for name, make in SOLUTIONS.items()
    }


def _run_flatness(size: Size, key: jax.Array) -> Arrays:
    radii = np.geomspace(0.003, 0.03, size.radii)
    found: dict[str, np.ndarray] = {"radius": radii}
    with jax.enable_x64(True):  # drops of gamma^5 are lost in the rounding of float32
        for (name, depth), flat in _curves(_problem_batch(size, key, "float64"), radii).items():
            found[f"drop_{name}_{depth}"] = np.asarray(flat.drop)
            found[f"gap_{name}_{depth}"] = np.asarray(flat.gap)
    return found


def _slopes(a: Arrays, name: str, depth: int) -> np.ndarray:
    with jax.enable_x64(True):
        slope = jax.vmap(flatness.fit_slope, in_axes=(None, 0))
        return np.asarray(slope(jnp.asarray(a["radius"]), jnp.asarray(a[f"drop_{name}_{depth}"])))


def _read_flatness(a: Arrays) -> Reading:
    rows, off, gap = [], [], 0.0
    medians: dict[str, dict[int, float]] = {name: {} for name in SOLUTIONS}
    for depth in DEPTHS:
        cells = []
        for name in SOLUTIONS:
            slope_T = _slopes(a, name, depth)
            drop_TG, gap_TG = a[f"drop_{name}_{depth}"], a[f"gap_{name}_{depth}"]
            medians[name][depth] = quantile(slope_T)
            gap = max(gap, float((gap_TG / (drop_TG + gap_TG)).max()))
            cells.append(spread(slope_T))
        off.append(abs(medians["balanced"][depth] - depth) < 0.1)
        off.append(abs(medians["unbalanced"][depth] - 1) < 0.1)
        rows.append([depth, *cells])
    text = (
        "Slope of log drop against log gamma, exact up to a certified gap whose largest share of "
        f"the drop is {gap:.1e}: the drop grows as gamma^N around the balanced solution and "
        f"linearly around (theta*, 1, ..., 1). {sum(off)} of {len(off)} medians are within .1."
    )
    head = ["N", "balanced solution", "unbalanced solution"]
    verdict = "agrees" if all(off) else "mixed"
    return Reading(table(head, rows), text, verdict, {"slopes": medians, "largest_gap": gap})


def _draw_flatness(a: Arrays) -> Any:
    drops, slopes = {}, {}
    for name, depths in (("balanced", DEPTHS), ("unbalanced", (3,))):
        for depth in depths:
            label = f"{name}, N = {depth}"
            drops[label] = np.median(a[f"drop_{name}_{depth}"], axis=0)
            slopes[label] = quantile(_slopes(a, name, depth))
    return figures.drop_curves(a["radius"], drops, slopes)


def _run_descent(size: Size, key: jax.Array) -> Arrays:
    batch = _problem_batch(size._replace(trials=4 * size.trials), key)
    found: dict[str, np.ndarray] = {}
    for (name, depth), flat in _curves(batch, np.array([1e-2], np.float32)).items():
        found[f"drop_{name}_{depth}"] = np.asarray(flat.drop[:, 0])
        found[f"loss_{name}_{depth}"] = np.asarray(flat.loss[:, 0])
    return found


def _read_descent(a: Arrays) -> Reading:
    rows, shares = [], {}
    for depth in DEPTHS:
        cells = []
        for name in SOLUTIONS:
            drop_T, loss_T = a[f"drop_{name}_{depth}"], a[f"loss_{name}_{depth}"]
            share = float((drop_T > 1e-6 * loss_T).mean())
            cells += [share, quantile(drop_T)]
            shares[name, depth] = share
        rows.append([depth, *cells])
    least = min(shares["unbalanced", depth] for depth in DEPTHS)
    text = (
        f"Of {len(a['drop_balanced_1'])} random instances at p = .1, the share in which the loss "
        "certainly falls by 1e-6 of itself within gamma = .01 of a true solution. "
        f"For the unbalanced one it is at least {least:.2f} at every depth."
    )
    head = ["N", "balanced: share", "median drop", "unbalanced: share", "median drop"]
    verdict = "agrees" if least > 0 else "disagrees"
    return Reading(table(head, rows), text, verdict, {"smallest_share": least})


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


def _baseline_grid() -> sweep.Grid:
    dim, rows, sparsity, steps = SETTINGS[1]
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
    records = _records(grid, key, size.trials)
    return {name: np.array(x) for name, x in found.items()} | {
        "error": records["error"][..., -1],
        "depth": records["depth"],
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
    dim, rows, sparsity, _ = SETTINGS[1]
    for trials, steps in ((8, 2000), (16, 2000), (32, 2000), (8, 4000), (8, 8000)):
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
    each = a["seconds"] / (a["trials"] * a["steps"] * len(DEPTHS))
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
    "b1": Section(
        "Success by depth and outlier fraction",
        "The sub-gradient method fails with one layer and recovers the truth with two or more.",
        _run_success,
        _read_success,
        _draw_success,
    ),
    "b2": Section(
        "Entry, stay and exit",
        "Deeper models stay longer near the truth, so that early stopping matters less.",
        _run_stay,
        _read_stay,
        _draw_stay,
    ),
    "b3": Section(
        "The law of entry",
        "From a small balanced start the slowest coordinate enters at the predicted step.",
        _run_entry,
        _read_entry,
        _draw_entry,
    ),
    "b4": Section(
        "Flatness around true solutions",
        "The deeper, the flatter: around the balanced solution the loss falls as gamma^N.",
        _run_flatness,
        _read_flatness,
        _draw_flatness,
    ),
    "b5": Section(
        "True solutions that are no minima",
        "With constant probability some true solution is neither a local nor a global minimum.",
        _run_descent,
        _read_descent,
    ),
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

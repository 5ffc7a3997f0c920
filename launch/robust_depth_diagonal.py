"""Experiments b1 to b5 of robust_depth_report: diagonal networks."""

import functools
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
from robust_depth import figures, flatness, models, problems, sweep, theory

# b1 ----------------------------------------------------------------------------------------------


def _run_success(size: Size, key: jax.Array) -> Arrays:
    found = {}
    for index, (dim, rows, sparsity, steps) in enumerate(sections.SETTINGS[: size.settings]):
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
            part = records(grid, key, size.trials)
            for name in ("error", "depth", "fraction"):
                found[f"{name}_{index}_{truth}"] = part[name]
    return found


def _read_success(a: Arrays) -> Reading:
    rows, right = [], []
    for index, (dim, num_rows, sparsity, steps) in enumerate(sections.SETTINGS):
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
    head = ["D, M, k, steps", "truth", "p", *(f"N = {n}" for n in sections.DEPTHS)]
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
    dim, rows, sparsity, _ = sections.SETTINGS[0]
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
    return records(grid, key, size.trials)


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
    error_at = {
        (float(p), int(n)): quantile(a["error"][:, at, -1])
        for at, (n, p) in enumerate(zip(a["depth"], a["fraction"], strict=True))
    }
    falls = all(
        error_at[p, 2] > error_at[p, 3] > error_at[p, 4] for p in map(float, set(a["fraction"]))
    )
    last = {n: error for (p, n), error in error_at.items() if p == 0.1}
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
        part = records(grid, key, size.trials)
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
    dim, rows, sparsity, _ = sections.SETTINGS[0]
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
        for depth in sections.DEPTHS
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
    for depth in sections.DEPTHS:
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
    for name, depths in (("balanced", sections.DEPTHS), ("unbalanced", (3,))):
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
    for depth in sections.DEPTHS:
        cells = []
        for name in SOLUTIONS:
            drop_T, loss_T = a[f"drop_{name}_{depth}"], a[f"loss_{name}_{depth}"]
            share = float((drop_T > 1e-6 * loss_T).mean())
            cells += [share, quantile(drop_T)]
            shares[name, depth] = share
        rows.append([depth, *cells])
    least = min(shares["unbalanced", depth] for depth in sections.DEPTHS)
    text = (
        f"Of {len(a['drop_balanced_1'])} random instances at p = .1, the share in which the loss "
        "certainly falls by 1e-6 of itself within gamma = .01 of a true solution. "
        f"For the unbalanced one it is at least {least:.2f} at every depth."
    )
    head = ["N", "balanced: share", "median drop", "unbalanced: share", "median drop"]
    verdict = "agrees" if least > 0 else "disagrees"
    return Reading(table(head, rows), text, verdict, {"smallest_share": least})


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
}

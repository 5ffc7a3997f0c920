"""Sweeps and flatness of robust_depth beside numpy, PyTorch and HiGHS, on the same cores.

    python -m benchmarks.robust_depth --json=robust_depth.json

sweep: the sub-gradient method on trials of M = 60 rows and D = 100 coordinates at depths 1 to 5.
The peers are what a competent user writes (`robust_depth_peers`).

- ours: `sweep.run_trials`, which also draws the problems and records every 100 steps. One XLA CPU
  device runs products as small as these on one core, so the program takes a mesh of two simulated
  devices; one device alone has a row, to be compared with what runs on one core.
- numpy, trial by trial: one product of a matrix and a vector after the other, on one core.
- numpy and torch, batched: all trials in one product, one program for each depth. So small are
  the products that numpy's are on one core; torch has as many threads as ours devices, and once
  one alone, as its threads slow each other where others use the machine.
- the same, depths together: our idea in their words, one product for all depths of a trial.

All make the same steps from the same starts on the same data, which is checked first: the losses
after 50 steps agree to 1e-3, at a start so large that they move at every depth. Slow ones then run
fewer trials or steps than ours, see the columns; their time is linear in both. The flop floor of a
step and run is the 4 M D of its two products, at the rate of the fastest large float32 product of
numpy, JAX and torch, timed in the same turns.

flatness: `flatness` of many problems under vmap, beside `box_minimum_lp`, HiGHS on one core, for
one after the other. The check is against HiGHS on every problem, which is timed on fewer. A
difference is the largest over the problems, relative to the drop, and to the minimum; "accurate"
says whether that of the drop is within 1e-4. Where drops are small the rounding of residuals to
float32 shows, so ours has a row in float64, as HiGHS is.

linear: the time of a step and run of ours, for more trials and for more steps: constant.

Times are medians of interleaved repetitions, from arrays in memory to arrays of the result. On a
machine that others use set OMP_WAIT_POLICY=passive, or torch's threads wait by spinning.

Axes: T trials, S settings (depths in one product), N layers, M rows, D coordinates.
"""

import argparse
import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import robust_depth_flatness, timing
from benchmarks.robust_depth_peers import STEP_SIZE, THREADS, Peer, Workload, known_peers
from robust_depth import sweep

PARTS = ("sweep", "flatness", "linear")
DEVICES = THREADS
DEPTHS = (1, 2, 3, 4, 5)
CHECK_STEPS, CHECK_SCALE, CHECK_ERROR = 50, 0.8, 1e-3
OURS = "ours, 2 devices"

SWEEP_COLUMNS = {
    "solver": "solver",
    "trials": "trials run",
    "steps": "steps run",
    "seconds": "s",
    "spread_percent": "spread %",
    "nanoseconds": "ns / step / run",
    "over_ours": "this / ours",
    "floor_percent": "flop floor %",
    "loss_error": f"loss error at {CHECK_STEPS}",
}
LINEAR_COLUMNS = {
    "trials": "trials",
    "steps": "steps",
    "seconds": "s",
    "spread_percent": "spread %",
    "nanoseconds": "ns / step / run",
}


def start_jax() -> None:
    """CPU only, with simulated devices: it has to come before JAX makes its devices."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)


def make_grid(steps: int, scale: float | None = None) -> sweep.Grid:
    return sweep.Grid(
        depths=DEPTHS, scales=(scale,), num_steps=steps, record_every=math.gcd(steps, 100)
    )


def make_mesh() -> jax.sharding.Mesh:
    auto = jax.sharding.AxisType.Auto
    return jax.make_mesh((DEVICES,), ("data",), (auto,), devices=jax.devices("cpu")[:DEVICES])


def make_workload(keys_T: jax.Array, grid: sweep.Grid) -> Workload:
    (fraction,) = grid.fractions
    problem = jax.vmap(lambda key: sweep.trial_problem(key, grid, fraction))(keys_T)
    starts = [sweep.trial_start(keys_T[0], grid, setting) for setting in grid.settings]
    return Workload(*map(np.asarray, problem[:2]), tuple(map(np.asarray, starts)))


def ours(keys_T: jax.Array, grid: sweep.Grid, mesh: Any = None) -> jax.Array:
    """The mean absolute residual after the steps, (T, S), as of each peer."""
    records = sweep.run_trials(keys_T, grid, step_size=STEP_SIZE, mesh=mesh)
    return records.loss_TSR[..., -1]


def products(size: int, with_torch: bool) -> dict[str, Callable[[], Any]]:
    """Large square float32 products, of 2 size^3 flops."""
    a = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    a_jax, dot = jnp.asarray(a), jax.jit(jnp.dot)
    calls = {"numpy product": lambda: a @ a, "jax product": lambda: dot(a_jax, a_jax)}
    if with_torch:
        import torch

        a_torch = torch.from_numpy(a)

        def product() -> Any:
            torch.set_num_threads(DEVICES)
            return a_torch @ a_torch

        calls["torch product"] = product
    return calls


def loss_errors(keys_T: jax.Array, peers: dict[str, Peer]) -> dict[str, float]:
    """Largest relative difference of a loss from ours on two devices.

    Raises:
        RuntimeError: if one is above the limit: it would not be the same method.
    """
    grid = make_grid(CHECK_STEPS, CHECK_SCALE)
    work = make_workload(keys_T, grid)
    wanted_TS = np.asarray(ours(keys_T, grid, make_mesh()))
    losses = {"ours, 1 device": np.asarray(ours(keys_T, grid))}
    losses |= {name: peer.run(work, CHECK_STEPS) for name, peer in peers.items()}
    errors = {OURS: 0.0}
    for name, loss_TS in losses.items():
        errors[name] = float(np.abs(loss_TS / wanted_TS - 1).max())
        if not errors[name] <= CHECK_ERROR:
            raise RuntimeError(
                f"{name}: a loss after {CHECK_STEPS} steps differs from ours by "
                f"{errors[name]:.2g}, expected at most {CHECK_ERROR}"
            )
    return errors


def measure_sweep(
    trials: int, steps: int, repetitions: int, product_size: int = 2048
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A row for each solver, and the flops a second of large products."""
    grid, mesh, peers = make_grid(steps), make_mesh(), known_peers()
    keys_T = sweep.trial_keys(jax.random.key(0), 0, trials)
    errors = loss_errors(keys_T[: 4 * DEVICES], peers)
    work = make_workload(keys_T, grid)
    calls = {
        OURS: functools.partial(ours, keys_T, grid, mesh),
        "ours, 1 device": functools.partial(ours, keys_T, grid),
    }
    sizes = dict.fromkeys(calls, (trials, steps))
    for name, peer in peers.items():
        few = max(trials // peer.fewer_trials, 1), max(steps // peer.fewer_steps, 1)
        sizes[name] = few
        calls[name] = functools.partial(peer.run, work.part(few[0]), few[1])
    large = products(product_size, "torch, batched" in peers)
    times = timing.interleave({**calls, **large}, repetitions=repetitions)
    rates = {name: 2 * product_size**3 / times[name].median for name in large}
    floor = 4 * grid.num_rows * grid.dim / max(rates.values())

    def each(name: str) -> float:  # seconds of a step and run
        return times[name].median / math.prod(sizes[name]) / len(grid.settings)

    rows = [
        {
            "solver": name,
            "trials": few_trials,
            "steps": few_steps,
            "seconds": times[name].median,
            "spread_percent": 100 * times[name].spread,
            "nanoseconds": 1e9 * each(name),
            "over_ours": each(name) / each(OURS),
            "floor_percent": 100 * floor / each(name),
            "loss_error": errors[name],
            "first_seconds": times[name].first,
            "repetition_seconds": times[name].repetitions,
        }
        for name, (few_trials, few_steps) in sizes.items()
    ]
    return rows, rates


def measure_linear(
    trials: Sequence[int], steps: Sequence[int], repetitions: int
) -> list[dict[str, Any]]:
    """Ours on two devices: each number of trials at the second of the steps, and the reverse."""
    middle_trials, middle_steps = sorted(trials)[len(trials) // 2], sorted(steps)[len(steps) // 3]
    pairs = [(t, middle_steps) for t in trials] + [(middle_trials, s) for s in steps]
    mesh, pairs = make_mesh(), list(dict.fromkeys(pairs))
    keys_T = sweep.trial_keys(jax.random.key(0), 0, max(trials))
    calls = {(t, s): functools.partial(ours, keys_T[:t], make_grid(s), mesh) for t, s in pairs}
    times = timing.interleave(calls, repetitions=repetitions)
    return [
        {
            "trials": t,
            "steps": s,
            "seconds": timer.median,
            "spread_percent": 100 * timer.spread,
            "nanoseconds": 1e9 * timer.median / (t * s * len(DEPTHS)),
            "first_seconds": timer.first,
            "repetition_seconds": timer.repetitions,
        }
        for (t, s), timer in times.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default all")
    parser.add_argument("--trials", type=int, default=200, help="of the sweep; default 200")
    parser.add_argument("--steps", type=int, default=1000, help="of the sweep; default 1000")
    parser.add_argument("--linear_trials", nargs="+", type=int, default=[50, 100, 200, 400])
    parser.add_argument("--linear_steps", nargs="+", type=int, default=[500, 1000, 2000, 4000])
    parser.add_argument("--problems", type=int, default=50, help="of flatness; default 50")
    parser.add_argument("--timed", type=int, default=10, help="of those by HiGHS; default 10")
    parser.add_argument("--repetitions", type=int, default=3, help="of each; default 3")
    parser.add_argument("--json", metavar="FILE", help="also write all numbers there")
    args = parser.parse_args(argv)
    for trials in {args.trials, *args.linear_trials}:
        if trials < 1 or trials % DEVICES:
            parser.error(f"{trials} trials: must be a multiple of the {DEVICES} devices")
    for name in ("steps", "problems", "timed", "repetitions"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}={getattr(args, name)}: must be at least 1")
    if args.timed > args.problems:
        parser.error(f"--timed={args.timed}: there are {args.problems} problems")

    start_jax()
    torch = ["torch"] if importlib.util.find_spec("torch") else []
    machine = timing.machine("jax", "jaxlib", "numpy", "scipy", *torch)
    machine["simulated_devices"] = len(jax.devices("cpu"))
    print(machine, flush=True)
    record = {"machine": machine}
    if "sweep" in args.parts:
        rows, rates = measure_sweep(args.trials, args.steps, args.repetitions)
        record |= {"sweep": rows, "flops_per_second": rates}
        shown = ", ".join(f"{name} {1e-9 * rate:.0f}" for name, rate in rates.items())
        print(f"\nsweep; Gflop/s: {shown}\n{timing.table(rows, SWEEP_COLUMNS)}", flush=True)
    if "flatness" in args.parts:
        rows = robust_depth_flatness.measure_all(
            problems=args.problems, timed=args.timed, repetitions=args.repetitions
        )
        record["flatness"] = rows
        print(f"\nflatness\n{timing.table(rows, robust_depth_flatness.COLUMNS)}", flush=True)
    if "linear" in args.parts:
        rows = measure_linear(args.linear_trials, args.linear_steps, args.repetitions)
        record["linear"] = rows
        print(f"\nlinear\n{timing.table(rows, LINEAR_COLUMNS)}", flush=True)
    if args.json:
        timing.write_json(args.json, record)


if __name__ == "__main__":
    main()

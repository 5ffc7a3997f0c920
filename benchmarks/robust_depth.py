"""Sweeps and flatness of robust_depth beside numpy, PyTorch and HiGHS, on the same cores.

    python -m benchmarks.robust_depth --json=robust_depth.json

sweep: the sub-gradient method on trials of M = 60 rows and D = 100 coordinates at depths 1 to 5.
The peers are what a competent user writes: memory allocated once, X and its transpose both
contiguous, every operation into memory that is there, products of all layers but one from those
before and those behind.

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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from robust_depth import models, sweep
from robust_depth.box import box_minimum_lp
from robust_depth.flatness import flatness, reachable_box

PARTS = ("sweep", "flatness", "linear")
DEVICES = 2
DEPTHS = (1, 2, 3, 4, 5)
STEP_SIZE = 0.01
CHECK_STEPS, CHECK_SCALE, CHECK_ERROR = 50, 0.8, 1e-3
OURS = "ours, 2 devices"
SIZES = ((48, 60), (120, 200))  # of flatness: rows, dim
RADII = (0.03, 0.3)
DROP_ERROR = 1e-4
FLATNESS_DEPTH = 3

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
FLATNESS_COLUMNS = {
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


# Sweep: ours and its peers, each the mean absolute residual after so many steps, (T, S) ----------


def make_grid(steps: int, scale: float | None = None) -> sweep.Grid:
    return sweep.Grid(
        depths=DEPTHS, scales=(scale,), num_steps=steps, record_every=math.gcd(steps, 100)
    )


def make_mesh() -> jax.sharding.Mesh:
    auto = jax.sharding.AxisType.Auto
    return jax.make_mesh((DEVICES,), ("data",), (auto,), devices=jax.devices("cpu")[:DEVICES])


class Workload(NamedTuple):
    """What the peers are given: problems, and the start of each depth."""

    x_TMD: np.ndarray
    y_TM: np.ndarray
    starts: tuple[np.ndarray, ...]  # w_ND of each depth, which grow

    def part(self, trials: int) -> "Workload":
        return self._replace(x_TMD=self.x_TMD[:trials], y_TM=self.y_TM[:trials])


def make_workload(keys_T: jax.Array, grid: sweep.Grid) -> Workload:
    (fraction,) = grid.fractions
    problem = jax.vmap(lambda key: sweep.trial_problem(key, grid, fraction))(keys_T)
    starts = [sweep.trial_start(keys_T[0], grid, setting) for setting in grid.settings]
    return Workload(*map(np.asarray, problem[:2]), tuple(map(np.asarray, starts)))


def ours(keys_T: jax.Array, grid: sweep.Grid, mesh: Any = None) -> jax.Array:
    records = sweep.run_trials(keys_T, grid, step_size=STEP_SIZE, mesh=mesh)
    return records.loss_TSR[..., -1]


def numpy_loop(work: Workload, steps: int) -> np.ndarray:
    losses_TS = np.empty((len(work.x_TMD), len(work.starts)))
    for t, (x_MD, y_M) in enumerate(zip(work.x_TMD, work.y_TM, strict=True)):
        for s, start_ND in enumerate(work.starts):
            theta_D = numpy_steps(x_MD, y_M, start_ND, steps)
            losses_TS[t, s] = np.abs(x_MD @ theta_D - y_M).mean()
    return losses_TS


def batched(work: Workload, steps: int, *, descend: Callable, together: bool) -> np.ndarray:
    """`descend` is one of the two below; `together` pads shallower networks with layers of 1."""
    groups = [work.starts] if together else [(start_ND,) for start_ND in work.starts]
    y_T1M, losses = work.y_TM[:, None], []
    for starts in groups:
        deepest = max(map(len, starts))
        pads = [((0, deepest - len(w_ND)), (0, 0)) for w_ND in starts]
        padded = [np.pad(w, pad, constant_values=1) for w, pad in zip(starts, pads, strict=True)]
        w_NSD = np.stack(padded, axis=1)
        w_NTSD = np.repeat(w_NSD[:, None], len(y_T1M), axis=1)
        moving_NS = np.arange(deepest)[:, None] < [len(w_ND) for w_ND in starts]
        moving_N1S1 = moving_NS[:, None, :, None].astype(w_NTSD.dtype) if together else None
        theta_TSD = descend(work.x_TMD, y_T1M, w_NTSD, steps, moving_N1S1)
        residual_TSM = theta_TSD @ work.x_TMD.swapaxes(1, 2) - y_T1M
        losses.append(np.abs(residual_TSM).mean(2))
    return np.concatenate(losses, axis=1)


def numpy_steps(
    x: np.ndarray, y: np.ndarray, w: np.ndarray, steps: int, moving: np.ndarray | None = None
) -> np.ndarray:
    """theta after the steps; of one trial, x (M, D) and w (N, D), or of all, as `batched` has it.

    Args:
        moving: 1 for layers that move and 0 for padding, to be broadcast against w.
    """
    x, turned = np.ascontiguousarray(x), np.ascontiguousarray(x.swapaxes(-1, -2))
    w, rate = w.copy(), np.float32(STEP_SIZE / x.shape[-2])
    ahead, behind = np.ones((len(w) + 1, *w.shape[1:]), w.dtype), np.ones_like(w)
    slope, push = np.empty_like(w), np.empty_like(w[0])
    r = np.empty((*w.shape[1:-1], x.shape[-2]), w.dtype)
    for _ in range(steps):
        for i in range(len(w)):
            np.multiply(ahead[i], w[i], out=ahead[i + 1])
        for i in range(len(w) - 1, 0, -1):
            np.multiply(behind[i], w[i], out=behind[i - 1])
        np.matmul(ahead[-1], turned, out=r)
        np.subtract(r, y, out=r)
        np.sign(r, out=r)
        np.matmul(r, x, out=push)
        np.multiply(push, rate, out=push)
        np.multiply(ahead[:-1], behind, out=slope)
        np.multiply(slope, push, out=slope)
        if moving is not None:
            np.multiply(slope, moving, out=slope)
        np.subtract(w, slope, out=w)
    return w.prod(0)


def torch_steps(
    x_TMD: np.ndarray,
    y_T1M: np.ndarray,
    w_NTSD: np.ndarray,
    steps: int,
    moving: np.ndarray | None,
    *,
    threads: int = DEVICES,
) -> np.ndarray:
    """`numpy_steps` of all trials, operation by operation."""
    import torch

    torch.set_num_threads(threads)
    with torch.no_grad():
        x, y, w = (torch.tensor(part) for part in (x_TMD, y_T1M, w_NTSD))
        turned, rate = x.transpose(1, 2).contiguous(), STEP_SIZE / x.shape[1]
        moving = None if moving is None else torch.tensor(moving)
        ahead, behind = torch.ones((len(w) + 1, *w.shape[1:])), torch.ones_like(w)
        slope, push = torch.empty_like(w), torch.empty_like(w[0])
        r = torch.empty((*w.shape[1:-1], x.shape[1]))
        for _ in range(steps):
            for i in range(len(w)):
                torch.mul(ahead[i], w[i], out=ahead[i + 1])
            for i in range(len(w) - 1, 0, -1):
                torch.mul(behind[i], w[i], out=behind[i - 1])
            torch.bmm(ahead[-1], turned, out=r)
            r.sub_(y).sign_()
            torch.bmm(r, x, out=push)
            push.mul_(rate)
            torch.mul(ahead[:-1], behind, out=slope)
            slope.mul_(push)
            if moving is not None:
                slope.mul_(moving)
            w.sub_(slope)
        return w.prod(0).numpy()


class Peer(NamedTuple):
    """A solver, and the shares of our trials and steps that it is timed on."""

    run: Callable[[Workload, int], np.ndarray]
    fewer_trials: int = 1
    fewer_steps: int = 1


def _batched(descend: Callable, together: bool, fewer_steps: int) -> Peer:
    run = functools.partial(batched, descend=descend, together=together)
    return Peer(run, fewer_steps=fewer_steps)


PEERS = {
    "numpy, trial by trial": Peer(numpy_loop, fewer_trials=20, fewer_steps=2),
    "numpy, batched": _batched(numpy_steps, False, 5),
    "numpy, depths together": _batched(numpy_steps, True, 5),
    "torch, batched": _batched(torch_steps, False, 10),
    "torch, depths together": _batched(torch_steps, True, 10),
    "torch, batched, 1 thread": _batched(
        functools.partial(torch_steps, threads=1), False, fewer_steps=10
    ),
}


def known_peers() -> dict[str, Peer]:
    """Those whose library is here."""
    torch = importlib.util.find_spec("torch") is not None
    return {name: peer for name, peer in PEERS.items() if torch or not name.startswith("torch")}


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


# Flatness ----------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=2)
def flat(w_BND: jax.Array, problem: Any, radius: float) -> Any:
    return jax.vmap(lambda w_ND, one: flatness(w_ND, one, radius))(w_BND, problem)


def measure_flatness(
    rows: int, dim: int, radius: float, *, problems: int, timed: int, repetitions: int
) -> list[dict[str, Any]]:
    """Balanced true solutions of `problems` problems; HiGHS is timed on the first `timed`."""
    with jax.enable_x64(True):
        grid = sweep.Grid(num_rows=rows, dim=dim, dtype="float64")
        keys_B = sweep.trial_keys(jax.random.key(0), 0, problems)
        problem = jax.vmap(lambda key: sweep.trial_problem(key, grid, 0.1))(keys_B)
        w_BND = jax.vmap(lambda theta: models.balanced_solution(theta, FLATNESS_DEPTH))(
            problem.theta_D
        )
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
        if name in data:
            flat_B = jax.tree.map(np.asarray, single(name))
            # Drops, as the difference of two losses would cancel, and minima.
            drop_B, best_B = flat_B.drop.astype("float64"), flat_B.minimum.astype("float64")
            drop_error = float(np.abs(drop_B / (loss_B - minimum_B) - 1).max())
            row |= {
                "steps": int(flat_B.steps.max()),
                "gap": float((flat_B.gap / flat_B.drop).max()),
                "drop_error": drop_error,
                "minimum_error": float(np.abs(best_B / minimum_B - 1).max()),
                "accurate": "yes" if drop_error < DROP_ERROR else "NO",
                "converged": bool(flat_B.converged.all()),
            }
        found.append(row)
    return found


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
        record["flatness"] = []
        for size in SIZES:
            for radius in RADII:
                record["flatness"] += measure_flatness(
                    *size,
                    radius,
                    problems=args.problems,
                    timed=args.timed,
                    repetitions=args.repetitions,
                )
        print(f"\nflatness\n{timing.table(record['flatness'], FLATNESS_COLUMNS)}", flush=True)
    if "linear" in args.parts:
        rows = measure_linear(args.linear_trials, args.linear_steps, args.repetitions)
        record["linear"] = rows
        print(f"\nlinear\n{timing.table(rows, LINEAR_COLUMNS)}", flush=True)
    if args.json:
        timing.write_json(args.json, record)


if __name__ == "__main__":
    main()

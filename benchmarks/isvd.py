"""The SVD of an operator beside other solvers, each of them made as accurate as ours.

    python -m benchmarks.isvd --json=isvd.json
    python -m benchmarks.isvd --float64 --solvers ours arpack propack

Every matrix is given to every solver that can take it: graphs as scipy sparse products (the walk
sum as a scipy LinearOperator in numpy's and scipy's products), dense matrices as arrays. Each
solver has a list of settings, from loose to tight. The first whose result meets the accuracy is
timed; one that never meets it is timed at its last and marked. Accuracy is measured by us on the
returned triplets: the largest error of a singular value and the larger of both residuals
|A v - s u|, |A^H u - s v|, each relative to the largest singular value; the reference values come
from a run of ours in float64 at a tolerance of 1e-10 (for the dense matrix from LAPACK).

On a GPU the peers are its libraries' solvers (`--solvers ours "cupy svds" "torch lowrank"`): CuPy's
Lanczos `svds` and PyTorch's randomised `svd_lowrank`. Their matrices lie there before the clock
starts. `ours csr` is ours with compressed rows.

Times are from arrays in memory to numpy arrays of the result, medians of interleaved repetitions;
the first call of ours includes compilation and has a column of its own.
"""

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

import isvd
from benchmarks import timing
from benchmarks.isvd_matrices import MATRICES, Problem, problems
from benchmarks.isvd_solvers import SOLVERS, Triplets

RANK = 32
# What is asked of values and of residuals, relative to s[0].
ACCURACY = {"float32": (1e-6, 1e-4), "float64": (1e-12, 1e-8)}
COLUMNS = {
    "matrix": "matrix",
    "solver": "solver",
    "setting": "setting",
    "milliseconds": "ms",
    "spread_percent": "spread %",
    "over_ours": "this / ours",
    "first_seconds": "first call s",
    "value_error": "value error",
    "residual": "residual",
    "accurate": "accurate",
}


def accuracy(problem: Problem, triplets: Triplets, values_K: np.ndarray) -> tuple[float, float]:
    """The largest error of a value, and the largest residual, relative to the largest value."""
    u_MK, s_K, v_NK = (np.asarray(part, problem.operator.dtype) for part in triplets)
    left_MK = np.asarray(problem.operator.matmat(v_NK)) - u_MK * s_K
    right_NK = np.asarray(problem.operator.rmatmat(u_MK)) - v_NK * s_K
    residual = max(np.linalg.norm(left_MK, axis=0).max(), np.linalg.norm(right_NK, axis=0).max())
    error = np.abs(s_K - values_K).max()
    return float(error / values_K[0]), float(residual / values_K[0])


def reference_values(problem: Problem, rank: int) -> np.ndarray:
    if isinstance(problem.scipy, np.ndarray):
        return np.linalg.svd(problem.scipy.astype(np.float64), compute_uv=False)[:rank]
    with jax.enable_x64(True):
        op = jax.tree.map(
            lambda x: x.astype("float64") if x.dtype == np.float32 else x, problem.operator
        )
        op = isvd.LinearOperator(op.matmat, op.rmatmat, op.shape, np.dtype("float64"))
        factors = isvd.svd(op, jax.random.key(1), rank=rank, tol=1e-10)
        if not factors.converged:
            raise RuntimeError("the reference did not converge")
        return np.asarray(factors.s_K)


def first_good(
    title: str,
    problem: Problem,
    run: Callable[[Problem, Any], Triplets],
    settings: Sequence[Any],
    values_K: np.ndarray,
    limit: float,
) -> dict[str, Any] | None:
    """The first setting that is accurate, or the last one; None where every one raises.

    After one that took more than `limit` seconds no other is tried. The seconds are those of the
    first call, which compiles.
    """
    most_error, most_residual = ACCURACY[problem.operator.dtype.name]
    found, first = None, None
    for setting in settings:
        start = time.perf_counter()
        try:
            triplets = run(problem, setting)
        except Exception as error:  # a solver that gives up is a result
            print(f"{title} at {setting}: {type(error).__name__}: {error}")
            continue
        seconds = time.perf_counter() - start
        first = seconds if first is None else first
        value_error, residual = accuracy(problem, triplets, values_K)
        good = value_error < most_error and residual < most_residual
        found = {
            "setting": setting,
            "first_seconds": first,
            "value_error": value_error,
            "residual": residual,
            "accurate": "yes" if good else "NO",
        }
        if good or seconds > limit:
            break
    return found


def measure(
    name: str,
    make: Callable[[], Problem],
    solvers: Sequence[str],
    *,
    rank: int,
    repetitions: int,
    limit: float,
) -> list[dict[str, Any]]:
    """A row for each solver that takes the problem; the first one is ours."""
    problem = make()
    values_K = reference_values(problem, rank)
    rows, calls = [], {}
    for solver in solvers:
        run, settings, _, takes = SOLVERS[solver]
        if not takes(problem):
            continue
        run = functools.partial(run, rank=rank)
        found = first_good(f"{name}, {solver}", problem, run, settings, values_K, limit)
        if found is not None:
            rows.append({"matrix": name, "solver": solver, **found})
            calls[solver] = functools.partial(run, problem, found["setting"])
            print(rows[-1], flush=True)
    times = timing.interleave(calls, repetitions=repetitions)
    for row in rows:
        timer = times[row["solver"]]
        row["milliseconds"] = 1e3 * timer.median
        row["spread_percent"] = 100 * timer.spread
        row["over_ours"] = timer.median / times["ours"].median
        row["repetition_seconds"] = timer.repetitions
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--matrices", nargs="+", choices=MATRICES, default=list(MATRICES))
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    parser.add_argument("--repetitions", type=int, default=5, help="of each; default 5")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds of one try; default 20")
    parser.add_argument("--float64", action="store_true", help="in place of float32")
    parser.add_argument("--data", default="../shared/data/asymproj", help="folder of the graphs")
    parser.add_argument("--json", metavar="FILE", help="also write all numbers there")
    args = parser.parse_args(argv)
    others = [name for name in args.solvers if name != "ours" and SOLVERS[name].installed]
    machine = timing.machine("jax", "jaxlib", "numpy", "scipy")
    dtype = np.float64 if args.float64 else np.float32
    error, residual = ACCURACY[dtype.__name__]
    print(f"{machine}\nrank {RANK}, {dtype.__name__}, value error < {error}, residual < {residual}")
    options = {"rank": RANK, "repetitions": args.repetitions, "limit": args.limit}
    rows = []
    with jax.enable_x64(args.float64):
        for name, make in problems(args.matrices, args.data, dtype).items():
            rows += measure(name, make, ["ours", *others], **options)
            print(timing.table(rows, COLUMNS), flush=True)  # each time, as the next may be stopped
    if args.json:
        timing.write_json(args.json, {"machine": machine, "solvers": rows})


if __name__ == "__main__":
    main()

"""What sparse products cost: in either layout beside scipy, and by the number of edges.

    python -m benchmarks.isvd_cost --json=cost.json
    python -m benchmarks.isvd_cost --parts scaling --plot=scaling.png

`products` times one product, as a share of a program of twenty; `scaling` whole factorisations of a
random graph's walks, each in a process of its own, with their memory.
"""

import argparse
import functools
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import scipy.sparse

import isvd
from benchmarks import timing
from benchmarks.isvd_matrices import random_graph, read_graph, walk_problem


def graphs(data: str) -> dict[str, Any]:
    found = {name: read_graph(f"{data}/{name}") for name in ("ppi", "ca-HepTh")}
    return {**found, "random 1e5, 1e6": random_graph(100_000, 1_000_000)}


def products(matrices: dict[str, Any], dtype: Any, repetitions: int) -> list[dict[str, Any]]:
    """One sparse product, as a share of a program (for scipy: a loop) of twenty."""
    times = 20

    @jax.jit
    def program(op: Any, x_NC: Any) -> Any:
        return jax.lax.fori_loop(0, times, lambda _, x_NC: 0.1 * op.matmat(x_NC), x_NC)

    def loop(matrix: Any, x_NC: np.ndarray) -> np.ndarray:
        for _ in range(times):
            x_NC = dtype(0.1) * (matrix @ x_NC)
        return x_NC

    rows = []
    for name, matrix in matrices.items():
        graph = scipy.sparse.csr_array(matrix, dtype=dtype)
        kinds = {layout: isvd.sparse(graph, layout=layout) for layout in ("csr", "ell")}
        for columns in (1, 8, 32):
            x_NC = np.random.default_rng(0).normal(size=(graph.shape[1], columns)).astype(dtype)
            calls = {
                layout: functools.partial(program, op, jax.numpy.asarray(x_NC))
                for layout, op in kinds.items()
            }
            calls["scipy"] = functools.partial(loop, graph, x_NC)
            found = timing.interleave(calls, repetitions=repetitions)
            rows += [
                {
                    "matrix": name,
                    "columns": columns,
                    "how": how,
                    "microseconds": 1e6 * timer.median / times,
                    "nanoseconds_per_entry": 1e9 * timer.median / times / graph.nnz,
                    "csr_over_this": found["csr"].median / timer.median,
                    "first_seconds": timer.first,
                }
                for how, timer in found.items()
            ]
    return rows


PRODUCT_COLUMNS = {
    "matrix": "matrix",
    "columns": "columns",
    "how": "how",
    "microseconds": "microseconds",
    "nanoseconds_per_entry": "ns / entry",
    "csr_over_this": "csr / this",
    "first_seconds": "first call s",
}


def scaling(edges: Sequence[int]) -> list[dict[str, Any]]:
    """Time and memory against the number of edges, each in a process of its own."""
    rows = []
    for count in edges:
        command = [sys.executable, "-m", "benchmarks.isvd_cost", "--scale_one", str(count)]
        out = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
        rows.append(json.loads(out.splitlines()[-1]))
        print(rows[-1], flush=True)
    return rows


def scale_one(count: int) -> dict[str, Any]:
    """One walk-sum factorisation of rank 32 on a random graph with so many stored edges."""
    nodes = max(count // 10, 1000)
    problem = walk_problem(random_graph(nodes, count), np.float32)
    seconds = []
    for seed in range(3):
        start = time.perf_counter()
        factors = isvd.svd(
            problem.operator, jax.random.key(seed), rank=32, tol=1e-2, max_products=512
        )
        jax.block_until_ready(factors)
        seconds.append(time.perf_counter() - start)
    products = int(factors.products)
    return {
        "edges": count,
        "nodes": nodes,
        "products": products,
        "seconds": min(seconds[1:]),
        "nanoseconds_per_edge_and_product": 1e9 * min(seconds[1:]) / count / products,
        "peak_mib": timing.peak_mib(),
    }


SCALE_COLUMNS = {
    "edges": "edges",
    "nodes": "nodes",
    "products": "products",
    "seconds": "s",
    "nanoseconds_per_edge_and_product": "ns / edge / product",
    "peak_mib": "peak MiB",
}


def scaling_figure(rows: Sequence[dict[str, Any]]) -> Any:
    """Time of a product and memory against edges, with a line of slope one."""
    from matplotlib.figure import Figure

    edges = np.array([row["edges"] for row in rows])
    figure = Figure(figsize=(7.0, 3.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    each = np.array([1e3 * row["seconds"] / row["products"] for row in rows])
    left.plot(edges, each, "o-", color="#0072B2", label="measured")
    left.plot(edges, each[0] * edges / edges[0], ":", color="#666666", label="linear")
    left.set(xscale="log", yscale="log", xlabel="edges", ylabel="milliseconds a product")
    left.legend()
    right.plot(edges, [row["peak_mib"] / 1024 for row in rows], "s-", color="#D55E00")
    right.axhline(8, ls=":", color="#666666")
    right.set(xscale="log", xlabel="edges", ylabel="peak memory (GiB)", ylim=(0, 8.5))
    return figure


PARTS = ("products", "scaling")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repetitions", type=int, default=5, help="of a product; default 5")
    parser.add_argument("--float64", action="store_true", help="in place of float32, of products")
    parser.add_argument("--data", default="../shared/data/asymproj", help="folder of the graphs")
    parser.add_argument("--edges", nargs="+", type=int, default=[10**i for i in range(4, 8)])
    parser.add_argument("--json", metavar="FILE", help="also write all numbers there")
    parser.add_argument("--plot", metavar="FILE", help="draw the scaling there")
    parser.add_argument("--scale_one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.scale_one:
        print(json.dumps(scale_one(args.scale_one)))
        return
    machine, product_rows, scale = timing.machine("jax", "jaxlib", "numpy", "scipy"), [], []
    print(machine)
    if "products" in args.parts:
        dtype = np.float64 if args.float64 else np.float32
        with jax.enable_x64(args.float64):
            product_rows = products(graphs(args.data), dtype, args.repetitions)
        print(timing.table(product_rows, PRODUCT_COLUMNS), flush=True)
    if "scaling" in args.parts:
        scale = scaling(args.edges)
        print(timing.table(scale, SCALE_COLUMNS))
        if args.plot:
            scaling_figure(scale).savefig(args.plot)
    if args.json:
        record = {"machine": machine, "products": product_rows, "scaling": scale}
        timing.write_json(args.json, record)


if __name__ == "__main__":
    main()

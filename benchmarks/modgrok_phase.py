"""A phase diagram's runs in one program, beside the same runs one after another.

    python -m benchmarks.modgrok_phase --json=phase.json

The grid is 12 runs (6 numbers of tasks x 2 shares of the inputs) at p = 7. One after another they
go through `train_chunk`, whose sizes are static: here all runs get the arrays of one number of
tasks and inputs, so that it is compiled once, which flatters it; in truth each cell of the grid is
a program of its own, and column `compile` counts the 12. The grid's program is measured as the
program runs it on a CPU (runs in turns on each device), with all runs in one batch of operations
(`vmap`), and over simulated devices. Tests are left out on both sides (one sequence a task).

Each number of devices is a process of its own that times the runs one after another as well, in
turns with the grid; ratios are within such a process. Cores are shared by all devices: beyond as
many devices as cores there is nothing to gain but overlap. With --gpu the device is the first GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import timing

TASKS, FRACTIONS = (6, 8, 12, 16, 24, 36), (0.6, 0.8)


class Size(NamedTuple):
    """One workload: batches are a multiple of every number of tasks."""

    width: int
    batch: int
    shots: int
    chunk: int  # steps of a repetition


SIZES = {
    "d64-b144-s4": Size(64, batch=144, shots=4, chunk=20),
    "d64-b144-s12": Size(64, batch=144, shots=12, chunk=8),
    "d32-b144-s4": Size(32, batch=144, shots=4, chunk=30),
}
COLUMNS = {
    "size": "size",
    "devices": "devices",
    "form": "form",
    "ratio": "runs one after another / this",
    "spread_percent": "spread %",
    "compile_ratio": "compile: 12 programs / this",
}


def measure(size: Size, repetitions: int) -> list[dict[str, Any]]:
    """Rows of the table on the devices of this process."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    import modgrok
    from modgrok import phase

    cfg = modgrok.Config(7, width=size.width, heads=4, layers=2)
    config = modgrok.OptimizerConfig(lr=1e-3, weight_decay=0.3, warmup_steps=0)
    tx = modgrok.make_optimizer(config)
    plan = phase.Plan(
        cfg, config, modulus=7, shots=size.shots, batch=size.batch, sequences_per_task=(1, 1)
    )
    cells = [(n, fraction) for fraction in FRACTIONS for n in TASKS]
    of_tasks, of_inputs, *keys = jax.random.split(jax.random.key(0), 2 + len(cells))
    tasks = [
        modgrok.sample_tasks(of_tasks, modulus=7, num_random=n, num_unseen=2) for n, _ in cells
    ]
    inputs = [modgrok.split_inputs(of_inputs, modulus=7, fraction=x) for _, x in cells]
    runs = phase.stack_runs(
        tasks, inputs, weight_decay=[0.3] * len(cells), batch_keys=keys, test_keys=keys
    )
    state = phase.init(jnp.stack(keys), plan=plan)
    singles = [jax.tree.map(lambda x, g=g: x[g], state) for g in range(len(cells))]
    common = tasks[-1].train_W2, inputs[-1].train_M2
    options = {"cfg": cfg, "tx": tx, "num_steps": size.chunk, "batch": size.batch}
    options |= {"shots": size.shots, "modulus": 7}

    def alone() -> Any:
        return [
            modgrok.train_chunk(single, key, *common, **options)
            for single, key in zip(singles, keys, strict=True)
        ]

    calls, devices = {"alone": alone}, jax.devices()
    if devices[0].platform == "gpu":
        devices = devices[:1]
    if len(devices) == 1:
        for form, together in (("in turns", 1), ("vmap", len(cells))):
            calls[form] = lambda together=together: phase.advance(
                state, runs, plan=plan, num_steps=size.chunk, together=together
            )
    else:
        mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
        fill = np.minimum(np.arange(-(-len(cells) // mesh.size) * mesh.size), len(cells) - 1)
        placed = jax.device_put(
            jax.tree.map(lambda x: x[fill], (state, runs)),
            NamedSharding(mesh, PartitionSpec("data")),
        )
        calls["in turns"] = lambda: phase.advance(
            *placed, plan=plan, num_steps=size.chunk, together=1, mesh=mesh
        )
    times = timing.interleave(calls, repetitions=repetitions)
    seconds = {form: timer.first - timer.median for form, timer in times.items()}
    return [
        {
            "devices": len(devices),
            "form": form,
            "ratio": times["alone"].median / timer.median,
            "spread_percent": 100 * timer.spread,
            "compile_ratio": len(cells) * seconds["alone"] / seconds[form],
            "repetition_seconds": timer.repetitions,
        }
        for form, timer in times.items()
        if form != "alone"
    ]


def in_own_process(size: Size, devices: int | None, repetitions: int) -> list[dict[str, Any]]:
    """Rows of the table for so many simulated devices, or for the first GPU."""
    command = [sys.executable, "-m", "benchmarks.modgrok_phase", "--probe", json.dumps(size)]
    simulated = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    env = {**os.environ, **(simulated if devices else {"JAX_PLATFORMS": "cuda"})}
    child = subprocess.run(
        [*command, "--repetitions", str(repetitions)],
        cwd=Path(__file__).parents[1],
        env=env,
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(child.stdout.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--gpu", action="store_true", help="the first GPU in place of --devices")
    parser.add_argument("--repetitions", type=int, default=5, help="of each; default 5")
    parser.add_argument("--json", metavar="FILE", help="also write all numbers there")
    parser.add_argument("--quick", action="store_true", help="see that it runs")
    parser.add_argument("--probe", help=argparse.SUPPRESS)  # for the processes that we start
    args = parser.parse_args(argv)
    if args.repetitions < 1:
        parser.error(f"--repetitions={args.repetitions}: must be at least 1")
    if args.probe:
        print(json.dumps(measure(Size(*json.loads(args.probe)), args.repetitions)))
        return
    sizes = {name: SIZES[name] for name in args.sizes}
    devices, repetitions = [None] if args.gpu else args.devices, args.repetitions
    if args.quick:
        sizes, devices, repetitions = {"quick": Size(16, 72, shots=2, chunk=2)}, [1, 2], 1
    machine, began = timing.machine("jax", "jaxlib", "numpy"), time.time()
    print(f"{machine}\n{repetitions} repetitions, medians, float32, AdamW, depth 2")
    rows = []
    for name, size in sizes.items():
        print(f"{name}: {size._asdict()}", flush=True)
        for count in devices:
            found = in_own_process(size, count, repetitions)
            rows += [{"size": name, **row} for row in found]
            for row in found:
                said = {key: x for key, x in row.items() if key != "repetition_seconds"}
                print(json.dumps(said), flush=True)
    print(timing.table(rows, COLUMNS))
    if args.json:
        record = {"machine": machine, "began": began, "repetitions": repetitions, "rows": rows}
        record["sizes"] = {name: size._asdict() for name, size in sizes.items()}
        timing.write_json(args.json, record)


if __name__ == "__main__":
    main()

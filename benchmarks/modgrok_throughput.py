"""Training steps a second of modgrok, beside the same loop in PyTorch, eager and compiled.

    python -m benchmarks.modgrok_throughput --json=throughput.json
    XLA_PYTHON_CLIENT_PREALLOCATE=false python -m benchmarks.modgrok_throughput --sizes paper-d2 \
        paper-d4 --parts speed

A step is everything that training does: draw a batch, forward, backward, AdamW, metrics. We also
report the gradient's norm, the peer does not. All of it is in float32, the paper's sizes in
bfloat16 products with float32 sums (the peer: autocast). Both use a GPU where they find one, with
TF32 for float32 products, as JAX does by default. Each repetition runs the same number of steps
(column `chunk`): ours in one program, the peer's in a Python loop. Each implementation has a
process of its own, asleep until its turn, because in one process two libraries' threads and
allocators slow each other. On a machine that others use set OMP_WAIT_POLICY=passive, or PyTorch's
threads wait for each other by spinning.

Flops are 2 for each multiply-add of the model's matrix products, three times the forward pass for
a step. They are counted in two ways, both with causal pairs only in the attention:

- plain: every block at all T = 3 S - 1 positions that are read, logits at all of them;
- needed: without what an exact program can leave out, which is the last block's queries, MLP and
  logits at positions without an answer, and the first block's projections of equal tokens.

"share" is that rate over the rate of a large square `jnp.dot` in the size's type, timed in the same
turns.

Start-up is measured in fresh processes, each with an empty compilation cache and then once more
with what that left. Seconds count from the start of the process until the numbers of two steps are
there; compile seconds are the first two steps less the next two. Peak memory is the whole
process's, libraries included; a cold one's is often the compiler's.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import timing

HEADS = 4
LR = 1.5e-4
OURS = "ours"
PEERS = ("eager", "compile", "compile-max")
PROBE_STEPS = 2  # a scan of one step would be another program than a scan of many


class Size(NamedTuple):
    """One workload. Every task gets batch / tasks sequences."""

    modulus: int
    width: int
    layers: int
    batch: int
    shots: int
    tasks: int
    chunk: int  # steps of a repetition
    dtype: str = "float32"

    @property
    def vocab(self) -> int:
        return self.modulus + 18  # the paper's vocabulary has 18 tokens that never occur


SIZES = {
    "p13-d64": Size(13, 64, layers=2, batch=128, shots=8, tasks=64, chunk=50),
    "p29-d128": Size(29, 128, layers=2, batch=64, shots=32, tasks=64, chunk=10),
    "p29-d512": Size(29, 512, layers=4, batch=32, shots=32, tasks=32, chunk=2),
}
# For a GPU: the paper's runs.
LARGE_SIZES = {
    "paper-d2": Size(29, 512, 2, batch=1024, shots=32, tasks=512, chunk=20, dtype="bfloat16"),
    "paper-d4": Size(29, 512, 4, batch=1536, shots=32, tasks=384, chunk=20, dtype="bfloat16"),
}

SPEED_COLUMNS = {
    "size": "size",
    "implementation": "implementation",
    "chunk": "chunk",
    "steps_per_second": "steps/s",
    "spread_percent": "spread %",
    "ours_over_this": "ours / this",
    "gflop_plain": "Gflop/step plain",
    "gflop_needed": "needed",
    "share_plain_percent": "share plain %",
    "share_needed_percent": "needed %",
}
START_COLUMNS = {
    "size": "size",
    "implementation": "implementation",
    "compile_seconds": "compile s",
    "cold_seconds": "first steps, cold s",
    "warm_seconds": "warm s",
    "cold_peak_mib": "peak, cold MiB",
    "warm_peak_mib": "warm MiB",
}

Run = Callable[[int], np.ndarray]  # trains so many steps; their losses


def step_flops(size: Size, *, needed: bool) -> int:
    """Flops of a training step's matrix products; the module's docstring says which."""
    width, length, batch = size.width, 3 * size.shots - 1, size.batch
    answers = range(1, length, 3)
    multiply_adds = 0
    for layer in range(size.layers):
        scored = answers if needed and layer == size.layers - 1 else range(length)
        # Equal tokens have equal vectors before the first block, so V rows do for all.
        once = needed and layer == 0
        kv_rows = size.vocab if once else batch * length
        q_rows = size.vocab if once else batch * len(scored)
        pairs = sum(position + 1 for position in scored)  # of a query and what it sees
        multiply_adds += width**2 * (2 * kv_rows + q_rows)
        multiply_adds += 2 * width * batch * pairs  # scores and values
        multiply_adds += 9 * width**2 * batch * len(scored)  # output, and the two of the MLP
    positions = len(answers) if needed else length
    multiply_adds += size.vocab * width * batch * positions
    return 3 * 2 * multiply_adds  # the backward pass has two products for each one


def problem(size: Size) -> tuple[np.ndarray, np.ndarray]:
    """(task_W2, input_M2), without JAX, so that the peer's process need not load it."""
    p, rng = size.modulus, np.random.default_rng(0)
    pairs = np.stack(np.divmod(np.arange(p * p), p), axis=1)
    return rng.permutation(pairs)[: size.tasks], rng.permutation(pairs)[: round(0.8 * p * p)]


def build(implementation: str, size: Size) -> Run:
    """A fresh trainer; calling it goes on where the call before stopped."""
    if implementation == OURS:
        return _build_ours(size)
    import torch

    from benchmarks.torch_peer import Trainer

    torch.set_num_threads(timing.cores())
    trainer = Trainer(
        *problem(size),
        modulus=size.modulus,
        vocab=size.vocab,
        width=size.width,
        heads=HEADS,
        layers=size.layers,
        shots=size.shots,
        batch=size.batch,
        variant=implementation,
        lr=LR,
        dtype=size.dtype,
    )
    return lambda num_steps: trainer.run(num_steps)[:, 0]


def _build_ours(size: Size) -> Run:
    import jax

    import modgrok

    cfg = modgrok.Config(
        size.vocab, width=size.width, heads=HEADS, layers=size.layers, dtype=size.dtype
    )
    tx = modgrok.make_optimizer(modgrok.OptimizerConfig(lr=LR))
    init_key, key = jax.random.split(jax.random.key(0))
    state = modgrok.init_state(init_key, cfg, tx)
    task_W2, input_M2 = map(jax.numpy.asarray, problem(size))

    def run(num_steps: int) -> np.ndarray:
        nonlocal state
        state, metrics = modgrok.train_chunk(
            state,
            key,
            task_W2,
            input_M2,
            cfg=cfg,
            tx=tx,
            num_steps=num_steps,
            batch=size.batch,
            shots=size.shots,
            modulus=size.modulus,
        )
        return jax.device_get(metrics).loss

    return run


@contextmanager
def in_own_process(implementation: str, size: Size) -> Iterator[Run]:
    """What `build` returns, in a process that lives until the end of the block."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, implementation, size))
    process.start()
    there.close()  # so that a child that dies ends our wait

    def run(num_steps: int) -> np.ndarray:
        here.send(num_steps)
        return here.recv()

    try:
        yield run
    finally:
        here.close()
        process.join()


def _serve(connection: Connection, implementation: str, size: Size) -> None:
    run = build(implementation, size)
    while True:
        try:
            num_steps = connection.recv()
        except EOFError:
            return
        connection.send(run(num_steps))


def matmuls(n: int, dtype: str, *, torch_too: bool) -> dict[str, Callable[[], Any]]:
    """The yardstick: one product of n x n matrices by each library, by PyTorch on a CPU only."""
    import jax

    a_NN, b_NN = np.random.default_rng(0).standard_normal((2, n, n), dtype=np.float32)
    dot, ours = jax.jit(jax.numpy.dot), [jax.numpy.asarray(x, dtype) for x in (a_NN, b_NN)]
    calls = {"jax matmul": lambda: dot(*ours)}
    if torch_too and jax.default_backend() == "cpu":
        import torch

        theirs = [torch.from_numpy(x).to(getattr(torch, dtype)) for x in (a_NN, b_NN)]
        calls["torch matmul"] = lambda: torch.mm(*theirs)
    return calls


def measure_speed(
    name: str, size: Size, peers: Sequence[str], *, repetitions: int, matmul_size: int
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of the speed table for one size, and the Gflop/s of the plain products."""
    with ExitStack() as stack:
        runs = {key: stack.enter_context(in_own_process(key, size)) for key in (OURS, *peers)}
        calls = {key: lambda run=run: run(size.chunk) for key, run in runs.items()}
        calls |= matmuls(matmul_size, size.dtype, torch_too=bool(peers))
        times = timing.interleave(calls, repetitions=repetitions)
    rates = {
        key: 2e-9 * matmul_size**3 / timer.median for key, timer in times.items() if key not in runs
    }
    plain, needed = (1e-9 * step_flops(size, needed=needed) for needed in (False, True))
    rows = []
    for implementation in runs:
        timer = times[implementation]
        steps = size.chunk / timer.median
        rows.append(
            {
                "size": name,
                "implementation": implementation,
                "chunk": size.chunk,
                "steps_per_second": steps,
                "spread_percent": 100 * timer.spread,
                "ours_over_this": timer.median / times[OURS].median,
                "gflop_plain": plain,
                "gflop_needed": needed,
                "share_plain_percent": 100 * plain * steps / rates["jax matmul"],
                "share_needed_percent": 100 * needed * steps / rates["jax matmul"],
                "repetition_seconds": timer.repetitions,
            }
        )
    return rows, rates


def probe(implementation: str, size: Size) -> dict[str, float]:
    """What a fresh process reports of its own first steps; `at` is a time of day."""
    run, seconds, at = build(implementation, size), [], []
    for _ in range(2):
        start = time.perf_counter()
        run(PROBE_STEPS)
        seconds.append(time.perf_counter() - start)
        at.append(time.time())
    return {"at": at[0], "compile_seconds": seconds[0] - seconds[1], "peak_mib": timing.peak_mib()}


def measure_start(name: str, implementation: str, size: Size) -> dict[str, Any]:
    """A row of the start-up table, from two fresh processes that share a compilation cache."""
    command = [sys.executable, "-m", "benchmarks.modgrok_throughput", "--probe", implementation]
    command += ["--probe_size", json.dumps(size)]
    with tempfile.TemporaryDirectory() as cache:
        env = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": f"{cache}/jax",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "TORCHINDUCTOR_CACHE_DIR": f"{cache}/torch",
        }
        reports, waits = [], []
        for _ in range(2):
            start = time.time()
            root = Path(__file__).parents[1]
            child = subprocess.run(command, cwd=root, env=env, stdout=subprocess.PIPE, check=True)
            reports.append(json.loads(child.stdout.splitlines()[-1]))
            waits.append(reports[-1]["at"] - start)
    return {
        "size": name,
        "implementation": implementation,
        "compile_seconds": reports[0]["compile_seconds"],
        "cold_seconds": waits[0],
        "warm_seconds": waits[1],
        "cold_peak_mib": reports[0]["peak_mib"],
        "warm_peak_mib": reports[1]["peak_mib"],
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=[*SIZES, *LARGE_SIZES], default=list(SIZES))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--repetitions", type=int, default=5, help="of each; default 5")
    parser.add_argument(
        "--parts", nargs="+", choices=("speed", "start"), default=("speed", "start")
    )
    parser.add_argument("--json", metavar="FILE", help="also write all numbers there")
    parser.add_argument(
        "--quick", action="store_true", help="see that it runs: 2 repetitions of 2 steps"
    )
    parser.add_argument("--probe", help=argparse.SUPPRESS)  # for the processes that we start
    parser.add_argument("--probe_size", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.repetitions < 1:
        parser.error(f"--repetitions={args.repetitions}: must be at least 1")
    if args.probe:
        print(json.dumps(probe(args.probe, Size(*json.loads(args.probe_size)))))
        return
    peers: Sequence[str] = args.peers
    if importlib.util.find_spec("torch") is None:
        print("torch is not installed: no peers to compare with", file=sys.stderr)
        peers = ()
    repetitions = args.repetitions
    sizes = {name: (SIZES | LARGE_SIZES)[name] for name in args.sizes}
    if args.quick:
        repetitions, peers = 2, peers[:2]
        sizes = {name: size._replace(chunk=2) for name, size in sizes.items()}
    # A GPU is done with the smaller one before the next call reaches it.
    matmul_sizes = {
        name: 512 if args.quick else 16384 if name in LARGE_SIZES else 4096 for name in sizes
    }

    machine = timing.machine("jax", "jaxlib", "numpy", *(["torch"] if peers else []))
    print(f"{machine}\n{repetitions} repetitions, medians, heads {HEADS}")
    speed, start, rates = [], [], {}
    for name, size in sizes.items() if "speed" in args.parts else ():
        print(f"{name}: {size._asdict()}, vocab {size.vocab}", flush=True)
        rows, rates[name] = measure_speed(
            name, size, peers, repetitions=repetitions, matmul_size=matmul_sizes[name]
        )
        speed += rows
        for row in rows:
            said = {key: x for key, x in row.items() if key != "repetition_seconds"}
            print(json.dumps(said), flush=True)
        print(", ".join(f"{key} {rate:.4g} Gflop/s" for key, rate in rates[name].items()))
    if speed:
        print(timing.table(speed, SPEED_COLUMNS), flush=True)
    for name, size in sizes.items() if "start" in args.parts else ():
        start += [measure_start(name, implementation, size) for implementation in (OURS, *peers)]
    if start:
        print(timing.table(start, START_COLUMNS))
    if args.json:
        record = {
            "machine": machine,
            "repetitions": repetitions,
            "sizes": {name: size._asdict() for name, size in sizes.items()},
            "matmul_size": matmul_sizes,
            "matmul_gflop_per_second": rates,
            "speed": speed,
            "start": start,
        }
        timing.write_json(args.json, record)


if __name__ == "__main__":
    main()

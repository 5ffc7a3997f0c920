"""What closed blocks save: forward passes of a gated decoder, and compile time by depth.

    python -m benchmarks.modgrok_depth --json=depth.json

One decoder of many blocks, of which a share is kept, computes its logits in five ways, which take
turns; times are medians of the CPU time of all threads, which others on the machine disturb less
than they do the clock, and ratios are of the time with every block:

- every block: multiplied by its gate, open or closed;
- cond: a `lax.cond` around each block in a scan over all;
- gathered: the open blocks one after another in a scan of a fixed number of steps, here their own;
- loop: the same in a loop of as many steps as are open, which the data decides: `skip=True`;
- pruned: the smaller network that `latent_depth.prune` makes, with its special last block.

"flops" is the share of `latent_depth.forward_flops`. Compile time is CPU time of a training step,
in this process, nothing cached, for decoders of several depths in turns.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import modgrok
from benchmarks import timing
from modgrok import latent_depth
from modgrok.layers import layer_norm, lookup
from modgrok.model import NO_PATCH, Block, _run_block, _unembed

COLUMNS = {
    "kept": "kept",
    "way": "way",
    "milliseconds": "CPU ms",
    "spread_percent": "spread %",
    "time_percent": "time %",
    "flops_percent": "flops %",
}


def chosen(params: Any, tokens_BT: jax.Array, cfg: modgrok.Config, run: Callable[..., Any]) -> Any:
    """Logits after `run(h_BTD, body)`, with body(h_BTD, layer) for the stream after that block."""
    block, dtype = Block(cfg, parent=None), jnp.dtype(cfg.dtype)
    h_BTD = lookup(params["embedding"], tokens_BT[:, :-1])

    def body(h_BTD, layer):
        weights = jax.tree.map(lambda w: w[layer], params["blocks"])
        return _run_block(block, (weights, None, NO_PATCH), h_BTD, None, False)[0]

    h_BTD = run(h_BTD, body)[:, 1::3]
    h_BTD = layer_norm().apply({"params": params["ln_f"]}, h_BTD)
    return _unembed(h_BTD, params["embedding"], dtype)


def gathered(
    params: Any, tokens_BT: jax.Array, gate_L: jax.Array, cfg: modgrok.Config, most: int
) -> Any:
    """Steps up to `most`, which is static; those beyond the open blocks do nothing."""
    order_L, count = jnp.argsort(gate_L == 0, stable=True), (gate_L != 0).sum()

    def run(h_BTD, body):
        def step(h_BTD, k):
            return jnp.where(k < count, body(h_BTD, order_L[k]), h_BTD), None

        return jax.lax.scan(step, h_BTD, jnp.arange(most))[0]

    return chosen(params, tokens_BT, cfg, run)


def conditional(params: Any, tokens_BT: jax.Array, gate_L: jax.Array, cfg: modgrok.Config) -> Any:
    def run(h_BTD, body):
        def step(h_BTD, layer):
            h_BTD = jax.lax.cond(gate_L[layer] != 0, lambda h: body(h, layer), lambda h: h, h_BTD)
            return h_BTD, None

        return jax.lax.scan(step, h_BTD, jnp.arange(cfg.layers))[0]

    return chosen(params, tokens_BT, cfg, run)


def cpu_seconds(
    candidates: Mapping[str, Callable[[], Any]], *, repetitions: int
) -> dict[str, timing.Timing]:
    """As `timing.interleave`, with the CPU time of this process in place of the clock's."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(1 + repetitions):
        for name, call in candidates.items():
            start = time.process_time()
            jax.block_until_ready(call())
            seconds[name].append(time.process_time() - start)
    return {name: timing.Timing(one[0], tuple(one[1:])) for name, one in seconds.items()}


def measure_forward(
    cfg: modgrok.Config, *, kept: Sequence[int], batch: int, shots: int, repetitions: int
) -> list[dict[str, Any]]:
    rows = []
    params = jax.jit(modgrok.init_params, static_argnums=1)(jax.random.key(0), cfg)
    tokens_BT = jnp.asarray(
        np.random.default_rng(0).integers(0, cfg.vocab, (batch, 3 * shots)), jnp.int32
    )
    for count in kept:
        keep_L = np.random.default_rng(count).permutation(cfg.layers) < count
        gate_L = jnp.asarray(keep_L, jnp.float32)
        small, pruned = latent_depth.pruned_config(cfg, keep_L), latent_depth.prune(params, keep_L)
        forward = jax.jit(modgrok.apply, static_argnames=("cfg", "skip"))
        gather = jax.jit(gathered, static_argnames=("cfg", "most"))
        cond = jax.jit(conditional, static_argnames="cfg")
        ways = {
            "every block": functools.partial(forward, params, tokens_BT, cfg=cfg, gate=gate_L),
            "cond": functools.partial(cond, params, tokens_BT, gate_L, cfg=cfg),
            "gathered": functools.partial(gather, params, tokens_BT, gate_L, cfg=cfg, most=count),
            "loop": functools.partial(forward, params, tokens_BT, cfg=cfg, gate=gate_L, skip=True),
            "pruned": functools.partial(forward, pruned, tokens_BT, cfg=small),
        }
        wanted = ways["every block"]()
        for name, way in ways.items():
            error = float(jnp.abs(way() - wanted).max() / jnp.abs(wanted).max())
            assert error < 1e-4, f"{name} differs by {error}"
        times = cpu_seconds(ways, repetitions=repetitions)
        flops = latent_depth.forward_flops(cfg, shots=shots, keep_L=keep_L)
        flops /= latent_depth.forward_flops(cfg, shots=shots)
        rows += [
            {
                "kept": f"{count} of {cfg.layers}",
                "way": name,
                "milliseconds": 1000 * one.median,
                "spread_percent": 100 * one.spread,
                "time_percent": 100 * one.median / times["every block"].median,
                "flops_percent": 100.0 if name == "every block" else 100 * flops,
            }
            for name, one in times.items()
        ]
    return rows


def measure_compilation(
    base: modgrok.Config, depths: Sequence[int], *, repetitions: int
) -> list[dict[str, Any]]:
    """Seconds to trace and compile a training step with gates, each depth in turn."""
    seconds: dict[int, list[float]] = {depth: [] for depth in depths}
    tokens_BT = jax.ShapeDtypeStruct((48, 24), jnp.int32)
    for repetition in range(repetitions):
        for depth in depths:
            cfg = dataclasses.replace(base, layers=depth)
            latent = modgrok.LatentConfig(target_depth=depth / 2)
            # A new optimiser each time, which is a new program.
            settings = modgrok.OptimizerConfig(warmup_steps=repetition, schedule_steps=99)
            tx = modgrok.make_optimizer(settings, latent=latent)
            state = jax.eval_shape(
                functools.partial(modgrok.init_state, cfg=cfg, tx=tx, latent=latent),
                jax.random.key(0),
            )
            step = functools.partial(modgrok.train_step, cfg=cfg, tx=tx, latent=latent)
            run = jax.jit(lambda state, tokens, key, step=step: step(state, tokens, gate_key=key))
            began = time.process_time()
            run.lower(state, tokens_BT, jax.random.key(1)).compile()
            seconds[depth].append(time.process_time() - began)
    first = statistics.median(seconds[depths[0]])
    return [
        {
            "blocks": depth,
            "compile_seconds": statistics.median(times),
            "ratio": statistics.median(times) / first,
        }
        for depth, times in seconds.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--kept", nargs="+", type=int, default=[4, 12, 24])
    parser.add_argument("--repetitions", type=int, default=5, help="of each; default 5")
    parser.add_argument("--depths", nargs="+", type=int, default=[10, 100], help="to compile")
    parser.add_argument("--json", metavar="FILE", help="also write all numbers there")
    parser.add_argument("--quick", action="store_true", help="see that it runs")
    args = parser.parse_args(argv)
    if args.repetitions < 1:
        parser.error(f"--repetitions={args.repetitions}: must be at least 1")
    if not all(1 <= count <= args.layers for count in args.kept):
        parser.error(f"--kept={args.kept}: expected numbers from 1 to --layers={args.layers}")
    if args.quick:
        args.layers, args.width, args.kept, args.depths, args.repetitions = 7, 8, [3], [5, 6], 1
    cfg = modgrok.Config(vocab=7, width=args.width, heads=4, layers=args.layers)
    machine = timing.machine("jax", "jaxlib", "numpy")
    print(machine, flush=True)
    forward = measure_forward(
        cfg, kept=args.kept, batch=4 if args.quick else 64, shots=12, repetitions=args.repetitions
    )
    print(timing.table(forward, COLUMNS), flush=True)
    compilation = measure_compilation(cfg, args.depths, repetitions=min(args.repetitions, 3))
    columns = {"blocks": "blocks", "compile_seconds": "compile CPU s", "ratio": "ratio"}
    print(timing.table(compilation, columns))
    if args.json:
        record = {"machine": machine, "forward": forward, "compilation": compilation}
        timing.write_json(args.json, record)


if __name__ == "__main__":
    main()

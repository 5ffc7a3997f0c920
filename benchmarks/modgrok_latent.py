"""What latent depth does: the experiments behind docs/latent_depth.md, at sizes for two cores.

    python -m benchmarks.modgrok_latent --experiments target selection --output=runs/latent

Experiments: `target` trains gated decoders to target depths and asks whether the expected depth
gets there, whether gates are decided, whether the pruned network is the rounded one, how a sampled
one does, and how the same weights do with the first blocks or random ones; `selection` trains
decoders of those depths from scratch, to compare; `stability` trains 100 blocks with gates, and
without before and after the layer norm, at rising learning rates; `hundred` trains such a gated
decoder to its target; `transience` follows unseen tasks
in a deep decoder with and without gates; `groups` asks whether task groups share blocks.

Each run is one line of OUTPUT/EXPERIMENT.jsonl, written when it ends, and a run whose line is there
is not trained again. Tables go to stdout; of 100 blocks OUTPUT/EXPERIMENT_gradients.png is drawn.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import modgrok
from benchmarks import timing
from modgrok import evaluation, latent_depth, latent_figures, task_groups
from modgrok.latent_depth import LatentConfig
from modgrok.training import answer_loss


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run. Chance is 1 / p; unseen tasks are all that are not trained on."""

    seed: int = 0
    layers: int = 24
    gated: bool = True
    target: float | None = None
    norm: str = "pre"
    p: int = 5
    tasks: int = 12
    width: int = 32
    shots: int = 8
    batch: int = 48
    steps: int = 1600
    optimizer: str = "muon"
    lr: float = 0.01
    weight_decay: float = 0.1
    embedding_lr: float = 2e-3
    warmup: int = 50
    groups: int = 1
    prior: str = "uniform"
    kl: float = 0.01
    depth: float = 1.25
    entropy: float = 2.5
    share: float = 0.0
    soft: int = 200
    anneal: int = 400
    gate_lr: float = 0.02
    gate_init: float = 2.0
    every: int = 50  # steps between two records
    test_every: int = 0  # steps between two tests; 0: only at the end

    @property
    def latent(self) -> LatentConfig | None:
        if not self.gated:
            return None
        return LatentConfig(
            groups=self.groups,
            target_depth=self.target,
            prior=self.prior,
            kl_weight=self.kl,
            depth_weight=self.depth,
            share_weight=self.share,
            entropy_weight=self.entropy,
            soft_steps=self.soft,
            anneal_steps=self.anneal,
            lr=self.gate_lr,
            init=self.gate_init,
        )

    @property
    def model(self) -> modgrok.Config:
        return modgrok.Config(
            vocab=self.p, width=self.width, heads=4, layers=self.layers, norm=self.norm
        )


def data_of(run: Run) -> tuple[Any, Any]:
    which, split = jax.random.split(jax.random.fold_in(jax.random.key(run.seed), 0))
    tasks = modgrok.sample_tasks(which, modulus=run.p, num_random=run.tasks, exclude_zero=True)
    return tasks, modgrok.split_inputs(split, modulus=run.p, fraction=0.8)


def train(run: Run) -> tuple[Any, dict[str, list[float]], dict[str, Any]]:
    """(parameters, columns of records, gradient norms by layer at a few steps)."""
    cfg, latent = run.model, run.latent
    tx = modgrok.make_optimizer(
        modgrok.OptimizerConfig(
            name=run.optimizer,
            lr=run.lr,
            weight_decay=run.weight_decay,
            embedding_lr=run.embedding_lr,
            warmup_steps=run.warmup,
            schedule_steps=run.steps,
        ),
        latent=latent,
    )
    tasks, inputs = data_of(run)
    group_W = None
    if run.groups > 1:
        group_W = task_groups.at_random(jax.random.key(run.seed), run.tasks, run.groups)
    key = jax.random.fold_in(jax.random.key(run.seed), 2)
    state = jax.jit(modgrok.init_state, static_argnames=("cfg", "tx", "latent"))(
        jax.random.fold_in(jax.random.key(run.seed), 1), cfg=cfg, tx=tx, latent=latent
    )
    columns: dict[str, list[float]] = {"step": [], "max_grad_norm": []}
    norms = {}
    sizes = {"modulus": run.p, "shots": run.shots, "batch": run.batch}

    @jax.jit
    def by_layer(state):
        step = jax.random.fold_in(key, state.step)
        tokens_BT = modgrok.sample_sequences(step, tasks.train_W2, inputs.train_M2, **sizes)
        options = {}
        if latent is not None and latent.groups == 1:
            noise = latent_depth.logistic_noise(
                latent_depth.step_key(key, state.step), 1, cfg.layers
            )
            z = latent_depth.concrete(
                state.params["gates"]["logits_GL"], noise, tau=latent.tau,
                hard=state.step >= latent.soft_steps,
            )  # fmt: skip
            options = {"gate": z[0]}
        grads = jax.grad(lambda p: answer_loss(p, tokens_BT, cfg, **options)[0])(state.params)
        return latent_depth.block_norms(grads)

    for step in range(0, run.steps, run.every):
        if run.layers >= 100 and step in (0, 100, 1000):
            norms[step] = np.asarray(by_layer(state)).tolist()
        state, metrics = modgrok.train_chunk(
            state, key, tasks.train_W2, inputs.train_M2, cfg=cfg, tx=tx,
            num_steps=min(run.every, run.steps - step), latent=latent, group_W=group_W, **sizes,
        )  # fmt: skip
        columns["step"].append(int(state.step))
        columns["max_grad_norm"].append(float(metrics.grad_norm.max()))
        for name, x in metrics._asdict().items():
            columns.setdefault(name, []).append(float(x.mean()))
        if run.test_every and int(state.step) % run.test_every == 0:
            for name, value in score(run, state.params, group_W).items():
                columns.setdefault(name, []).append(value)
        if not np.isfinite(columns["loss"][-1]):
            break
    if run.layers >= 100:
        norms[int(state.step)] = np.asarray(by_layer(state)).tolist()
    return state.params, columns, {"norms": norms, "group_W": group_W}


def score(run: Run, params: Any, group_W: Any = None, gates: Any = None) -> dict[str, float]:
    """Accuracy at the last shot and loss on seen and unseen tasks, train inputs."""
    tasks, inputs = data_of(run)
    if gates is None and run.gated:
        gates = latent_depth.task_gates(params, group_W)
    scores = modgrok.evaluate(
        params, jax.random.fold_in(jax.random.key(run.seed), 4), tasks, inputs, cfg=run.model,
        modulus=run.p, shots=run.shots, sequences_per_task=64,
        gates=(None, None) if gates is None else gates,
    )  # fmt: skip
    return {
        "seen": float(scores.seen_train.last_shot),
        "unseen": float(scores.unseen_train.last_shot),
        **{
            name: float(evaluation.take_tasks(scores.unseen_train, index).last_shot)
            for name, index in (
                ("deciding", evaluation.DECIDING),
                ("reported", evaluation.REPORTED),
            )
        },
        "seen_loss": float(scores.seen_train.loss_WS.mean()),
    }


def single(gate_L: Any) -> tuple[jax.Array, jax.Array]:
    gate_L = jnp.asarray(gate_L, jnp.float32)
    return gate_L, gate_L


def gate_report(run: Run, params: Any) -> dict[str, Any]:
    """What became of the gates; of a single posterior, the rounded, pruned and sampled networks."""
    found = latent_depth.posterior(params)
    row: dict[str, Any] = {
        "expected_depth": float(found.expected_depth_G.mean()),
        "kept": float(found.kept_G.mean()),
        "variance": float(found.variance_G.mean()),
        "inclusion": np.asarray(found.inclusion_GL).round(4).tolist(),
        "overlap": float(latent_depth.overlap(found.keep_GL)),
    }
    keep_L = np.asarray(found.keep_GL[0])
    if run.groups > 1 or not keep_L.any():
        return row
    tasks, inputs = data_of(run)
    small, pruned = (
        latent_depth.pruned_config(run.model, keep_L),
        latent_depth.prune(params, keep_L),
    )
    tokens_BT = modgrok.sample_sequences(
        jax.random.key(9), tasks.train_W2, inputs.train_M2, modulus=run.p, shots=run.shots,
        batch=20 * run.tasks,
    )  # fmt: skip
    gate_L = jnp.asarray(keep_L, jnp.float32)
    whole = modgrok.apply(params, tokens_BT, run.model, gate=gate_L)
    difference = jnp.abs(modgrok.apply(pruned, tokens_BT, small) - whole).max()
    row["pruned_difference"] = float(difference / jnp.abs(whole).max())
    scores = []
    for draw in range(32):
        # Fresh sequences each time, the same for both: the spread is that of gates and sequences.
        z_GL = latent_depth.sample_gates(jax.random.fold_in(jax.random.key(5), draw), params)
        pair = [
            evaluation.score_tasks(
                params, jax.random.fold_in(jax.random.key(6), draw), tasks.train_W2,
                inputs.train_M2, cfg=run.model, modulus=run.p, shots=run.shots, num_sequences=16,
                gate=gate,
            ).last_shot
            for gate in (gate_L, z_GL[0])
        ]  # fmt: skip
        scores.append([float(x) for x in pair])
    rounded_N, sampled_N = np.array(scores).T
    row["rounded"], row["sampled"] = rounded_N.mean(), sampled_N.mean()
    row["sampled_se"] = (rounded_N - sampled_N).std(ddof=1) / len(scores) ** 0.5
    return row


def finish(run: Run, *, extra: Any = None) -> dict[str, Any]:
    began = time.monotonic()
    params, columns, about = train(run)
    row: dict[str, Any] = {"run": dataclasses.asdict(run)}
    diverged = not np.isfinite(columns["loss"][-1])
    if not diverged:
        row |= score(run, params, about["group_W"])
        if run.gated:
            row |= gate_report(run, params)
        if extra:
            row |= extra(run, params)
    final = columns["loss"][-max(1, len(columns["loss"]) // 10) :]
    row |= {"final_loss": float(np.mean(final)), "diverged": diverged, "norms": about["norms"]}
    return row | {"seconds": time.monotonic() - began, "history": columns}


def other_blocks(run: Run, params: Any) -> dict[str, Any]:
    """The same weights with the first K blocks, and with K random ones."""
    keep_L = np.asarray(latent_depth.posterior(params).keep_GL[0])
    count, rng = int(keep_L.sum()), np.random.default_rng(run.seed)
    first = score(run, params, gates=single(np.arange(run.layers) < count))
    random = [
        score(run, params, gates=single(rng.permutation(run.layers) < count)) for _ in range(10)
    ]
    return {
        "first": first["seen"],
        "random": [one["seen"] for one in random],
        "all": score(run, params, gates=single(np.ones(run.layers)))["seen"],
    }


def experiments(args: argparse.Namespace) -> dict[str, tuple[list[Run], Any]]:
    """name -> (runs, what else to measure of each)."""
    base = Run(steps=args.steps or Run.steps)
    change = dataclasses.replace
    target = [change(base, seed=s, target=k) for s in args.seeds for k in (4, 12)]
    scratch = [change(base, seed=s, layers=k, gated=False) for s in args.seeds for k in (4, 12, 24)]
    # A hundred blocks at their target, and a sweep of rates that ends before the depth term begins.
    hundred = [change(base, seed=s, layers=100, target=12, batch=24) for s in args.seeds]
    sweep = change(
        base, layers=100, steps=args.steps or 200, target=12, optimizer="adamw", batch=24, soft=100,
        anneal=100, warmup=20, every=20,
    )  # fmt: skip
    kinds = ({"gated": True}, {"gated": False}, {"gated": False, "norm": "post"})
    stability = [
        change(sweep, seed=s, lr=lr, target=12 if kind["gated"] else None, **kind)
        for s in args.seeds
        for lr in (3e-3, 1e-2, 1e-3, 3e-4)
        for kind in kinds
    ]
    deep = change(
        base, p=7, tasks=36, width=64, shots=12, batch=144, weight_decay=0.05, lr=0.02,
        steps=args.steps or 3000, layers=8, test_every=250, soft=300,
    )  # fmt: skip
    transience = [
        change(deep, seed=s, **kind)
        for s in args.seeds
        for kind in ({"target": 2}, {"gated": False}, {"gated": False, "layers": 2})
    ]
    groups = [
        change(base, seed=s, target=6, groups=3, prior=prior, share=share, kl=kl)
        for s in args.seeds
        for prior, share, kl in (
            ("uniform", 0.0, 0.01),
            ("aggregated", 0.0, 0.1),
            ("uniform", 0.1, 0.01),
        )
    ]
    return {
        "target": (target, other_blocks),
        "selection": (scratch, None),
        "stability": (stability, None),
        "hundred": (hundred, other_blocks),
        "transience": (transience, None),
        "groups": (groups, None),
        "plain": ([change(base, seed=s, gated=False) for s in args.seeds], None),
    }


COLUMNS = {
    "seed": "seed", "kind": "kind", "lr": "lr", "final_loss": "loss", "peak": "max grad",
    "spikes": "spikes", "seen": "seen", "unseen": "unseen", "best_reported": "best unseen",
    "last_reported": "last unseen",
    "expected_depth": "depth", "kept": "kept", "variance": "q(1-q)", "pruned_difference": "pruned",
    "rounded": "rounded", "sampled": "sampled", "sampled_se": "se of difference",
    "first": "first K", "random_mean": "random K",
    "overlap": "overlap", "seconds": "s",
}  # fmt: skip


def summary(row: dict[str, Any]) -> dict[str, Any]:
    run, history = Run(**row["run"]), row["history"]
    kind = f"L={run.layers} {run.norm}" + (f" K={run.target}" if run.gated else " no gates")
    if run.groups > 1:
        kind += f" G={run.groups} {run.prior} share={run.share:g}"
    late = [
        g for s, g in zip(history["step"], history["max_grad_norm"], strict=True) if s > run.warmup
    ]
    shown = {**row, "seed": run.seed, "kind": kind, "lr": run.lr}
    if late:
        # A chunk counts whose largest gradient is ten times the median of such.
        shown |= {"peak": max(late), "spikes": int(sum(np.array(late) > 10 * np.median(late)))}
    if "random" in row:
        shown["random_mean"] = float(np.mean(row["random"]))
    if "reported" in history:
        # Half of the unseen tasks choose the step, among those at which all weights are whole.
        steps = np.arange(1, 1 + len(history["reported"])) * run.test_every
        known = steps >= (run.soft + 2 * run.anneal if run.gated else 0)
        if known.any():
            found = evaluation.transience(
                steps[known], *(np.array(history[name])[known] for name in ("reported", "deciding"))
            )
            shown |= {"best_reported": found.best, "last_reported": found.last}
    return shown


def draw_gradients(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Gradient norm by block at the steps on record, of each kind's first run."""
    norms: dict[str, Any] = {}
    for row in filter(lambda row: row["norms"], rows):  # of 100 blocks or more
        by_step = sorted(row["norms"].items(), key=lambda item: int(item[0]))
        norms.setdefault(row["kind"], {f"step {step}": norm_L for step, norm_L in by_step})
    if norms:
        latent_figures.gradient_by_block(norms).savefig(path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = ("target", "selection", "stability", "hundred", "transience", "groups", "plain")
    parser.add_argument("--experiments", nargs="+", choices=names, default=names[:3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of each run; default: the experiment's own")
    parser.add_argument("--output", required=True, help="folder of the records")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="fields of Run to replace"
    )
    args = parser.parse_args(argv)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    changes = {}
    for item in args.set:
        name, value = item.split("=", 1)
        changes[name] = value if name in ("optimizer", "prior", "norm") else json.loads(value)
    print(timing.machine("jax", "jaxlib", "numpy"))
    for name in args.experiments:
        path, shown = output / f"{name}.jsonl", []
        done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        runs, extra = experiments(args)[name]
        # Changes may make some of them equal.
        for run in dict.fromkeys(dataclasses.replace(run, **changes) for run in runs):
            row = next((row for row in done if Run(**row["run"]) == run), None)
            if row is None:
                row = json.loads(json.dumps(finish(run, extra=extra)))
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                one = summary(row)
                print({k: one[k] for k in COLUMNS if one.get(k) is not None}, flush=True)
            shown.append(summary(row))
        columns = {k: v for k, v in COLUMNS.items() if any(row.get(k) is not None for row in shown)}
        print(f"\n{name}\n{timing.table(shown, columns)}", flush=True)
        draw_gradients(shown, output / f"{name}_gradients.png")


if __name__ == "__main__":
    main()

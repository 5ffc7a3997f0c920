"""Train a transformer to learn modular arithmetic in context, and test it on tasks never seen.

A run folder is resumed by the same command. stdout ends with one line of JSON; progress goes to
stderr. Presets: demo (the default: minutes on a laptop), small (seconds, to try things), and the
paper's runs of depth 2, 4 and 6 (a GPU). Recipes: --flagfile=launch/recipes/NAME.flags.
"""

import dataclasses
import functools
import os
import sys
from typing import Any

from launch import UsageError, flags, rundir
from launch.modgrok_config import (
    FREE,
    PRESETS,
    PROGRAM,
    TrainConfig,
    abstract_state,
    key_for,
    make_model,
    prepare_data,
    state_maker,
)


def main(cfg: TrainConfig) -> int:
    from launch import parallel

    resuming = cfg.workdir and rundir.check(
        cfg.workdir, dataclasses.asdict(cfg), program=PROGRAM, free=FREE
    )
    parallel.start(
        platform_devices=cfg.platform_devices,
        coordinator_address=cfg.coordinator_address,
        num_processes=cfg.num_processes,
        process_id=cfg.process_id,
        multiprocess=cfg.multiprocess,
        compilation_cache=cfg.compilation_cache,
    )
    return train(cfg, resuming=bool(resuming))


def train(cfg: TrainConfig, *, resuming: bool) -> int:
    """Run in this process, whose devices are set up."""
    import jax

    from launch import loop, modgrok_report, parallel
    from launch.checkpoints import Checkpoints

    mesh = parallel.make_mesh(cfg.devices)
    if cfg.batch % (mesh.size * cfg.micro_batches):
        raise UsageError(
            f"--batch={cfg.batch}: expected a multiple of the {mesh.size} devices"
            + (f" x --micro_batches={cfg.micro_batches}" if cfg.micro_batches > 1 else "")
        )
    writer = jax.process_index() == 0
    workdir = cfg.workdir or str(rundir.default_path(PROGRAM))
    if not cfg.workdir and jax.process_count() > 1:
        raise UsageError("--workdir=: several processes need the same folder by name")
    tasks, inputs = prepare_data(cfg)
    model, tx = make_model(cfg)
    like = abstract_state(cfg, model, tx)
    directory = os.path.join(workdir, "checkpoints")
    with Checkpoints(directory, keep=cfg.keep) as checkpoints:
        restored = checkpoints.restore(like) if resuming else None
        start, best = 0, loop.Best()
        if restored:
            start, state = restored.step, restored.state
            if restored.meta["best_score"] is not None:
                best = loop.Best(restored.meta["best_step"], restored.meta["best_score"])
        else:
            state = state_maker(cfg, model, tx)(key_for(cfg, 1), key_for(cfg, 2))
        state = parallel.replicate(state, mesh)

        saved = {**dataclasses.asdict(cfg), "workdir": workdir}
        with rundir.RunDir(workdir, saved, program=PROGRAM, writer=writer) as folder:
            folder.truncate(start if restored else -1)
            say = functools.partial(print, file=sys.stderr, flush=True)
            if cfg.quiet or not writer:
                say = lambda *_: None  # noqa: E731
            say(
                f"{workdir}: {model.num_params:,} parameters, {len(tasks.train_W2)} seen and "
                f"{len(tasks.unseen_U2)} unseen tasks mod {cfg.p}, {mesh.size} x "
                f"{jax.devices()[0].platform}; "
                + (f"resuming at step {start}" if restored else "compiling first")
            )
            evaluator = modgrok_report.Evaluator(cfg, model, tasks, inputs, mesh)
            chunk = _chunk(cfg, model, tx, tasks, inputs, mesh)
            outcome = loop.run(
                state,
                start=start,
                best=best,
                cadence=loop.Cadence(
                    cfg.steps, cfg.log_every, cfg.eval_every, cfg.checkpoint_every
                ),
                chunk=chunk,
                evaluate=lambda state: evaluator.on_the_way(state[0], key_for(cfg, 3)),
                target=cfg.target,
                checkpoints=checkpoints,
                rundir=folder,
                quiet=cfg.quiet or not writer,
            )
            checkpoints.wait()
            kept = checkpoints.restore(like, which="best")
            best_state = parallel.replicate(kept.state, mesh) if kept else outcome.state
            summary = evaluator.at_the_end(
                best_state[0], outcome, key_for(cfg, 4), folder, draw=cfg.figures, say=say
            )
    if writer:
        rundir.summary_line(
            {
                "program": PROGRAM,
                "workdir": workdir,
                "seconds": outcome.seconds,
                "steps": outcome.step,
                **summary,
                "resumed_from": restored.step if restored else None,
                "parameters": model.num_params,
                "devices": mesh.size,
            }
        )
    return 0


def _chunk(cfg: TrainConfig, model: Any, tx: Any, tasks: Any, inputs: Any, mesh: Any) -> Any:
    """chunk(state, num_steps) over the mesh, where state is (TrainState, key of the batches)."""
    import modgrok
    from launch import parallel

    body = functools.partial(
        modgrok.train_chunk.__wrapped__,
        cfg=model,
        tx=tx,
        batch=cfg.batch,
        shots=cfg.shots,
        modulus=cfg.p,
        micro_batches=cfg.micro_batches,
        ema_decay=cfg.ema or None,
    )

    def chunk(state: Any, *data: Any, **options: Any) -> Any:
        train_state, key = state
        train_state, metrics = body(train_state, key, *data, **options)
        return (train_state, key), metrics

    data = parallel.replicate((tasks.train_W2, inputs.train_M2), mesh)
    run = parallel.wrap(chunk, mesh, cfg.parallel)
    return lambda state, num_steps: run(state, *data, num_steps=num_steps)


def cli() -> None:
    from launch import loop

    def guarded(cfg: TrainConfig) -> int:
        try:
            return main(cfg)
        except loop.Interrupted as stopped:
            print(f"{PROGRAM}: {stopped}", file=sys.stderr)
            return stopped.status
        except loop.NonFiniteError as error:
            print(f"{PROGRAM}: {error} in {cfg.workdir or 'the run folder'}", file=sys.stderr)
            return 1

    flags.run(guarded, TrainConfig, presets=PRESETS, doc=__doc__)


if __name__ == "__main__":
    cli()

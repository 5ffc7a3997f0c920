"""Train a transformer to learn modular arithmetic in context, and test it on tasks never seen.

A run folder is resumed by the same command. stdout ends with one line of JSON; progress goes to
stderr. Presets: demo (the default: minutes on a laptop), small (seconds, to try things), and the
paper's runs of depth 2, 4 and 6 (a GPU). Recipes: --flagfile=launch/recipes/NAME.flags.
"""

import dataclasses
import functools
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from launch import UsageError, flags, rundir
from launch.modgrok_config import (
    FREE,
    GROUPS,
    LATER,
    PRESETS,
    PROGRAM,
    TrainConfig,
    check_groups,
    group_file,
)

# What may differ between the processes of one run.
OF_ONE_PROCESS = ("process_id", "quiet", "compilation_cache")


def main(cfg: TrainConfig) -> int:
    began = time.monotonic()
    settings = dataclasses.asdict(cfg)
    # Every process looks before any can have written: `start` waits for all of them.
    folder = cfg.workdir or rundir.default_path(PROGRAM)
    # Folders of earlier versions lack later flags: these runs had no gates.
    plain = dataclasses.asdict(dataclasses.replace(cfg, norm="pre", latent_depth=False))
    later = {name: plain[name] for name in LATER}
    resuming = rundir.check(folder, settings, program=PROGRAM, free=FREE, later=later)
    check_groups(cfg, folder)
    from launch import parallel

    parallel.start(
        platform_devices=cfg.platform_devices,
        coordinator_address=cfg.coordinator_address,
        num_processes=cfg.num_processes,
        process_id=cfg.process_id,
        multiprocess=cfg.multiprocess,
        compilation_cache=cfg.compilation_cache,
    )
    parallel.check_same(repr(settings | dict.fromkeys(OF_ONE_PROCESS)))
    result = train(cfg, resuming=resuming)
    if parallel.is_first():
        rundir.summary_line({**result, "seconds": time.monotonic() - began})
    return 0


def train(cfg: TrainConfig, *, resuming: bool) -> dict[str, Any]:
    """Run in this process, whose devices are set up; returns what the summary line says."""
    from launch import loop, modgrok_report, parallel
    from launch import modgrok_setup as setup
    from launch.checkpoints import Checkpoints
    from launch.hoststate import from_process_0

    mesh = parallel.make_mesh(cfg.devices)
    if cfg.batch % (mesh.size * cfg.micro_batches):
        raise UsageError(
            f"--batch={cfg.batch}: expected a multiple of the {mesh.size} devices"
            + (f" x --micro_batches={cfg.micro_batches}" if cfg.micro_batches > 1 else "")
        )
    tasks, inputs = setup.prepare_data(cfg)
    group_W = setup.task_groups(cfg, tasks, workdir=cfg.workdir or None)
    parts = setup.make_parts(cfg, group_W)
    like = setup.abstract_state(cfg, parts)
    writer = parallel.is_first()
    # Process 0 decides: the others may be on machines that do not see its disk.
    resuming = bool(from_process_0(b"x" * resuming))
    new = os.fsencode(rundir.new_folder(PROGRAM)) if writer and not cfg.workdir else b""
    workdir = cfg.workdir or from_process_0(new).decode()
    with (
        _held(workdir, writer),
        Checkpoints(os.path.join(workdir, "checkpoints"), keep=cfg.keep) as checkpoints,
    ):
        restored, state, best = _begin(cfg, parts, like, checkpoints, resuming)
        start, state = restored.step if restored else 0, parallel.replicate(state, mesh)
        saved = {**dataclasses.asdict(cfg), "workdir": workdir}
        with rundir.RunDir(workdir, saved, program=PROGRAM, writer=writer) as folder:
            folder.truncate(start if restored else -1)
            if (groups := group_file(cfg)) is not None and not (folder.path / GROUPS).exists():
                folder.save_text(GROUPS, groups.read_text())
            say = rundir.speaker(cfg.quiet or not writer)
            say(f"{workdir}: {_greeting(cfg, parts, tasks, mesh, restored)}")
            evaluator = modgrok_report.Evaluator(cfg, parts, tasks, inputs, mesh, group_W=group_W)
            outcome = loop.run(
                state,
                start=start,
                best=best,
                cadence=loop.Cadence(
                    cfg.steps, cfg.log_every, cfg.eval_every, cfg.checkpoint_every
                ),
                chunk=_chunk(cfg, parts, tasks, inputs, mesh, group_W),
                evaluate=lambda state: evaluator.on_the_way(state[0], setup.key_for(cfg, 3)),
                target=cfg.target,
                checkpoints=checkpoints,
                rundir=folder,
                quiet=cfg.quiet or not writer,
            )
            checkpoints.wait()
            outcome, tested = _to_test(outcome, like, checkpoints)
            tested = parallel.replicate(tested, mesh)
            summary = evaluator.at_the_end(
                tested[0], outcome, setup.key_for(cfg, 4), folder, draw=cfg.figures, say=say
            )
    return {
        "program": PROGRAM,
        "workdir": workdir,
        "seconds": outcome.seconds,
        "steps": outcome.step,
        **summary,
        "resumed_from": restored.step if restored else None,
        "parameters": parts.model.num_params,
        "devices": mesh.size,
    }


@contextmanager
def _held(workdir: str, writer: bool) -> Iterator[None]:
    """`rundir.hold` by process 0; all raise its UsageError, so that none waits for the others."""
    from launch.hoststate import from_process_0

    with ExitStack() as stack:
        refusal = ""
        if writer:
            try:
                stack.enter_context(rundir.hold(workdir))
            except UsageError as error:
                refusal = str(error)
        if refusal := from_process_0(refusal.encode()).decode():
            raise UsageError(refusal)
        yield


def _begin(
    cfg: TrainConfig, parts: Any, like: Any, checkpoints: Any, resuming: bool
) -> tuple[Any, Any, Any]:
    """(checkpoint to go on from, None of a new run; its state; `loop.Best` so far)."""
    from launch import loop
    from launch import modgrok_setup as setup

    restored = checkpoints.restore(like) if resuming else None
    if restored is None:
        make = setup.state_maker(cfg, parts)
        return None, make(setup.key_for(cfg, 1), setup.key_for(cfg, 2)), loop.Best()
    best = checkpoints.restore(like, which="best", dispensable=True)
    if best is None or best.step > restored.step:
        # Damaged, gone, or left by a kill just after it was saved. Unless the best state is at
        # hand, tests of the steps to come choose another.
        best = restored if restored.meta["best_step"] == restored.step else None
        if best:
            checkpoints.save_best(*best)
    score = best.meta["best_score"] if best else None
    return restored, restored.state, loop.Best() if score is None else loop.Best(best.step, score)


def _to_test(outcome: Any, like: Any, checkpoints: Any) -> tuple[Any, Any]:
    """(outcome, state to test in the end): the best, or where there is none the last."""
    from launch import loop

    kept = None
    if outcome.best.step > 0:
        kept = checkpoints.restore(like, which="best", dispensable=True)
    if kept is None:
        return outcome._replace(best=loop.Best()), outcome.state
    return outcome, kept.state


def _greeting(cfg: TrainConfig, parts: Any, tasks: Any, mesh: Any, restored: Any) -> str:
    at = f"resuming at step {restored.step}" if restored else "compiling first"
    text = (
        f"{parts.model.num_params:,} parameters, {len(tasks.train_W2)} seen and "
        f"{len(tasks.unseen_U2)} unseen tasks mod {cfg.p}, {mesh.size} x "
        f"{mesh.devices.flat[0].platform}; {at}"
    )
    if parts.latent is not None and parts.latent.ramp_end > cfg.steps:
        text += (
            f"\nThe gates' weights are whole from step {parts.latent.ramp_end} on, and "
            f"--steps={cfg.steps}: no checkpoint of these steps is chosen as the best"
        )
    return text


def _chunk(cfg: TrainConfig, parts: Any, tasks: Any, inputs: Any, mesh: Any, group_W: Any) -> Any:
    """chunk(state, num_steps) over the mesh, where state is (TrainState, key of the batches)."""
    import modgrok
    from launch import parallel

    body = functools.partial(
        modgrok.train_chunk.__wrapped__,
        cfg=parts.model,
        tx=parts.tx,
        batch=cfg.batch,
        shots=cfg.shots,
        modulus=cfg.p,
        micro_batches=cfg.micro_batches,
        ema_decay=cfg.ema or None,
        latent=parts.latent,
    )

    def chunk(state: Any, task_W2: Any, input_M2: Any, *groups: Any, **options: Any) -> Any:
        train_state, key = state
        group_W = groups[0] if groups else None
        train_state, metrics = body(train_state, key, task_W2, input_M2, group_W=group_W, **options)
        return (train_state, key), metrics

    groups = () if group_W is None else (group_W,)
    data = parallel.replicate((tasks.train_W2, inputs.train_M2, *groups), mesh)
    run = parallel.wrap(chunk, mesh, cfg.parallel)
    return lambda state, num_steps: run(state, *data, num_steps=num_steps)


def cli() -> None:
    flags.run(_guarded, TrainConfig, presets=PRESETS, doc=__doc__)


def _guarded(cfg: TrainConfig) -> int:
    """`main`, with a sentence and a status for each way to end early."""
    try:
        return main(cfg)
    except UsageError:
        raise
    except KeyboardInterrupt:  # outside the loop, where there is nothing new to save
        print(f"{PROGRAM}: stopped; the same command continues", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        from launch import loop, parallel

        if isinstance(error, loop.Interrupted):
            print(f"{PROGRAM}: {error}", file=sys.stderr)
            return error.status
        if isinstance(error, loop.NonFiniteError):
            print(
                f"{PROGRAM}: {error}; the same command would end here again: try a smaller --lr "
                "or another --seed in a new --workdir",
                file=sys.stderr,
            )
            return 1
        if not parallel.is_alone():
            # An orderly exit waits for the other processes, which wait for this one.
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        raise


if __name__ == "__main__":
    cli()

"""Write the model of a run as a PyTorch checkpoint with the names of the paper's code.

The format follows the ending of --output: .safetensors, .npz, or .pt (which needs torch). Averaged
weights are written if the run keeps them. A run with gates (--latent_depth) is written as the
network that they select, an ordinary one of fewer blocks. With --prune, --output is a folder: that
network as a run that modgrok_train continues, optimiser included. stdout ends with one line of
JSON.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from launch import UsageError, flags, modgrok_config, rundir
from launch.flags import field

PROGRAM = "modgrok_export"
ENDINGS = (".safetensors", ".npz", ".pt", ".pth")


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    workdir: str = field("", "folder of the run")
    output: str = field("", "file to write: .safetensors, .npz, .pt or .pth; a folder with --prune")
    which: Literal["best", "latest"] = field("best", "checkpoint to take")
    overwrite: bool = field(False, "replace the file if it exists")
    prune: bool = field(False, "write the network that the gates select as a smaller run")
    group: str = field(
        "shared",
        "whose gates select, where there are several groups: shared (the mean of their logits, as "
        "unseen tasks have), a number, or union (what any group keeps; a .mask.npz beside the file "
        "says which group uses which)",
    )
    quiet: bool = field(False, "nothing on stderr")

    def validate(self) -> None:
        # os.path answers for names that are too long for a file as well.
        if not os.path.isfile(Path(self.workdir) / rundir.CONFIG):
            raise ValueError(
                f"--workdir={self.workdir}: expected the folder of a modgrok_train run, with its "
                f"{rundir.CONFIG}"
            )
        if self.group not in ("shared", "union") and not self.group.isdecimal():
            raise ValueError(f"--group={self.group}: expected shared, union or a number")
        if self.prune:
            if self.group == "union":
                raise ValueError("--group=union: a run has no mask; expected shared or a number")
            if not self.output:
                raise ValueError("--output=: expected the folder to write")
            there = Path(self.output)
            if os.path.exists(there) and not (there.is_dir() and not any(there.iterdir())):
                raise ValueError(f"--output={self.output}: expected a new or empty folder")
            return
        if Path(self.output).suffix not in ENDINGS:
            raise ValueError(f"--output={self.output}: expected one of {', '.join(ENDINGS)}")
        if os.path.exists(self.output) and not self.overwrite:
            raise ValueError(f"--output={self.output}: exists; --overwrite replaces it")
        if self.group == "union" and os.path.exists(_mask(self.output)) and not self.overwrite:
            raise ValueError(
                f"--output={self.output}: {_mask(self.output)} of --group=union exists; "
                "--overwrite replaces it"
            )
        if not os.path.isdir(Path(self.output).absolute().parent):
            raise ValueError(f"--output={self.output}: expected a folder that exists")


def _mask(output: str | Path) -> Path:
    """The file beside `output` that says which group uses which of its blocks."""
    return Path(output).with_name(f"{Path(output).stem}.mask.npz")


def run_settings(workdir: str, *, flag: str = "--workdir") -> modgrok_config.TrainConfig:
    """The settings that the run in `workdir`, named by `flag`, was made with."""
    try:
        stored = json.loads((Path(workdir) / rundir.CONFIG).read_text())
        program = stored.pop("program")
        if program != modgrok_config.PROGRAM:
            raise UsageError(f"{flag}={workdir}: belongs to {program}, expected a training run")
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
        return modgrok_config.TrainConfig(**values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{flag}={workdir}: its {rundir.CONFIG} is not one of this version ({error})"
        ) from error


class _Selected(NamedTuple):
    """A checkpoint after its gates, if it has any, have been applied."""

    step: int
    meta: dict[str, Any]  # best_score is None if it is not of these weights and blocks
    model: Any  # modgrok.Config
    state: Any  # TrainState without gates
    key: Any  # of the batches
    kept_layers: list[int] | None  # None: the run has no gates
    mask_GL: Any  # which group keeps which layer; None: no gates


def _select(cfg: ExportConfig, run: modgrok_config.TrainConfig) -> _Selected:
    """The chosen checkpoint, pruned to what its gates select; UsageError if it cannot be."""
    import numpy as np

    from launch import modgrok_setup
    from modgrok import latent_depth

    restored, (model, _, latent) = modgrok_setup.restore(
        run, cfg.workdir, cfg.which, flag="--workdir"
    )
    state, key = restored.state
    if latent is None:
        if cfg.prune:
            raise UsageError(f"--prune: the run in {cfg.workdir} has no gates (--latent_depth)")
        if cfg.group != "shared":
            raise UsageError(
                f"--group={cfg.group}: the run in {cfg.workdir} has no gates (--latent_depth)"
            )
        return _Selected(restored.step, restored.meta, model, state, key, None, None)

    logits_GL = np.asarray(state.tested["gates"]["logits_GL"])
    mask_GL = logits_GL > 0
    shared_L = np.asarray(latent_depth.shared_logits(logits_GL)) > 0
    if cfg.group == "union":
        keep_L = mask_GL.any(0)
    elif cfg.group == "shared":
        keep_L = shared_L
    elif int(cfg.group) < len(mask_GL):
        keep_L = mask_GL[int(cfg.group)]
    else:
        raise UsageError(f"--group={cfg.group}: expected 0 to {len(mask_GL) - 1}")
    if not keep_L.any():
        raise UsageError(
            f"--group={cfg.group}: every gate is closed at step {restored.step}; expected a model "
            "that keeps a block"
        )
    # The optimiser's state is that of the weights, cut as they are; gates and theirs are dropped.
    opt_state = state.opt_state.inner_states["weights"].inner_state
    pruned = state._replace(
        params=latent_depth.prune(state.params, keep_L),
        opt_state=latent_depth.prune(opt_state, keep_L),
        ema=None if state.ema is None else latent_depth.prune(state.ema, keep_L),
    )
    small = latent_depth.pruned_config(model, keep_L)
    kept = np.flatnonzero(keep_L)
    # The best score is that of unseen tasks, with shared gates, at the best step: no other's.
    scored = restored.step == restored.meta["best_step"] and (keep_L == shared_L).all()
    meta = restored.meta if scored else {"best_step": restored.step, "best_score": None}
    return _Selected(restored.step, meta, small, pruned, key, kept.tolist(), mask_GL[:, kept])


def main(cfg: ExportConfig) -> None:
    run = run_settings(cfg.workdir)
    chosen = _select(cfg, run)
    output = Path(cfg.output)
    result: dict[str, Any] = {
        "program": PROGRAM,
        "workdir": cfg.workdir,
        "output": str(output),
        "step": chosen.step,
        "averaged": chosen.state.ema is not None,
    }
    if chosen.kept_layers is not None:
        result |= {"layers": chosen.model.layers, "kept_layers": chosen.kept_layers}
    try:
        if cfg.prune:
            _write_run(output, run, chosen)
        else:
            _write_file(cfg, output, chosen)
            if cfg.group == "union" and chosen.mask_GL is not None:
                import numpy as np

                arrays = {"mask_GK": chosen.mask_GL, "kept_layers": np.array(chosen.kept_layers)}
                _replace(_mask(output), lambda part: np.savez(part, **arrays))
                result["mask"] = str(_mask(output))
    except OSError as error:
        raise UsageError(
            f"--output={cfg.output}: {error.strerror or error}; expected a place to write to"
        ) from error
    if not cfg.quiet:
        print(f"wrote {output}, the {cfg.which} checkpoint, step {chosen.step}", file=sys.stderr)
    rundir.summary_line(result)


def _write_file(cfg: ExportConfig, output: Path, chosen: _Selected) -> None:
    from modgrok import interop

    params, model = chosen.state.tested, chosen.model
    try:
        _replace(output, lambda part: interop.save_reference(part, params, model))
    except ImportError as error:
        raise UsageError(f"--output={cfg.output}: {error}") from error
    except ValueError as error:  # of a post-norm decoder, which the reference cannot be
        raise UsageError(f"--workdir={cfg.workdir}: {error}") from error


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    # Under another name first: a kill or a full disk leaves no half file and spoils no old one.
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _write_run(output: Path, run: modgrok_config.TrainConfig, chosen: _Selected) -> None:
    """A folder like that of a run of this many layers which has come to this step."""
    from launch.checkpoints import Checkpoints

    settings = dataclasses.replace(
        run,
        workdir=str(output),
        layers=chosen.model.layers,
        latent_depth=False,
        target_depth=None,
        task_groups="none",
    )
    with (
        rundir.RunDir(output, dataclasses.asdict(settings), program=modgrok_config.PROGRAM),
        Checkpoints(output / "checkpoints") as checkpoints,
    ):
        state = (chosen.state, chosen.key)
        checkpoints.save(chosen.step, state, chosen.meta)
        checkpoints.save_best(chosen.step, state, chosen.meta)


def cli() -> None:
    flags.run(main, ExportConfig, doc=__doc__)


if __name__ == "__main__":
    cli()

"""Write the model of a run as a PyTorch checkpoint with the names of the paper's code.

The format follows the ending of --output: .safetensors, .npz, or .pt (which needs torch). Averaged
weights are written if the run keeps them. stdout ends with one line of JSON.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Literal

from launch import UsageError, flags, modgrok_config, rundir
from launch.flags import field

PROGRAM = "modgrok_export"
_ENDINGS = (".safetensors", ".npz", ".pt", ".pth")


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    workdir: str = field("", "folder of the run")
    output: str = field("", "file to write: .safetensors, .npz, .pt or .pth")
    which: Literal["best", "latest"] = field("best", "checkpoint to take")
    overwrite: bool = field(False, "replace the file if it exists")
    quiet: bool = field(False, "nothing on stderr")

    def validate(self) -> None:
        if not (Path(self.workdir) / rundir.CONFIG).is_file():
            raise ValueError(
                f"--workdir={self.workdir}: expected the folder of a modgrok_train run, with its "
                f"{rundir.CONFIG}"
            )
        if Path(self.output).suffix not in _ENDINGS:
            raise ValueError(f"--output={self.output}: expected one of {', '.join(_ENDINGS)}")
        if Path(self.output).exists() and not self.overwrite:
            raise ValueError(f"--output={self.output}: exists; --overwrite replaces it")
        if not Path(self.output).absolute().parent.is_dir():
            raise ValueError(f"--output={self.output}: expected a folder that exists")


def run_settings(workdir: str) -> modgrok_config.TrainConfig:
    """The settings that the run in `workdir` was made with."""
    try:
        stored = json.loads((Path(workdir) / rundir.CONFIG).read_text())
        program = stored.pop("program")
        if program != modgrok_config.PROGRAM:
            raise UsageError(f"--workdir={workdir}: belongs to {program}, expected a training run")
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
        return modgrok_config.TrainConfig(**values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"--workdir={workdir}: its {rundir.CONFIG} is not one of this version ({error})"
        ) from error


def main(cfg: ExportConfig) -> None:
    run = run_settings(cfg.workdir)
    from launch.checkpoints import Checkpoints
    from modgrok import interop

    model, tx = modgrok_config.make_model(run)
    with Checkpoints(os.path.join(cfg.workdir, "checkpoints")) as checkpoints:
        like = modgrok_config.abstract_state(run, model, tx)
        restored = checkpoints.restore(like, which=cfg.which)
    if restored is None:
        raise UsageError(f"--workdir={cfg.workdir}: holds no {cfg.which} checkpoint yet")
    state = restored.state[0]
    params = state.params if state.ema is None else state.ema
    # Under another name first: a kill or a full disk leaves no half file and spoils no old one.
    output = Path(cfg.output)
    part = output.with_name(f".{output.stem}.part{output.suffix}")
    try:
        interop.save_reference(part, params, model)
        os.replace(part, output)
    except ImportError as error:
        raise UsageError(f"--output={cfg.output}: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    if not cfg.quiet:
        print(f"wrote {output}, the {cfg.which} checkpoint, step {restored.step}", file=sys.stderr)
    rundir.summary_line(
        {
            "program": PROGRAM,
            "workdir": cfg.workdir,
            "output": str(output),
            "step": restored.step,
            "averaged": state.ema is not None,
        }
    )


def cli() -> None:
    flags.run(main, ExportConfig, doc=__doc__)


if __name__ == "__main__":
    cli()

"""What a trained model learned: attention, features, circuits and the algorithm, on one page.

Reads a work directory of modgrok_train, or a checkpoint with the names of the paper's code (.pt,
.pth, .safetensors or .npz; then say --p, --shots, --num_tasks and --input_fraction as well). Writes
report.md with figures, scores.json with every score, and the numbers behind them as .npz, one file
for the network and one for each control: Ratio Matching, Bayes, and a random network, which go
through the same instruments. stdout ends with one line of JSON.
"""

import dataclasses
import functools
import json
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from launch import UsageError, modgrok_export, program, rundir
from launch.flags import field
from launch.modgrok_config import TrainConfig

PROGRAM = "modgrok_inspect"
PRESETS: dict[str, dict[str, object]] = {"quick": {}, "full": {"size": "full"}}
CONTROLS = ("random", "ratio_matching", "bayes")
# Of the run: read from a work directory, and to be given for a file.
OF_THE_RUN = ("p", "shots", "heads", "num_tasks", "task_rule", "num_unseen", "input_fraction")
OF_THE_RUN += ("exclude_zero", "reference_sampling", "extra_tokens")
NEEDED = ("p", "shots", "num_tasks", "input_fraction")
INPUT = "input"  # of an array: the digest of the files looked at and of the programs that looked
_REFERENCE_EXTRA = 18  # unused entries of the vocabulary of the paper's code


@dataclasses.dataclass(frozen=True)
class InspectConfig(program.SpreadConfig):
    checkpoint: str = field(
        "",
        "work directory of modgrok_train, or a .safetensors, .npz, .pt or .pth file",
        group="Model",
    )
    which: Literal["best", "latest"] = field("best", "checkpoint of a work directory to take")
    p: int | None = field(None, "modulus that the model of a file was trained with", min=5)
    shots: int | None = field(None, "examples in its sequences", min=3)
    heads: int | None = field(None, "its attention heads, where the file does not tell", min=1)
    num_tasks: int | None = field(None, "tasks that it was trained on", min=1)
    task_rule: Literal["random", "rectangular"] | None = field(None, "how they were chosen")
    num_unseen: int | None = field(None, "at most this many unseen tasks are tested on", min=2)
    input_fraction: float | None = field(
        None, "share of the inputs that it was trained on", min=0, max=1
    )
    exclude_zero: bool | None = field(None, "whether the task (0, 0) was left out")
    reference_sampling: bool | None = field(
        None, "whether tasks and inputs are those of the paper's code for --task_seed"
    )
    task_seed: int = field(
        0, "seed that chose the tasks and inputs of a file", min=0, max=2**31 - 1
    )
    extra_tokens: int | None = field(
        None, "unused entries of its vocabulary; for a file 0 or 18 unless said", min=0
    )

    size: Literal["quick", "full"] = field(
        "quick", "repetitions, sequences, shuffles", group="Page"
    )
    controls: tuple[str, ...] = field(CONTROLS, "what else to look at", choices=CONTROLS)
    interventions: bool = field(
        True, "silence heads and neurons, and put activations back: most of the work"
    )
    head: str = field("", "LAYER.HEAD whose components are drawn; empty: the best circle")
    together: tuple[str, ...] = field(
        (), "groups of heads to silence together, such as 2.1+2.2,3.0+3.1+3.2"
    )
    feature_shot: int | None = field(
        None, "shot (from 0) whose inputs are varied; none: in the middle", min=0
    )
    rows: int = field(
        1024,
        "sequences in one forward pass, which bounds memory; at least the 48 of a set "
        "(256 with --size=full)",
        min=1,
    )

    def validate(self) -> None:
        path = Path(self.checkpoint)
        if not self.checkpoint or not path.exists():
            raise ValueError(
                f"--checkpoint={self.checkpoint}: does not exist; expected the folder of a "
                f"modgrok_train run, or a file ending in {', '.join(modgrok_export.ENDINGS)}"
            )
        if path.is_dir() and not (path / rundir.CONFIG).is_file():
            raise ValueError(
                f"--checkpoint={self.checkpoint}: expected the folder of a modgrok_train run, with "
                f"its {rundir.CONFIG}"
            )
        if not path.is_dir() and path.suffix not in modgrok_export.ENDINGS:
            raise ValueError(
                f"--checkpoint={self.checkpoint}: expected a folder, or a file ending in "
                f"{', '.join(modgrok_export.ENDINGS)}"
            )
        if path.is_dir():
            if self.task_seed:
                raise ValueError(
                    f"--task_seed={self.task_seed}: expected none with the folder of a run, which "
                    "has its own"
                )
        else:
            if self.which != "best":
                raise ValueError(f"--which={self.which}: expected none with a file")
            for name in NEEDED:
                if getattr(self, name) is None:
                    raise ValueError(
                        f"--{name}=none: expected a value, since a file does not say how its model "
                        "was trained"
                    )
        if self.head and not _parse_head(self.head):
            raise ValueError(f"--head={self.head}: expected LAYER.HEAD, such as 1.0, from 0")
        if self.together and not self.interventions:
            raise ValueError(
                f"--together={','.join(self.together)}: expected none with --nointerventions"
            )
        for group in self.together:
            names = group.split("+")
            if not all(map(_parse_head, names)) or len(set(names)) < len(names):
                raise ValueError(
                    f"--together={','.join(self.together)}: expected groups such as 2.1+2.2, each "
                    "head once"
                )
        if len(set(self.controls)) != len(self.controls):
            raise ValueError(
                f"--controls={','.join(self.controls)}: expected some of {', '.join(CONTROLS)}, "
                "each once"
            )


def _parse_head(text: str) -> tuple[int, ...]:
    parts = text.split(".")
    return tuple(map(int, parts)) if len(parts) == 2 and all(map(str.isdecimal, parts)) else ()


def _files(cfg: InspectConfig) -> Iterable[Path]:
    path = Path(cfg.checkpoint)
    if not path.is_dir():
        return (path,)
    folder = path / "checkpoints" / cfg.which
    return (path / rundir.CONFIG, *sorted(x for x in folder.rglob("*") if x.is_file()))


def _instruments() -> Iterable[Path]:
    """The sources of what measures."""
    root = Path(__file__).parents[1]
    patterns = ("launch/modgrok_instruments*.py", "modgrok/*.py")
    return [path for pattern in patterns for path in sorted(root.glob(pattern))]


def _prepare(cfg: InspectConfig, say: Callable[..., None]) -> tuple[Any, str]:
    """Everything that is known to be good before anything is written, and its files' digest."""
    # Before they are read; what another version measured is not taken up.
    digest = program.digest([*_files(cfg), *_instruments()])
    if Path(cfg.checkpoint).is_dir():
        run, model, params, source = _from_run(cfg)
    else:
        run, model, params, source = _from_file(cfg)
    from launch import modgrok_setup
    from launch.modgrok_instruments_common import Problem

    _check_model(cfg, run, params)
    gate_L, posterior = _latent_depth(params)
    layers = list(range(model.layers)) if gate_L is None else np.flatnonzero(gate_L).tolist()
    if not layers:
        raise UsageError(
            f"--checkpoint={cfg.checkpoint}: every gate is closed in its {cfg.which} checkpoint, "
            "for a task in no group; expected a network with an open block"
        )
    if cfg.head:
        _check_heads(f"--head={cfg.head}: expected", [cfg.head], layers, model)
    together = _heads_together(cfg, layers, model)
    shot = (run.shots - 1) // 2 if cfg.feature_shot is None else cfg.feature_shot
    if shot > run.shots - 2:
        raise UsageError(
            f"--feature_shot={shot}: expected 0 to {run.shots - 2}, a shot with another after it"
        )
    tasks, inputs = modgrok_setup.prepare_data(run)
    _check_inputs(cfg, run, inputs)
    if gate_L is not None:
        params, model, words = _open_blocks(params, model, gate_L, layers)
        source += words
    problem = Problem(
        params=params,
        model=model,
        open_layers=None if gate_L is None else tuple(layers),
        posterior=posterior,
        tasks=tasks,
        inputs=inputs,
        modulus=run.p,
        shots=run.shots,
        feature_shot=shot,
        together=together,
        source=source,
    )
    return problem, digest


def _check_model(cfg: InspectConfig, run: TrainConfig, params: Any) -> None:
    """UsageError if the instruments cannot look at such a model."""
    import jax

    if not all(bool(np.isfinite(x).all()) for x in jax.tree.leaves(params)):
        raise UsageError(
            f"--checkpoint={cfg.checkpoint}: has weights that are not finite; expected sound ones"
        )
    if run.p < 5:
        raise UsageError(
            f"--checkpoint={cfg.checkpoint}: its model has p={run.p}; expected 5 or more, below "
            "which there are no frequencies to tell apart"
        )
    if run.shots < 3:
        raise UsageError(
            f"--checkpoint={cfg.checkpoint}: its model has shots={run.shots}; expected 3 or more"
        )


def _check_inputs(cfg: InspectConfig, run: TrainConfig, inputs: Any) -> None:
    """UsageError if no pair of prompts can be made of them."""
    from modgrok import prompts

    try:
        prompts.prompt_inputs(inputs.train_M2, modulus=run.p)
    except ValueError as error:
        raise UsageError(
            f"--checkpoint={cfg.checkpoint}: its model was trained with --input_fraction="
            f"{run.input_fraction:g}, and none of these {len(inputs.train_M2)} inputs has another "
            "on its line through the origin and one off it; expected more inputs"
        ) from error


def _heads_together(
    cfg: InspectConfig, layers: list[int], model: Any
) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Groups of heads, each (place among the open blocks, head); UsageError if there are none."""
    groups = [group.split("+") for group in cfg.together]
    flag = f"--together={','.join(cfg.together)}: expected heads"
    _check_heads(flag, [name for group in groups for name in group], layers, model)
    return tuple(tuple((layers.index(i), j) for i, j in map(_parse_head, g)) for g in groups)


def _open_blocks(
    params: Any, model: Any, gate_L: np.ndarray, layers: list[int]
) -> tuple[Any, Any, str]:
    """The network of open blocks alone, and words about them.

    Closed blocks are the identity: heads and neurons of theirs are no part of the network.
    """
    from modgrok import latent_depth

    words = (
        " Open by its gates, rounded as for a task in no group: blocks "
        f"{', '.join(map(str, layers))}; closed ones are left out."
    )
    pruned = latent_depth.prune(params, gate_L)
    return pruned, latent_depth.pruned_config(model, gate_L), words


def _check_heads(flag: str, names: Sequence[str], layers: list[int], model: Any) -> None:
    """UsageError if these are no heads of open blocks."""
    known = f"0.0 to {model.layers - 1}.{model.heads - 1}, the layers and heads of this model"
    if len(layers) < model.layers:
        known += f", in its open blocks {', '.join(map(str, layers))}"
    if any(i not in layers or j >= model.heads for i, j in map(_parse_head, names)):
        raise UsageError(f"{flag} {known}")


def _from_run(cfg: InspectConfig) -> tuple[TrainConfig, Any, Any, str]:
    from launch import modgrok_setup

    run = modgrok_export.run_settings(cfg.checkpoint, flag="--checkpoint")
    for name in OF_THE_RUN:
        asked, there = getattr(cfg, name), getattr(run, name)
        if asked is not None and asked != there:
            raise UsageError(
                f"--{name}={asked}: the run in {cfg.checkpoint} has {name}={there}; expected that, "
                "or the flag left out"
            )
    restored, parts = modgrok_setup.restore(run, cfg.checkpoint, cfg.which, flag="--checkpoint")
    state = restored.state[0]
    averaged = "averaged weights" if state.ema is not None else "weights"
    source = (
        f"The {cfg.which} checkpoint of a modgrok_train run, step {restored.step}, {averaged}: "
        + _words(run, parts.model)
    )
    return run, parts.model, state.tested, source


def _from_file(cfg: InspectConfig) -> tuple[TrainConfig, Any, Any, str]:
    from modgrok import interop
    from modgrok.tasks import is_prime

    try:
        model, params = interop.load_reference(cfg.checkpoint, heads=cfg.heads)
    except (OSError, ValueError, ImportError) as error:
        hint = " (--heads)" if "pass heads=" in str(error) else ""
        raise UsageError(f"--checkpoint={cfg.checkpoint}: {error}{hint}") from error
    extra = model.vocab - cfg.p
    allowed = (0, _REFERENCE_EXTRA) if cfg.extra_tokens is None else (cfg.extra_tokens,)
    if extra not in allowed:
        moduli = [model.vocab - x for x in allowed if model.vocab - x >= 5]
        moduli = " or ".join(str(p) for p in moduli if is_prime(p))
        ways = [f"--p={moduli}"] if moduli else []
        if extra >= 0:
            ways.append(f"--extra_tokens={extra} if the rest of them are unused")
        raise UsageError(
            f"--p={cfg.p}: the model of {cfg.checkpoint} has {model.vocab} tokens; expected "
            f"{', or '.join(ways) or 'a smaller --p'}"
        )
    given = {name: getattr(cfg, name) for name in OF_THE_RUN if getattr(cfg, name) is not None}
    run = TrainConfig(
        **{**given, "extra_tokens": extra, "heads": model.heads},
        seed=cfg.task_seed,
        width=model.width,
        layers=model.layers,
        mlp_ratio=model.mlp_ratio,
        batch=cfg.num_tasks,
    )
    try:
        run.validate()
    except ValueError as error:
        raise UsageError(str(error)) from error
    return run, model, params, f"The model of a file: {_words(run, model)}"


def _words(run: TrainConfig, model: Any) -> str:
    return (
        f"p = {run.p}, {run.num_tasks} tasks trained on, {run.input_fraction:.0%} of the inputs, "
        f"{run.shots} shots, {model.layers} blocks of width {model.width} with {model.heads} heads."
    )


def _latent_depth(params: Any) -> tuple[Any, Any]:
    """Rounded gates of a task in no group, and what the gates say; None where there are none."""
    if "gates" not in params:
        return None, None
    from modgrok import latent_depth

    logits_L = latent_depth.shared_logits(params["gates"]["logits_GL"])
    return latent_depth.rounded(logits_L), latent_depth.posterior(params)


def _sharing(devices: int, sequences: int) -> int:
    """How many devices share the sequences evenly: their number must not depend on the devices."""
    return max(n for n in range(1, devices + 1) if sequences % n == 0)


def _work(
    cfg: InspectConfig, prepared: tuple[Any, str], folder: rundir.RunDir, say: Callable[..., None]
) -> tuple[dict[str, Any], program.Arrays]:
    from launch import modgrok_inspect_page as pages
    from launch import modgrok_inspect_scores as scoring
    from launch import modgrok_instruments, parallel
    from launch import modgrok_instruments_common as common

    problem, digest = prepared
    size = common.SIZES[cfg.size]
    there = parallel.make_mesh(cfg.devices).size
    mesh = parallel.make_mesh(_sharing(there, size.sequences))
    if mesh.size < there:
        say(f"{mesh.size} of {there} devices, which share {size.sequences} sequences evenly")
    key = program.key_for(cfg, 1)
    look = common.Look(problem, size, key, cfg.rows, cfg.interventions, mesh, say)
    names = ("network", *cfg.controls)
    say(f"{problem.source} Looking at {', '.join(names)}; compiling first")
    arrays: dict[str, dict[str, np.ndarray]] = {}
    for name in names:
        kept, keep = _kept(folder, name, digest), functools.partial(folder.save_arrays, name)
        arrays[name] = modgrok_instruments.measure(name, look, kept, keep)
    own = arrays["network"]
    circle_LH = own["circle_log_RLHC"][..., :2].mean((0, -1))
    best = np.unravel_index(circle_LH.argmax(), circle_LH.shape)
    best = (scoring.layer_numbers(own)[best[0]], best[1])
    own["drawn_head"] = np.array(_parse_head(cfg.head) or best)
    if problem.posterior is not None:
        for name, value in problem.posterior._asdict().items():
            own[f"posterior_{name}"] = np.asarray(value)
    scores = {name: scoring.scores(arrays[name]) for name in names}
    about = pages.About(
        command=_command(cfg),
        source=problem.source,
        modulus=problem.modulus,
        shots=problem.shots,
        feature_shot=problem.feature_shot,
        size=cfg.size,
        repetitions=size.repetitions,
        sequences=size.sequences,
        figures=cfg.figures,
    )
    folder.save_text("scores.json", json.dumps(scores, allow_nan=False) + "\n")
    folder.save_text("report.md", pages.page(scores, about))
    heads = {name: scoring.headline(score) for name, score in scores.items()}
    return {"report": "report.md", "scores": heads.pop("network"), "controls": heads}, arrays


def _kept(folder: rundir.RunDir, name: str, digest: str) -> dict[str, np.ndarray]:
    """What a run that was killed has measured of the same checkpoint."""
    try:
        arrays = rundir.read_arrays(folder.path / f"{name}.npz")
    except rundir.Unreadable:
        arrays = {}
    same = str(arrays.get(INPUT)) == digest
    return arrays if same else {INPUT: np.array(digest)}


def _command(cfg: InspectConfig) -> str:
    """The flags on which the numbers depend."""
    words = ["python", "-m", f"launch.{PROGRAM}"]
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        if f.name not in (*program.FREE, "rows") and value != f.default:
            text = ",".join(value) if isinstance(value, tuple) else value
            words.append(f"--{f.name}={str(text).lower() if isinstance(text, bool) else text}")
    return shlex.join(words)


def _draw(arrays: program.Arrays) -> dict[str, Any]:
    from launch import modgrok_inspect_drawings

    return modgrok_inspect_drawings.draw(arrays)


_PROGRAM = program.Program(PROGRAM, _files, _prepare, _work, _draw, free=("rows",))


def cli() -> None:
    program.cli(_PROGRAM, InspectConfig, PRESETS, __doc__)


if __name__ == "__main__":
    cli()

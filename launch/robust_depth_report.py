"""One page on "Blessing of Depth in Linear Regression": each claim, and what was found here.

Runs the experiments b1 to b5 (diagonal networks) and d1 to d4 (matrices, ReLU networks, baselines,
cost) and writes report.md with tables and figures. Experiments that a killed report has finished
are not run again. Files: NAME.npz, the numbers of each. stdout ends with one line of JSON.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from launch import program, rundir
from launch.flags import field

PROGRAM = "robust_depth_report"
PRESETS: dict[str, dict[str, object]] = {"quick": {}, "full": {"size": "full"}}
NAMES = ("b1", "b2", "b3", "b4", "b5", "d1", "d2", "d3", "d4")


@dataclasses.dataclass(frozen=True)
class ReportConfig(program.RunConfig):
    size: Literal["quick", "full"] = field(
        "quick", "how many trials, steps and radii", group="Report"
    )
    sections: tuple[str, ...] = field(NAMES, "experiments to run", choices=NAMES)

    def validate(self) -> None:
        if not self.sections or len(set(self.sections)) != len(self.sections):
            raise ValueError(
                f"--sections={','.join(self.sections)}: expected one or more of "
                f"{', '.join(NAMES)}, each once"
            )


def _sections() -> dict[str, Any]:
    from launch import robust_depth_beyond, robust_depth_diagonal

    return robust_depth_diagonal.SECTIONS | robust_depth_beyond.SECTIONS


def _prepare(cfg: ReportConfig, say: Callable[..., None]) -> None:
    return None


def _work(
    cfg: ReportConfig, _: None, folder: rundir.RunDir, say: Callable[..., None]
) -> tuple[dict[str, Any], program.Arrays]:
    from launch.robust_depth_sections import SIZES

    sections = _sections()
    say(f"{len(cfg.sections)} sections of size {cfg.size}; each is compiling first")
    arrays: dict[str, Any] = {}
    for number, name in enumerate(cfg.sections):
        section = sections[name]
        kept = _kept_arrays(folder, name)
        say(f"{name} ({number + 1}/{len(cfg.sections)}): {section.title}" + "; kept" * bool(kept))
        # The key goes by name: a section is the same in any selection.
        key = program.key_for(cfg, NAMES.index(name))
        arrays[name] = kept or dict(section.run(SIZES[cfg.size], key))
        folder.save_arrays(name, **arrays[name])
    readings = {name: sections[name].read(arrays[name]) for name in cfg.sections}
    folder.save_text("report.md", _page(cfg, readings))
    for name, reading in readings.items():
        say(f"{name} {reading.verdict}: {reading.found}")
    verdicts = {name: reading.verdict for name, reading in readings.items()}
    numbers = {name: reading.numbers for name, reading in readings.items()}
    return {"report": "report.md", "verdicts": verdicts, "numbers": numbers}, arrays


def _kept_arrays(folder: rundir.RunDir, name: str) -> dict[str, np.ndarray] | None:
    try:
        return rundir.read_arrays(folder.path / f"{name}.npz")
    except rundir.Unreadable:  # run again
        return None


def _page(cfg: ReportConfig, readings: dict[str, Any]) -> str:
    from launch.robust_depth_sections import table

    sections = _sections()
    parts = [
        "# Depth and robustness: what was found",
        f"`python -m launch.robust_depth_report --size={cfg.size} --seed={cfg.seed}`. The claims: "
        'Ma & Fattahi, "Blessing of Depth in Linear Regression" (NeurIPS 2022, arXiv '
        "2207.07612). Cells are medians with quartiles unless a text says otherwise; p is the "
        "fraction of corrupted rows, N the depth.",
        table(
            ["", "claim", "verdict"],
            [[name, sections[name].claim, r.verdict] for name, r in readings.items()],
        ),
    ]
    for name, reading in readings.items():
        section = sections[name]
        parts += [
            f"## {name}. {section.title}",
            f"Claim: {section.claim}",
            f"Found: {reading.found} **{reading.verdict.capitalize()}.**",
            reading.table,
        ]
        if cfg.figures and section.draw is not None:
            parts.append(f"![{section.title}](figures/{name}.png)")
    return "\n\n".join(parts) + "\n"


def _draw(arrays: program.Arrays) -> dict[str, Any]:
    sections = _sections()
    drawers = {name: sections[name].draw for name in arrays}
    return {name: draw(arrays[name]) for name, draw in drawers.items() if draw is not None}


_PROGRAM = program.Program(PROGRAM, lambda cfg: (), _prepare, _work, _draw)


def cli() -> None:
    program.cli(_PROGRAM, ReportConfig, PRESETS, __doc__)


if __name__ == "__main__":
    cli()

"""Deep diagonal networks on sparse regression with gross outliers: one setting, several depths.

Every trial draws a problem y = X theta + s of which a part of the rows is grossly corrupted, and
trains a network theta = w_1 * ... * w_N of each depth on it by the sub-gradient method, on the
mean absolute residual. Files: records.npz (loss and error of each trial and depth by step).
stdout ends with one line of JSON.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from launch import program, robust_depth_common
from launch.flags import field

PROGRAM = "robust_depth_run"
PRESETS: dict[str, dict[str, object]] = {
    "small": {"rows": 48, "dim": 60, "sparsity": 2, "steps": 8000},
    "medium": {},
    "large": {"rows": 120, "dim": 200, "sparsity": 4},
}


@dataclasses.dataclass(frozen=True)
class DepthConfig(robust_depth_common.ProblemConfig):
    depths: tuple[int, ...] = field((1, 2, 3, 4, 5), "layers N to compare", min=1, group="Depths")
    outlier_fraction: float = field(0.1, "share p of the rows that is corrupted", min=0)
    init_scale: float | None = field(
        None, "size alpha of the start; none: measured ones, by depth", min=0
    )
    baselines: bool = field(
        True, "also least squares, Huber, RANSAC and l1-penalised LAD (needs scikit-learn)"
    )

    def validate(self) -> None:
        super().validate()
        robust_depth_common.check_values("depths", self.depths, least=1)
        robust_depth_common.check_values(
            "outlier_fraction", (self.outlier_fraction,), least=0, below=1
        )


def _prepare(cfg: DepthConfig, say: Callable[..., None]) -> Any:
    return robust_depth_common.make_grid(
        cfg, depths=cfg.depths, fractions=(cfg.outlier_fraction,), scales=(cfg.init_scale,)
    )


def _work(
    cfg: DepthConfig, grid: Any, folder: Any, say: Callable[..., None]
) -> tuple[dict[str, Any], program.Arrays]:
    from robust_depth import sweep

    spans = robust_depth_common.spans(0, cfg.trials, cfg.chunk)
    parts: list[dict[str, np.ndarray]] = []
    say(f"{cfg.trials} trials x depths {','.join(map(str, cfg.depths))}; compiling first")
    tell = robust_depth_common.progress(say, cfg.trials)
    for number, ((_, stop), part) in enumerate(robust_depth_common.chunks(cfg, grid, spans)):
        _check_diverged(cfg, grid, part["loss_TSR"])
        parts.append(part)
        rate_S = sweep.success_rate(part["error_TSR"][..., -1], threshold=cfg.threshold)
        rates = {f"success_rate_depth_{n}": r for n, r in zip(cfg.depths, rate_S, strict=True)}
        folder.scalars(number, {"trials": stop, **rates})
        tell(stop, "  ".join(f"N={n}: {r:.2f}" for n, r in zip(cfg.depths, rate_S, strict=True)))
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    arrays |= {"step": grid.record_steps, "depth": np.array(cfg.depths)}
    errors = _baselines(cfg, grid, say) if cfg.baselines else {}
    return _result(cfg, arrays, errors), {"records": arrays, "baselines": errors}


def _check_diverged(cfg: DepthConfig, grid: Any, loss_TSR: np.ndarray) -> None:
    """FloatingPointError that names step and norm, found by running one of the trials again."""
    bad = np.argwhere(~np.isfinite(loss_TSR))
    if not len(bad):
        return
    from robust_depth import method, sweep

    trial, at, _ = bad[0]
    setting = grid.settings[at]
    key = sweep.trial_keys(program.key_for(cfg, 0), int(trial), int(trial) + 1)[0]
    _, info_R = method.run(
        sweep.trial_start(key, grid, setting),
        sweep.trial_problem(key, grid, setting.fraction),
        step_size=robust_depth_common.step_size(cfg),
        num_steps=grid.num_steps,
        record_every=grid.record_every,
    )
    text = method.diverged(info_R, record_every=grid.record_every) or "the loss is not finite"
    raise FloatingPointError(f"--step_size={cfg.step_size:g}: at depth {setting.depth} {text}")


def _baselines(cfg: DepthConfig, grid: Any, say: Callable[..., None]) -> dict[str, np.ndarray]:
    """Relative error of each baseline on each trial."""
    try:
        import sklearn  # noqa: F401
    except ModuleNotFoundError:
        say("no baselines: scikit-learn is missing")
        return {}
    from robust_depth import baselines, sweep

    solvers = {
        "least_squares": baselines.least_squares,
        "huber": baselines.huber,
        "ransac": baselines.ransac,
        "lad_lasso": baselines.lad_lasso,
    }
    errors: dict[str, list[float]] = {name: [] for name in solvers}
    for key in sweep.trial_keys(program.key_for(cfg, 0), 0, cfg.trials):
        x_MD, y_M, theta_D = map(
            np.asarray, sweep.trial_problem(key, grid, np.float32(cfg.outlier_fraction))
        )
        for name, solve in solvers.items():
            off_D = np.asarray(solve(x_MD, y_M)) - theta_D
            errors[name].append(float(np.linalg.norm(off_D) / np.linalg.norm(theta_D)))
    for name, error_T in errors.items():
        say(f"{name}: median relative error {np.median(error_T):.2g}")
    return {name: np.array(error_T) for name, error_T in errors.items()}


def _result(
    cfg: DepthConfig, arrays: dict[str, np.ndarray], errors: dict[str, np.ndarray]
) -> dict[str, Any]:
    from robust_depth import sweep, theory

    records = sweep.Records(arrays["loss_TSR"], arrays["error_TSR"])
    last_TS, best_TS = records.error_TSR[..., -1], np.asarray(records.best_error_TS())
    enter_TS = np.asarray(theory.entry_time(records.error_TSR, arrays["step"]))
    exit_TS = np.asarray(theory.exit_time(records.error_TSR, arrays["step"]))

    def by_depth(values_TS: np.ndarray) -> dict[str, Any]:
        return {str(n): values_TS[..., i].tolist() for i, n in enumerate(cfg.depths)}

    return {
        "steps": cfg.steps,
        "relative_error": by_depth(last_TS),
        "success_rate": by_depth(sweep.success_rate(last_TS, threshold=cfg.threshold)),
        "best_relative_error": by_depth(best_TS),
        "entry_time": by_depth(enter_TS),
        "exit_time": by_depth(exit_TS),
        "loss": by_depth(records.loss_TSR[..., -1].mean(0)),
        "baselines": {name: error_T.tolist() for name, error_T in errors.items()},
        "trials": cfg.trials,
    }


def _draw(arrays: program.Arrays) -> dict[str, Any]:
    from robust_depth import figures

    records = arrays["records"]
    labels = [f"N = {depth}" for depth in records["depth"]]
    title = "Error of the estimate by depth: median and quartiles"
    return {
        "error": figures.error_curves(
            records["step"], records["error_TSR"], labels, title=title, threshold=0.05
        ),
        "loss": figures.error_curves(
            records["step"],
            records["loss_TSR"],
            labels,
            title="Loss by depth: median and quartiles",
            ylabel="mean absolute residual",
        ),
    }


_PROGRAM = program.Program(
    PROGRAM, lambda cfg: (), _prepare, _work, _draw, free=("chunk", "memory_gib")
)


def cli() -> None:
    program.cli(_PROGRAM, DepthConfig, PRESETS, __doc__)


if __name__ == "__main__":
    cli()

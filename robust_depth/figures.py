"""Figures of the experiments: functions of arrays, which return a matplotlib figure to save.

Axes: T trials, S curves, R records, F fractions, G radii.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart.
_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7")
_MARKERS = "osD^vP*"


def error_curves(
    step_R: Any,
    error_TSR: Any,
    labels: Sequence[str],
    *,
    title: str = "",
    ylabel: str = "relative error",
    threshold: float | None = None,
) -> "Figure":
    """The median over trials of each curve, with the quartiles shaded, against steps.

    Raises:
        ValueError: for shapes that do not fit.
    """
    step_R, error_TSR = np.asarray(step_R), np.asarray(error_TSR, float)
    if error_TSR.ndim != 3 or error_TSR.shape[1:] != (len(labels), len(step_R)):
        raise ValueError(
            f"error_TSR has shape {error_TSR.shape}, expected (trials, {len(labels)}, "
            f"{len(step_R)}): one curve for each label, one entry for each step"
        )
    figure, axes = _new(title, "steps", ylabel)
    for curve, label in enumerate(labels):
        # A trial that diverged is worse than all others.
        error_TR = np.nan_to_num(error_TSR[:, curve], nan=np.inf, posinf=np.inf)
        low_R, middle_R, high_R = np.quantile(
            error_TR, (0.25, 0.5, 0.75), axis=0, method="inverted_cdf"
        )
        colour = _COLOURS[curve % len(_COLOURS)]
        axes.plot(step_R, np.where(np.isfinite(middle_R), middle_R, np.nan), color=colour)
        axes.plot([], [], color=colour, label=label)
        axes.fill_between(
            step_R, low_R, high_R, where=np.isfinite(high_R), color=colour, alpha=0.2, lw=0
        )
    if threshold is not None:
        axes.axhline(threshold, ls=":", color="#666666", label=f"success, {threshold:g}")
    axes.set_yscale("log")
    axes.legend(fontsize="small")
    return figure


def success_map(
    rate_SF: Any, depths: Sequence[int], fractions: Sequence[float], *, title: str = ""
) -> "Figure":
    """Share of the trials that succeed, by depth (rows) and outlier fraction (columns).

    Raises:
        ValueError: for shapes that do not fit.
    """
    rate_SF = np.asarray(rate_SF, float)
    if rate_SF.shape != (len(depths), len(fractions)):
        raise ValueError(
            f"rate_SF has shape {rate_SF.shape}, expected ({len(depths)}, {len(fractions)})"
        )
    figure, axes = _new(title or "Share of trials that succeed", "outlier fraction", "depth N")
    image = axes.imshow(rate_SF, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
    axes.set_xticks(range(len(fractions)), [f"{fraction:g}" for fraction in fractions])
    axes.set_yticks(range(len(depths)), [str(depth) for depth in depths])
    for (row, column), rate in np.ndenumerate(rate_SF):
        colour = "white" if rate < 0.5 else "black"
        axes.text(column, row, f"{rate:.2f}", ha="center", va="center", color=colour)
    figure.colorbar(image, label="share")
    return figure


def drop_curves(
    radius_G: Any, drops: Mapping[str, Any], slopes: Mapping[str, float], *, title: str = ""
) -> "Figure":
    """How far the loss falls within a ball, by its radius, log-log; slopes go to the legend."""
    figure, axes = _new(
        title or "Largest drop of the loss in an l_inf ball", "radius gamma", "drop"
    )
    for index, (label, drop_G) in enumerate(drops.items()):
        drop_G = np.asarray(drop_G, float)
        name = f"{label}, slope {slopes[label]:.2f}" if label in slopes else label
        axes.plot(
            np.asarray(radius_G),
            np.where(drop_G > 0, drop_G, np.nan),  # which a log axis cannot show
            marker=_MARKERS[index % len(_MARKERS)],
            ms=3,
            color=_COLOURS[index % len(_COLOURS)],
            label=name,
        )
    axes.set(xscale="log", yscale="log")
    axes.legend(fontsize="small")
    return figure


def entry_times(predicted: Mapping[str, Any], measured: Mapping[str, Any]) -> "Figure":
    """Measured against predicted steps until the error enters, one colour for each label."""
    figure, axes = _new("Steps until the error enters", "predicted", "measured")
    everything = []
    for index, (label, predicted_T) in enumerate(predicted.items()):
        pair = np.asarray(predicted_T, float), np.asarray(measured[label], float)
        axes.plot(
            *pair,
            ls="",
            marker=_MARKERS[index % len(_MARKERS)],
            ms=4,
            color=_COLOURS[index % len(_COLOURS)],
            label=label,
        )
        everything += [part[np.isfinite(part)] for part in pair]
    span = np.concatenate(everything)
    if span.size:
        ends = np.array([span.min(), span.max()])
        axes.plot(ends, ends, "-", color="#666666", lw=1, label="equal")
        for factor in (0.75, 1.25):
            axes.plot(ends, factor * ends, ":", color="#666666", lw=1)
    axes.set(xscale="log", yscale="log")
    axes.legend(fontsize="small")
    return figure


def _new(title: str, xlabel: str, ylabel: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return figure, axes

"""Figures of a training run and of its evaluation.

Every function takes arrays and returns a `matplotlib.figure.Figure` for the caller to save; pyplot
and its global state are not used. The four sets go by the fields of `evaluation.Evaluation`:
seen_train, seen_heldout, unseen_train, unseen_heldout (tasks, then inputs); any may be missing.

Axes: N records  S shots  W seen tasks  U unseen tasks  P the modulus
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from modgrok.figure_style import BLUE, GREEN, GREY, SET_TITLES, VERMILION, new_figure, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLANK = "#DDDDDD"
# Colour tells seen from unseen tasks, line and marker tell the inputs: readable in grey as well.
_STYLES = {
    "seen_train": (BLUE, "-", "o"),
    "seen_heldout": (BLUE, "--", "s"),
    "unseen_train": (VERMILION, "-", "o"),
    "unseen_heldout": (VERMILION, "--", "s"),
}
SET_NAMES = tuple(_STYLES)


def training_curves(
    history: Mapping[str, ArrayLike], *, modulus: int, best_step: int | None = None
) -> "Figure":
    """Loss, and accuracy at the last shot on the four sets, against steps.

    Args:
        history: columns of one length N. "step" is needed; "loss" (nats per answer) and the names
            of sets (accuracy, 0 to 1) are drawn where given. NaN means not recorded at that step,
            so the columns may have been recorded at different intervals.
        modulus: p; chance is ln p nats and accuracy 1/p.
        best_step: marked in both panels when given.
    """
    _check_names(history, ("step", "loss", *SET_NAMES))
    columns = {name: np.asarray(column, float) for name, column in history.items()}
    if "step" not in columns:
        raise ValueError("history lacks the column step")
    step_N = columns.pop("step")
    for name, column_N in columns.items():
        if column_N.shape != step_N.shape:
            raise ValueError(
                f"history[{name!r}] has shape {column_N.shape}, expected {step_N.shape} as step has"
            )

    figure = new_figure(height=6.6)
    top, bottom = figure.subplots(2, sharex=True, height_ratios=(2, 3))
    top.set(title=f"Training loss, p = {modulus}", ylabel="loss (nats per answer)")
    bottom.set(title="Accuracy at the last shot", xlabel="training steps")
    for name in ("loss", *SET_NAMES):
        if name not in columns:
            continue
        there_N = np.isfinite(columns[name])
        x_N, y_N = step_N[there_N], columns[name][there_N]
        if name == "loss":
            top.plot(x_N, y_N, color="black", lw=1.2, label="training loss")
        else:
            _plot_set(bottom, name, x_N, y_N)
    chance = np.log(modulus)
    top.axhline(chance, color=GREY, ls=":", label=f"chance (ln p = {chance:.2f})")
    _accuracy_axis(bottom, modulus)
    if best_step is not None:
        for axes in (top, bottom):
            axes.axvline(best_step, color=GREEN, zorder=1, label=f"best step ({best_step})")
    top.legend(frameon=False)
    _legend_below(bottom)
    return figure


def accuracy_by_shots(
    accuracy: Mapping[str, ArrayLike],
    *,
    modulus: int,
    bayes_S: ArrayLike | None = None,
    ratio_matching_S: ArrayLike | None = None,
) -> "Figure":
    """Accuracy against the number of examples before the query, with the oracles' curves.

    Args:
        accuracy: name of a set -> accuracy_S, 0 to 1, after 0, 1, 2, ... examples.
        modulus: p; chance is 1/p.
        bayes_S, ratio_matching_S: accuracy of the oracles, drawn where given.
    """
    _check_names(accuracy, SET_NAMES)
    figure = new_figure(height=5.0)
    axes = figure.subplots()
    axes.set(
        title=f"Accuracy by number of examples in context, p = {modulus}",
        xlabel="examples before the query (shots)",
    )
    whole_numbers(axes.xaxis)
    for name in SET_NAMES:
        if name in accuracy:
            _plot_set(axes, name, np.arange(len(np.asarray(accuracy[name]))), accuracy[name])
    oracles = (("Bayes-optimal", bayes_S, "-"), ("Ratio Matching", ratio_matching_S, "-."))
    for label, curve_S, line in oracles:
        if curve_S is not None:
            shots_S = np.arange(len(np.asarray(curve_S)))
            axes.plot(shots_S, curve_S, color="black", ls=line, lw=1.2, label=label)
    _accuracy_axis(axes, modulus)
    _legend_below(axes)
    return figure


def task_map(
    seen_W2: ArrayLike,
    seen_accuracy_W: ArrayLike,
    unseen_U2: ArrayLike,
    unseen_accuracy_U: ArrayLike,
    *,
    modulus: int,
) -> "Figure":
    """Accuracy on every task (a, b) as a p x p map with a dot on each unseen task.

    Args:
        seen_W2, unseen_U2: tasks (a, b) of z = a x + b y mod p.
        seen_accuracy_W, unseen_accuracy_U: accuracy on each of them, 0 to 1.
        modulus: p. Tasks in neither list stay blank.
    """
    accuracy_PP = np.full((modulus, modulus), np.nan)
    seen_W2, unseen_U2 = (np.asarray(task, int).reshape(-1, 2) for task in (seen_W2, unseen_U2))
    for name, task_W2, accuracy_W in (
        ("seen", seen_W2, seen_accuracy_W),
        ("unseen", unseen_U2, unseen_accuracy_U),
    ):
        if np.shape(accuracy_W) != (len(task_W2),):
            raise ValueError(
                f"{name} accuracy has shape {np.shape(accuracy_W)}, expected ({len(task_W2)},)"
            )
        if np.any((task_W2 < 0) | (task_W2 >= modulus)):
            raise ValueError(f"{name} tasks reach outside, expected from 0 to {modulus - 1}")
        accuracy_PP[task_W2[:, 1], task_W2[:, 0]] = accuracy_W  # b upwards, a to the right

    figure = new_figure(height=6.2)
    axes = figure.subplots()
    axes.set(title=f"Accuracy on each task z = a x + b y mod {modulus}", xlabel="a", ylabel="b")
    axes.set_facecolor(_BLANK)
    for axis in (axes.xaxis, axes.yaxis):
        whole_numbers(axis)
    image = axes.imshow(accuracy_PP, origin="lower", cmap="viridis", vmin=0, vmax=1)
    figure.colorbar(image, label="accuracy (fraction right)")
    if len(unseen_U2):
        axes.scatter(
            unseen_U2[:, 0],
            unseen_U2[:, 1],
            s=1500 / modulus**1.5,  # points^2: inside its cell at any modulus
            color="white",
            edgecolors="black",
            linewidths=0.8,
            label="unseen task (not trained on)",
        )
    if np.isnan(accuracy_PP).any():
        axes.scatter([], [], s=80, marker="s", color=_BLANK, label="not evaluated")
    _legend_below(axes)
    return figure


def _accuracy_axis(axes: "Axes", modulus: int) -> None:
    axes.set(ylabel="accuracy (fraction right)", ylim=(-0.02, 1.02))
    axes.axhline(1 / modulus, color=GREY, ls=":", label=f"chance (1/p = {1 / modulus:.3f})")


def _plot_set(axes: "Axes", name: str, x_N: ArrayLike, accuracy_N: ArrayLike) -> None:
    color, line, marker = _STYLES[name]
    axes.plot(x_N, accuracy_N, color=color, ls=line, marker=marker, ms=4, label=SET_TITLES[name])


def _legend_below(axes: "Axes") -> None:
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)


def _check_names(names: Iterable[str], known: tuple[str, ...]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"unknown name {name!r}, expected one of {', '.join(known)}")

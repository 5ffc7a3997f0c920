"""Figures of a phase diagram: four maps with their transitions, and transience.

Every function takes arrays and returns a `matplotlib.figure.Figure` for the caller to save.

Axes: G runs, A shares of the inputs, N numbers of tasks, 4 the sets of `evaluation.SETS`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from modgrok import evaluation, phase
from modgrok.figure_style import GREY, SET_TITLES, VERMILION, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LINE = VERMILION  # seen on the whole of viridis


def grid_maps(
    num_tasks_G: ArrayLike, fraction_G: ArrayLike, accuracy_G4: ArrayLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n_N, alpha_A, accuracy_4AN): means over the runs of each cell that have not diverged.

    NaN where there is none.
    """
    num_tasks_G, fraction_G = np.asarray(num_tasks_G), np.asarray(fraction_G)
    accuracy_G4 = np.asarray(accuracy_G4, float)
    n_N, column_G = np.unique(num_tasks_G, return_inverse=True)
    alpha_A, row_G = np.unique(fraction_G, return_inverse=True)
    maps_4AN = np.full((4, len(alpha_A), len(n_N)), np.nan)
    for row in range(len(alpha_A)):
        for column in range(len(n_N)):
            there_G = (row_G == row) & (column_G == column)
            mean_4 = np.ma.masked_invalid(accuracy_G4[there_G]).mean(0)  # nanmean, without warning
            maps_4AN[:, row, column] = mean_4.filled(np.nan)
    return n_N, alpha_A, maps_4AN


def diagram(
    num_tasks_G: ArrayLike,
    fraction_G: ArrayLike,
    accuracy_G4: ArrayLike,
    *,
    modulus: int,
    title: str,
    threshold: float = 0.5,
) -> "Figure":
    """Accuracy on the four sets by number of tasks and share of inputs, runs of a cell averaged.

    Lines are drawn where neighbouring cells lie on different sides of the threshold.

    Args:
        num_tasks_G, fraction_G: n and alpha of each run.
        accuracy_G4: accuracy of each run, 0 to 1.
        modulus: p; chance is 1/p.
    Source: He et al. (2024), figure 1b and the diagrams by set.
    """
    from matplotlib.collections import LineCollection

    n_N, alpha_A, maps_4AN = grid_maps(num_tasks_G, fraction_G, accuracy_G4)
    figure = new_figure(3.4 + 0.62 * len(alpha_A), 4.4 + 0.55 * len(n_N))
    axes_4 = list(figure.subplots(2, 2, sharex=True, sharey=True).flat)
    for axes, name, map_AN in zip(axes_4, SET_TITLES.values(), maps_4AN, strict=True):
        image = axes.imshow(map_AN, origin="lower", vmin=0, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(map_AN):
            if np.isfinite(value):
                color = "black" if value > 0.6 else "white"
                axes.text(
                    column, row, f"{value:.2f}", ha="center", va="center", color=color, size=7
                )
        sides = phase.transitions(map_AN, threshold=threshold)
        axes.add_collection(LineCollection(sides, colors=_LINE, linewidths=3))
        axes.set_title(name, size=9)
        axes.set_xticks(range(len(n_N)), [str(n) for n in n_N])
        axes.set_yticks(range(len(alpha_A)), [f"{alpha:g}" for alpha in alpha_A])
    figure.supxlabel("tasks trained on, n", size=9)
    figure.supylabel("share of inputs trained on", size=9)
    figure.suptitle(
        f"{title} (p = {modulus}, chance {1 / modulus:.2f}; line: accuracy {threshold:g})", size=9
    )
    figure.colorbar(image, ax=axes_4, label="accuracy at the last shot")
    return figure


def transience(
    num_tasks_G: ArrayLike,
    fraction_G: ArrayLike,
    best_step_G: ArrayLike,
    best_G: ArrayLike,
    last_G: ArrayLike,
    *,
    modulus: int,
    title: str,
) -> "Figure":
    """Best against last accuracy on unseen tasks, and the step of the best.

    Dots are runs; lines are medians over those with the same tasks and inputs (seeds).

    Args:
        best_G, last_G: accuracy of the reported unseen tasks at the step that the deciding ones
            chose, and at the last step.   best_step_G: that step; -1 (never) is not drawn.
    Source: He et al. (2024), section 4: in deeper models the best is passed and lost.
    """
    num_tasks_G, fraction_G, best_step_G, best_G, last_G = map(
        np.asarray, (num_tasks_G, fraction_G, best_step_G, best_G, last_G)
    )
    figure = new_figure(4.4, 9.6)
    left, right = figure.subplots(1, 2)
    n_N = np.unique(num_tasks_G)
    color_G = np.searchsorted(n_N, num_tasks_G)
    image = left.scatter(
        last_G, best_G, c=color_G, vmin=0, vmax=max(len(n_N) - 1, 1), edgecolors="black", lw=0.5
    )
    left.axline((0, 0), slope=1, color="black", lw=0.8)
    for at in (left.axhline, left.axvline):
        at(1 / modulus, color=GREY, ls=":", lw=0.8)
    left.set(xlabel="last accuracy", ylabel="best accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
    left.set_title(f"{title}; dotted: chance", size=9)
    bar = figure.colorbar(image, ax=left, ticks=range(len(n_N)), label="tasks trained on, n")
    bar.ax.set_yticklabels([str(n) for n in n_N])
    for alpha in np.unique(fraction_G):
        at_G = (fraction_G == alpha) & (best_step_G >= 0)
        x_G, y_G = num_tasks_G[at_G], best_step_G[at_G]
        x_X = np.unique(x_G)
        (line,) = right.plot(
            x_X, [np.median(y_G[x_G == x]) for x in x_X], lw=1, label=f"alpha = {alpha:g}"
        )
        right.plot(x_G, y_G, "o", ms=4, color=line.get_color())
    right.set(xlabel="tasks trained on, n", ylabel="step of the best", ylim=(0, None))
    right.set_xscale("log", base=2)
    right.set_xticks(n_N, [str(n) for n in n_N])
    right.minorticks_off()
    right.legend(frameon=False, fontsize=8)
    return figure


def all_figures(arrays: Mapping[str, np.ndarray]) -> dict[str, "Figure"]:
    """The figures of each depth (and weight decay) of what `phase.npz` holds, by name."""
    x = {name: np.asarray(value) for name, value in arrays.items()}
    modulus, threshold = int(x["modulus"]), float(x["threshold"])
    select = str(x["select"])
    chosen = evaluation.SETS.index(select)
    decays = np.unique(x["weight_decay_G"])
    drawn = {}
    for layers in np.unique(x["layers_G"]):
        for decay in decays.tolist():
            at_G = (x["layers_G"] == layers) & (x["weight_decay_G"] == decay)
            if not at_G.any():
                continue
            # With all its digits: two that nearly agree are two diagrams.
            name = f"L{layers}" + (f"_w{decay}" if len(decays) > 1 else "")
            title = f"{layers} blocks" + (f", decay {decay}" if len(decays) > 1 else "")
            grid = x["num_tasks_G"][at_G], x["input_fraction_G"][at_G]
            for which, words in (("best", "at the best step"), ("last", "at the last step")):
                drawn[f"phase_{name}_{which}"] = diagram(
                    *grid,
                    x[f"{which}_G4"][at_G],
                    modulus=modulus,
                    threshold=threshold,
                    title=f"{title}, {words}",
                )
            drawn[f"transience_{name}"] = transience(
                *grid,
                x["best_step_G"][at_G],
                x["best_G4"][at_G, chosen],
                x["last_G4"][at_G, chosen],
                modulus=modulus,
                title=f"{title}, {SET_TITLES[select]}",
            )
    return drawn

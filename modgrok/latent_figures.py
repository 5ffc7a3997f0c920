"""Figures of latent depth: which blocks are kept, how depth got there, gradients by block.

Functions take arrays and return a `matplotlib.figure.Figure`, as those of `modgrok.figures` do.

Axes: G groups  L layers  N records
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from modgrok.figure_style import BLUE, GREY, VERMILION, new_figure, whole_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def posterior_map(inclusion_GL: ArrayLike, *, group_names: Sequence[str] | None = None) -> "Figure":
    """Probability of every block in every group, layer x group, with a dot where it is kept.

    Args:
        inclusion_GL: q, 0 to 1.   group_names: one for each group; default: their numbers.
    """
    inclusion_GL = np.asarray(inclusion_GL, float)
    if inclusion_GL.ndim != 2:
        raise ValueError(f"inclusion_GL has shape {inclusion_GL.shape}, expected (groups, layers)")
    groups, layers = inclusion_GL.shape
    if group_names is not None and len(group_names) != groups:
        raise ValueError(f"group_names has {len(group_names)} names for {groups} groups")
    figure = new_figure(height=2.4 + 0.25 * min(groups, 24))
    axes = figure.subplots()
    axes.set(title="Posterior of the gates", xlabel="block", ylabel="group of tasks")
    image = axes.imshow(inclusion_GL, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    figure.colorbar(image, label="probability of the block")
    group_K, layer_K = np.nonzero(inclusion_GL > 0.5)
    axes.scatter(layer_K, group_K, s=12, color="black", label="kept")
    whole_numbers(axes.xaxis)
    axes.set_yticks(range(groups), group_names or [str(g) for g in range(groups)])
    depth_G = inclusion_GL.sum(1)
    axes.set_title(
        f"expected depth {depth_G.mean():.1f} of {layers}", loc="right", fontsize="small"
    )
    return figure


def depth_curves(history: Mapping[str, ArrayLike], *, target: float | None = None) -> "Figure":
    """Expected depth, and how undecided the gates are, against steps.

    Args:
        history: columns of one length: "step", "expected_depth" (blocks) and "gate_variance" (mean
            of q (1 - q), 0 to .25); NaN means not recorded.
        target: K, drawn where given.
    """
    for name in ("step", "expected_depth", "gate_variance"):
        if name not in history:
            raise ValueError(f"history lacks the column {name}")
    step_N = np.asarray(history["step"], float)
    figure = new_figure(height=5.0)
    top, bottom = figure.subplots(2, sharex=True)
    for axes, name, color in (
        (top, "expected_depth", BLUE),
        (bottom, "gate_variance", VERMILION),
    ):
        y_N = np.asarray(history[name], float)
        there_N = np.isfinite(y_N)
        axes.plot(step_N[there_N], y_N[there_N], color=color)
        axes.set_ylim(bottom=0)
    top.set(title="Expected depth", ylabel="blocks")
    bottom.set(title="Undecided gates", ylabel="mean of q (1 - q)", xlabel="training steps")
    if target is not None:
        top.axhline(target, color=GREY, ls=":", label=f"target ({target:g})")
        top.legend(frameon=False)
    return figure


def gradient_by_block(norms: Mapping[str, Mapping[str, Sequence[float]]]) -> "Figure":
    """Gradient norm of each block's parameters, logarithmic: a panel of curves for each network.

    Args:
        norms: of each network, by its name, the norms of its blocks by what each curve is called,
            such as "step 100". Curves of one name have one colour.
    """
    if not norms:
        raise ValueError("norms is empty, expected those of a network or more")
    figure = new_figure(height=3.4, width=3.2 * len(norms) + 1)
    names = list(dict.fromkeys(name for curves in norms.values() for name in curves))
    for axes, (network, curves) in zip(
        figure.subplots(1, len(norms), sharey=True, squeeze=False)[0], norms.items(), strict=True
    ):
        axes.set(title=network, xlabel="block", yscale="log")
        for name, norm_L in curves.items():
            # A closed block has gradient 0, which a logarithm does not show: a gap.
            norm_L = np.asarray(norm_L, float)
            shown_L = np.where(norm_L > 0, norm_L, np.nan)
            axes.plot(shown_L, marker=".", lw=0.8, color=f"C{names.index(name)}", label=name)
        whole_numbers(axes.xaxis)
    figure.axes[0].set_ylabel("gradient norm")
    figure.axes[-1].legend(frameon=False, fontsize="small")
    return figure

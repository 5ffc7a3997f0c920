"""Figures of what a network learned: of `interpret`, `grids` and `interventions`.

Every function takes arrays and returns a `matplotlib.figure.Figure`, as those of `modgrok.figures`.
Layers are called 0, 1, ... where no `layer_L` gives them other numbers, such as the open ones among
those that were trained.

Axes: L layers  H heads  T tokens  S shots  p residues  N = p^2 inputs (x slowest)  K panels
      F neurons  Q frequencies
Source: He et al. (2024), figures 1d, 1e and 5, attention maps, cosine similarity.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from modgrok.figure_style import BLUE, GREEN, GREY, VERMILION, new_figure
from modgrok.fourier import discrete_log

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = (BLUE, VERMILION, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "black")
_DPI = 110


def attention_maps(weight_LHTT: ArrayLike, layer_L: Sequence[int] | None = None) -> "Figure":
    """The weights of every head on one sequence: query down, key to the right, one row a layer."""
    weight_LHTT = np.asarray(weight_LHTT)
    layers, heads = weight_LHTT.shape[:2]
    layer_L = range(layers) if layer_L is None else layer_L
    figure, axes_LH = _grid(layers, heads, 2.1)
    for layer, head in np.ndindex(layers, heads):
        axes = axes_LH[layer, head]
        image = axes.imshow(weight_LHTT[layer, head], vmin=0, vmax=1, cmap="magma")
        axes.set_title(f"layer {layer_L[layer]}, head {head}", fontsize=8)
        axes.tick_params(labelsize=6)
    figure.colorbar(image, ax=axes_LH, label="attention weight", shrink=0.8)
    figure.supxlabel("key (token)", fontsize=9)
    figure.supylabel("query (token)", fontsize=9)
    return figure


def head_scores(score: Mapping[str, ArrayLike], layer_L: Sequence[int] | None = None) -> "Figure":
    """A table of colours for each score: name -> value_LH, from 0 to 1, heads across layers."""
    values = {name: np.asarray(value) for name, value in score.items()}
    figure, axes_11 = _grid(1, len(values), 2.2)
    for axes, (name, value_LH) in zip(axes_11[0], values.items(), strict=True):
        image = axes.imshow(value_LH, vmin=0, vmax=1, cmap="viridis")
        for layer, head in np.ndindex(value_LH.shape):
            value = value_LH[layer, head]
            color = "black" if value > 0.6 else "white"
            axes.text(head, layer, f"{value:.2f}", ha="center", va="center", color=color, size=7)
        axes.set_title(name, fontsize=8)
        axes.set_xticks(range(value_LH.shape[1]))
        axes.set_yticks(range(value_LH.shape[0]), layer_L)
        axes.set_xlabel("head", fontsize=8)
    axes_11[0, 0].set_ylabel("layer", fontsize=8)
    figure.colorbar(image, ax=axes_11, shrink=0.8)
    return figure


def attention_by_offset(offset_LH3T: ArrayLike, layer_L: Sequence[int] | None = None) -> "Figure":
    """Mean weight by distance from query to key, a line for each kind of query (x, y, z)."""
    offset_LH3T = np.asarray(offset_LH3T)
    layers, heads = offset_LH3T.shape[:2]
    layer_L = range(layers) if layer_L is None else layer_L
    figure, axes_LH = _grid(layers, heads, 2.1, sharex=True, sharey=True)
    for layer, head in np.ndindex(layers, heads):
        axes = axes_LH[layer, head]
        for phase, name in enumerate("xyz"):
            axes.plot(offset_LH3T[layer, head, phase], color=_COLORS[phase], lw=1, label=name)
        axes.set_title(f"layer {layer_L[layer]}, head {head}", fontsize=8)
        axes.tick_params(labelsize=6)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.supxlabel("offset (tokens)", fontsize=9)
    figure.supylabel("mean weight", fontsize=9)
    return figure


def circle_of_circles(score_N2: ArrayLike, *, modulus: int, title: str = "") -> "Figure":
    """Two components for all inputs, once coloured by log x and once by log y (figure 1d).

    Points of one x are joined in the order of log y. Squares have a 0 in the coloured place.
    """
    score_N2 = np.asarray(score_N2)
    if score_N2.shape != (modulus**2, 2):
        raise ValueError(f"score_N2 has shape {score_N2.shape}, expected ({modulus**2}, 2)")
    log_p = discrete_log(modulus)
    figure, axes_12 = _grid(1, 2, 3.6)
    loop = np.argsort(log_p)[1:]
    loop = np.append(loop, loop[0])
    for axes, token_N, name in zip(
        axes_12[0], np.divmod(np.arange(modulus**2), modulus), "xy", strict=True
    ):
        for x in range(modulus):
            ring = score_N2[modulus * x + loop]
            axes.plot(*ring.T, color="#CCCCCC", lw=0.5, zorder=1)
        zero_N = token_N == 0
        dots = axes.scatter(
            *score_N2[~zero_N].T, c=log_p[token_N[~zero_N]], cmap="twilight", s=14, zorder=2
        )
        axes.scatter(*score_N2[zero_N].T, color=GREEN, marker="s", s=14, zorder=3)
        axes.set_aspect("equal", "datalim")
        axes.set(xlabel="component 1", ylabel="component 2")
        figure.colorbar(dots, ax=axes, label=f"log {name} (square: {name} = 0)")
    figure.suptitle(title, fontsize=9)
    return figure


def embedding_components(score_p3: ArrayLike, *, modulus: int) -> "Figure":
    """Three components of the embedding, tokens by their logarithm, even and odd (figure 1e)."""
    score_p3 = np.asarray(score_p3)
    log_p = discrete_log(modulus)
    figure, axes_12 = _grid(1, 2, 3.6)
    for axes, (i, j) in zip(axes_12[0], [(0, 1), (1, 2)], strict=True):
        for token in range(modulus):
            color = GREEN if token == 0 else (BLUE, VERMILION)[log_p[token] % 2]
            axes.scatter(score_p3[token, i], score_p3[token, j], color=color, s=16)
            name = "0" if token == 0 else f"{token} (log {log_p[token]})"
            axes.annotate(
                name, score_p3[token, [i, j]], (5, 2), textcoords="offset points", fontsize=7
            )
        axes.set(xlabel=f"component {i + 1}", ylabel=f"component {j + 1}")
    figure.suptitle("Embedding: blue even logarithm, red odd, green zero", fontsize=9)
    return figure


def token_spectrum(
    log_Q: ArrayLike, additive_Q: ArrayLike, *, zero: float, limit: Mapping[str, float]
) -> "Figure":
    """Share of the embedding's variance by frequency in both bases; `limit` is a dashed line."""
    figure, axes_12 = _grid(1, 2, 3.2, sharey=True)
    for axes, name, share_Q in zip(
        axes_12[0], ("log", "additive"), (log_Q, additive_Q), strict=True
    ):
        share_Q = np.asarray(share_Q)
        axes.bar(np.arange(1, len(share_Q) + 1), share_Q, color=BLUE)
        if name == "log":
            axes.bar([0], [zero], color=GREEN, label="zero token")
        axes.axhline(limit[name], color=GREY, ls="--", label="shuffled tokens, 95 %")
        axes.set(title=f"{name} basis", xlabel="frequency")
        axes.legend(frameon=False, fontsize=7)
    axes_12[0, 0].set_ylabel("share of variance")
    return figure


def neuron_fits(
    share: Mapping[str, ArrayLike],
    shuffled: Mapping[str, ArrayLike],
    num_bins: int = 20,
    layer_L: Sequence[int] | None = None,
) -> "Figure":
    """How many neurons have which best R^2, in each basis: share_LF, beside shuffled tokens."""
    layers = np.asarray(next(iter(share.values()))).shape[0]
    layer_L = range(layers) if layer_L is None else layer_L
    figure, axes_KL = _grid(len(share), layers, 2.6, sharex=True)
    for row, name in enumerate(share):
        for layer in range(layers):
            axes = axes_KL[row, layer]
            for label, values, color in (
                ("network", np.asarray(share[name])[layer], BLUE),
                ("shuffled tokens", np.asarray(shuffled[name])[..., layer, :].ravel(), GREY),
            ):
                axes.hist(
                    values, np.linspace(0, 1, num_bins + 1), density=True, histtype="step",
                    color=color, label=label,
                )  # fmt: skip
            axes.set_title(f"{name} basis, layer {layer_L[layer]}", fontsize=8)
            axes.set_xlabel("best R²", fontsize=8)
    axes_KL[0, 0].legend(frameon=False, fontsize=7)
    return figure


def similarity_maps(similarity: Mapping[str, ArrayLike]) -> "Figure":
    """Matrices of cosine similarity, name -> (N, N)."""
    figure, axes_1K = _grid(1, len(similarity), 3.0)
    for axes, (name, matrix_NN) in zip(axes_1K[0], similarity.items(), strict=True):
        image = axes.imshow(np.asarray(matrix_NN, np.float32), vmin=-1, vmax=1, cmap="RdBu_r")
        axes.set_title(name, fontsize=8)
        axes.tick_params(labelsize=6)
    figure.colorbar(image, ax=axes_1K, label="cosine similarity", shrink=0.8)
    return figure


def shot_grids(rows: Mapping[str, ArrayLike], shot_K: Sequence[int]) -> "Figure":
    """Grids over queries, name -> value_Kpp from 0 to 1, a column for each k (figure 5)."""
    figure, axes_RK = _grid(len(rows), len(shot_K), 1.7)
    for row, (name, value_Kpp) in enumerate(rows.items()):
        for column, shot in enumerate(shot_K):
            axes = axes_RK[row, column]
            image = np.asarray(value_Kpp, float)[column].T  # x to the right, y upwards
            axes.imshow(image, origin="lower", vmin=0, vmax=1, cmap="Greens")
            axes.set(xticks=[], yticks=[])
            if row == 0:
                axes.set_title(f"k = {shot}", fontsize=8)
        axes_RK[row, 0].set_ylabel(name, fontsize=8)
    figure.supxlabel("query x (y upwards)", fontsize=9)
    return figure


def effects(effect: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]], ylabel: str) -> "Figure":
    """Bars with intervals: name of a group -> (mean_X, low_X, high_X) over what is on the axis."""
    figure, ((axes,),) = _grid(1, 1, 3.4, width=7.0)
    step = 0.8 / len(effect)
    for i, (name, (mean_X, low_X, high_X)) in enumerate(effect.items()):
        mean_X, low_X, high_X = (np.asarray(x, float) for x in (mean_X, low_X, high_X))
        at_X = np.arange(len(mean_X)) + step * (i - (len(effect) - 1) / 2)
        axes.bar(at_X, mean_X, step, color=_COLORS[i % len(_COLORS)], label=name)
        if np.isfinite(low_X).all():
            axes.errorbar(
                at_X, mean_X, [mean_X - low_X, high_X - mean_X], fmt="none", ecolor="black", lw=0.8
            )
    axes.axhline(0, color="black", lw=0.8)
    axes.set_ylabel(ylabel)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def effects_of_heads(
    effect: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]], layer_L: Sequence[int], heads: int
) -> "Figure":
    """`effects` of silencing each head: axes name layer.head; effects are changes of accuracy."""
    figure = effects(effect, "change of accuracy")
    names = [f"{layer}.{head}" for layer in layer_L for head in range(heads)]
    figure.axes[0].set_xticks(range(len(names)), names)
    figure.axes[0].set_xlabel("silenced: layer.head")
    return figure


def patching_map(
    share_LT: ArrayLike, *, match: int, layer_L: Sequence[int] | None = None
) -> "Figure":
    """Recovered share of the effect by layer and patched position; marks the corrupted label."""
    share_LT = np.asarray(share_LT, float)
    layers, length = share_LT.shape
    figure, ((axes,),) = _grid(1, 1, 1.2 + 0.3 * layers, width=8.0)
    image = axes.imshow(share_LT, vmin=-1, vmax=1, cmap="RdBu_r", aspect="auto")
    ticks = np.arange(0, length, 3)
    axes.set_xticks(ticks, [f"x{t // 3}" for t in ticks], fontsize=6)
    axes.set_yticks(range(layers), layer_L)
    axes.set(ylabel="after layer", xlabel="patched position (shot from 0)")
    axes.axvline(3 * match + 2, color=GREEN, lw=0.8)
    figure.colorbar(image, ax=axes, label="share recovered")
    return figure


def corruption_maps(accuracy: Mapping[str, ArrayLike]) -> "Figure":
    """Accuracy at a later shot (right) after one label was corrupted (down): name -> (S, S)."""
    figure, axes_1K = _grid(1, len(accuracy), 2.6)
    for axes, (name, accuracy_SS) in zip(axes_1K[0], accuracy.items(), strict=True):
        image = axes.imshow(np.asarray(accuracy_SS, float), vmin=0, vmax=1, cmap="viridis")
        axes.set_title(name, fontsize=8)
        axes.set_xlabel("asked shot", fontsize=8)
    axes_1K[0, 0].set_ylabel("corrupted shot", fontsize=8)
    figure.colorbar(image, ax=axes_1K, label="accuracy", shrink=0.8)
    return figure


def curves(
    lines: Mapping[str, ArrayLike],
    bands: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    *,
    xlabel: str,
    ylabel: str,
) -> "Figure":
    """A curve for each name, against 0, 1, 2, ...; bands: name -> (low_X, high_X), shaded."""
    figure, ((axes,),) = _grid(1, 1, 3.6, width=6.0)
    for i, (name, value_X) in enumerate(lines.items()):
        color = _COLORS[i % len(_COLORS)]
        axes.plot(np.asarray(value_X), color=color, marker=".", label=name)
        if bands and name in bands:
            low_X, high_X = (np.asarray(x, float) for x in bands[name])
            axes.fill_between(range(len(low_X)), low_X, high_X, color=color, alpha=0.15, lw=0)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _grid(
    rows: int, columns: int, height: float, width: float | None = None, **options: Any
) -> "tuple[Figure, np.ndarray]":
    width = width or 0.8 + 1.1 * height * columns
    figure = new_figure(0.5 + height * rows, width, _DPI)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, axes

"""Colours, names and frames that all figures share.

Colours of Okabe and Ito, which colour-blind readers tell apart.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"

# By the names of `evaluation.SETS`, in their order.
SET_TITLES = {
    "seen_train": "seen tasks, train inputs",
    "seen_heldout": "seen tasks, held-out inputs",
    "unseen_train": "unseen tasks, train inputs",
    "unseen_heldout": "unseen tasks, held-out inputs",
}


def new_figure(height: float, width: float = 7.0, dpi: int = 150) -> "Figure":
    """Of `width` x `height` inches; pyplot and its global state are not used."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def whole_numbers(axis: "Axis") -> None:
    """Ticks at whole numbers alone."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))

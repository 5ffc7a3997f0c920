"""Labels of nodes and sets of them, checked: what classification on a graph begins with.

Axes: N nodes, T training nodes, V validation nodes.
"""

from typing import Any

import numpy as np


def checked_labels(labels_N: Any, num_nodes: int) -> np.ndarray:
    """The labels as an array, if they are whole numbers, one for each node.

    Raises:
        ValueError: if they are not.
    """
    labels_N = np.asarray(labels_N)
    if labels_N.shape != (num_nodes,):
        raise ValueError(f"labels_N has shape {labels_N.shape}, expected ({num_nodes},)")
    if not np.issubdtype(labels_N.dtype, np.integer):
        raise ValueError(
            f"labels_N has dtype {labels_N.dtype}, expected integers "
            "(np.unique(labels, return_inverse=True) numbers classes)"
        )
    return labels_N


def checked_nodes(name: str, index: Any, labels_N: np.ndarray) -> np.ndarray:
    """The index as an array, if its nodes exist and have labels.

    Raises:
        ValueError: saying which do not.
    """
    index = np.asarray(index)
    if index.ndim != 1 or not index.size or not np.issubdtype(index.dtype, np.integer):
        raise ValueError(
            f"{name} has shape {index.shape} and dtype {index.dtype}, expected integers on one "
            "axis, not empty"
        )
    if index.min() < 0 or index.max() >= len(labels_N):
        bad = index.min() if index.min() < 0 else index.max()
        raise ValueError(f"{name} has node {bad}, expected 0 to {len(labels_N) - 1}")
    missing = labels_N[index] < 0
    if missing.any():
        raise ValueError(
            f"{name} has {missing.sum()} nodes without a label, the first is {index[missing][0]}"
        )
    return index


def check_disjoint(train_T: np.ndarray, validation_V: np.ndarray) -> None:
    """Refuse nodes that are in both sets, of which validation says nothing.

    Raises:
        ValueError: naming one.
    """
    both = np.intersect1d(train_T, validation_V)
    if both.size:
        raise ValueError(
            f"train_T and validation_V share {both.size} nodes, the first is {both[0]}: expected "
            "none in both"
        )

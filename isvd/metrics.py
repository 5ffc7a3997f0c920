"""How good scores are: of pairs of nodes for links, and of classes for nodes.

Axes: P positives, Q negatives, N nodes, C classes, I nodes that are looked at.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from isvd.arguments import check_integer
from isvd.node_labels import checked_nodes


def roc_auc(positive_P: Any, negative_Q: Any) -> Any:
    """The chance that a positive scores above a negative; ties count one half.

    Exact for numpy arrays, whose counts are 64-bit integers, and a float; with a JAX array the
    counts of each positive are exact and their mean has the rounding of float32 (it works under
    jit). NaN if a score is NaN.

    Raises:
        ValueError: if either has other than one axis, or is empty.
    """
    xp = _namespace(positive_P, negative_Q)
    positive_P, negative_Q = (
        _flat(xp, "positive_P", positive_P),
        _flat(xp, "negative_Q", negative_Q),
    )
    sorted_Q = xp.sort(negative_Q)
    # Twice the negatives below, a tie once: whole numbers.
    wins_P = sum(xp.searchsorted(sorted_Q, positive_P, side=side) for side in ("left", "right"))
    bad = xp.isnan(positive_P).any() | xp.isnan(negative_Q).any()
    if xp is np:
        return float("nan") if bad else int(wins_P.sum()) / (2 * len(negative_Q) * len(positive_P))
    return jnp.where(bad, jnp.nan, (wins_P / (2 * negative_Q.shape[0])).mean())


def hits_at_k(positive_P: Any, negative_Q: Any, k: int) -> Any:
    """The fraction of positives strictly above the k-th highest negative; 1 if there are fewer.

    NaN if a score is.

    Raises:
        ValueError: if either has other than one axis, or is empty, or k is no whole number from 1.
    Source: the evaluator of the Open Graph Benchmark.
    """
    xp = _namespace(positive_P, negative_Q)
    positive_P, negative_Q = (
        _flat(xp, "positive_P", positive_P),
        _flat(xp, "negative_Q", negative_Q),
    )
    check_integer("k", k, 1)
    bad = xp.isnan(positive_P).any() | xp.isnan(negative_Q).any()
    bar = xp.sort(negative_Q)[-k] if k <= negative_Q.shape[0] else -xp.inf
    share = (positive_P > bar).mean() if k <= negative_Q.shape[0] else xp.ones(())
    share = xp.where(bad, xp.nan, share)
    return float(share) if xp is np else share


def mean_reciprocal_rank(positive_P: Any, negative_PQ: Any) -> Any:
    """Mean of 1 / rank of each positive among its own negatives; a tie counts half a place.

    NaN if a score is.

    Raises:
        ValueError: if shapes are not (P,) and (P, Q), or there is no positive.
    Source: the evaluator of the Open Graph Benchmark.
    """
    xp = _namespace(positive_P, negative_PQ)
    positive_P, negative_PQ = _flat(xp, "positive_P", positive_P), xp.asarray(negative_PQ)
    if negative_PQ.ndim != 2 or negative_PQ.shape[0] != positive_P.shape[0]:
        raise ValueError(
            f"negative_PQ has shape {negative_PQ.shape}, expected ({positive_P.shape[0]}, Q)"
        )
    # Counts of 32 bits, so that what JAX makes of them is a float32 with x64 on too.
    above_P = (negative_PQ > positive_P[:, None]).sum(1, dtype=np.int32)
    not_below_P = (negative_PQ >= positive_P[:, None]).sum(1, dtype=np.int32)
    bad = xp.isnan(positive_P).any() | xp.isnan(negative_PQ).any()
    mean = xp.where(bad, xp.nan, (1 / (1 + (above_P + not_below_P) / 2)).mean())
    return float(mean) if xp is np else mean


def _namespace(*arrays: Any) -> Any:
    return jnp if any(isinstance(a, jax.Array) for a in arrays) else np


def _flat(xp: Any, name: str, score_P: Any) -> Any:
    score_P = xp.asarray(score_P)
    if score_P.ndim != 1 or not score_P.size:
        raise ValueError(f"{name} has shape {score_P.shape}, expected one axis, not empty")
    return score_P


def accuracy(scores_NC: Any, labels_N: Any, index_I: Any) -> float:
    """The fraction of the nodes `index_I` whose largest score is that of their label.

    NaN if one of their scores is.

    Raises:
        ValueError: if there are none, some are outside 0 to N - 1, or have no label (-1).
    """
    scores_NC, labels_N = np.asarray(scores_NC), np.asarray(labels_N)
    index_I = checked_nodes("index_I", index_I, labels_N)
    if scores_NC.ndim != 2 or len(scores_NC) != len(labels_N):
        raise ValueError(
            f"scores_NC has shape {scores_NC.shape}, expected ({len(labels_N)}, classes)"
        )
    scores_IC = scores_NC[index_I]
    if np.isnan(scores_IC).any():
        return float("nan")
    return float((scores_IC.argmax(1) == labels_N[index_I]).mean())

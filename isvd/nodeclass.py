"""Node classification in closed form: least squares on propagated features, by an SVD.

The linear jumping-knowledge network M W, M = [Z | A Z | ... | A^L Z], is fitted by
W = V f(S) U^T Y from the SVD of the training rows of M. Averaging the scores of several fits is
averaging their weights, so an ensemble over dropout draws is one linear model again.

Axes: N nodes, F features, C classes, D = (L + 1) F columns of the design, T training nodes,
V validation nodes, K rank, G settings that are compared, R ranks, P ridges, B dropout draws.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from isvd.algebra import take_rows
from isvd.arguments import check_integer
from isvd.design import normalized_adjacency, propagated
from isvd.factorize import SVD, svd
from isvd.metrics import accuracy
from isvd.node_features import Report, ReportPass, compressed, planetoid_features
from isvd.node_labels import check_disjoint, checked_labels, checked_nodes
from isvd.operators import LinearOperator, dense
from isvd.solve import pinv_solve


class Fit(NamedTuple):
    """A classifier, and what the validation nodes said about the settings that were tried.

    Attributes:
        scores_NC: M W. The prediction is the argmax.
        weights_DC: W, the mean over dropout draws.
        rank, ridge: the settings with the best validation accuracy; among equals the larger ridge,
            then the smaller rank.
        accuracy_RP: validation accuracy, 0 to 1, of each rank and ridge that was tried; NaN where
            scores are.
    """

    scores_NC: jax.Array
    weights_DC: jax.Array
    rank: int
    ridge: float
    accuracy_RP: np.ndarray


# Least squares -----------------------------------------------------------------------------------


def closed_form(
    factors: SVD,
    targets_TC: jax.Array,
    *,
    rank: int | None = None,
    cutoff: float | None = None,
    ridge: Any = 0.0,
) -> jax.Array:
    """w_DC = V f(S) U^T Y, with f(s) = s / (s^2 + ridge * s[0]^2) for the leading `rank` triplets.

    Without a ridge, and with all triplets, these are the weights of least norm among those of
    least squares.

    Args:
        factors: the SVD of the training rows (T, D).   targets_TC: Y.
        rank: triplets that are used; all of them by default.
        cutoff: triplets with s <= cutoff * s[0] are left out; by default those at rounding,
            max(T, D) * eps.
        ridge: relative to s[0]^2, at least 0; may be traced.
    Raises:
        ValueError: if shapes do not fit, the rank is outside 1 to K, or the ridge is negative.
    Source: section 3, W = M^+ Y.
    """
    if targets_TC.ndim != 2:
        raise ValueError(f"targets_TC has shape {targets_TC.shape}, expected (rows, classes)")
    limit = factors.s_K.shape[0]
    rank = limit if rank is None else rank
    check_integer("rank", rank, 1, limit, "the triplets there are")
    ridge = ridge * factors.s_K[0] ** 2
    return pinv_solve(factors.leading(rank), targets_TC, rcond=cutoff, ridge=ridge)


# Fit ---------------------------------------------------------------------------------------------


def fit(
    design: LinearOperator,
    labels_N: Any,
    train_T: Any,
    validation_V: Any,
    key: jax.Array,
    *,
    ranks: Sequence[int] = (50, 75, 100, 140),
    ridges: Sequence[float] = (0.0, 1e-3, 1e-2),
    draws: int = 8,
    copies: int = 1,
    dropout: float = 0.5,
    report: Report | None = None,
    report_pass: ReportPass | None = None,
) -> Fit:
    """Fit the linear classifier to the training nodes; validation nodes choose rank and ridge.

    Each draw stacks the training rows on `copies` of them whose entries are dropped with
    probability `dropout`, the others divided by 1 - dropout. The mask falls on the design, after
    propagation. The weights of all draws are averaged, which averages their scores.

    Args:
        design: M, (N, D), such as `design.propagated`, of a real floating type.
        labels_N: classes, whole numbers from 0 to N - 1 for training nodes. Those of other nodes
            than the two sets are not looked at.
        ranks: triplets to use; those beyond the rows of a draw are left out.
        ridges: relative to s[0]^2.
        draws: of dropout (--dropout_copies of `launch.isvd_node`). 0 fits the clean rows alone,
            without forming them (copies and dropout are not used).
        copies: of the training rows in each draw, beside the clean ones.
        report: as of `classify`; of all draws at once, whose factors have a leading axis of draws
            and no vectors.
        report_pass: as of `classify`; not of draws, whose matrices are formed and small.
    Raises:
        ValueError: for nodes out of range, without a label or in both sets, labels or a design of
            another type, less than two classes in the training rows, training rows that are all
            zero, scores that are NaN whatever the setting, or settings outside their range.
    Source: section 3; one draw, one rank and no ridge are the paper's "iSVD + dropout".
    """
    _check_dropout(draws, copies, dropout)
    labels_N, train_T, validation_V = _checked_data(design, labels_N, train_T, validation_V)
    limit = min(len(train_T) * (1 + copies * (draws > 0)), design.shape[1])
    ranks, ridges, ridge_P = _checked_grid(ranks, ridges, limit, design.dtype)

    classes = int(labels_N[train_T].max()) + 1
    targets_TC = jnp.asarray(labels_N[train_T, None] == np.arange(classes), design.dtype)
    rows = take_rows(design, train_T)
    if draws:
        sizes = (ranks, int(draws), int(copies))
        keep = jnp.asarray(1 - dropout, design.dtype)
        weights_DGC, factors = _average_weights(sizes, rows, targets_TC, ridge_P, keep, key)
    else:
        factors = svd(rows, key, rank=ranks[-1], report=report_pass)
        weights_DGC = _weights_by_setting(ranks, factors, targets_TC, ridge_P)
    if report is not None:
        report("training rows with dropout" if draws else "training rows", factors)
    if not factors.s_K.max() > 0:  # NaN is not
        raise ValueError(
            "the training rows of the design are all zero, or not finite: check the features"
        )
    return _chosen(design, weights_DGC, labels_N, validation_V, ranks, ridges)


def _check_dropout(draws: int, copies: int, dropout: float) -> None:
    check_integer("draws", draws, 0)
    check_integer("copies", copies, 1)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}, expected from 0 to less than 1")


def _checked_data(
    design: LinearOperator, labels_N: Any, train_T: Any, validation_V: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(labels_N, train_T, validation_V)"""
    if not jnp.issubdtype(design.dtype, jnp.floating):
        raise ValueError(f"design has dtype {design.dtype}, expected a real floating type")
    labels_N = checked_labels(labels_N, design.shape[0])
    train_T = checked_nodes("train_T", train_T, labels_N)
    validation_V = checked_nodes("validation_V", validation_V, labels_N)
    check_disjoint(train_T, validation_V)
    if labels_N[train_T].max() >= len(labels_N):
        raise ValueError(
            f"train_T has a node with label {labels_N[train_T].max()}, expected 0 to "
            f"{len(labels_N) - 1}: number the classes from 0, without gaps"
        )
    if len(set(labels_N[train_T].tolist())) < 2:
        raise ValueError("the training nodes have one class, expected two or more")
    return labels_N, train_T, validation_V


def _checked_grid(
    ranks: Sequence[int], ridges: Sequence[float], limit: int, dtype: Any
) -> tuple[tuple[int, ...], tuple[float, ...], jax.Array]:
    """Each rank once, in order and cut to the limit; the ridges, also as an array of the type."""
    for name, values in (("ranks", ranks), ("ridges", ridges)):
        if np.ndim(values) != 1:
            raise ValueError(f"{name}={values!r}, expected a sequence of numbers")
    for rank in ranks:
        check_integer("ranks", rank, 1)
    ranks = tuple(sorted({min(int(rank), limit) for rank in ranks}))
    ridges = tuple(float(ridge) for ridge in ridges)
    with np.errstate(over="ignore"):  # found below
        ridge_P = np.array(ridges).astype(dtype)
    if not ranks or not ridges or not ((ridge_P >= 0) & (ridge_P < np.inf)).all():  # NaN is not
        raise ValueError(
            f"ranks={ranks} and ridges={ridges}: expected some, from 1 and from 0, finite in "
            f"{np.dtype(dtype).name}"
        )
    return ranks, ridges, jnp.asarray(ridge_P)


@functools.partial(jax.jit, static_argnums=0)
def _average_weights(
    sizes: tuple[tuple[int, ...], int, int],
    rows: LinearOperator,
    targets_TC: jax.Array,
    ridge_P: jax.Array,
    keep: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, SVD]:
    """The mean weights, and the factors of each draw (B, ...) without their vectors."""
    ranks, draws, copies = sizes
    rows_TD = rows.to_dense()
    targets = jnp.tile(targets_TC, (1 + copies, 1))

    def one_draw(total_DGC: jax.Array, key: jax.Array) -> tuple[jax.Array, SVD]:
        key_mask, key_svd = jax.random.split(key)
        mask = jax.random.bernoulli(key_mask, keep, (copies, *rows_TD.shape))
        noisy = jnp.where(mask, rows_TD / keep, 0).reshape(-1, rows_TD.shape[1])
        factors = svd(dense(jnp.vstack([rows_TD, noisy])), key_svd, rank=ranks[-1])
        weights_DGC = _weights_by_setting(ranks, factors, targets, ridge_P)
        told = factors._replace(u_MK=factors.u_MK[:0], v_NK=factors.v_NK[:0])
        return total_DGC + weights_DGC / draws, told

    shape = (rows.shape[1], len(ranks) * len(ridge_P), targets_TC.shape[1])
    keys_B = jax.random.split(key, draws)
    return jax.lax.scan(one_draw, jnp.zeros(shape, rows_TD.dtype), keys_B)


def _weights_by_setting(
    ranks: tuple[int, ...], factors: SVD, targets_TC: jax.Array, ridge_P: jax.Array
) -> jax.Array:
    """w_DGC of every rank and ridge: the triplets are shared, only f(s) differs."""
    settings = [(rank, ridge) for rank in ranks for ridge in ridge_P]
    each = [closed_form(factors, targets_TC, rank=k, ridge=ridge) for k, ridge in settings]
    return jnp.stack(each, axis=1)


def _chosen(
    design: LinearOperator,
    weights_DGC: jax.Array,
    labels_N: np.ndarray,
    validation_V: np.ndarray,
    ranks: tuple[int, ...],
    ridges: tuple[float, ...],
) -> Fit:
    """Scores of all settings by one product; the validation nodes choose."""
    num_columns, num_settings, classes = weights_DGC.shape
    scores = _matmat(design, weights_DGC.reshape(num_columns, -1))
    scores_NGC = scores.reshape(-1, num_settings, classes)
    accuracy_G = [accuracy(scores_NGC[:, g], labels_N, validation_V) for g in range(num_settings)]
    accuracy_RP = np.reshape(accuracy_G, (len(ranks), len(ridges)))
    if np.isnan(accuracy_G).all():
        raise ValueError(
            "the scores of the validation nodes are NaN with every rank and ridge: check the "
            "features"
        )
    order = [(ridge, -rank) for rank in ranks for ridge in ridges]
    best = max(range(num_settings), key=lambda g: (np.nan_to_num(accuracy_G[g], nan=-1), *order[g]))
    ridge, minus_rank = order[best]
    return Fit(scores_NGC[:, best], weights_DGC[:, best], -minus_rank, ridge, accuracy_RP)


@jax.jit
def _matmat(op: LinearOperator, x_NC: jax.Array) -> jax.Array:
    return op.matmat(x_NC)


def classify(
    adjacency: Any,
    features: Any,
    labels_N: Any,
    train_T: Any,
    validation_V: Any,
    key: jax.Array,
    *,
    num_hops: int = 15,
    embedding_rank: int = 64,
    pca_rank: int | None = 1000,
    report: Report | None = None,
    report_pass: ReportPass | None = None,
    **fit_options: Any,
) -> Fit:
    """The paper's Planetoid pipeline, from the graph to the scores.

    Args:
        adjacency: (N, N), scipy sparse, symmetric, of 0 and 1.   features: X, (N, F).
        labels_N: -1 where unknown. Only those of the two sets are looked at.
        num_hops, embedding_rank, pca_rank: as in `design.propagated` and `planetoid_features`.
        report: called on the host after each factorisation with what was factored and its factors.
        report_pass: `report` of each `svd`, after each pass. It is part of the compiled programs,
            which JAX then does not keep for another process.
        fit_options: of `fit`.
    Raises:
        ValueError: as `planetoid_features`, `design.propagated` and `fit` do.
    Source: section 3. Beyond the reference: validation nodes choose rank and ridge, and eight
        dropout draws are averaged; `ranks=(100,), ridges=(0.0,), draws=1` is the reference.
    """
    key_features, key_fit = jax.random.split(key)
    told = {"report": report, "report_pass": report_pass}
    z = planetoid_features(
        adjacency, features, key_features, embedding_rank=embedding_rank, pca_rank=pca_rank, **told
    )
    design = propagated(compressed(normalized_adjacency(adjacency), z.dtype), z, num_hops)
    return fit(design, labels_N, train_T, validation_V, key_fit, **told, **fit_options)

"""Node classification in closed form: least squares on propagated features, by an SVD.

The linear jumping-knowledge network M W, M = [Z | A Z | ... | A^L Z], is fitted by
W = V f(S) U^T Y from the SVD of the training rows of M. Averaging the scores of several fits is
averaging their weights, so an ensemble over dropout draws is one linear model again.

Axes: N nodes, F features, C classes, D = (L + 1) F columns of the design, T training nodes,
V validation nodes, K rank, G settings that are compared, R ranks, P ridges, B dropout draws.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from isvd.algebra import centered, hstack, take_rows
from isvd.design import link_operator, normalized_adjacency, propagated
from isvd.factorize import SVD, svd
from isvd.linkpred import embeddings
from isvd.operators import LinearOperator, dense
from isvd.solve import pinv_solve
from isvd.spmm import sparse
from isvd.triplets import relative_residual

# Called on the host after a factorisation: of what, columns that were multiplied, and the largest
# residual over s[0].
Report = Callable[[str, int, float], None]

# Products of these small matrices are compiled many times over: for the walks, the components, the
# draws. Rows of few lengths take longer there even once compiled (docs/benchmarks.md).
_compressed = functools.partial(sparse, layout="csr")


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
        ValueError: if shapes do not fit or the rank is outside 1 to K.
    Source: section 3, W = M^+ Y.
    """
    if targets_TC.ndim != 2:
        raise ValueError(f"targets_TC has shape {targets_TC.shape}, expected (rows, classes)")
    limit = factors.s_K.shape[0]
    rank = limit if rank is None else rank
    if not 1 <= rank <= limit:
        raise ValueError(f"rank={rank}, expected 1 to {limit}, the triplets there are")
    part = SVD(factors.u_MK[:, :rank], factors.s_K[:rank], factors.v_NK[:, :rank], *factors[3:])
    return pinv_solve(part, targets_TC, rcond=cutoff, ridge=ridge * factors.s_K[0] ** 2)


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


# Features ----------------------------------------------------------------------------------------


def node_embedding(
    adjacency: Any,
    key: jax.Array,
    *,
    rank: int = 64,
    window: int = 3,
    negative_weight: float = 0.05,
    tol: float | None = None,
    report: Report | None = None,
) -> jax.Array:
    """[U sqrt(s) | V sqrt(s)], (N, 2 rank), of the walk matrix with P = D^-1 A, no degree factor.

    Source: section 3; the reference multiplies by P where P^T is meant, which we do not.
    """
    walks = link_operator(
        adjacency,
        window=window,
        negative_weight=negative_weight,
        symmetric=False,
        degree_factor=False,
        leaf=_compressed,
    )
    factors = svd(walks, key, rank=rank, tol=tol)
    _tell(report, "walks", factors)
    return jnp.hstack(embeddings(factors))


def _tell(report: Report | None, what: str, factors: SVD) -> None:
    if report is not None:
        residual = relative_residual(factors.residual_K, factors.s_K)
        report(what, int(factors.products), float(residual))


def principal_components(
    features: LinearOperator, key: jax.Array, *, rank: int, report: Report | None = None
) -> jax.Array:
    """The scores of the leading principal components, (N, rank): U diag(s) of the centred features.

    Up to a quarter of min(N, F), `svd` of the operator. From there on nearly the whole spectrum is
    wanted, and Krylov bases cost more than the eigenvectors of the Gram matrix of the shorter side,
    which is made from products and has min(N, F)^2 entries. Its squares lose components below
    sqrt(eps) of the first: in float32 those with less than 1e-7 of its variance come out as noise
    of that size. The Gram matrix is not reported: it has no residuals.

    Raises:
        ValueError: if the rank is outside 1 to min(N, F).
    """
    shortest = min(features.shape)
    if not 1 <= rank <= shortest:
        raise ValueError(
            f"rank={rank}, expected 1 to {shortest}: the features have shape {features.shape}"
        )
    if 4 * rank <= shortest:
        factors = svd(centered(features), key, rank=rank)
        _tell(report, "features", factors)
        return factors.u_MK * factors.s_K
    return _components_by_gram(rank, features)


@functools.partial(jax.jit, static_argnums=0)
def _components_by_gram(rank: int, features: LinearOperator) -> jax.Array:
    a = centered(features)
    tall = a.shape[0] >= a.shape[1]
    eye = jnp.eye(min(a.shape), dtype=a.dtype)
    gram = a.rmatmat(a.matmat(eye)) if tall else a.matmat(a.rmatmat(eye))
    value_K, vector = jnp.linalg.eigh((gram + gram.conj().T) / 2)
    value_K, vector = value_K[::-1][:rank], vector[:, ::-1][:, :rank]
    return a.matmat(vector) if tall else vector * jnp.sqrt(jnp.maximum(value_K, 0))


def planetoid_features(
    adjacency: Any,
    features: Any,
    key: jax.Array,
    *,
    embedding_rank: int = 64,
    pca_rank: int | None = 1000,
    report: Report | None = None,
) -> LinearOperator:
    """Z = [PCA of [X | R] | R] with R the node embedding, (N, pca_rank + 2 embedding_rank).

    With `pca_rank=None` the centred [X | R] takes the place of its components. Nothing is lost and
    nothing dense is formed: least squares depends on Z only through Z Z^T, which the rotation to
    principal components leaves alone; what differs is the tail that they cut off, and which
    entries dropout drops.

    Args:
        adjacency: (N, N), scipy sparse.   features: X, (N, F), scipy sparse or dense.
        pca_rank: cut to min(N, F + 2 embedding_rank).
        report: as of `classify`.
    Source: section 3 and the reference's Planetoid script.
    """
    key_embed, key_pca = jax.random.split(key)
    x = _compressed(features) if hasattr(features, "tocsr") else dense(_floating(features))
    r_NR = node_embedding(adjacency, key_embed, rank=embedding_rank, report=report)
    r_NR = r_NR.astype(x.dtype)
    embedding = dense(r_NR)
    both = hstack([x, embedding])
    if pca_rank is None:
        return hstack([centered(both), embedding])
    rank = min(pca_rank, *both.shape)
    components = principal_components(both, key_pca, rank=rank, report=report)
    return dense(jnp.hstack([components, r_NR]))


def _floating(x: Any) -> jax.Array:
    """An array in its own type, or float32 for whole numbers, as `sparse` makes them."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)


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
    rate: float = 0.5,
    report: Report | None = None,
) -> Fit:
    """Fit the linear classifier to the training nodes; validation nodes choose rank and ridge.

    Each draw stacks the training rows on `copies` of them whose entries are dropped with
    probability `rate`, the others divided by 1 - rate. The mask falls on the design, after
    propagation. The weights of all draws are averaged, which averages their scores.

    Args:
        design: M, (N, D), such as `design.propagated`, of a real floating type.
        labels_N: classes, whole numbers from 0 to N - 1 for training nodes. Those of other nodes
            than the two sets are not looked at.
        ranks: triplets to use; those beyond the rows of a draw are left out.
        ridges: relative to s[0]^2.
        draws: 0 fits the clean rows alone, without forming them (copies and rate are not used).
        report: as of `classify`; of all draws together, with the largest of their residuals.
    Raises:
        ValueError: for nodes out of range, without a label or in both sets, labels or a design of
            another type, less than two classes in the training rows, training rows that are all
            zero, scores that are NaN whatever the setting, or settings outside their range.
    Source: section 3; one draw, one rank and no ridge are the paper's "iSVD + dropout".
    """
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
    if not 0 <= rate < 1:
        raise ValueError(f"rate={rate}, expected from 0 to less than 1")
    for name, values in (("ranks", ranks), ("ridges", ridges)):
        if np.ndim(values) != 1:
            raise ValueError(f"{name}={values!r}, expected a sequence of numbers")
    whole = [("draws", draws, 0), ("copies", copies, 1), *(("ranks", rank, 1) for rank in ranks)]
    for name, value, least in whole:
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{name}={value!r}, expected a whole number, at least {least}")
    limit = min(len(train_T) * (1 + copies * (draws > 0)), design.shape[1])
    ranks = tuple(sorted({min(int(rank), limit) for rank in ranks}))
    ridges = tuple(float(ridge) for ridge in ridges)
    good = all(0 <= ridge < float("inf") for ridge in ridges)  # NaN is not
    if not ranks or not ridges or not good:
        raise ValueError(f"ranks={ranks} and ridges={ridges}: expected some, from 1 and from 0")

    classes = int(labels_N[train_T].max()) + 1
    targets_TC = jnp.asarray(labels_N[train_T, None] == np.arange(classes), design.dtype)
    rows = take_rows(design, train_T)
    ridge_P = jnp.asarray(ridges, design.dtype)
    if draws:
        sizes = (ranks, int(draws), int(copies))
        keep = jnp.asarray(1 - rate, design.dtype)
        weights_DGC, size, products_B, residual_B = _average_weights(
            sizes, rows, targets_TC, ridge_P, keep, key
        )
        if report is not None:
            report("training rows with dropout", int(products_B.sum()), float(residual_B.max()))
    else:
        factors = svd(rows, key, rank=ranks[-1])
        weights_DGC, size = _weights_by_setting(ranks, factors, targets_TC, ridge_P), factors.s_K[0]
        _tell(report, "training rows", factors)
    if not size > 0:  # NaN is not
        raise ValueError(
            "the training rows of the design are all zero, or not finite: check the features"
        )
    return _chosen(design, weights_DGC, labels_N, validation_V, ranks, ridges)


@functools.partial(jax.jit, static_argnums=0)
def _average_weights(
    sizes: tuple[tuple[int, ...], int, int],
    rows: LinearOperator,
    targets_TC: jax.Array,
    ridge_P: jax.Array,
    keep: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The mean weights, the largest value, and the products and residual of each draw."""
    ranks, draws, copies = sizes
    rows_TD = rows.to_dense()
    targets = jnp.tile(targets_TC, (1 + copies, 1))

    def one_draw(total: tuple, key: jax.Array) -> tuple[tuple, tuple]:
        key_mask, key_svd = jax.random.split(key)
        mask = jax.random.bernoulli(key_mask, keep, (copies, *rows_TD.shape))
        noisy = jnp.where(mask, rows_TD / keep, 0).reshape(-1, rows_TD.shape[1])
        factors = svd(dense(jnp.vstack([rows_TD, noisy])), key_svd, rank=ranks[-1])
        weights_DGC = _weights_by_setting(ranks, factors, targets, ridge_P)
        total = (total[0] + weights_DGC / draws, jnp.maximum(total[1], factors.s_K[0]))
        return total, (factors.products, relative_residual(factors.residual_K, factors.s_K))

    shape = (rows.shape[1], len(ranks) * len(ridge_P), targets_TC.shape[1])
    start = (jnp.zeros(shape, rows_TD.dtype), jnp.zeros((), rows_TD.dtype))
    total, told = jax.lax.scan(one_draw, start, jax.random.split(key, draws))
    return (*total, *told)


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
    **fit_options: Any,
) -> Fit:
    """The paper's Planetoid pipeline, from the graph to the scores.

    Args:
        adjacency: (N, N), scipy sparse, symmetric, of 0 and 1.   features: X, (N, F).
        labels_N: -1 where unknown. Only those of the two sets are looked at.
        num_hops, embedding_rank, pca_rank: as in `design.propagated` and `planetoid_features`.
        report: called on the host after each factorisation with what was factorised, the columns
            that were multiplied, and the largest residual over s[0].
        fit_options: of `fit`.
    Source: section 3. Beyond the reference: validation nodes choose rank and ridge, and eight
        dropout draws are averaged; `ranks=(100,), ridges=(0.0,), draws=1` is the reference.
    """
    key_features, key_fit = jax.random.split(key)
    z = planetoid_features(
        adjacency,
        features,
        key_features,
        embedding_rank=embedding_rank,
        pca_rank=pca_rank,
        report=report,
    )
    design = propagated(_compressed(normalized_adjacency(adjacency), z.dtype), z, num_hops)
    return fit(design, labels_N, train_T, validation_V, key_fit, report=report, **fit_options)

"""Closed-form classification against numpy's least squares, and the pipeline on a planted graph."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import operator_cases
import pytest
from asserts import assert_close
from planted_graph import planted

from isvd import metrics, node_features, nodeclass
from isvd.algebra import centered, take_rows
from isvd.design import normalized_adjacency, propagated
from isvd.factorize import svd
from isvd.operators import dense
from isvd.spmm import sparse

draw = functools.partial(operator_cases.draw, dtype="float64")

# Least squares -----------------------------------------------------------------------------------


def least_squares(shape, seed=0):
    m_TD, y_TC = draw(seed, *shape), draw(seed + 1, shape[0], 3)
    factors = svd(dense(m_TD.astype("f")), jax.random.key(0), rank=min(shape))
    return m_TD, y_TC, factors


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_all_triplets_give_the_weights_of_least_norm(shape):
    m_TD, y_TC, factors = least_squares(shape)
    wanted, *_ = np.linalg.lstsq(m_TD, y_TC)
    assert_close(nodeclass.closed_form(factors, jnp.asarray(y_TC, jnp.float32)), wanted)


@pytest.mark.parametrize("ridge", [1e-3, 0.3])
def test_ridge(ridge):
    m_TD, y_TC, factors = least_squares((9, 12))
    mu = ridge * np.linalg.norm(m_TD, 2) ** 2
    wanted = m_TD.T @ np.linalg.solve(m_TD @ m_TD.T + mu * np.eye(9), y_TC)
    got = nodeclass.closed_form(factors, jnp.asarray(y_TC, jnp.float32), ridge=ridge)
    assert_close(got, wanted)


def test_rank():
    m_TD, y_TC, factors = least_squares((9, 12))
    u, s, vt = np.linalg.svd(m_TD)
    wanted = vt[:4].T @ np.diag(1 / s[:4]) @ u[:, :4].T @ y_TC
    got = nodeclass.closed_form(factors, jnp.asarray(y_TC, jnp.float32), rank=4)
    assert_close(got, wanted)


def test_cutoff_leaves_out_what_is_noise():
    m_TD = np.outer(draw(0, 8), draw(1, 10))
    y_TC = draw(2, 8, 2)
    factors = svd(dense(m_TD.astype("f")), jax.random.key(0), rank=8)
    targets = jnp.asarray(y_TC, jnp.float32)
    assert_close(nodeclass.closed_form(factors, targets), np.linalg.pinv(m_TD) @ y_TC)
    full = least_squares((8, 10))[2]
    cut = nodeclass.closed_form(full, targets, cutoff=0.5)
    count = int((full.s_K > 0.5 * full.s_K[0]).sum())
    assert 0 < count < 8
    assert_close(cut, nodeclass.closed_form(full, targets, rank=count))


def test_factorisations_are_reported():
    graph, features, labels_N, train, validation, _ = planted()
    key, told, passes = jax.random.key(0), {}, []
    options = {"embedding_rank": 4, "pca_rank": 6, "num_hops": 2, "ranks": (3,), "draws": 0}
    nodeclass.classify(
        graph, features, labels_N, train, validation, key, report=told.__setitem__,
        report_pass=lambda *numbers: passes.append([float(x) for x in numbers]), **options,
    )  # fmt: skip
    jax.effects_barrier()
    assert list(told) == ["walks", "features", "training rows"]
    key_features, key_fit = jax.random.split(key)
    z = node_features.planetoid_features(
        graph, features, key_features, embedding_rank=4, pca_rank=6
    )
    step = sparse(normalized_adjacency(graph), z.dtype)
    rows = take_rows(propagated(step, z, 2), train)
    wanted = svd(rows, key_fit, rank=3)
    assert int(told["training rows"].products) == int(wanted.products)
    assert_close(told["training rows"].s_K, wanted.s_K)
    walks = told["walks"]
    products, residual = passes[-1]  # the others have a basis of all columns, and no pass
    assert products <= int(walks.products)
    assert 0 < residual < 1e-3
    assert 0 < walks.residual_K.max() < 1e-3 * walks.s_K[0]


def test_draws_are_reported_together():
    """Their values and residuals, of each draw one row; vectors would be large."""
    told = []
    for draws in (3, 1):
        fitted(draws=draws, report=lambda *what_factors: told.append(what_factors))
    (what, three), (again, one) = told
    assert what == again == "training rows with dropout"
    assert three.s_K.shape == three.residual_K.shape == (3, 9)
    assert three.u_MK.size == three.v_NK.size == 0
    assert int(three.products.sum()) == 3 * int(one.products.sum())


# Fit ---------------------------------------------------------------------------------------------


@functools.cache
def small_design():
    graph, features, labels_N, train, validation, test = planted()
    design = propagated(sparse(normalized_adjacency(graph)), centered(sparse(features)), 2)
    return design, labels_N, train, validation, test


def twin_scores(design, labels_N, train, rank, ridge, copies=()):
    """Scores of the stacked least-squares problem, by numpy."""
    m_ND = np.asarray(design.to_dense(), np.float64)
    y_TC = np.eye(3)[labels_N[train]]
    stack = np.vstack([m_ND[train], *copies])
    u, s, vt = np.linalg.svd(stack, full_matrices=False)
    f = s[:rank] / (s[:rank] ** 2 + ridge * s[0] ** 2)
    return m_ND @ (vt[:rank].T * f @ u[:, :rank].T @ np.vstack([y_TC] * (1 + len(copies))))


def fitted(**options):
    design, labels_N, train, validation, _ = small_design()
    key = options.pop("key", jax.random.key(0))
    options = {"ranks": (3, 9), "ridges": (0.0, 0.1), **options}
    return nodeclass.fit(design, labels_N, train, validation, key, **options)


def test_fit_without_dropout():
    design, labels_N, train, validation, _ = small_design()
    got = fitted(draws=0)
    assert got.accuracy_RP.shape == (2, 2)
    for row, rank in enumerate((3, 9)):
        for column, ridge in enumerate((0.0, 0.1)):
            wanted = twin_scores(design, labels_N, train, rank, ridge)
            share = (wanted[validation].argmax(1) == labels_N[validation]).mean()
            assert got.accuracy_RP[row, column] == pytest.approx(share, abs=0.04)  # near ties
    assert_close(got.scores_NC, twin_scores(design, labels_N, train, got.rank, got.ridge), 2e-3)
    assert_close(got.scores_NC, design @ got.weights_DC)


def test_fit_of_many_masks_is_the_mean_of_their_fits(monkeypatch):
    """The masks are recorded, and each draw is solved by numpy."""
    design, labels_N, train, *_ = small_design()
    masks, real = [], jax.random.bernoulli

    def record(key, p, shape):
        mask = real(key, p, shape)
        jax.debug.callback(lambda m: masks.append(np.asarray(m)), mask, ordered=True)
        return mask

    monkeypatch.setattr(jax.random, "bernoulli", record)
    got = fitted(ranks=(8,), ridges=(0.01,), draws=3, copies=2, dropout=0.25)
    jax.effects_barrier()
    assert len(masks) == 3
    assert masks[0].shape == (2, 15, design.shape[1])
    assert np.mean(masks) == pytest.approx(0.75, abs=0.02)
    rows = np.asarray(design.to_dense(), np.float64)[train]
    scores = [
        twin_scores(design, labels_N, train, 8, 0.01, [rows * m / 0.75 for m in mask])
        for mask in masks
    ]
    assert_close(got.scores_NC, np.mean(scores, 0), 2e-3)
    assert np.abs(scores[0] - scores[1]).max() > 0.01


def test_options_of_fit_change_the_result():
    first = fitted(draws=1)
    np.testing.assert_array_equal(first.weights_DC, fitted(draws=1).weights_DC)
    changes = {"draws": 2, "copies": 2, "dropout": 0.2, "ranks": (3, 5), "ridges": (0.5, 0.7)}
    for name, value in {**changes, "key": jax.random.key(5)}.items():
        other = fitted(**{"draws": 1, name: value})
        assert np.abs(other.weights_DC - first.weights_DC).max() > 1e-4


def test_validation_nodes_choose_and_others_are_not_looked_at():
    """With every other label garbled the result is the same; ties go to the simpler model."""
    design, labels_N, train, validation, test = small_design()
    garbled = labels_N.copy()
    garbled[test] = -1
    options = {"ranks": (3, 9), "ridges": (0.0, 0.1), "draws": 0}
    got = nodeclass.fit(design, garbled, train, validation, jax.random.key(0), **options)
    want = fitted(draws=0)
    np.testing.assert_array_equal(got.scores_NC, want.scores_NC)
    best = want.accuracy_RP.max()
    row, column = (3, 9).index(want.rank), (0.0, 0.1).index(want.ridge)
    assert want.accuracy_RP[row, column] == best
    same = fitted(draws=0, ranks=(9, 9, 400), ridges=(1e-9, 0.0))  # 400 is cut to 15 rows
    assert same.accuracy_RP.shape == (2, 2)
    tied = np.argwhere(same.accuracy_RP == same.accuracy_RP.max())
    if len(tied) > 1:
        assert same.ridge == 1e-9


def test_a_setting_whose_scores_are_no_numbers_is_not_chosen():
    """NaN counts as the largest score, so that it were right for class 0."""
    design, labels_N, _, validation, _ = small_design()
    weights_DGC = jnp.asarray(draw(7, design.shape[1], 4, 3), jnp.float32)
    broken_DGC = weights_DGC.at[:, 1:3].set(jnp.nan)
    zeros_N = np.zeros_like(labels_N)
    got = nodeclass._chosen(design, broken_DGC, zeros_N, validation, (3, 9), (0.0, 0.1))
    assert np.isnan(got.accuracy_RP).tolist() == [[False, True], [True, False]]
    finite = [(got.accuracy_RP[0, 0], 0.0, 3), (got.accuracy_RP[1, 1], 0.1, 9)]
    assert (np.nanmax(got.accuracy_RP), got.ridge, got.rank) == max(finite)
    with pytest.raises(ValueError, match="scores of the validation nodes are NaN with every rank"):
        nodeclass._chosen(design, jnp.nan * weights_DGC, labels_N, validation, (3, 9), (0.0, 0.1))


def test_the_whole_pipeline():
    graph, features, labels_N, train, validation, test = planted()
    options = {"num_hops": 3, "embedding_rank": 4, "ranks": (6, 12), "draws": 2}
    hidden = np.where(np.isin(np.arange(90), test), -1, labels_N)
    fit = nodeclass.classify(
        graph, features, hidden, train, validation, jax.random.key(0), pca_rank=30, **options
    )
    assert metrics.accuracy(fit.scores_NC, labels_N, test) > 0.75
    implicit = nodeclass.classify(
        graph, features, hidden, train, validation, jax.random.key(0), pca_rank=None, **options
    )
    assert metrics.accuracy(implicit.scores_NC, labels_N, test) > 0.75
    wrong = np.roll(labels_N, 1)
    assert metrics.accuracy(fit.scores_NC, wrong, test) < 0.4


# Errors ------------------------------------------------------------------------------------------


def fit_with(**changes):
    design, labels_N, train, validation, _ = small_design()
    parts = {"design": design, "labels": labels_N, "train": train, "validation": validation}
    options = {k: v for k, v in changes.items() if k not in parts}
    parts.update({k: v for k, v in changes.items() if k in parts})
    return nodeclass.fit(*parts.values(), jax.random.key(0), **options)


MISSING = np.where(np.arange(90) == 2, -1, np.arange(90) % 3)
WRONG = {
    "no label": (lambda: fit_with(labels=MISSING), "train_T has 1 nodes without a label.* is 2"),
    "no validation label": (
        lambda: fit_with(labels=MISSING, train=np.arange(9) + 3, validation=np.array([2])),
        "validation_V has 1 nodes without a label",
    ),
    "in both sets": (
        lambda: fit_with(validation=np.array([50, 14, 3])),
        "train_T and validation_V share 2 nodes, the first is 3: expected none in both",
    ),
    "one ridge": (lambda: fit_with(ridges=0.1), "ridges=0.1, expected a sequence of numbers"),
    "one rank": (lambda: fit_with(ranks=3), "ranks=3, expected a sequence of numbers"),
    "one class": (lambda: fit_with(train=np.arange(0, 15, 3)), "one class, expected two"),
    "outside": (lambda: fit_with(train=np.array([0, 90])), "train_T has node 90, expected 0 to 89"),
    "negative": (lambda: fit_with(validation=np.array([-1])), "validation_V has node -1"),
    "mask": (lambda: fit_with(train=np.ones(90, bool)), "dtype bool, expected integers"),
    "none": (lambda: fit_with(train=np.zeros(0, int)), r"train_T has shape \(0,\)"),
    "labels": (lambda: fit_with(labels=np.zeros(3, int)), r"labels_N has shape \(3,\), .*\(90,\)"),
    "float labels": (lambda: fit_with(labels=np.arange(90) / 1), "labels_N has dtype float64"),
    "names": (
        lambda: fit_with(labels=np.full(90, "a")),
        "labels_N has dtype <U1, expected integers",
    ),
    "two truths": (lambda: fit_with(labels=np.arange(90) > 4), "labels_N has dtype bool"),
    "gaps": (
        lambda: fit_with(labels=np.where(np.arange(90) == 2, 10**9, np.arange(90) % 3)),
        "train_T has a node with label 1000000000, expected 0 to 89: number the classes",
    ),
    "design": (
        lambda: fit_with(design=dense(np.ones((90, 4), int))),
        "design has dtype int32, expected a real floating type",
    ),
    "zero rows": (
        lambda: fit_with(design=dense(np.zeros((90, 4), "f"))),
        "all zero, or not finite",
    ),
    "zero rows, clean": (
        lambda: fit_with(design=dense(np.zeros((90, 4), "f")), draws=0),
        "all zero, or not finite",
    ),
    "dropout": (lambda: fit_with(dropout=1.0), "dropout=1.0, expected from 0 to less than 1"),
    "draws": (lambda: fit_with(draws=-1), "draws=-1"),
    "ranks": (lambda: fit_with(ranks=(0,)), "ranks=0, expected at least 1"),
    "part of a rank": (lambda: fit_with(ranks=(2.7,)), "ranks=2.7, expected a whole number"),
    "no ranks": (lambda: fit_with(ranks=()), r"ranks=\(\) and ridges"),
    "ridges": (lambda: fit_with(ridges=(-1.0,)), r"ridges=\(-1.0,\)"),
    "ridge of float64": (
        lambda: fit_with(ridges=(0.1, 1e39)),
        r"ridges=\(0.1, 1e\+39\): expected some, from 1 and from 0, finite in float32",
    ),
    "no ridge": (lambda: fit_with(ridges=(np.nan,)), r"ridges=\(nan,\)"),
    "rank": (
        lambda: nodeclass.closed_form(least_squares((4, 5))[2], jnp.ones((4, 2)), rank=5),
        "rank=5, expected from 1 to 4, the triplets there are",
    ),
    "targets": (
        lambda: nodeclass.closed_form(least_squares((4, 5))[2], jnp.ones(4)),
        r"targets_TC has shape \(4,\)",
    ),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_errors_say_what_was_expected(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call()

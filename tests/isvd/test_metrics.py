"""Measures of scores, against counts over all pairs, scipy's statistics, and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from isvd import metrics


def auc_by_pairs(positive_P, negative_Q):
    higher = positive_P[:, None] > negative_Q
    return (higher + 0.5 * (positive_P[:, None] == negative_Q)).mean()


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_auc(levels):
    """Against all pairs, and the statistic of Mann and Whitney; few levels make many ties."""
    rng = np.random.default_rng(levels)
    positive_P = rng.integers(0, levels, 300).astype("f") + levels / 10
    positive_P, negative_Q = np.round(positive_P), rng.integers(0, levels, 170).astype("f")
    wanted = auc_by_pairs(positive_P, negative_Q)
    u = scipy.stats.mannwhitneyu(positive_P.astype("d"), negative_Q.astype("d")).statistic
    assert wanted == pytest.approx(u / (300 * 170), abs=1e-12)
    got = metrics.roc_auc(positive_P, negative_Q)
    assert isinstance(got, float)
    assert got == pytest.approx(wanted, abs=1e-14)
    on_device = jax.jit(metrics.roc_auc)(jnp.asarray(positive_P), jnp.asarray(negative_Q))
    assert on_device == pytest.approx(wanted, abs=1e-6)


def test_auc_of_many_pairs_does_not_overflow():
    """10^11 pairs: more than an int32 or the digits of a float32 can hold."""
    positive_P = np.arange(200_000) + 0.5
    negative_Q = np.arange(500_000.0)
    wanted = (np.arange(1, 200_001) / 500_000).mean()
    assert metrics.roc_auc(positive_P, negative_Q) == pytest.approx(wanted, abs=1e-14)
    as_float32 = (jnp.asarray(x, jnp.float32) for x in (positive_P, negative_Q))
    assert metrics.roc_auc(*as_float32) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("namespace", [np, jnp])
def test_measures_by_hand(namespace):
    one = namespace.asarray
    positive_P, negative_Q = one([3.0, 2.0, 1.0]), one([2.0, 0.0, 2.0, 1.5])
    assert metrics.roc_auc(positive_P, negative_Q) == pytest.approx((4 + 3 + 1) / 12)
    # The second highest negative is 2, and 2 is not above it.
    assert metrics.hits_at_k(positive_P, negative_Q, 2) == pytest.approx(1 / 3)
    assert metrics.hits_at_k(positive_P, negative_Q, 3) == pytest.approx(2 / 3)
    assert metrics.hits_at_k(positive_P, negative_Q, 4) == 1
    assert metrics.hits_at_k(positive_P, negative_Q, 5) == 1
    # Ranks 1, between 1 and 3, and 3.
    negative_PQ = one([[2.0, 0.0], [2.0, 2.0], [2.0, 3.0]])
    mean = metrics.mean_reciprocal_rank(positive_P, negative_PQ)
    assert mean == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)


def test_mean_reciprocal_rank_against_ranks_of_scipy():
    rng = np.random.default_rng(3)
    positive_P, negative_PQ = rng.integers(0, 6, 40), rng.integers(0, 6, (40, 9))
    ranks = [
        scipy.stats.rankdata(-np.r_[p, q])[0] for p, q in zip(positive_P, negative_PQ, strict=True)
    ]
    got = metrics.mean_reciprocal_rank(positive_P.astype("f"), negative_PQ.astype("f"))
    assert got == pytest.approx(np.mean(1 / np.array(ranks)), abs=1e-12)


@pytest.mark.parametrize("namespace", [np, jnp])
def test_a_score_that_is_not_a_number_is_not_hidden(namespace):
    bad, good = namespace.asarray([1.0, np.nan]), namespace.asarray([0.0, 0.5])
    for positive_P, negative_Q in ((bad, good), (good, bad)):
        assert np.isnan(metrics.roc_auc(positive_P, negative_Q))
        assert np.isnan(metrics.hits_at_k(positive_P, negative_Q, 1))
    assert np.isnan(metrics.mean_reciprocal_rank(bad, good[:, None]))


def test_accuracy():
    scores_NC = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    labels_N = np.array([0, 1, 0, -1])
    assert metrics.accuracy(scores_NC, labels_N, np.array([0, 1, 2])) == pytest.approx(2 / 3)
    assert metrics.accuracy(jnp.asarray(scores_NC), labels_N, np.array([2])) == 0
    scores_NC[3] = np.inf, 0
    scores_NC[0, 1] = np.nan
    assert np.isnan(metrics.accuracy(scores_NC, labels_N, np.array([0, 1])))
    assert metrics.accuracy(scores_NC, labels_N, np.array([1, 2])) == 0.5


ONE_2, LABELS_N = np.ones(2), np.array([0, 1, -1])
WRONG = {
    "empty": (lambda: metrics.roc_auc(np.zeros(0), ONE_2), r"positive_P has shape \(0,\)"),
    "k": (lambda: metrics.hits_at_k(ONE_2, ONE_2, 0), "k=0, expected at least 1"),
    "true": (lambda: metrics.hits_at_k(ONE_2, ONE_2, True), "k=True, expected a whole number"),
    "rows": (
        lambda: metrics.mean_reciprocal_rank(ONE_2, np.ones((3, 2))),
        r"expected \(2, Q\)",
    ),
    "no label": (
        lambda: metrics.accuracy(np.ones((3, 2)), LABELS_N, np.array([2])),
        "index_I",
    ),
    "scores": (
        lambda: metrics.accuracy(np.ones((2, 2)), LABELS_N, np.array([0])),
        r"scores_NC has shape \(2, 2\), expected \(3, classes\)",
    ),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_requests(case):
    request, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        request()

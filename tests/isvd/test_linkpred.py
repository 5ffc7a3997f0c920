"""Scores, the choice of the rank and the spectral kernel, against independent twins."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.sparse.csgraph
import scipy.stats

from isvd import linkpred
from isvd.design import link_operator
from isvd.factorize import SVD, svd
from isvd.readers import adjacency


def factors_of(a_NN, rank):
    u, s, vt = np.linalg.svd(a_NN)
    parts = (jnp.asarray(x, jnp.float32) for x in (u[:, :rank], s[:rank], vt[:rank].T))
    return SVD(*parts, jnp.zeros(rank), jnp.int32(0), jnp.bool(True))


def random_factors(seed=0, size=8, rank=3):
    a_NN = np.random.default_rng(seed).normal(size=(size, size))
    factors = factors_of(a_NN, rank)
    u, s, v = (np.asarray(x, np.float64) for x in factors[:3])
    return factors, u * s @ v.T


# Scores ------------------------------------------------------------------------------------------

PAIRS = np.array([[0, 1], [1, 0], [3, 3], [7, 2]])


def test_scores_are_entries_of_the_low_rank_matrix():
    factors, low_NN = random_factors()
    i, j = PAIRS.T
    one_way = linkpred.scores(factors, PAIRS, symmetric=False)
    np.testing.assert_allclose(one_way, low_NN[i, j], atol=1e-5)
    both = linkpred.scores(factors, PAIRS)
    np.testing.assert_allclose(both, (low_NN + low_NN.T)[i, j] / 2, atol=1e-5)
    assert not np.allclose(both[:2], one_way[:2], atol=0.01)
    jitted = jax.jit(linkpred.scores, static_argnames="symmetric")(factors, jnp.asarray(PAIRS))
    np.testing.assert_allclose(jitted, both, atol=1e-6)


def test_scores_of_nodes_that_there_are_not_are_not_numbers():
    factors, _ = random_factors()
    for bad in (len(factors.u_MK), 2**32 + 1, -1, -(2**32)):
        assert np.isnan(linkpred.scores(factors, np.array([[1, bad]]))).all()
    assert np.isnan(linkpred.scores(factors, np.array([[1, 2**63 + 1]], np.uint64))).all()


def test_embeddings_multiply_to_the_low_rank_matrix():
    factors, low_NN = random_factors()
    left_NK, right_NK = linkpred.embeddings(factors)
    np.testing.assert_allclose(left_NK @ right_NK.T, low_NN, atol=1e-5)
    np.testing.assert_allclose(jnp.square(left_NK).sum(0), factors.s_K, rtol=1e-5)
    np.testing.assert_allclose(jnp.square(right_NK).sum(0), factors.s_K, rtol=1e-5)


def test_pairs_outside_are_not_numbers():
    """Negative ones too, which numpy counts from the end."""
    factors, _ = random_factors()
    pairs = jnp.array([[0, 8], [-1, 0], [0, -8], [7, 0]])
    for symmetric in (True, False):
        for scores in (linkpred.scores, jax.jit(linkpred.scores, static_argnames="symmetric")):
            bad = np.isnan(scores(factors, pairs, symmetric=symmetric))
            assert bad.tolist() == [True, True, True, False]


# Choice of the rank ------------------------------------------------------------------------------


def communities(seed=0, size=60, groups=6, inside=0.8, across=0.03):
    """Edges i < j of a planted partition: few nodes, so that `svd` takes its dense way."""
    rng = np.random.default_rng(seed)
    i, j = np.triu_indices(size, 1)
    joined = rng.random(len(i)) < np.where(i % groups == j % groups, inside, across)
    return np.stack([i[joined], j[joined]], axis=1).astype(np.int32)


def recorded_split(monkeypatch, call):
    """What a rank choice fits and scores."""
    seen = {}

    def auc_by_rank(graph, positive_P2, negative_Q2, ranks, *rest):
        seen.update(graph=graph.toarray(), positive=positive_P2, negative=negative_Q2)
        return np.array([0.5, 0.9, 0.9][: len(ranks)])

    monkeypatch.setattr(linkpred, "_auc_by_rank", auc_by_rank)
    return call(), seen


def test_an_edge_goes_wholly_to_one_side(monkeypatch):
    edges = communities()
    arcs = np.concatenate([edges, edges[:, ::-1], edges[:50]])  # reversed, and repeated
    choice, seen = recorded_split(
        monkeypatch, lambda: linkpred.choose_rank(arcs, 60, jax.random.key(0), ranks=(8, 4, 2))
    )
    positive, graph = seen["positive"], seen["graph"]
    assert not graph[positive[:, 0], positive[:, 1]].any()
    assert not graph[positive[:, 1], positive[:, 0]].any()
    assert len(positive) == round(0.15 * len(edges))
    assert np.count_nonzero(graph) == 2 * (len(edges) - len(positive))
    assert choice.rank == 2  # 4 and 2 are equal: the smaller
    assert choice.ranks == (8, 4, 2)


def test_negatives_join_no_edge_of_either_side(monkeypatch):
    edges = communities()
    _, seen = recorded_split(
        monkeypatch,
        lambda: linkpred.choose_rank(
            edges, 60, jax.random.key(0), ranks=(2, 4), negatives_per_edge=3
        ),
    )
    negative = seen["negative"]
    known = adjacency(edges, 60).toarray()
    assert len(negative) == 3 * len(seen["positive"])
    assert (negative[:, 0] < negative[:, 1]).all()
    assert not known[negative[:, 0], negative[:, 1]].any()


@pytest.mark.parametrize("fraction", [0.15, 0.9])
def test_what_is_connected_stays_connected(monkeypatch, fraction):
    """Two rings with chords, a path between two nodes of its own, and loops, which are all kept."""
    ring = np.stack([np.arange(20), (np.arange(20) + 1) % 20], axis=1)
    chords = np.stack([np.arange(20), (np.arange(20) + 5) % 20], axis=1)
    path, loops = np.array([[40, 41], [41, 42]]), np.array([[3, 3], [41, 41]])
    edges = np.concatenate([ring, chords, ring + 20, chords + 20, path, loops])
    held = set()
    for seed in range(5):
        call = functools.partial(
            linkpred.choose_rank, edges, 43, jax.random.key(seed), ranks=(2,), fraction=fraction
        )
        _, seen = recorded_split(monkeypatch, call)
        graph, positive = seen["graph"], seen["positive"]
        assert scipy.sparse.csgraph.connected_components(graph)[0] == 3
        # A forest of 43 nodes in 3 parts has 40 edges; 42 of 84 are neither of it nor loops.
        assert len(positive) == min(round(fraction * 84), 42)
        held |= set(map(tuple, positive))
    assert not held & {(3, 3), (41, 41), (40, 41), (41, 42)}
    assert len(held) > (30 if fraction < 0.5 else 60)  # other ones with each key


def test_the_choice_is_that_of_the_mean_over_splits(monkeypatch):
    seen = []

    def auc_by_rank(graph, positive_P2, negative_Q2, ranks, *rest):
        seen.append({tuple(pair) for pair in positive_P2.tolist()})
        return np.array([[0.5, 0.9], [0.8, 0.4], [0.8, 0.4]][len(seen) - 1])

    monkeypatch.setattr(linkpred, "_auc_by_rank", auc_by_rank)
    choice = linkpred.choose_rank(EDGES, 60, KEY, ranks=(2, 4), splits=3)
    np.testing.assert_allclose(choice.auc_R, [0.7, 1.7 / 3])
    assert choice.rank == 2
    assert len(set(map(frozenset, seen))) == 3


def test_a_weight_is_chosen_as_a_rank_is():
    """Each weight has the splits, and so the numbers, of the choice of a rank with it."""
    options = {"ranks": (2, 6), "splits": 2, "window": 2}
    weights = (0.0, 0.05, 5.0)
    choice = linkpred.choose_weight(EDGES, 60, KEY, weights=weights, **options)
    for weight, auc_R in zip(weights, choice.auc_WR, strict=True):
        alone = linkpred.choose_rank(EDGES, 60, KEY, negative_weight=weight, **options)
        np.testing.assert_array_equal(auc_R, alone.auc_R)
    w, r = np.unravel_index(choice.auc_WR.argmax(), (3, 2))
    assert (choice.negative_weight, choice.rank) == (weights[w], (2, 6)[r])
    assert (choice.weights, choice.ranks) == (weights, (2, 6))


def test_of_equal_weights_the_smaller_is_chosen(monkeypatch):
    monkeypatch.setattr(linkpred, "_auc_by_rank", lambda *given: np.array([0.4, 0.7, 0.7]))
    choice = linkpred.choose_weight(EDGES, 60, KEY, ranks=(8, 4, 2), weights=(0.2, 0.1), splits=1)
    assert (choice.negative_weight, choice.rank) == (0.1, 2)


def test_the_leaky_split_leaks(monkeypatch):
    """The reverse of a held-out arc is among the fitted ones with probability .4."""
    choice, seen = recorded_split(
        monkeypatch,
        lambda: linkpred.choose_rank_leaky(communities(), 60, jax.random.key(0), ranks=(2, 4, 8)),
    )
    positive, graph = seen["positive"], seen["graph"]
    leaked = (graph[positive[:, 0], positive[:, 1]] > 0).mean()
    assert 0.33 < leaked < 0.47
    assert choice.rank == 8  # ties: the larger
    assert len(seen["negative"]) == 5 * len(positive)


def test_choice_on_planted_communities():
    """Six groups: rank 6 tells them apart, less does not, and more is noise."""
    edges, ranks = communities(), (1, 2, 6, 50)
    key = jax.random.key(1)
    honest = linkpred.choose_rank(edges, 60, key, ranks=ranks, window=2)
    assert honest.rank == 6
    assert honest.auc_R[2] > 0.85 > honest.auc_R[0]
    same = linkpred.choose_rank(edges, 60, key, ranks=ranks, window=2)
    np.testing.assert_array_equal(same.auc_R, honest.auc_R)
    other = linkpred.choose_rank(edges, 60, jax.random.key(2), ranks=ranks, window=2)
    assert (other.auc_R != honest.auc_R).any()


@pytest.mark.parametrize("choose", [linkpred.choose_rank, linkpred.choose_rank_leaky])
def test_default_ranks_are_those_of_the_graph(monkeypatch, choose):
    for num_nodes, ranks in ((60, (4, 8, 16, 32)), (256, linkpred.RANKS), (3, (1,))):
        assert linkpred.ranks_for(num_nodes) == ranks
    monkeypatch.setattr(linkpred, "_auc_by_rank", lambda *given: np.arange(len(given[3])) / 4)
    choice = choose(communities(), 60, jax.random.key(1))
    assert (choice.ranks, choice.rank) == ((4, 8, 16, 32), 32)


def test_a_rank_without_a_measure_is_not_chosen():
    ranks, nan = (2, 4, 8), np.nan
    for auc_R, rank in (([nan, 0.6, 0.5], 4), ([0.1, nan, 0.1], 2), ([nan, nan, 0.0], 8)):
        assert linkpred._choice(ranks, np.array(auc_R), ties=-1).rank == rank
    with pytest.raises(ValueError, match=r"AUC is NaN for each of ranks=\(2, 4, 8\), .* check neg"):
        linkpred._choice(ranks, np.full(3, nan), ties=-1)


def test_only_the_leaky_rule_sees_something_in_pure_noise():
    edges = communities(inside=0.1, across=0.1)
    options = {"ranks": (50,), "window": 2}
    honest = linkpred.choose_rank(edges, 60, jax.random.key(0), fraction=0.4, **options)
    leaky = linkpred.choose_rank_leaky(edges, 60, jax.random.key(0), **options)
    assert abs(honest.auc_R[0] - 0.5) < 0.1
    assert leaky.auc_R[0] > 0.65


def test_auc_of_each_rank_is_that_of_its_own_decomposition():
    edges = communities()
    graph = adjacency(edges, 60)
    positive, negative = edges[:40], np.stack([np.arange(50), np.arange(50) + 7], axis=1)
    got = linkpred._auc_by_rank(
        graph, positive, negative, (3, 12), jax.random.key(0), None, {"window": 2}
    )
    m_NN = np.asarray(link_operator(graph, window=2).to_dense())
    for rank, auc in zip((3, 12), got, strict=True):
        u, s, vt = np.linalg.svd(m_NN)
        low = u[:, :rank] * s[:rank] @ vt[:rank]
        low = low + low.T
        sides = low[tuple(positive.T)], low[tuple(negative.T)]
        wins = scipy.stats.mannwhitneyu(*sides).statistic
        assert auc == pytest.approx(wins / (len(positive) * len(negative)), abs=1e-3)


# Fine-tuning -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mu", "tau"), [(1.0, 5.0), (0.7, 8.0), (1.5, 0.0), (0.51, 3.0)])
def test_spectral_kernel_is_a_mean_over_a_truncated_normal(mu, tau):
    """By quadrature of the density; the grid takes its end points with full weight."""
    s_K = np.array([75.0, 4.0, 1.0, 0.3])
    density = lambda x: np.exp(-((mu - x) ** 2) * np.exp(tau))  # noqa: E731
    inside = {"points": [min(mu, 1.99)]}
    total = scipy.integrate.quad(density, 0.5, 2, **inside)[0]
    wanted = [
        scipy.integrate.quad(lambda x, s=s: density(x) * s**x, 0.5, 2, **inside)[0] / total
        for s in s_K
    ]
    with jax.enable_x64(True):
        got = linkpred.spectral_kernel(s_K, mu, tau)
    np.testing.assert_allclose(got, wanted, rtol=2e-2)


def test_spectral_kernel_at_the_start_and_in_the_limit():
    s_K = np.array([70.0, 4.0, 0.0], np.float32)
    spread = np.exp(-5) / 2  # variance at tau = 5
    start = linkpred.spectral_kernel(s_K, 1.0, 5.0)
    second_order = s_K[:2] * (1 + spread * np.log(s_K[:2]) ** 2 / 2)
    np.testing.assert_allclose(start[:2], second_order, rtol=2e-3)
    np.testing.assert_allclose(linkpred.spectral_kernel(s_K, 1.0, 20.0), s_K, rtol=1e-4)
    np.testing.assert_allclose(linkpred.spectral_kernel(s_K, 0.8, 20.0), s_K**0.8, rtol=1e-4)
    slopes = jax.jacobian(linkpred.spectral_kernel, argnums=(0, 1, 2))(s_K, 1.0, 5.0)
    assert all(np.isfinite(slope).all() for slope in slopes)


@pytest.mark.parametrize("size", [1e-20, 1e20, 1e35])
def test_spectral_kernel_of_values_whose_squares_are_no_numbers(size):
    """Against float64, in which they are."""
    s_K = np.array([size, 3.0])
    with jax.enable_x64(True):
        wanted = linkpred.spectral_kernel(s_K, 1.0, 9.0)
    got = linkpred.spectral_kernel(s_K.astype("f"), 1.0, 9.0)
    np.testing.assert_allclose(got, wanted, rtol=1e-4)
    slopes = jax.jacobian(linkpred.spectral_kernel, argnums=(1, 2))(s_K.astype("f"), 1.0, 9.0)
    assert all(np.isfinite(slope).all() for slope in slopes)


def test_spectral_kernel_gradient():
    with jax.enable_x64(True):
        s_K = np.array([70.0, 4.0, 0.5])

        def value(mu, tau):
            return linkpred.spectral_kernel(s_K, mu, tau).sum()

        got = jax.grad(value, argnums=(0, 1))(1.1, 4.0)
        step = 1e-5
        mu = (value(1.1 + step, 4.0) - value(1.1 - step, 4.0)) / (2 * step)
        tau = (value(1.1, 4.0 + step) - value(1.1, 4.0 - step)) / (2 * step)
    np.testing.assert_allclose(got, (mu, tau), rtol=1e-6)


@functools.cache
def community_factors():
    """Of large values, so that scores matter."""
    op = 5 * link_operator(adjacency(communities(), 60), window=2)
    return svd(op, jax.random.key(0), rank=12)


def tuned(steps=60, key=0, **options):
    options = {"batch": 50, "negatives": 3, "learning_rate": 3e-2, **options}
    return linkpred.finetune_spectrum(
        community_factors(), communities(), jax.random.key(key), steps=steps, **options
    )


def expected_loss(s_K, negatives):
    """Over all edges, and all pairs with equal chance."""
    factors = community_factors()._replace(s_K=s_K)
    every = np.stack(np.meshgrid(np.arange(60), np.arange(60)), axis=-1).reshape(-1, 2)
    positive, negative = (
        np.asarray(linkpred.scores(factors, pairs), np.float64) for pairs in (communities(), every)
    )
    loss = np.logaddexp(0, -positive).mean() + negatives * np.logaddexp(0, negative).mean()
    return loss / (1 + negatives)


def test_finetuning_lowers_the_loss_and_moves_only_the_spectrum():
    factors, spectrum = community_factors(), tuned()
    assert spectrum.loss_S.shape == (60,)
    assert abs(float(spectrum.mu) - 1) > 0.05
    wanted = linkpred.spectral_kernel(factors.s_K, spectrum.mu, spectrum.tau)
    np.testing.assert_allclose(spectrum.s_K, wanted, rtol=1e-5)
    before, after = expected_loss(factors.s_K, 3), expected_loss(spectrum.s_K, 3)
    assert after < before - 0.005
    start = linkpred.spectral_kernel(factors.s_K, 1.0, 5.0)
    assert spectrum.loss_S[0] == pytest.approx(expected_loss(start, 3), abs=0.1)


def test_parameters_stay_in_their_range():
    spectrum = tuned(steps=3, learning_rate=10.0)
    assert float(spectrum.mu) in (pytest.approx(0.51), pytest.approx(1.99))
    assert 0 <= float(spectrum.tau) <= 20
    assert float(tuned(steps=1, learning_rate=30.0).tau) in (0, 20)


def test_finetuning_options_change_the_result():
    first = tuned(steps=3)
    np.testing.assert_array_equal(first.loss_S, tuned(steps=3).loss_S)
    changes = {"key": 7, "batch": 40, "negatives": 2, "learning_rate": 0.2, "symmetric": False}
    for name, value in changes.items():
        assert (tuned(steps=3, **{name: value}).loss_S[1:] != first.loss_S[1:]).any()


def test_a_pass_uses_every_edge_once(monkeypatch):
    edges = communities()[:60]
    options = {"batch": 20, "negatives": 1, "learning_rate": 0.0}
    seen = []
    real = linkpred._pair_scores

    def record(u, s, v, pairs, symmetric):
        jax.debug.callback(lambda p: seen.append(np.asarray(p)), pairs)
        return real(u, s, v, pairs, symmetric)

    monkeypatch.setattr(linkpred, "_pair_scores", record)
    linkpred.finetune_spectrum(community_factors(), edges, jax.random.key(3), steps=6, **options)
    jax.effects_barrier()
    assert len(seen) == 6
    for part in (seen[:3], seen[3:]):
        used = np.concatenate([pairs[:20] for pairs in part])
        assert sorted(map(tuple, used)) == sorted(map(tuple, edges))


# Errors ------------------------------------------------------------------------------------------

F, KEY = random_factors()[0], jax.random.key(0)
EDGES = communities()
WRONG = {
    "pairs": (lambda: linkpred.scores(F, np.zeros((2, 3), int)), r"shape \(2, 3\).*\(P, 2\)"),
    "types": (lambda: linkpred.scores(F, np.zeros((2, 2))), "dtype float64, expected integers"),
    "node": (lambda: linkpred.choose_rank(EDGES, 50, KEY), "edges_E2 has node .*0 to 49"),
    "fraction": (lambda: linkpred.choose_rank(EDGES, 60, KEY, fraction=1.0), "fraction=1.0"),
    "few edges": (lambda: linkpred.choose_rank(EDGES[:2], 60, KEY), "holds none out"),
    "a tree": (
        lambda: linkpred.choose_rank(np.array([[0, 1], [0, 2], [2, 3], [3, 3]]), 4, KEY),
        "fraction=0.15 of 4 distinct edges holds none out: the others are those that keep conn",
    ),
    "no splits": (
        lambda: linkpred.choose_rank(EDGES, 60, KEY, splits=0),
        "splits=0, expected at least 1",
    ),
    "no weights": (
        lambda: linkpred.choose_weight(EDGES, 60, KEY, ranks=(4,), weights=()),
        r"weights=\(\), expected some",
    ),
    "no ranks": (
        lambda: linkpred.choose_rank(EDGES, 60, KEY, ranks=()),
        r"ranks=\(\), expected some",
    ),
    "negatives": (
        lambda: linkpred.choose_rank(EDGES, 60, KEY, negatives_per_edge=0),
        "negatives_per_edge=0, expected at least 1",
    ),
    "part of a negative": (
        lambda: linkpred.choose_rank(EDGES, 60, KEY, negatives_per_edge=1.5),
        "negatives_per_edge=1.5, expected a whole number",
    ),
    "part of a negative, leaky": (
        lambda: linkpred.choose_rank_leaky(EDGES, 60, KEY, negatives_per_edge=1.5),
        "negatives_per_edge=1.5, expected a whole number",
    ),
    "one rank": (
        lambda: linkpred.choose_rank(EDGES, 60, KEY, ranks=8),
        "ranks=8, expected some, at least 1",
    ),
    "all joined": (
        lambda: linkpred.choose_rank(np.stack(np.triu_indices(6, 1), axis=1), 6, KEY),
        "almost all 6 nodes are joined",
    ),
    "batch": (
        lambda: linkpred.finetune_spectrum(F, EDGES[:5] % 8, KEY, steps=1),
        "batch=1000 is more than the 5 edges",
    ),
    "steps": (lambda: linkpred.finetune_spectrum(F, EDGES % 8, KEY, steps=0), "steps=0"),
    "node of an edge": (
        lambda: linkpred.finetune_spectrum(F, EDGES, KEY, steps=1),
        "edges_E2 has node .*, expected 0 to 7",
    ),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_errors_say_what_was_expected(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call()

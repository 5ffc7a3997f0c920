"""Scores on hand-built attention, features and networks, where the right answer is known.

Ratio Matching and Bayes (`controls`) are the positive controls, random weights the negative one.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sklearn.decomposition import PCA

from modgrok import controls, fourier, interpret, oracles, sequences
from modgrok.model import Config, init_params

P, SHOTS = 7, 6
EVERY = np.stack(np.divmod(np.arange(P**2), P), axis=1).astype(np.int32)
TOKENS_BT = np.asarray(
    sequences.sample_sequences(
        jax.random.key(0), EVERY[1:], EVERY, modulus=P, shots=SHOTS, batch=48, paired=False
    )
)
CFG = Config(vocab=P, width=16, heads=2, layers=2)
RULES = {"ratio_matching": controls.ratio_matching(P), "bayes": controls.bayes(P)}
RANDOM = interpret.network(init_params(jax.random.key(1), CFG), CFG)

scores = functools.partial(interpret.attention_scores, modulus=P)
capture = jax.jit(lambda subject, tokens_BT: subject.capture(tokens_BT))


def slow_ratio_scores(attention_BTT, tokens_BT):
    """Means of ratio and ratio_choice, one query at a time."""
    matched, earlier = [], []
    for weight_TT, row in zip(attention_BTT, tokens_BT.reshape(-1, SHOTS, 3), strict=True):
        for shot, (x, y, _) in enumerate(row):
            same = [
                i
                for i, (a, b, _) in enumerate(row[:shot])
                if (x, y) != (0, 0) and any((c * a % P, c * b % P) == (x, y) for c in range(1, P))
            ]
            if same:
                answers = weight_TT[3 * shot + 1, 2 : 3 * shot : 3]
                matched.append(answers[same].sum())
                earlier.append(answers.sum())
    return np.mean(matched), np.mean(matched) / np.mean(earlier)


def test_scores_of_any_attention_equal_slow_sums():
    rng = np.random.default_rng(0)
    length = 3 * SHOTS - 1
    weight = np.tril(rng.uniform(size=(2, 48, 3, length, length)).astype(np.float32))
    weight /= weight.sum(-1, keepdims=True)
    found = scores(weight, TOKENS_BT)
    for layer, head in np.ndindex(2, 3):
        ratio, choice = slow_ratio_scores(weight[layer, :, head], TOKENS_BT)
        np.testing.assert_allclose(found.ratio_LH[layer, head], ratio, rtol=1e-5)
        np.testing.assert_allclose(found.ratio_choice_LH[layer, head], choice, rtol=1e-5)
        mean_TT = weight[layer, :, head].mean(0)
        previous_T = np.array([mean_TT[t, t - 1] for t in range(1, length)])
        np.testing.assert_allclose(found.previous_LH[layer, head], previous_T.mean(), rtol=1e-5)
        np.testing.assert_allclose(found.own_x_LH[layer, head], previous_T[::3].mean(), rtol=1e-5)
        np.testing.assert_allclose(found.first_LH[layer, head], mean_TT[1:, 0].mean(), rtol=1e-5)
        for phase, offset in ((0, 3), (1, 2), (2, 14), (0, 16), (1, 16)):
            queries = [t for t in range(offset, length) if t % 3 == phase]
            wanted = np.mean([mean_TT[t, t - offset] for t in queries]) if queries else 0
            given = found.offset_LH3T[layer, head, phase, offset]
            np.testing.assert_allclose(given, wanted, rtol=1e-5)


def test_uniform_attention_has_closed_forms():
    length = 3 * SHOTS - 1
    found = scores(interpret.uniform_attention(48, length), TOKENS_BT)
    later_T = np.arange(2, length + 1)
    np.testing.assert_allclose(found.previous_LH, np.mean(1 / later_T), rtol=1e-5)
    np.testing.assert_allclose(found.first_LH, np.mean(1 / later_T), rtol=1e-5)
    np.testing.assert_allclose(found.own_x_LH, np.mean(1 / (2 + 3 * np.arange(SHOTS))), rtol=1e-5)


def test_matching_rule_copies_and_regression_pools():
    """The positive controls have their scores exactly, a random network those of uniform."""
    uniform = scores(interpret.uniform_attention(48, 3 * SHOTS - 1), TOKENS_BT)
    for name, subject in (*RULES.items(), ("random", RANDOM)):
        found = scores(capture(subject, TOKENS_BT).attention_LBHTT, TOKENS_BT)
        if name == "random":
            for field in ("previous_LH", "first_LH", "ratio_LH", "ratio_choice_LH"):
                wanted = np.broadcast_to(getattr(uniform, field), (2, 2))
                np.testing.assert_allclose(getattr(found, field), wanted, rtol=0.05)
            continue
        assert found.previous_LH[0, 0] == found.own_x_LH[0, 0] == 1
        np.testing.assert_allclose(found.offset_LH3T[0, 1, :, 2], 1)
        if name == "ratio_matching":
            np.testing.assert_allclose(found.ratio_LH[1, 0], 1, rtol=1e-5)
            np.testing.assert_allclose(found.ratio_choice_LH[1, 0], 1, rtol=1e-5)
            assert found.first_LH[1, 1] == 1
            assert found.ratio_LH[1, 1] == 0
        else:
            np.testing.assert_allclose(found.ratio_LH[1], uniform.ratio_LH[0, 0], rtol=1e-5)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_a_head_built_from_rotary_weights_looks_back_by_its_offset(offset):
    """Every token has one query and one key; turned by `offset` positions they meet."""
    size = 32
    cfg = Config(vocab=P, width=2 * size, heads=2, layers=1)
    params = jax.tree.map(jnp.zeros_like, init_params(jax.random.key(0), cfg))
    constant_D = np.tile([1.0, -1.0], size).astype(np.float32)  # survives the layer norm
    freq_K = 10000.0 ** (-np.arange(0, size, 2) / size)
    query_K = np.stack([np.ones_like(freq_K), 0 * freq_K], axis=1).ravel()
    # Keys are turned forward by `offset`, so that the product is largest at that distance.
    key_K = np.stack([np.cos(offset * freq_K), np.sin(offset * freq_K)], axis=1).ravel()
    qkv = np.zeros((cfg.width, 3, 2, size), np.float32)
    strength = 60 / cfg.width
    qkv[:, 0, 0] = strength * constant_D[:, None] * query_K
    qkv[:, 1, 0] = constant_D[:, None] * key_K / cfg.width * size**0.5
    blocks = {**params["blocks"], "qkv": jnp.asarray(qkv)[None]}
    blocks["ln_1"] = {**blocks["ln_1"], "scale": jnp.ones((1, cfg.width))}
    params = {**params, "blocks": blocks, "embedding": jnp.tile(constant_D, (P, 1))}
    seen = capture(interpret.network(params, cfg), TOKENS_BT)
    found = scores(seen.attention_LBHTT, TOKENS_BT)
    by_offset = np.asarray(found.offset_LH3T[0, 0])
    assert (by_offset.argmax(-1) == offset).all()
    assert by_offset[:, offset].min() > 0.9
    assert (found.previous_LH[0, 0] > 0.9) == (offset == 1)
    uniform = scores(interpret.uniform_attention(48, 3 * SHOTS - 1), TOKENS_BT)
    np.testing.assert_allclose(found.previous_LH[0, 1], uniform.previous_LH[0, 0], rtol=1e-4)


def grid_of(subject, shot=3):
    tokens_NT = interpret.input_grid(TOKENS_BT[5], np.array([2, 3]), modulus=P, shot=shot)
    return tokens_NT, interpret.grid_features(subject, tokens_NT, shot=shot)


def test_input_grid_is_one_context_with_every_input_and_its_answer():
    tokens_NT = np.asarray(interpret.input_grid(TOKENS_BT[5], np.array([2, 3]), modulus=P, shot=3))
    assert tokens_NT.shape == (P**2, 15)
    for column in (*range(9), 12, 13, 14):
        assert (tokens_NT[:, column] == TOKENS_BT[5, column]).all()
    np.testing.assert_array_equal(tokens_NT[:, 9:11], EVERY)
    np.testing.assert_array_equal(tokens_NT[:, 11], (2 * EVERY[:, 0] + 3 * EVERY[:, 1]) % P)
    with pytest.raises(ValueError, match="shot=5, expected from 0 to 4"):
        interpret.input_grid(TOKENS_BT[5], np.array([2, 3]), modulus=P, shot=5)


def test_features_are_the_activations_whatever_the_rows():
    tokens_NT, features = grid_of(RANDOM)
    seen = capture(RANDOM, tokens_NT)
    out_LHKD = RANDOM.out_LHKD
    head = np.einsum("lnthk,lhkd->lhntd", seen.head_LBTHK[:, :, 9:12], out_LHKD)
    np.testing.assert_allclose(features.head_LHN3D, head, atol=1e-6)
    np.testing.assert_allclose(features.hidden_LN3F, seen.hidden_LBTF[:, :, 9:12], atol=1e-6)
    np.testing.assert_allclose(features.residual_LN3D, seen.residual_LBTD[:, :, 9:12], atol=1e-6)
    fewer = interpret.grid_features(RANDOM, tokens_NT, shot=3, rows=10)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    subject = jax.device_put(RANDOM, NamedSharding(mesh, PartitionSpec()))
    spread = interpret.grid_features(subject, tokens_NT, shot=3, rows=10, row_sharding=rows)
    for wanted, *others in zip(features, fewer, spread, strict=True):
        for given in others:
            np.testing.assert_allclose(given, wanted, atol=1e-6)


def test_components_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    feature_GND = rng.normal(size=(3, 40, 12)) * np.arange(1, 13) + 5
    found = interpret.principal_components(feature_GND, components=4)
    for score_NC, explained_C, feature_ND in zip(*found, feature_GND, strict=True):
        pca = PCA(4).fit(feature_ND)
        wanted_NC = pca.transform(feature_ND)
        wanted_NC = wanted_NC * np.sign((wanted_NC * score_NC).sum(0))
        np.testing.assert_allclose(score_NC, wanted_NC, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(explained_C, pca.explained_variance_ratio_, rtol=1e-4)
        assert (
            np.take_along_axis(np.asarray(score_NC), np.abs(score_NC).argmax(0)[None], 0) > 0
        ).all()
    still = interpret.principal_components(np.full((1, 9, 5), 0.1, np.float32), components=2)
    np.testing.assert_array_equal(still.explained_GC, 0)
    with pytest.raises(ValueError, match="components=13, expected from 1 to 12"):
        interpret.principal_components(feature_GND, components=13)


@pytest.mark.parametrize("name", RULES)
def test_circle_of_circles_of_the_controls(name):
    """Figure 1d: R^2 of 1 in the rule's own basis, and no more than by chance in the other."""
    own, other = ("log", "additive") if name == "ratio_matching" else ("additive", "log")
    _, features = grid_of(RULES[name])
    pairs_GND = features.head_LHN3D[0, :1, :, :2].reshape(1, P**2, 4)
    parts = interpret.principal_components(pairs_GND, components=2)
    component_Cpp = np.asarray(parts.score_GNC)[0].T.reshape(2, P, P)
    found = {
        kind: fourier.circles(fourier.pair_shares(component_Cpp, modulus=P, kind=kind), P).share_G
        for kind in fourier.KINDS
    }
    np.testing.assert_allclose(found[own], 1, atol=1e-4)
    assert (np.asarray(found[other]) < 0.75).all()
    np.testing.assert_allclose(parts.explained_GC.sum(), 0.979, atol=1e-3)
    hidden_Fpp = np.moveaxis(np.asarray(features.hidden_LN3F)[1, :, 1], 0, 1).reshape(-1, P, P)
    best = fourier.best(fourier.pair_shares(hidden_Fpp, modulus=P, kind=own))
    np.testing.assert_allclose(best.share_G, 1, atol=1e-4)
    t, u = fourier.pair_frequencies(P, own)[np.asarray(best.mode_G)].T
    if name == "ratio_matching":  # q (log x - log y), which is q (log x + log y) without a sine
        np.testing.assert_array_equal(np.stack([t, u]), [[1, 2, 3], [-1, -2, 3]])
    else:
        np.testing.assert_array_equal((u * pow(1, -1, P) - 2 * t) % P, 0)


def test_similarity_is_correlation_of_channels():
    feature_ND = np.random.default_rng(0).normal(2, 3, size=(6, 9)).astype(np.float32)
    np.testing.assert_allclose(interpret.similarity(feature_ND), np.corrcoef(feature_ND), atol=1e-5)
    for value in (4.0, 0.1):  # of which the second is not its own mean in float32
        still = np.vstack([feature_ND, np.full(9, value)])
        np.testing.assert_array_equal(interpret.similarity(still)[-1], 0)


def slow_ratio_similarity(feature_ND, p=P, order=None):
    """By pairs; `order` gives the token v the name order[v - 1] + 1."""
    name = np.arange(p) if order is None else np.append(0, np.asarray(order) + 1)
    x_N, y_N = name[np.stack(np.divmod(np.arange(p**2), p))]
    matrix = np.corrcoef(feature_ND)
    nonzero_N = (x_N > 0) & (y_N > 0)
    pairs = nonzero_N[:, None] & nonzero_N & (x_N[:, None] != x_N) & (y_N[:, None] != y_N)
    same = (x_N[:, None] * y_N - y_N[:, None] * x_N) % p == 0
    return matrix[pairs & same].mean(), matrix[pairs & ~same].mean()


def test_ratio_similarity_equals_slow_means():
    feature_GND = np.random.default_rng(0).normal(size=(2, P**2, 5))
    found = interpret.ratio_similarity(feature_GND, jax.random.key(0), modulus=P, num=3)
    for g in range(2):
        within, between = slow_ratio_similarity(feature_GND[g])
        np.testing.assert_allclose(found.within_G[g], within, atol=1e-5)
        np.testing.assert_allclose(found.between_G[g], between, atol=1e-5)
    assert found.null_RG.shape == (3, 2)
    assert interpret.ratio_similarity(
        feature_GND, jax.random.key(0), modulus=P, num=0
    ).null_RG.shape == (0, 2)


def test_the_null_of_ratio_similarity_is_of_renamed_tokens():
    """Of p = 5 and 7 all renamings that change the ratios, each way to part them once."""
    rng = np.random.default_rng(0)
    for p, others in ((5, 2), (7, 59)):
        feature_ND = rng.normal(size=(p**2, 5))
        found = interpret.ratio_similarity(feature_ND[None], jax.random.key(0), modulus=p, num=99)
        every = [
            np.subtract(*slow_ratio_similarity(feature_ND, p, order))
            for order in itertools.permutations(range(p - 1))
        ]
        distinct = np.unique(np.round(every, 6))
        mine = np.round(np.subtract(*slow_ratio_similarity(feature_ND, p)), 6)
        assert len(distinct) == others + 1
        assert found.null_RG.shape == (others, 1)
        np.testing.assert_allclose(
            np.sort(found.null_RG[:, 0]), np.setdiff1d(distinct, mine), atol=1e-5
        )
    feature_ND = rng.normal(size=(11**2, 5))
    key = jax.random.key(0)
    found = interpret.ratio_similarity(feature_ND[None], key, modulus=11, num=3)
    for score, k in zip(found.null_RG[:, 0], jax.random.split(key, 3), strict=True):
        order = jax.random.permutation(k, 10)
        wanted = np.subtract(*slow_ratio_similarity(feature_ND, 11, order))
        np.testing.assert_allclose(score, wanted, atol=1e-5)


def test_ratio_similarity_tells_ratios_from_tokens():
    rng = np.random.default_rng(0)
    inverse = np.array([0] + [pow(v, -1, P) for v in range(1, P)])
    ratio_N = EVERY[:, 0] * inverse[EVERY[:, 1]] % P
    codes = rng.normal(size=(3, P, 40))
    features = np.stack([codes[0][ratio_N], codes[1][EVERY[:, 0]], codes[2][EVERY[:, 1]]])
    found = interpret.ratio_similarity(features, jax.random.key(0), modulus=P, num=99)
    score_G = np.asarray(found.within_G - found.between_G)
    null_RG = np.asarray(found.null_RG)
    assert score_G[0] > 0.9
    assert null_RG[:, 0].max() < 0.8, "no other way to part them is as good"
    np.testing.assert_allclose(score_G[1:], 0, atol=1e-5)
    np.testing.assert_allclose(null_RG[:, 1:], 0, atol=1e-5)


def test_ratios_of_untrained_networks_are_by_chance():
    """P-values of 60 networks: few are small, also where equal tokens look alike."""
    grid_NT = interpret.input_grid(TOKENS_BT[0], np.array([1, 3]), modulus=P, shot=1)

    @jax.jit
    def p_values(key):
        subject = interpret.network(init_params(key, CFG), CFG)
        seen = interpret.grid_features(subject, grid_NT, shot=1)
        head_XND = seen.head_LHN3D[:, :, :, 1].reshape(-1, P**2, CFG.width)
        feature_XND = jnp.concatenate([head_XND, seen.residual_LN3D[:, :, 1]])
        found = interpret.ratio_similarity(feature_XND, key, modulus=P, num=99)
        beyond_RX = found.null_RG >= found.within_G - found.between_G - 1e-6
        return (1 + beyond_RX.sum(0)) / (1 + len(beyond_RX))

    p_NX = jax.lax.map(p_values, jax.random.split(jax.random.key(0), 60))
    assert (p_NX <= 0.05).mean() <= 0.05
    equal_N1 = (EVERY[:, :1] == EVERY[:, 1:]).astype(float)
    detector_ND = np.hstack([equal_N1, 0 * equal_N1])  # at p - 1 of the ratios and no other
    found = interpret.ratio_similarity(detector_ND[None], jax.random.key(0), modulus=P, num=99)
    score = found.within_G[0] - found.between_G[0]
    np.testing.assert_allclose(found.null_RG[:, 0], score, atol=1e-5)


def test_controls_answer_as_the_oracles_and_differ():
    for name, subject in RULES.items():
        wanted = getattr(oracles, name)(TOKENS_BT, P)
        np.testing.assert_array_equal(subject.predict(TOKENS_BT), wanted)
    again = controls.ratio_matching(P)
    same = jax.tree.structure(again) == jax.tree.structure(RULES["ratio_matching"])
    assert same, "one program for each rule and modulus"
    seen = [capture(x, TOKENS_BT) for x in RULES.values()]
    for activations in seen:
        np.testing.assert_allclose(activations.attention_LBHTT.sum(-1), 1, rtol=1e-5)
    _, features = grid_of(RULES["ratio_matching"])
    found = interpret.ratio_similarity(
        features.residual_LN3D[:, :, 1], jax.random.key(0), modulus=P, num=9
    )
    np.testing.assert_allclose(found.within_G, [0, 1], atol=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: scores(np.zeros((1, 2, 1, 8, 8)), np.zeros((2, 6), int)),
            "expected whole sequences",
        ),
        (
            lambda: interpret.ratio_similarity(
                np.zeros((1, 9, 2)), jax.random.key(0), modulus=5, num=2
            ),
            r"expected p\^2 = 25 rows",
        ),
        (
            lambda: interpret.ratio_similarity(
                np.zeros((1, 9, 2)), jax.random.key(0), modulus=3, num=2
            ),
            "modulus=3 leaves no pairs",
        ),
        (
            lambda: interpret.input_grid(TOKENS_BT[5], np.array([2, 3]), modulus=6, shot=3),
            "modulus=6 is not a prime",
        ),
        (
            lambda: interpret.grid_features(RANDOM, TOKENS_BT[:2], shot=5),
            "shot=5, expected from 0 to 4",
        ),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call()

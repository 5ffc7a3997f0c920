"""Wrong labels: by hand, and on rules whose answer is known."""

import functools

import jax
import numpy as np
import pytest

from modgrok import controls, corruption, oracles, sequences

P, SHOTS = 5, 6
EVERY = np.stack(np.divmod(np.arange(P**2), P), axis=1).astype(np.int32)
TOKENS_BT = sequences.sample_sequences(
    jax.random.key(0), EVERY[1:], EVERY, modulus=P, shots=SHOTS, batch=48, paired=False
)
KEY = jax.random.key(5)
RULES = {"ratio_matching": controls.ratio_matching(P), "bayes": controls.bayes(P)}


def test_corruption_of_rules_has_closed_forms():
    """Ratio Matching heeds shots on the line alone; Bayes loses its last task to any."""
    wrong = {
        name: corruption.label_corruption(rule.predict, TOKENS_BT, KEY, modulus=P)
        for name, rule in RULES.items()
    }
    assert wrong["ratio_matching"].unmatched == 0
    assert wrong["ratio_matching"].matched < -0.4
    assert wrong["bayes"].unmatched < -0.4
    for found in wrong.values():
        map_SS = np.asarray(found.accuracy_SS)
        np.testing.assert_array_equal(np.isnan(map_SS), np.tri(SHOTS, dtype=bool))


def test_corruption_map_equals_one_by_hand():
    rule = RULES["ratio_matching"]
    found = corruption.label_corruption(rule.predict, TOKENS_BT, KEY, modulus=P)
    shift_SB = np.asarray(jax.random.randint(KEY, (SHOTS, 48), 1, P))
    tokens_BT = np.array(TOKENS_BT)
    tokens_BT[:, 5] = (tokens_BT[:, 5] + shift_SB[1]) % P
    z_BS = np.asarray(TOKENS_BT)[:, 2::3]
    hits_S = oracles.expected_accuracy(rule.predict(tokens_BT), z_BS).mean(0)
    np.testing.assert_allclose(found.accuracy_SS[1, 2:], hits_S[2:], rtol=1e-5)
    clean_S = oracles.expected_accuracy(rule.predict(TOKENS_BT), z_BS).mean(0)
    np.testing.assert_allclose(found.clean_S, clean_S, rtol=1e-5)


def test_several_wrong_labels():
    """None changes nothing; all wrong and Ratio Matching is right at the origin or by a guess."""
    rule, last = RULES["ratio_matching"], SHOTS - 1
    counts = np.array([(last, j) for j in range(SHOTS)] + [(2, 0), (2, 2)])
    found_N = np.asarray(
        corruption.corrupt_several(rule.predict, TOKENS_BT, KEY, counts, modulus=P)
    )
    z_BS = np.asarray(TOKENS_BT)[:, 2::3]
    clean_S = oracles.expected_accuracy(rule.predict(TOKENS_BT), z_BS).mean(0)
    np.testing.assert_allclose(found_N[[0, SHOTS]], np.asarray(clean_S)[[last, 2]], rtol=1e-5)
    query_B2 = np.asarray(TOKENS_BT).reshape(48, SHOTS, 3)[:, -1, :2]
    matched_B = np.asarray(oracles.matches(TOKENS_BT, P))[:, -1].any(-1)
    origin_B = (query_B2 == 0).all(1)
    wanted = (origin_B + (~origin_B & ~matched_B) / P).mean()
    np.testing.assert_allclose(found_N[last], wanted, rtol=1e-5)
    assert (np.diff(found_N[:SHOTS]) <= 1e-6).all(), "the wrong places are nested"


def test_refusals():
    with pytest.raises(ValueError, match=r"count_N2=\[\[6, 0\]\], expected .* 0 <= j <= k < 6"):
        corruption.corrupt_several(len, TOKENS_BT, KEY, [[6, 0]], modulus=P)
    for call in (
        corruption.label_corruption,
        functools.partial(corruption.corrupt_several, count_N2=[[1, 1]]),
    ):
        with pytest.raises(
            ValueError, match=r"tokens_BT has shape \(18,\), expected rows of whole"
        ):
            call(len, TOKENS_BT[0], KEY, modulus=P)

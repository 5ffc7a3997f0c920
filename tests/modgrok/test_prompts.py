"""Pairs of prompts: one label differs, and the answer hangs on it."""

import functools

import jax
import numpy as np
import pytest

from modgrok import oracles, prompts

P, SHOTS, MATCH = 5, 6, 2
EVERY = np.stack(np.divmod(np.arange(P**2), P), axis=1).astype(np.int32)
KEY = jax.random.key(5)
draw = functools.partial(prompts.matched_prompts, KEY, modulus=P, shots=SHOTS)


def test_matched_prompts_hang_on_one_label():
    found = draw(EVERY[1:], EVERY, match=MATCH, batch=200)
    clean, corrupt = (np.asarray(x).reshape(200, SHOTS, 3) for x in found[:2])
    differ = (clean != corrupt).any(0)
    assert differ.sum() == 1
    assert (clean[:, MATCH, 2] != corrupt[:, MATCH, 2]).all()
    match_BS = np.asarray(oracles.matches(found.clean_BT, P))[:, -1]
    assert (match_BS == (np.arange(SHOTS) == MATCH)).all()
    assert (clean[:, MATCH, :2] != clean[:, -1, :2]).any(-1).all()
    assert (clean[:, :, :2] != 0).any(-1).all()
    np.testing.assert_array_equal(clean[:, -1, 2], found.clean_B)
    for tokens_BT, answer_B in zip(found[:2], found[2:], strict=True):
        assert (oracles.ratio_matching(tokens_BT, P)[:, -1].argmax(-1) == answer_B).all()
    for tokens_BS3 in (clean,):  # one task explains every label of the clean prompts
        assert float(oracles.bayes(tokens_BS3.reshape(200, -1), P)[:, -1].max(-1).min()) > 0.999
    assert (found.clean_B != found.corrupt_B).all()


@pytest.mark.parametrize(
    ("input_M2", "match", "words"),
    [
        (EVERY, 5, "match=5, expected from 0 to 4"),
        (EVERY[[1, 5]], 0, "none of 2 inputs has another on its line"),
    ],
)
def test_refusals(input_M2, match, words):
    with pytest.raises(ValueError, match=words):
        draw(EVERY, input_M2, match=match, batch=2)

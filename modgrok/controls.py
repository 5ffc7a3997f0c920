"""Ratio Matching and Bayes as subjects of the instruments: positive controls with known scores.

Answers are exactly the oracles'. Activations are made up: they have the structure that the paper
describes for each algorithm at the places listed here, and nowhere else.

| layer | what | Ratio Matching | Bayes |
|---|---|---|---|
| 0 | head 0 | previous token | previous token |
| 0 | head 1 | the token before that | the token before that |
| 0 | output of head 0 at x and y | circle of circles in log x, log y | the same in x, y |
| 1 | head 0 | at y: z of matching shots; else the first token | everything alike |
| 1 | head 1 | the first token | everything alike |
| 1 | neuron q at y | a character of log x - log y | a character of x + 2 y |
| 1 | residual stream at y and z | the ratio x / y | (x, y), all pairs different |

Axes: B sequences  T tokens read  D width (2)  F neurons ((p - 1) / 2)  p residues  C classes
Source: He et al. (2024), figures 1d and 5 and attention maps; the construction is ours.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from modgrok import fourier, interpret, oracles
from modgrok.model import Activations
from modgrok.tasks import check_modulus, inverses

Rule = Literal["ratio_matching", "bayes"]
RADII = (1.0, 0.3)  # of the big circle and of the small ones


def ratio_matching(modulus: int) -> interpret.Subject:
    """Copies the answer of an earlier shot on the query's line, times the ratio."""
    return _subject("ratio_matching", modulus)


def bayes(modulus: int) -> interpret.Subject:
    """Bayes-optimal under all p^2 tasks: solves for the task (modular regression)."""
    return _subject("bayes", modulus)


def _subject(rule: Rule, modulus: int) -> interpret.Subject:
    check_modulus(modulus)
    identity_LHKD = jnp.broadcast_to(jnp.eye(2, dtype=jnp.float32), (2, 2, 2, 2))
    functions = (Partial(_bound(f, rule, modulus)) for f in (_answers, _activations))
    return interpret.Subject(*functions, identity_LHKD, jnp.asarray(_circle(rule, modulus)))


@functools.cache
def _bound(function, rule, modulus):
    """One object, and so one compiled program, for each rule and modulus."""
    return functools.partial(function, rule, modulus)


def _circle(rule: Rule, modulus: int) -> np.ndarray:
    """Tokens on a circle, (p, 2): in order of the logarithm, 0 in the centre, or of the token."""
    if rule == "bayes":
        place_p, on_p, order = np.arange(modulus), np.ones(modulus), modulus
    else:
        place_p, order = fourier.discrete_log(modulus), modulus - 1
        on_p = place_p >= 0
    angle_p = 2 * np.pi * place_p / order
    return np.stack([on_p * np.cos(angle_p), on_p * np.sin(angle_p)], axis=1).astype(np.float32)


def _answers(rule: Rule, modulus: int, tokens_BT: jax.Array) -> jax.Array:
    return getattr(oracles, rule)(tokens_BT, modulus)


def _activations(rule: Rule, modulus: int, tokens_BT: jax.Array) -> Activations:
    token_BT = tokens_BT[:, :-1]
    batch, length = token_BT.shape
    matching = rule == "ratio_matching"

    # Rows that have no token so far back look at the first one.
    first_TT = jnp.zeros((length, length), jnp.float32).at[:, 0].set(1)
    back_TT = [jnp.eye(length, k=-d, dtype=jnp.float32).at[:d, 0].set(1) for d in (1, 2)]
    layer_0 = [jnp.broadcast_to(x, (batch, length, length)) for x in back_TT]
    if matching:
        layer_1 = [_copying(tokens_BT, modulus), jnp.broadcast_to(first_TT, layer_0[0].shape)]
    else:
        layer_1 = [interpret.uniform_attention(batch, length)[0, :, 0]] * 2
    attention_LBHTT = jnp.stack([jnp.stack(heads, axis=1) for heads in (layer_0, layer_1)])

    one_BT, two_BT = (jnp.pad(token_BT[:, :-d], [(0, 0), (d, 0)]) for d in (1, 2))
    phase_T = np.arange(length) % 3
    circle_p2, (big, small) = jnp.asarray(_circle(rule, modulus)), RADII
    at_y_BT2 = big * circle_p2[one_BT] + small * circle_p2[token_BT]
    head_BT2 = jnp.where(phase_T[:, None] == 1, at_y_BT2, big * circle_p2[token_BT])
    head_LBTHK = jnp.zeros((2, batch, length, 2, 2), jnp.float32).at[0, :, :, 0].set(head_BT2)

    if matching:
        log_p, order = jnp.asarray(fourier.discrete_log(modulus), jnp.int32), modulus - 1
        place_BT = log_p[one_BT] - log_p[token_BT]
        known_BT = (one_BT != 0) & (token_BT != 0)
    else:
        place_BT, order, known_BT = one_BT + 2 * token_BT, modulus, True
    freq_F = jnp.arange(1, (modulus + 1) // 2, dtype=jnp.int32)
    turn_BTF = (place_BT[..., None] * freq_F % order).astype(jnp.float32)
    angle_BTF = 2 * np.float32(np.pi) / order * turn_BTF
    on_BT1 = jnp.asarray(known_BT & (phase_T == 1))[..., None]
    # Above 0, as neurons are after a ReLU.
    hidden_BTF = 1 + jnp.where(on_BT1, jnp.cos(angle_BTF), 0)
    hidden_LBTF = jnp.stack([jnp.ones_like(hidden_BTF), hidden_BTF])

    x_BT, y_BT = (jnp.where(phase_T == 1, *pair) for pair in ((one_BT, two_BT), (token_BT, one_BT)))
    if matching:
        inverse_p = jnp.asarray(inverses(modulus))
        # x / y; p where y = 0 (infinity), p + 1 for (0, 0).
        class_BT = jnp.where(
            y_BT != 0, x_BT * inverse_p[y_BT] % modulus, modulus + (x_BT == 0).astype(jnp.int32)
        )
        classes = modulus + 2
    else:
        class_BT, classes = modulus * x_BT + y_BT, modulus**2
    residual_BTC = jax.nn.one_hot(class_BT, classes, dtype=jnp.float32)
    residual_BTC = jnp.where(phase_T[:, None] == 0, 0, residual_BTC)
    residual_LBTC = jnp.stack([jnp.zeros_like(residual_BTC), residual_BTC])
    return Activations(circle_p2[token_BT], attention_LBHTT, head_LBTHK, hidden_LBTF, residual_LBTC)


def _copying(tokens_BT: jax.Array, modulus: int) -> jax.Array:
    """At y evenly over z of the matching shots; elsewhere, and without any, the first token."""
    batch, length = tokens_BT.shape[0], tokens_BT.shape[1] - 1
    match_BSS = oracles.matches(tokens_BT, modulus).astype(jnp.float32)
    count_BS1 = match_BSS.sum(-1, keepdims=True)
    share_BSS = match_BSS / jnp.maximum(count_BS1, 1)
    weight_BTT = jnp.zeros((batch, length, length), jnp.float32).at[:, :, 0].set(1)
    at_y_BST = jnp.zeros((batch, match_BSS.shape[1], length), jnp.float32)
    at_y_BST = at_y_BST.at[..., 2::3].set(share_BSS[..., :-1])
    at_y_BST = at_y_BST.at[..., 0].set((count_BS1 == 0)[..., 0].astype(jnp.float32))
    return weight_BTT.at[:, 1::3].set(at_y_BST)

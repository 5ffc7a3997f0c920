"""Fourier shares: complete, equal to a least-squares fit, and right on functions that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modgrok import fourier

P = 7


def angles(kind):
    place_p = np.arange(P) if kind == "additive" else fourier.discrete_log(P)
    return 2 * np.pi * place_p / (P if kind == "additive" else P - 1), place_p >= 0


@pytest.mark.parametrize("modulus", [5, 7, 29])
def test_logarithms_undo_powers(modulus):
    root, log_p = fourier.primitive_root(modulus), fourier.discrete_log(modulus)
    assert log_p[0] == -1
    assert [pow(root, int(k), modulus) for k in log_p[1:]] == list(range(1, modulus))


def test_logarithms_are_the_same_for_every_caller():
    with pytest.raises(ValueError, match="read-only"):
        fourier.discrete_log(11)[0] = 3


def test_the_papers_base_is_one_of_many():
    log_p = fourier.discrete_log(29, 27)
    assert (27 ** int(log_p[2])) % 29 == 2
    with pytest.raises(ValueError, match="base=28, expected a primitive root mod 29"):
        fourier.discrete_log(29, 28)


@pytest.mark.parametrize("modulus", [5, 7, 13])
@pytest.mark.parametrize("kind", fourier.KINDS)
def test_shares_are_r_squared_of_least_squares(kind, modulus):
    """Of one token: a fit by numpy on the same cosine and sine. All modes and zero add up to 1."""
    rng = np.random.default_rng(modulus)
    value_Gp = rng.normal(size=(3, modulus))
    share_GQ = np.asarray(fourier.token_shares(value_Gp, modulus=modulus, kind=kind))
    place_p = np.arange(modulus) if kind == "additive" else fourier.discrete_log(modulus)
    order = modulus - (kind == "log")
    on_p = place_p >= 0
    for value_p, share_Q in zip(value_Gp, share_GQ, strict=True):
        total = ((value_p - value_p.mean()) ** 2).sum()
        fits = [[on_p]] if kind == "log" else []
        angle = 2 * np.pi * place_p / order
        fits += [
            [on_p * np.cos(q * angle), on_p * np.sin(q * angle)] for q in range(1, len(share_Q) + 1)
        ]
        found = []
        for columns in fits:
            design = np.stack([np.ones(modulus), *columns], axis=1)
            fitted_p = design @ np.linalg.lstsq(design, value_p, rcond=None)[0]
            found.append(1 - ((value_p - fitted_p) ** 2).sum() / total)
        np.testing.assert_allclose(share_Q, found[-len(share_Q) :], atol=1e-5)
        assert sum(found) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", fourier.KINDS)
def test_every_mode_of_pairs_is_found_alone(kind):
    """Mode (t, u) at a random phase has share 1 there, 0 elsewhere."""
    angle_p, on_p = angles(kind)
    frequencies = fourier.pair_frequencies(P, kind)
    values = []
    for number, (t, u) in enumerate(frequencies):
        angle_pp = t * angle_p[:, None] + u * angle_p + 0.1 + number
        on_pp = (on_p[:, None] | (t == 0)) & (on_p | (u == 0))
        values.append(np.where(on_pp, np.cos(angle_pp), 0))
    share_MM = np.asarray(fourier.pair_shares(np.stack(values), modulus=P, kind=kind))
    twins = {tuple(f): i for i, f in enumerate(frequencies)}
    for number, (t, u) in enumerate(frequencies):
        # Without a sine, (t, -u) is the function (t, u), which is where it counts.
        alike = kind == "log" and 3 in (abs(t), abs(u)) and u < 0
        wanted = twins[(t, -u)] if alike else number
        assert share_MM[number].argmax() == wanted
        np.testing.assert_allclose(share_MM[number, wanted], 1, atol=1e-5)


@pytest.mark.parametrize("kind", fourier.KINDS)
def test_pairs_add_up_to_one_with_zero(kind):
    value_Gpp = np.random.default_rng(0).normal(size=(4, P, P))
    share_G = np.asarray(fourier.pair_shares(value_Gpp, modulus=P, kind=kind)).sum(-1)
    if kind == "additive":
        np.testing.assert_allclose(share_G, 1, atol=1e-5)
        return
    # What is left depends on whether x or y is 0: without it nothing is.
    value_Gpp[:, 0], value_Gpp[:, :, 0] = 0, 0
    value_Gpp[:, 1:, 1:] -= value_Gpp[:, 1:, 1:].mean((1, 2), keepdims=True)
    value_Gpp[:, 1:, 1:] -= value_Gpp[:, 1:, 1:].mean(1, keepdims=True)
    value_Gpp[:, 1:, 1:] -= value_Gpp[:, 1:, 1:].mean(2, keepdims=True)
    share_G = np.asarray(fourier.pair_shares(value_Gpp, modulus=P, kind=kind)).sum(-1)
    np.testing.assert_allclose(share_G, 1, atol=1e-5)
    zero_pp = (np.arange(P) == 0)[:, None] * np.ones(P)
    np.testing.assert_allclose(fourier.pair_shares(zero_pp, modulus=P, kind=kind), 0, atol=1e-6)


@pytest.mark.parametrize("kind", fourier.KINDS)
def test_circle_of_circles_fits_its_own_basis_only(kind):
    angle_p, on_p = angles(kind)
    x_p, y_p = (on_p * np.cos(q * angle_p + 0.3) for q in (2, 1))
    value_pp = x_p[:, None] + 0.3 * y_p
    for other in fourier.KINDS:
        share_M = fourier.pair_shares(value_pp, modulus=P, kind=other)
        found, frequency_2 = fourier.circles(share_M, P)
        assert (found > 0.9999) if other == kind else (found < 0.7)
        if other == kind:
            np.testing.assert_array_equal(frequency_2, [2, 1])


def test_shuffled_tokens_lose_the_fit_and_keep_what_names_do_not_change():
    angle_p, _ = angles("additive")
    value_pp = np.cos(angle_p)[:, None] + np.cos(angle_p)
    options = {"modulus": P, "kind": "additive", "num": 60}
    key = jax.random.key(0)
    best_R, circles_R = fourier.shuffled(key, jnp.asarray(value_pp), pairs=True, **options)
    # Half of it is of x and half of y, and both lose alike; multiplications mod p keep the form.
    np.testing.assert_allclose(circles_R, 2 * best_R, atol=1e-5)
    assert np.mean(np.asarray(circles_R) < 0.99) > 0.8
    token_R, _ = fourier.shuffled(key, jnp.cos(angle_p), pairs=False, **options)
    np.testing.assert_allclose(token_R, circles_R, atol=1e-5)
    flat_R, _ = fourier.shuffled(key, jnp.ones((P, P)), pairs=True, **options)
    np.testing.assert_array_equal(flat_R, 0)


def test_constants_have_no_modes_whatever_rounding_leaves():
    value_pp = np.full((2, P, P), 0.1) + 1e-9 * np.random.default_rng(0).normal(size=(2, P, P))
    for kind in fourier.KINDS:
        np.testing.assert_array_equal(fourier.pair_shares(value_pp, modulus=P, kind=kind), 0)


@pytest.mark.parametrize(
    ("value", "options", "words"),
    [
        (np.ones(6), {"modulus": 7, "kind": "log"}, r"shape \(6,\), expected it to end in \(7,\)"),
        (
            np.ones(7),
            {"modulus": 7, "kind": "cosine"},
            "kind='cosine', expected one of additive, log",
        ),
        (np.ones(3), {"modulus": 3, "kind": "log"}, "modulus=3 has too few residues"),
        (np.ones(6), {"modulus": 6, "kind": "log"}, "modulus=6 is not a prime"),
    ],
)
def test_refusals(value, options, words):
    with pytest.raises(ValueError, match=words):
        fourier.token_shares(value, **options)


def test_circles_refuse_what_is_no_prime():
    with pytest.raises(ValueError, match="modulus=6 is not a prime"):
        fourier.circles(jnp.ones(12), 6)

"""How much of a function of tokens is Fourier modes: of the token, and of its discrete logarithm.

Two bases of functions on Z_p, both orthogonal and complete:

- "additive": cos and sin of 2 pi q x / p, frequencies q = 1 .. (p - 1) / 2;
- "log": cos and sin of 2 pi q log_g(x) / (p - 1) at x != 0 and 0 at x = 0 (multiplicative
  characters), q = 1 .. (p - 1) / 2, the last of which has no sine (quadratic residues or not); and
  apart from them "zero", whether x = 0.

A share is the R^2 of the least-squares fit by a constant and one mode: both bases being orthogonal
on all tokens, it is a squared projection, and the shares of all modes (and of zero) add up to 1. A
mode has 2 degrees of freedom (1 where there is no sine) of p - 1, or of p^2 - 1 for pairs of
tokens: a random function gets a share of 2 / (p - 1), and the best of many modes more. `shuffled`
says how much more: it fits the same values after tokens have exchanged their names.

Axes: p residues  Q frequencies  M modes of pairs  G functions (any leading axes)  R shuffles
Source: He et al. (2024), figures 1d and 1e; the definitions are ours.
"""

import functools
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from modgrok.tasks import check_modulus

Kind = Literal["additive", "log"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_CONSTANT = 1e-10  # of the squares: below it, variance is what rounding left of a constant


class Best(NamedTuple):
    """The mode with the largest share; `mode` indexes the modes, `share` is its R^2."""

    share_G: jax.Array
    mode_G: jax.Array


class _Basis(NamedTuple):
    row_pp: np.ndarray  # orthonormal rows, the constant first
    cos_Q: np.ndarray  # which row is the cosine of each frequency
    sin_Q: np.ndarray  # ... the sine; p, a row that is not there, if there is none


@functools.cache
def primitive_root(modulus: int) -> int:
    """The smallest generator of the multiplicative group mod p."""
    check_modulus(modulus)
    order = modulus - 1
    primes = [q for q in range(2, order + 1) if order % q == 0 and all(q % r for r in range(2, q))]
    return next(
        g for g in range(1, modulus) if all(pow(g, order // q, modulus) != 1 for q in primes)
    )


@functools.cache
def discrete_log(modulus: int, base: int | None = None) -> np.ndarray:
    """log_p with base^log = x mod p, from 0 to p - 2; -1 at x = 0.

    Args:
        base: a primitive root; by default the smallest. (The paper's figures use 27 mod 29.)
    """
    base = primitive_root(modulus) if base is None else base
    powers = [pow(base, k, modulus) for k in range(modulus - 1)]
    if len(set(powers)) != modulus - 1:
        raise ValueError(f"base={base}, expected a primitive root mod {modulus}")
    log_p = np.full(modulus, -1)
    log_p[powers] = np.arange(modulus - 1)
    log_p.flags.writeable = False  # every caller gets this one
    return log_p


@functools.cache
def _basis(modulus: int, kind: Kind) -> _Basis:
    check_modulus(modulus)
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}, expected one of {', '.join(KINDS)}")
    if modulus < 5:
        raise ValueError(f"modulus={modulus} has too few residues for modes, expected 5 or more")
    order = modulus if kind == "additive" else modulus - 1
    place_p = np.arange(modulus) if kind == "additive" else discrete_log(modulus)
    rows, cos, sin = [np.ones(modulus)], [], []
    if kind == "log":
        rows.append(np.where(place_p < 0, modulus - 1, -1.0))
    for q in range(1, (modulus - 1) // 2 + 1):
        angle_p = 2 * np.pi * q * place_p / order
        cos.append(len(rows))
        rows.append(np.where(place_p < 0, 0, np.cos(angle_p)))
        has_sine = 2 * q != order
        sin.append(len(rows) if has_sine else modulus)
        if has_sine:
            rows.append(np.where(place_p < 0, 0, np.sin(angle_p)))
    row_pp = np.array(rows)
    row_pp /= np.linalg.norm(row_pp, axis=1, keepdims=True)
    return _Basis(row_pp, np.array(cos, np.int32), np.array(sin, np.int32))


@functools.partial(jax.jit, static_argnames=("modulus", "kind"))
def token_shares(value_Gp: jax.Array, *, modulus: int, kind: Kind) -> jax.Array:
    """Share of the variance of a function of one token in each frequency, share_GQ.

    In the log basis 1 minus their sum is the share of "zero". A constant function has shares 0.
    """
    basis = _basis(modulus, kind)
    _check_axes(value_Gp, (modulus,))
    power_Gp = _project(value_Gp, basis, 1) ** 2
    power_Gp = jnp.pad(power_Gp, [(0, 0)] * (power_Gp.ndim - 1) + [(0, 1)])
    power_GQ = power_Gp[..., basis.cos_Q] + power_Gp[..., basis.sin_Q]
    return _divide(power_GQ, power_Gp.sum(-1), value_Gp, 1)


def pair_frequencies(modulus: int, kind: Kind) -> np.ndarray:
    """The modes of functions of (x, y): frequency_M2, signed (t, u) with t >= 0.

    Mode (t, u) is cos and sin of t angle(x) + u angle(y). First those of x alone, (q, 0), then of y
    alone, (0, q), then (q, r), then (q, -r): at r = q of the log basis, functions of x / y. Where
    one of q, r has no sine, (q, r) is the same function as (q, -r): all of it counts for (q, r).
    """
    freq_Q = np.arange(1, len(_basis(modulus, kind).cos_Q) + 1)
    q, r = (axis.ravel() for axis in np.meshgrid(freq_Q, freq_Q, indexing="ij"))
    parts = [(freq_Q, 0 * freq_Q), (0 * freq_Q, freq_Q), (q, r), (q, -r)]
    return np.concatenate([np.stack(part, axis=1) for part in parts])


@functools.partial(jax.jit, static_argnames=("modulus", "kind"))
def pair_shares(value_Gpp: jax.Array, *, modulus: int, kind: Kind) -> jax.Array:
    """Share of the variance of a function of (x, y) in each of the modes, share_GM.

    In the log basis 1 minus their sum is what depends on whether x or y is 0. A mode has two
    degrees of freedom of p^2 - 1, where there is a sine (see `pair_frequencies`).
    """
    basis = _basis(modulus, kind)
    _check_axes(value_Gpp, (modulus, modulus))
    coef_Gpp = _project(value_Gpp, basis, 2)
    coef = jnp.pad(coef_Gpp, [(0, 0)] * (coef_Gpp.ndim - 2) + [(0, 1), (0, 1)])
    cos, sin = basis.cos_Q, basis.sin_Q
    x_GQ = coef[..., cos, 0] ** 2 + coef[..., sin, 0] ** 2
    y_GQ = coef[..., 0, cos] ** 2 + coef[..., 0, sin] ** 2
    cc, ss = coef[..., cos[:, None], cos], coef[..., sin[:, None], sin]
    cs, sc = coef[..., cos[:, None], sin], coef[..., sin[:, None], cos]
    plus = ((cc - ss) ** 2 + (sc + cs) ** 2) / 2  # cos(a + b) = cos a cos b - sin a sin b
    minus = ((cc + ss) ** 2 + (sc - cs) ** 2) / 2
    alike = (sin == modulus)[:, None] | (sin == modulus)
    plus, minus = jnp.where(alike, plus + minus, plus), jnp.where(alike, 0, minus)
    flat = (*value_Gpp.shape[:-2], -1)
    power_GM = jnp.concatenate([x_GQ, y_GQ, plus.reshape(flat), minus.reshape(flat)], axis=-1)
    return _divide(power_GM, (coef_Gpp**2).sum((-2, -1)), value_Gpp, 2)


def best(share_GM: jax.Array) -> Best:
    """The mode (or frequency) with the largest share."""
    return Best(share_GM.max(-1), share_GM.argmax(-1))


class Circles(NamedTuple):
    """R^2 of a circle of circles, and its frequencies (from 1) of x and of y."""

    share_G: jax.Array
    frequency_G2: jax.Array


def circles(share_GM: jax.Array, modulus: int) -> Circles:
    """R^2 of a circle of circles: best frequency of x alone plus best of y alone.

    The model is a constant, one cosine and sine of x, and one of y: 5 degrees of freedom (in the
    log basis tokens 0 then sit in the centres of the circles, as in figure 1d).
    """
    check_modulus(modulus)
    num = (modulus - 1) // 2
    share_G2Q = share_GM[..., : 2 * num].reshape(*share_GM.shape[:-1], 2, num)
    return Circles(share_G2Q.max(-1).sum(-1), 1 + share_G2Q.argmax(-1))


@functools.partial(jax.jit, static_argnames=("modulus", "kind", "pairs", "num"))
def shuffled(
    key: jax.Array, value: jax.Array, *, modulus: int, kind: Kind, pairs: bool, num: int
) -> tuple[jax.Array, jax.Array]:
    """The best share, and that of `circles`, after tokens exchanged their names at random.

    Args:
        value: value_Gp, or value_Gpp if `pairs`; x and y are renamed alike.   num: R shuffles.
    Returns:
        (best_RG, circles_RG), the second equal to the first for functions of one token.
    """

    def once(key):
        order_p = jax.random.permutation(key, modulus)
        if not pairs:
            top = token_shares(value[..., order_p], modulus=modulus, kind=kind).max(-1)
            return top, top
        renamed = value[..., order_p, :][..., order_p]
        share_GM = pair_shares(renamed, modulus=modulus, kind=kind)
        return share_GM.max(-1), circles(share_GM, modulus).share_G

    return jax.lax.map(once, jax.random.split(key, num))


def _check_axes(value: jax.Array, wanted: tuple[int, ...]) -> None:
    if value.shape[-len(wanted) :] != wanted:
        raise ValueError(f"value has shape {value.shape}, expected it to end in {wanted}")


def _project(value: jax.Array, basis: _Basis, axes: int) -> jax.Array:
    """Coefficients of the centred function: the constant's are 0."""
    last = tuple(range(-axes, 0))
    coef = jnp.asarray(value, jnp.float32)
    coef = coef - coef.mean(last, keepdims=True)
    row_pp = jnp.asarray(basis.row_pp, jnp.float32)
    for _ in range(axes):  # each turn contracts the first of the axes and appends its coefficients
        coef = jnp.tensordot(
            jnp.moveaxis(coef, -axes, -1), row_pp, axes=((-1,), (1,)), precision="highest"
        )
    return coef


def _divide(power: jax.Array, total_G: jax.Array, value: jax.Array, axes: int) -> jax.Array:
    square_G = (jnp.asarray(value, jnp.float32) ** 2).sum(tuple(range(-axes, 0)))
    varies_G = total_G > _CONSTANT * square_G
    return jnp.where(varies_G[..., None], power / jnp.where(varies_G, total_G, 1)[..., None], 0)

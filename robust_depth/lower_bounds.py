"""How far the loss falls at least in an l_inf ball around the weights of any model.

Axes: P weights in all, S samples or starts, T steps.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from robust_depth.arguments import check_radius, check_sizes
from robust_depth.method import Model, l1_loss
from robust_depth.problems import NetworkProblem, Problem


def sampled_lower_bound(
    key: jax.Array,
    weights: Any,
    problem: Problem | NetworkProblem,
    *,
    model: Model,
    radius: Any,
    num_samples: int,
) -> jax.Array:
    """Largest fall of the loss over random weights of the l_inf ball: a lower bound on the drop.

    Even samples are uniform in the ball, odd ones corners of it. At least 0, the fall at w itself.

    Raises:
        ValueError: for fewer than one sample, or a concrete radius below 0.
    """
    check_sizes(num_samples=num_samples)
    check_radius("radius", radius)
    return _sampled(key, weights, problem, radius, model=model, num_samples=num_samples)


@functools.partial(jax.jit, static_argnames=["model", "num_samples"])
def _sampled(key, weights, problem, radius, *, model, num_samples) -> jax.Array:
    flat_P, loss = _flat_loss(weights, problem, model)

    def one(item: tuple[jax.Array, jax.Array]) -> jax.Array:
        return loss(flat_P + _offset(*item, flat_P, radius))

    items = jax.random.split(key, num_samples), jnp.arange(num_samples)
    loss_S = jax.lax.map(one, items, batch_size=min(num_samples, 64))
    return jnp.maximum(loss(flat_P) - loss_S.min(), 0)


def descent_lower_bound(
    key: jax.Array,
    weights: Any,
    problem: Problem | NetworkProblem,
    *,
    model: Model,
    radius: Any,
    num_steps: int,
    num_starts: int,
) -> jax.Array:
    """Largest fall that projected sub-gradient steps find in the ball: a lower bound on the drop.

    From w and from num_starts - 1 points drawn as in `sampled_lower_bound`, with the largest entry
    of a step shrinking from the radius to a millionth of it.

    Raises:
        ValueError: for fewer than one step or start, or a concrete radius below 0.
    """
    check_sizes(num_steps=num_steps, num_starts=num_starts)
    check_radius("radius", radius)
    return _descended(
        key, weights, problem, radius, model=model, num_steps=num_steps, num_starts=num_starts
    )


@functools.partial(jax.jit, static_argnames=["model", "num_steps", "num_starts"])
def _descended(key, weights, problem, radius, *, model, num_steps, num_starts) -> jax.Array:
    flat_P, loss = _flat_loss(weights, problem, model)
    radius = jnp.asarray(radius, flat_P.dtype)
    low_P, high_P = flat_P - radius, flat_P + radius

    def descend(item: tuple[jax.Array, jax.Array]) -> jax.Array:
        key, index = item
        begin_P = flat_P + jnp.where(index > 0, _offset(key, index, flat_P, radius), 0)

        def step(carry: tuple, eta: jax.Array) -> tuple[tuple, None]:
            w_P, best = carry
            value, slope_P = jax.value_and_grad(loss)(w_P)
            largest = jnp.abs(slope_P).max()
            slope_P = slope_P / jnp.where(largest > 0, largest, 1)
            w_P = jnp.clip(w_P - eta * radius * slope_P, low_P, high_P)
            return (w_P, jnp.minimum(best, value)), None

        eta_T = jnp.geomspace(1, 1e-6, num_steps, dtype=flat_P.dtype)
        (w_P, best), _ = jax.lax.scan(step, (begin_P, loss(flat_P)), eta_T)
        return jnp.minimum(best, loss(w_P))

    best_S = jax.vmap(descend)((jax.random.split(key, num_starts), jnp.arange(num_starts)))
    return loss(flat_P) - best_S.min()


def _flat_loss(weights: Any, problem: Any, model: Model) -> tuple:
    flat_P, unravel = ravel_pytree(weights)
    return flat_P, lambda w_P: l1_loss(unravel(w_P), problem, model=model)


def _offset(key: jax.Array, index: jax.Array, like_P: jax.Array, radius: Any) -> jax.Array:
    part_P = jax.random.uniform(key, like_P.shape, like_P.dtype, -1, 1)
    return jnp.asarray(radius, like_P.dtype) * jnp.where(index % 2 > 0, jnp.sign(part_P), part_P)

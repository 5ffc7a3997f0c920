"""What blocks of the decoder are made of.

Axes: B batch, T tokens read, H heads, K head size, V vocab, X any.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

LN_EPSILON = 1e-5
_LONG = 64  # tokens; below this, two halves cost more than they save


def dense(x_BTX: jax.Array, weight: jax.Array, ndim_in: int = 1) -> jax.Array:
    """Contracts the last `ndim_in` axes of x with the first of `weight`, as one matrix product.

    Rows are flattened first: with several row axes XLA's CPU backend transposes an activation to
    get the weight's gradient, which makes forward and backward 1.1 to 1.4 times slower.
    """
    rows, shape_in = x_BTX.shape[:-ndim_in], weight.shape[:ndim_in]
    size = math.prod(shape_in)
    x, weight_2d = x_BTX.reshape(-1, size), weight.reshape(size, -1)
    if size > weight_2d.shape[1]:
        weight_2d = jax.lax.optimization_barrier(weight_2d.T)
        y = jax.lax.dot_general(x, weight_2d, (((1,), (1,)), ((), ())))
    else:
        y = x @ weight_2d
    return y.reshape(*rows, *weight.shape[ndim_in:])


@jax.custom_jvp
def lookup(table_VX: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """table_VX[tokens_BT], whose gradient is a matrix product and not a scatter.

    A scatter-add over all tokens runs serially on a CPU; the product with a one-hot matrix costs
    V multiply-adds for each entry and runs at full speed everywhere.
    """
    return table_VX[tokens_BT]


@lookup.defjvp
def _lookup_jvp(primals, tangents):
    (table_VX, tokens_BT), (dtable_VX, _) = primals, tangents
    hot_BTV = jax.nn.one_hot(tokens_BT, table_VX.shape[0], dtype=dtable_VX.dtype)
    return lookup(table_VX, tokens_BT), dense(hot_BTV, dtable_VX)


def rotary_tables(length: int, head_size: int) -> tuple[jax.Array, jax.Array]:
    """cos and sin, each (length, K/2), of position * 10000^(-2 i / K)."""
    pair_K = jnp.arange(head_size // 2, dtype=jnp.float32)
    position_T = jnp.arange(length, dtype=jnp.float32)
    angle_TK = position_T[:, None] * 10000.0 ** (-2.0 * pair_K / head_size)
    return jnp.cos(angle_TK), jnp.sin(angle_TK)


def rotate(x_BHT2K: jax.Array, cos_TK: jax.Array, sin_TK: jax.Array) -> jax.Array:
    """Rotates channel pairs given as [..., 0, i] and [..., 1, i]."""
    even, odd = x_BHT2K[..., 0, :], x_BHT2K[..., 1, :]
    return jnp.concatenate([even * cos_TK - odd * sin_TK, odd * cos_TK + even * sin_TK], axis=-1)


def attention_parts(length: int, query_T: np.ndarray) -> list[tuple[slice, int]]:
    """Which queries are scored with the keys before which position: (slice of query_T, stop).

    A long sequence is done in two halves: the first half of the queries needs no scores with keys
    after its last one, a quarter of all.
    """
    halves = np.array_split(np.arange(len(query_T)), 2 if length >= _LONG else 1)
    return [(slice(half[0], half[-1] + 1), int(query_T[half[-1]]) + 1) for half in halves]


def attend(
    q_BHTK: jax.Array, k_BHTK: jax.Array, v_BHTK: jax.Array, query_T: np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """Causal attention of queries at positions query_T: the weights, and what they pick."""
    length, scale = k_BHTK.shape[2], k_BHTK.shape[3] ** -0.5
    attention, picked = [], []
    for rows, stop in attention_parts(length, query_T):
        score_BHTT = scale * jnp.einsum(
            "bhtk,bhsk->bhts",
            q_BHTK[:, :, rows],
            k_BHTK[:, :, :stop],
            preferred_element_type=jnp.float32,
        )
        causal_TT = np.arange(stop) <= query_T[rows, None]
        score_BHTT = jnp.where(causal_TT, score_BHTT, jnp.finfo(jnp.float32).min)
        weight_BHTT = jax.nn.softmax(score_BHTT, axis=-1)
        picked.append(
            jnp.einsum("bhts,bhsk->bhtk", weight_BHTT.astype(v_BHTK.dtype), v_BHTK[:, :, :stop])
        )
        attention.append(jnp.pad(weight_BHTT, [(0, 0)] * 3 + [(0, length - stop)]))
    return jnp.concatenate(attention, axis=2), jnp.concatenate(picked, axis=2)


def normal(std: float) -> nn.initializers.Initializer:
    return nn.initializers.normal(std, jnp.float32)  # also where x64 is on


def layer_norm(name: str | None = None) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=LN_EPSILON, use_fast_variance=False, name=name)

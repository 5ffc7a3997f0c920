"""Deep models: diagonal linear networks, products of matrices, ReLU networks.

A model is a function from weights and measurement vectors to predictions; its weights are a pytree.
Derivatives are those of the sub-gradient method: 0 where a kink is, exact where a layer is 0.

Axes: N layers, D coordinates, M rows, n rows and columns of a square matrix.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp

from robust_depth.arguments import check_choice, check_sizes

SCHEMES = ("zero_first", "balanced", "gaussian", "random_sign")

# Sizes at which a start is small without being slow to leave, for theta of about 1: measured.
INIT_SCALES = {1: 1e-3, 2: 3e-5, 3: 0.1, 4: 0.22, 5: 0.35}


def init_scale(depth: int) -> float:
    """alpha by depth: a start of about alpha^N; beyond N = 5 that of N = 5."""
    return INIT_SCALES[min(depth, max(INIT_SCALES))]


# Diagonal networks -------------------------------------------------------------------------------


@jax.custom_jvp
def product(w_ND: jax.Array) -> jax.Array:
    """theta = w_1 * w_2 * ... * w_N, elementwise.

    The derivative in a layer is `leave_one_out`, which has no division: it is right where one
    layer, or several, are 0.
    """
    return jnp.prod(w_ND, axis=0)


@product.defjvp
def _product_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (w_ND,), (dw_ND,) = primals, tangents
    return product(w_ND), (leave_one_out(w_ND) * dw_ND).sum(0)


def leave_one_out(w_ND: jax.Array) -> jax.Array:
    """Row i holds the product of all layers but i: that of those before, times that of those after.

    >>> leave_one_out(jnp.array([[0.0], [2.0], [3.0]])).ravel()
    Array([6., 0., 0.], dtype=float32)
    """
    ahead = list(itertools.accumulate(w_ND[:-1], jnp.multiply, initial=jnp.ones_like(w_ND[0])))
    back = w_ND[:0:-1]
    behind = list(itertools.accumulate(back, jnp.multiply, initial=jnp.ones_like(w_ND[0])))
    return jnp.stack([a * b for a, b in zip(ahead, reversed(behind), strict=True)])


def predict_diagonal(w_ND: jax.Array, x_MD: jax.Array) -> jax.Array:
    """X (w_1 * ... * w_N), (M,)."""
    return jnp.matmul(x_MD, product(w_ND), precision="highest")


def init_diagonal(
    key: jax.Array,
    *,
    depth: int,
    dim: int,
    scale: Any = None,
    scheme: str = "zero_first",
    dtype: Any = jnp.float32,
) -> jax.Array:
    """A small start, w_ND.

    Args:
        depth, dim: N and D.
        scale: alpha, by default `init_scale(depth)`. With N = 1 it is the only layer's.
        scheme: "zero_first", the first layer 0 and the others alpha: right for truths of any sign,
            a little slower to enter; "balanced", every layer alpha: for truths >= 0 only, as theta
            keeps its sign; "gaussian", alpha N(0, 1), and "random_sign", alpha or -alpha: they
            fail in deeper models.
    Raises:
        ValueError: for a depth or dimension below 1, or an unknown scheme.
    """
    check_sizes(depth=depth, dim=dim)
    check_choice("scheme", scheme, SCHEMES)
    alpha = jnp.asarray(init_scale(depth) if scale is None else scale, dtype)
    if scheme == "gaussian":
        return alpha * jax.random.normal(key, (depth, dim), dtype)
    if scheme == "random_sign":
        return alpha * jax.random.rademacher(key, (depth, dim), dtype)
    w_ND = jnp.full((depth, dim), alpha)
    return w_ND.at[0].set(0) if scheme == "zero_first" else w_ND


def balanced_solution(theta_D: jax.Array, depth: int) -> jax.Array:
    """|theta|^(1/N) in every layer, with the sign in the first: their product is theta.

    Raises:
        ValueError: for a depth below 1.
    """
    check_sizes(depth=depth)
    root_D = jnp.abs(theta_D) ** jnp.asarray(1 / depth, theta_D.dtype)
    return jnp.tile(root_D, (depth, 1)).at[0].multiply(jnp.sign(theta_D))


def unbalanced_solution(theta_D: jax.Array, depth: int) -> jax.Array:
    """(theta, 1, ..., 1): as true a solution, with a landscape around it that is not flat.

    Raises:
        ValueError: for a depth below 1.
    """
    check_sizes(depth=depth)
    return jnp.ones((depth, *theta_D.shape), theta_D.dtype).at[0].set(theta_D)


# Products of matrices ----------------------------------------------------------------------------


def matrix_product(w_Nnn: jax.Array) -> jax.Array:
    """vec(W_1 W_2 ... W_N), (n^2,) row by row."""
    total = w_Nnn[0]
    for w_nn in w_Nnn[1:]:
        total = jnp.matmul(total, w_nn, precision="highest")
    return total.reshape(-1)


def predict_matrix(w_Nnn: jax.Array, x_MD: jax.Array) -> jax.Array:
    """<A_i, W_1 ... W_N> of each row A_i, (M,)."""
    return jnp.matmul(x_MD, matrix_product(w_Nnn), precision="highest")


def init_matrix(
    key: jax.Array,
    *,
    depth: int,
    dim: int,
    scale: Any,
    scheme: str = "zero_first",
    dtype: Any = jnp.float32,
) -> jax.Array:
    """w_Nnn: "zero_first", 0 and then alpha times the identity; "orthogonal", 0 and then alpha
    times random orthogonal matrices; "gaussian", alpha N(0, 1) / sqrt(n).

    Raises:
        ValueError: for a depth or dimension below 1, or an unknown scheme.
    """
    check_sizes(depth=depth, dim=dim)
    check_choice("scheme", scheme, ("zero_first", "orthogonal", "gaussian"))
    alpha = jnp.asarray(scale, dtype)
    if scheme == "gaussian":
        w_Nnn = jax.random.normal(key, (depth, dim, dim), dtype)
        return alpha / jnp.sqrt(jnp.asarray(dim, dtype)) * w_Nnn
    if scheme == "orthogonal":
        w_Nnn = alpha * jax.random.orthogonal(key, dim, (depth,), dtype)
    else:
        w_Nnn = alpha * jnp.tile(jnp.eye(dim, dtype=dtype), (depth, 1, 1))
    return w_Nnn.at[0].set(0)


# ReLU networks -----------------------------------------------------------------------------------


def predict_relu(weights: list[dict[str, jax.Array]], x_MI: jax.Array) -> jax.Array:
    """A network of N layers, each but the last followed by a ReLU; one output, (M,)."""
    for layer, part in enumerate(weights):
        x_MI = jnp.matmul(x_MI, part["w"], precision="highest") + part["b"]
        if layer < len(weights) - 1:
            x_MI = jax.nn.relu(x_MI)  # whose derivative at 0 is 0
    return x_MI[:, 0]


def init_relu(
    key: jax.Array,
    *,
    depth: int,
    dim: int,
    width: int,
    scale: Any = 1.0,
    dtype: Any = jnp.float32,
) -> list[dict[str, jax.Array]]:
    """scale times He's normal weights, and biases of 0; `depth` layers, so depth - 1 hidden ones.

    Raises:
        ValueError: for a depth, dimension or width below 1.
    """
    check_sizes(depth=depth, dim=dim, width=width)
    sizes = [dim, *[width] * (depth - 1), 1]
    weights = []
    layers = zip(jax.random.split(key, depth), itertools.pairwise(sizes), strict=True)
    for layer_key, (rows, columns) in layers:
        size = jnp.asarray(scale * (2 / rows) ** 0.5, dtype)
        w_IO = size * jax.random.normal(layer_key, (rows, columns), dtype)
        weights.append({"w": w_IO, "b": jnp.zeros(columns, dtype)})
    return weights

"""What the iSVD paper factors, as operators: walk sums of a graph, and propagated features.

Link prediction factors a weighted sum of walks less the absent edges, node classification the
features beside what each propagation makes of them. Neither is formed: a product costs one product
with the sparse graph for each step of a walk.

Axes: N nodes, F features, C columns of a block, W window, L hops, H = L + 1 blocks of features.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

from isvd.algebra import windowed_sum
from isvd.arguments import check_integer, check_square
from isvd.closures import Product, Static, compiled
from isvd.operators import LinearOperator, diagonal, dtype_of, ones
from isvd.spmm import sparse


def walk_weights(window: int) -> np.ndarray:
    """c_q = (W - q + 1) / (W (W + 1) / 2) for walks of q = 1, ..., W steps: they sum to one.

    >>> walk_weights(3).round(3)
    array([0.5  , 0.333, 0.167])
    """
    check_integer("window", window, 1)
    return np.arange(window, 0, -1) / (window * (window + 1) / 2)


def link_operator(
    adjacency: Any,
    *,
    window: Any = 10,
    negative_weight: Any = 0.02,
    symmetric: bool = True,
    degree_factor: bool = True,
    dtype: Any = jnp.float32,
    leaf: Callable[..., LinearOperator] = sparse,
) -> LinearOperator:
    """The design matrix of network embedding,

        M = [sum_q c_q P^q] E - negative_weight * (1 1^T - A),

    with P = D^-1/2 A D^-1/2, E = D^1/2, or P = D^-1 A, E = D where not `symmetric`; E = I without
    `degree_factor`; D holds the row sums of A, each at least 1. A product is `window` + 1 sparse
    ones. M is not symmetric, even of a symmetric A, unless P is and E is the identity.

    The reference code multiplies by P where the adjoint needs P^T, if P is not symmetric: values
    that it gives for `symmetric=False` are not those of this operator, nor of any other.

    Args:
        adjacency: (N, N), a scipy sparse matrix; entries stored twice are added. Self-loops stay.
        window: W, the longest walk, weighted by `walk_weights`; or weights of your own (W,), used
            as they are. Those, and `negative_weight`, may be traced.
        leaf: what makes the operator of a scipy matrix and a dtype; give `row_sharded` with its
            mesh and axis to spread the rows over devices.
    Raises:
        ValueError: if the adjacency is not sparse, not square or complex, or for an empty window.
    Source: Abu-El-Haija et al., NeurIPS 2021, section on network embedding.
    """
    adjacency = _checked_graph(adjacency)
    dtype = dtype_of(dtype)
    weights_W = walk_weights(window) if np.ndim(window) == 0 else window
    if np.ndim(weights_W) != 1 or not np.size(weights_W):
        raise ValueError(f"window has shape {np.shape(window)}, expected a number or (W,) weights")
    step = leaf(normalized_adjacency(adjacency, loops=None, symmetric=symmetric), dtype=dtype)
    walks = windowed_sum(step, jnp.asarray(weights_W, dtype))
    if degree_factor:
        degree_N = _degrees(adjacency)
        walks = walks @ diagonal(jnp.asarray(degree_N**0.5 if symmetric else degree_N, dtype))
    absent = ones(*adjacency.shape, dtype) - leaf(adjacency, dtype=dtype)
    return walks - jnp.asarray(negative_weight, dtype) * absent


def normalized_adjacency(
    adjacency: Any, *, loops: float | None = 1.0, symmetric: bool = True
) -> scipy.sparse.csr_array:
    """D^-1/2 A D^-1/2, or D^-1 A, where every diagonal entry of A is first set to `loops`.

    Args:
        adjacency: (N, N), a scipy sparse matrix, taken as it is off the diagonal: it is neither
            made symmetric nor 0/1.
        loops: the weight of each self-loop; None leaves the diagonal as it is.
        symmetric: divide by the roots of the degrees on both sides, or by the degrees on the left.
            Degrees are row sums, each at least 1.
    Raises:
        ValueError: if the adjacency is not sparse, not square or complex.
    Source: section 3, whose A + I sets loops that exist to one, too.
    """
    adjacency = _checked_graph(adjacency)
    if loops is not None:
        eye = scipy.sparse.eye_array(adjacency.shape[0], format="csr")
        adjacency = adjacency - scipy.sparse.diags_array(adjacency.diagonal()) + loops * eye
        adjacency.eliminate_zeros()
    scale = scipy.sparse.diags_array(_degrees(adjacency) ** (-0.5 if symmetric else -1.0))
    result = scale @ adjacency @ scale if symmetric else scale @ adjacency
    return scipy.sparse.csr_array(result)


def _checked_graph(adjacency: Any) -> scipy.sparse.csr_array:
    if not scipy.sparse.issparse(adjacency) or adjacency.ndim != 2:
        raise ValueError(
            f"adjacency is a {type(adjacency).__name__}, expected a scipy sparse matrix (N, N)"
        )
    if adjacency.shape[0] != adjacency.shape[1]:
        raise ValueError(f"adjacency has shape {adjacency.shape}, expected a square one")
    if adjacency.dtype.kind == "c":
        raise ValueError(f"adjacency has dtype {adjacency.dtype}, expected real weights")
    # float64, so that degrees are exact whatever the type of the entries
    return scipy.sparse.csr_array(adjacency).astype(np.float64)


def _degrees(adjacency: scipy.sparse.csr_array) -> np.ndarray:
    return np.maximum(np.asarray(adjacency.sum(axis=1)).ravel(), 1.0)


def propagated(
    adjacency_hat: LinearOperator, features: LinearOperator, num_hops: int
) -> LinearOperator:
    """M = [X | A X | ... | A^L X], (N, (L + 1) F), without forming it.

    A product is L products with A, in a loop that is compiled once, and L + 1 with the features;
    so is one of the adjoint. `algebra.take_rows(M, rows)` has the rows of some nodes.

    Args:
        adjacency_hat: A, (N, N), such as `sparse(normalized_adjacency(...))`.
        features: X, (N, F).
        num_hops: L, at least 0.
    Raises:
        ValueError: if shapes do not fit or `num_hops` is no whole number from 0.
    Source: section 3, the linear jumping-knowledge network.
    """
    check_square("propagated", adjacency_hat)
    if adjacency_hat.shape[1] != features.shape[0]:
        raise ValueError(
            f"adjacency_hat has shape {adjacency_hat.shape} and features {features.shape}: "
            "expected as many rows of features as nodes"
        )
    check_integer("num_hops", num_hops, 0)
    num_blocks = int(num_hops) + 1
    dtype = jnp.result_type(adjacency_hat.dtype, features.dtype)
    static = Static((num_blocks, dtype))
    return LinearOperator(
        compiled(_hops, static, adjacency_hat.matmat, features.matmat),
        compiled(_hops_adjoint, static, adjacency_hat.rmatmat, features.rmatmat),
        (features.shape[0], num_blocks * features.shape[1]),
        dtype,
    )


def _hops(static: Static, step: Product, features: Product, x_NC: jax.Array) -> jax.Array:
    """sum_l A^l X x_l, from the last hop to the first (Horner)."""
    num_blocks, dtype = static.value
    x_NC = x_NC.astype(jnp.result_type(dtype, x_NC))
    x_HFC = x_NC.reshape(num_blocks, -1, x_NC.shape[1])

    def add_hop(y_NC: jax.Array, x_FC: jax.Array) -> tuple[jax.Array, None]:
        return step(y_NC) + features(x_FC), None

    return jax.lax.scan(add_hop, features(x_HFC[-1]), x_HFC[:-1], reverse=True)[0]


def _hops_adjoint(static: Static, step: Product, features: Product, y_NC: jax.Array) -> jax.Array:
    """Blocks X^H (A^H)^l y; each is one step after the last."""
    num_blocks, dtype = static.value
    y_NC = y_NC.astype(jnp.result_type(dtype, y_NC))

    def next_hop(y_NC: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        y_NC = step(y_NC)
        return y_NC, features(y_NC)

    first_FC = features(y_NC)
    _, later_LFC = jax.lax.scan(next_hop, y_NC, length=num_blocks - 1)
    return jnp.concatenate([first_FC[None], later_LFC]).reshape(-1, y_NC.shape[1])

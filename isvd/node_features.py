"""Features of nodes: principal components of what is known of them, and an embedding of the graph.

Axes: N nodes, F features, K rank.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from isvd.algebra import centered, hstack
from isvd.arguments import check_integer
from isvd.design import link_operator
from isvd.factorize import SVD, svd
from isvd.linkpred import embeddings
from isvd.operators import LinearOperator, dense
from isvd.spmm import sparse

# Called on the host after a factorisation: of what, and its factors.
Report = Callable[[str, SVD], None]
# `report` of `svd`.
ReportPass = Callable[[Any, Any], None]

# Products of these small matrices are compiled many times over: for the walks, the components, the
# draws. Rows of few lengths take longer there even once compiled (docs/benchmarks.md).
compressed = functools.partial(sparse, layout="csr")


def node_embedding(
    adjacency: Any,
    key: jax.Array,
    *,
    rank: int = 64,
    window: int = 3,
    negative_weight: float = 0.05,
    tol: float | None = None,
    report: Report | None = None,
    report_pass: ReportPass | None = None,
) -> jax.Array:
    """[U sqrt(s) | V sqrt(s)], (N, 2 rank), of the walk matrix with P = D^-1 A, no degree factor.

    Args:
        adjacency: (N, N), scipy sparse.
        window, negative_weight: of `design.link_operator`.
        tol: of `svd`.
        report, report_pass: as of `nodeclass.classify`.
    Raises:
        ValueError: as `design.link_operator` and `svd` do: for what is no graph, a rank beyond N.
    Source: section 3; the reference multiplies by P where P^T is meant, which we do not.
    """
    walks = link_operator(
        adjacency,
        window=window,
        negative_weight=negative_weight,
        symmetric=False,
        degree_factor=False,
        leaf=compressed,
    )
    factors = svd(walks, key, rank=rank, tol=tol, report=report_pass)
    if report is not None:
        report("walks", factors)
    return jnp.hstack(embeddings(factors))


def principal_components(
    features: LinearOperator,
    key: jax.Array,
    *,
    rank: int,
    report: Report | None = None,
    report_pass: ReportPass | None = None,
) -> jax.Array:
    """The scores of the leading principal components, (N, rank): U diag(s) of the centred features.

    Up to a quarter of min(N, F), `svd` of the operator. From there on nearly the whole spectrum is
    wanted, and Krylov bases cost more than the eigenvectors of the Gram matrix of the shorter side,
    which is made from products and has min(N, F)^2 entries. Its squares lose components below
    sqrt(eps) of the first: in float32 those with less than 1e-7 of its variance come out as noise
    of that size. The Gram matrix is not reported: it has no residuals.

    Raises:
        ValueError: if the rank is outside 1 to min(N, F).
    """
    shortest = min(features.shape)
    check_integer("rank", rank, 1, shortest, f"as the features have shape {features.shape}")
    if 4 * rank <= shortest:
        factors = svd(centered(features), key, rank=rank, report=report_pass)
        if report is not None:
            report("features", factors)
        return factors.u_MK * factors.s_K
    return _components_by_gram(int(rank), features)


@functools.partial(jax.jit, static_argnums=0)
def _components_by_gram(rank: int, features: LinearOperator) -> jax.Array:
    a = centered(features)
    tall = a.shape[0] >= a.shape[1]
    eye = jnp.eye(min(a.shape), dtype=a.dtype)
    gram = a.rmatmat(a.matmat(eye)) if tall else a.matmat(a.rmatmat(eye))
    value_K, vector = jnp.linalg.eigh((gram + gram.conj().T) / 2)
    value_K, vector = value_K[::-1][:rank], vector[:, ::-1][:, :rank]
    return a.matmat(vector) if tall else vector * jnp.sqrt(jnp.maximum(value_K, 0))


def planetoid_features(
    adjacency: Any,
    features: Any,
    key: jax.Array,
    *,
    embedding_rank: int = 64,
    pca_rank: int | None = 1000,
    report: Report | None = None,
    report_pass: ReportPass | None = None,
) -> LinearOperator:
    """Z = [PCA of [X | R] | R] with R the node embedding, (N, pca_rank + 2 embedding_rank).

    With `pca_rank=None` the centred [X | R] takes the place of its components. Nothing is lost and
    nothing dense is formed: least squares depends on Z only through Z Z^T, which the rotation to
    principal components leaves alone; what differs is the tail that they cut off, and which
    entries dropout drops.

    Args:
        adjacency: (N, N), scipy sparse.   features: X, (N, F), scipy sparse or dense.
        pca_rank: cut to min(N, F + 2 embedding_rank).
        report, report_pass: as of `nodeclass.classify`.
    Raises:
        ValueError: as `node_embedding` does, if X has not N rows, or for a `pca_rank` below 1.
    Source: section 3 and the reference's Planetoid script.
    """
    key_embed, key_pca = jax.random.split(key)
    told = {"report": report, "report_pass": report_pass}
    x = compressed(features) if hasattr(features, "tocsr") else dense(_floating(features))
    r_NR = node_embedding(adjacency, key_embed, rank=embedding_rank, **told)
    r_NR = r_NR.astype(x.dtype)
    embedding = dense(r_NR)
    both = hstack([x, embedding])
    if pca_rank is None:
        return hstack([centered(both), embedding])
    rank = min(pca_rank, *both.shape)
    return dense(jnp.hstack([principal_components(both, key_pca, rank=rank, **told), r_NR]))


def _floating(x: Any) -> jax.Array:
    """An array in its own type, or float32 for whole numbers, as `sparse` makes them."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)

"""Public functions of arrays under strict promotion, and with x64 on: types follow the inputs.

Nearly all are only traced. What makes an operator is tried by its products.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from jax.sharding import AxisType, Mesh

import isvd
from isvd import deepen, design, linkpred, metrics, node_features, nodeclass

KEY = jax.random.key(0)
N = 8
KRYLOV = {"rank": 1, "block": 1, "width": 4}  # with a basis below N: the matrix is not formed
RNG = np.random.default_rng(0)
GRAPH = scipy.sparse.random_array((N, N), density=0.4, rng=0, dtype=np.float32)
INDEX = [2, 0, 2]
PAIRS_P2 = np.array([[0, 1], [3, 2], [5, 4]], np.int32)
LABELS_N = np.arange(N) % 3
A, X = (jnp.array(RNG.normal(size=(N, n)), jnp.float32) for n in (N, 3))
D, SCORE_P = A[0], A[0, :3]
FACTORS = isvd.SVD(X, SCORE_P, X, SCORE_P, jnp.int32(8), jnp.bool(True))
WEIGHTS_HFC = jnp.array(RNG.normal(size=(3, 3, 3)), jnp.float32)
PARAMS = deepen.init(WEIGHTS_HFC)


def products(make, *arrays):
    """(a function of arrays, the arrays): what an operator makes of blocks and of vectors."""

    def both_sides(*arrays):
        op = make(*arrays)
        x_NC, y_MC = (jnp.ones((size, 2), jnp.float32) for size in reversed(op.shape))
        vector_M = op @ x_NC[:, 0]
        return op.matmat(x_NC), op.rmatmat(y_MC), vector_M, y_MC[:, 0] @ op, op.to_dense()

    return both_sides, arrays


def mesh():
    return Mesh(np.array(jax.devices()[:2]), ("rows",), axis_types=(AxisType.Auto,))


def of_dense(function, **options):
    """A function of an operator and a key, with the operator's matrix for its array."""
    return lambda a_NN: function(isvd.dense(a_NN), KEY, **options), (A,)


def network(params, x_NF, **options):
    return deepen.apply(params, isvd.sparse(GRAPH), x_NF, **options)


def trained_network(params, x_NF):
    index = (LABELS_N, [0, 1, 2], [3, 4, 5])
    return deepen.finetune(params, isvd.sparse(GRAPH), x_NF, *index, KEY, steps=2)


def slope(function, *arrays):
    """The gradient of the sum of all that it gives."""

    def total(*arrays):
        leaves = jax.tree.leaves(function(*arrays))
        return sum(x.sum() for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact))

    return jax.grad(total, argnums=tuple(range(len(arrays)))), arrays


def low_rank_product(a_NN, x_NC):
    op = isvd.dense(a_NN)
    return isvd.low_rank_product(op, isvd.svd(op, KEY, rank=2), x_NC)


def pinv_solve(a_NN, y_MC):
    op = isvd.dense(a_NN)
    return isvd.pinv_solve(isvd.svd(op, KEY, rank=2), y_MC, ridge=0.1, op=op)


# name -> (function of arrays, the arrays)
OPERATORS = {
    "dense": products(isvd.dense, A),
    "diagonal": products(isvd.diagonal, D),
    "low_rank": products(isvd.low_rank, X, X),
    "ones": products(lambda: 0.5 * isvd.ones(N, N)),
    "identity": products(lambda: isvd.identity(N) / 3),
    "from_matmat": products(lambda a: isvd.from_matmat(lambda x: a @ x, (N, N)), A),
    "from_matmat, rmatmat": products(
        lambda a: isvd.from_matmat(lambda x: a @ x, (N, N), rmatmat=lambda y: a.T @ y), A
    ),
    "sparse": products(lambda: isvd.sparse(GRAPH)),
    "sparse, integers": products(lambda: isvd.sparse(GRAPH.astype(bool))),
    "sparse_from_entries": products(
        lambda v_E: isvd.sparse_from_entries([0, 1, 4], [2, 3, 4], v_E, (N, N)), SCORE_P
    ),
    "row_sharded": products(lambda: isvd.row_sharded(GRAPH, mesh(), "rows")),
    "row_sharded, dense": products(lambda: isvd.row_sharded(np.asarray(A), mesh(), "rows")),
    "signs": products(
        lambda a, d: -((isvd.dense(a) @ isvd.diagonal(d) - 2 * isvd.dense(a).T) ** 3) / 7, A, D
    ),
    "traced factor": products(lambda a, c: c * isvd.dense(a), A, jnp.float32(2)),
    "polynomial": products(lambda a, c_Q: isvd.polynomial(isvd.dense(a), c_Q), A, SCORE_P),
    "windowed_sum": products(lambda a, c_Q: isvd.windowed_sum(isvd.dense(a), c_Q), A, SCORE_P),
    "geometric_sum": products(lambda a: isvd.geometric_sum(isvd.dense(a), 0.5, 3), A),
    "hstack": products(lambda a, d: isvd.hstack([isvd.dense(a), isvd.diagonal(d)]), A, D),
    "vstack": products(lambda a, d: isvd.vstack([isvd.dense(a), isvd.diagonal(d)]), A, D),
    "take_rows": products(lambda a: isvd.take_rows(isvd.dense(a), INDEX), A),
    "take_columns": products(lambda a: isvd.take_columns(isvd.dense(a), INDEX), A),
    "centered": products(lambda a: isvd.centered(isvd.dense(a)), A),
    "centered, scaled": products(lambda a, d: isvd.centered(isvd.dense(a), d, d), A, D),
    "approximation": products(isvd.approximation, FACTORS),
    "link_operator": products(lambda: design.link_operator(GRAPH)),
    "link_operator, no symmetry": products(
        lambda c_W, c: design.link_operator(GRAPH, window=c_W, negative_weight=c, symmetric=False),
        SCORE_P,
        jnp.float32(0.1),
    ),
    "propagated": products(lambda x: design.propagated(isvd.sparse(GRAPH), isvd.dense(x), 2), X),
}
FUNCTIONS = {
    "svd": of_dense(isvd.svd, **KRYLOV),
    "svd, gradient": slope(lambda a: isvd.svd(isvd.dense(a), KEY, **KRYLOV), A),
    "svd, formed": of_dense(isvd.svd, rank=2),
    "svd, subspace": of_dense(isvd.svd, rank=2, method="subspace", warm_start=X),
    "eigh": of_dense(isvd.eigh, rank=2),
    "spectral_norm": of_dense(isvd.spectral_norm),
    "frobenius_norm": of_dense(isvd.frobenius_norm),
    "trace": of_dense(isvd.trace),
    "adjoint_defect": of_dense(isvd.adjoint_defect),
    "linearity_defect": of_dense(isvd.linearity_defect),
    "nonfinite": of_dense(isvd.nonfinite),
    "low_rank_product": (low_rank_product, (A, X)),
    "low_rank_product, gradient": slope(low_rank_product, A, X),
    "pinv_solve": (isvd.pinv_solve, (FACTORS, X)),
    "pinv_solve, of an operator": (pinv_solve, (A, X)),
    "pinv_solve, gradient": slope(pinv_solve, A, X),
    "orthonormalize": (isvd.orthonormalize, (X,)),
    "orthonormalize, cholesky": (
        functools.partial(isvd.orthonormalize, method="cholesky"),
        (X,),
    ),
    "embeddings": (linkpred.embeddings, (FACTORS,)),
    "scores": (linkpred.scores, (FACTORS, PAIRS_P2)),
    "scores, one way": (
        functools.partial(linkpred.scores, symmetric=False),
        (FACTORS, PAIRS_P2),
    ),
    "roc_auc": (metrics.roc_auc, (SCORE_P, D)),
    "hits_at_k": (lambda p, q: metrics.hits_at_k(p, q, 2), (SCORE_P, D)),
    "mean_reciprocal_rank": (metrics.mean_reciprocal_rank, (SCORE_P, A[:3])),
    "spectral_kernel": (linkpred.spectral_kernel, (SCORE_P, jnp.float32(1), jnp.float32(5))),
    "spectral_kernel, of numbers": (lambda s_K: linkpred.spectral_kernel(s_K, 1.0, 5), (SCORE_P,)),
    "finetune_spectrum": (
        lambda f: linkpred.finetune_spectrum(f, PAIRS_P2, KEY, steps=2, batch=2),
        (FACTORS,),
    ),
    "closed_form": (nodeclass.closed_form, (FACTORS, X)),
    "closed_form, ridge": (
        lambda f, y, ridge: nodeclass.closed_form(f, y, rank=2, ridge=ridge),
        (FACTORS, X, jnp.float32(0.1)),
    ),
    "node_embedding": (lambda: node_features.node_embedding(GRAPH, KEY, rank=2), ()),
    "principal_components": of_dense(node_features.principal_components, rank=2),
    "principal_components, most": of_dense(node_features.principal_components, rank=4),
    "deepen.init": (deepen.init, (WEIGHTS_HFC,)),
    "deepen.apply": (network, (PARAMS, X)),
    "deepen.apply, dropout": (functools.partial(network, key=KEY, dropout=0.5), (PARAMS, X)),
    "deepen.apply, gradient": slope(network, PARAMS, X),
    "deepen.finetune": (trained_network, (PARAMS, X)),
}
ALL = OPERATORS | FUNCTIONS


def types(name, x64):
    """Shape, dtype and weakness of all that comes out; of a new function each time."""
    function, arrays = ALL[name]
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("strict"):
        shapes = jax.eval_shape(jax.jit(lambda *arrays: function(*arrays)), *arrays)
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), shapes)


@pytest.mark.parametrize("name", ALL)
def test_strict_promotion_and_x64_change_no_type(name):
    assert types(name, True) == types(name, False)


def test_functions_that_look_at_values():
    """With x64, where strict promotion has more to refuse than without."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        isvd.verify(isvd.dense(A), KEY)
        factors = isvd.svd_to_error(isvd.dense(A), KEY, error=0.3, first_rank=4)
    assert {x.dtype for x in factors[:4]} == {jnp.dtype("float32")}
    assert factors.products.dtype == "int32"


def test_no_public_function_is_missing():
    at_values, classes = {"svd_to_error", "verify"}, {"SVD", "Eigen", "LinearOperator"}
    assert set(isvd.__all__) - at_values - classes <= {name.split(",")[0] for name in ALL}
    for name in isvd.__all__:
        assert getattr(isvd, name).__doc__, name

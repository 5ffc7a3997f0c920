"""Features of nodes against numpy's SVD of dense twins."""

import functools

import jax
import numpy as np
import operator_cases
import pytest
from asserts import assert_close
from planted_graph import planted

from isvd import node_features
from isvd.operators import dense

draw = functools.partial(operator_cases.draw, dtype="float64")


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])
@pytest.mark.parametrize("rank", [2, 9])
def test_principal_components(shape, rank):
    """Both ways: by Krylov (rank 2) and by the Gram matrix of either side."""
    x_NF = draw(5, *shape) + 3 * draw(6, shape[1])
    u, s, _ = np.linalg.svd(x_NF - x_NF.mean(0), full_matrices=False)
    wanted = u[:, :rank] * s[:rank]
    matrix = dense(x_NF.astype("f"))
    got = np.asarray(node_features.principal_components(matrix, jax.random.key(0), rank=rank))
    signs = np.sign((got * wanted).sum(0))
    assert_close(got * signs, wanted, 1e-3)


def test_node_embedding():
    graph = planted()[0]
    a_NN = graph.toarray().astype("d")
    step = a_NN / np.maximum(a_NN.sum(1), 1)[:, None]
    walks = sum(
        c * np.linalg.matrix_power(step, q) for c, q in ((3 / 6, 1), (2 / 6, 2), (1 / 6, 3))
    )
    u, s, vt = np.linalg.svd(walks - 0.05 * (1 - a_NN))
    got = np.asarray(node_features.node_embedding(graph, jax.random.key(0), rank=5))
    assert got.shape == (90, 10)
    assert_close(got[:, :5] @ got[:, 5:].T, u[:, :5] * s[:5] @ vt[:5], 1e-3)
    assert_close((got**2).sum(0), np.r_[s[:5], s[:5]], 1e-3)


def test_features_by_components_and_without():
    """Z Z^T is the same with all components and with the centred features themselves."""
    graph, features, *_ = planted()
    options = {"embedding_rank": 4}
    key = jax.random.key(0)
    all_of_them = node_features.planetoid_features(graph, features, key, pca_rank=1000, **options)
    implicit = node_features.planetoid_features(graph, features, key, pca_rank=None, **options)
    assert all_of_them.shape == implicit.shape == (90, 40 + 8 + 8)
    z_NF, x_NF = np.asarray(all_of_them.to_dense()), np.asarray(implicit.to_dense())
    assert_close(z_NF @ z_NF.T, x_NF @ x_NF.T, 1e-3)
    assert_close(x_NF[:, :40], features.toarray() - features.toarray().mean(0), 1e-5)
    np.testing.assert_allclose(x_NF[:, :48].mean(0), 0, atol=1e-6)
    assert_close(z_NF[:, 48:], x_NF[:, 48:], 1e-6)
    few = node_features.planetoid_features(graph, features, key, pca_rank=6, **options)
    assert few.shape == (90, 6 + 8)
    # Both Gram matrices have the embedding; take it away, and what is left has rank 6.
    rest = np.asarray(few.to_dense())[:, :6]
    assert np.linalg.matrix_rank(rest) == 6
    dense_too = node_features.planetoid_features(
        graph, features.toarray(), key, pca_rank=None, **options
    )
    assert_close(dense_too.to_dense(), x_NF)


@pytest.mark.parametrize("dtype", [bool, int, "uint8"])
def test_features_that_are_whole_numbers(dtype):
    """The embedding beside them keeps its digits."""
    graph, features, *_ = planted()
    options = {"embedding_rank": 4, "pca_rank": 6}
    wanted, got = (
        node_features.planetoid_features(graph, x_NF, jax.random.key(0), **options).to_dense()
        for x_NF in (features.toarray(), features.toarray().astype(dtype))
    )
    np.testing.assert_array_equal(got, wanted)


def test_a_rank_beyond_the_features_is_refused():
    with pytest.raises(ValueError, match="rank=4, expected from 1 to 3, as the features"):
        node_features.principal_components(dense(np.ones((4, 3), "f")), None, rank=4)

"""Every solver is given the same matrix."""

import jax
import numpy as np
import pytest
import scipy.sparse

from benchmarks import isvd_matrices


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-4), (np.float64, 1e-13)])
def test_ours_and_scipy_have_the_same_walk_sum(dtype, tolerance):
    graph = isvd_matrices.random_graph(300, 2400).astype("float32")  # as graphs are read
    with jax.enable_x64(dtype is np.float64):
        problem = isvd_matrices.walk_problem(graph, dtype, window=4)
        x_NC = np.random.default_rng(0).normal(size=(300, 3)).astype(dtype)
        for ours, peer in (
            (problem.operator, problem.scipy),
            (problem.operator.H, problem.scipy.H),
        ):
            np.testing.assert_allclose(
                ours @ x_NC, peer @ x_NC, rtol=10 * tolerance, atol=tolerance
            )


def test_random_graph_is_symmetric_with_about_as_many_entries():
    graph = isvd_matrices.random_graph(300, 2400)
    assert abs(graph.nnz - 2400) < 50
    assert (graph != graph.T).nnz == 0
    assert set(graph.data) == {1}


def test_designed_values():
    values_K = 0.7 ** np.arange(40)
    problem = isvd_matrices.designed(values_K, 40, np.float32)
    assert scipy.sparse.issparse(problem.scipy)
    wanted = np.linalg.svd(problem.scipy.toarray(), compute_uv=False)
    np.testing.assert_allclose(wanted, values_K, atol=1e-6)

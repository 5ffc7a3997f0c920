"""The comparison is fair: one matrix for every solver, accuracy measured on what they return."""

import jax
import numpy as np
import pytest
import scipy.sparse

from benchmarks import isvd as benchmark


@pytest.fixture
def graph():
    return benchmark.random_graph(300, 2400)


def test_ours_and_scipy_have_the_same_walk_sum(graph):
    problem = benchmark.walk_problem(graph, np.float32, window=4)
    x_NC = np.random.default_rng(0).normal(size=(300, 3)).astype("float32")
    np.testing.assert_allclose(problem.operator @ x_NC, problem.scipy @ x_NC, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(
        problem.operator.H @ x_NC, problem.scipy.H @ x_NC, rtol=1e-3, atol=1e-4
    )


def test_random_graph_is_symmetric_with_about_as_many_entries(graph):
    assert abs(graph.nnz - 2400) < 50
    assert (graph != graph.T).nnz == 0
    assert set(graph.data) == {1}


def test_designed_values():
    values_K = 0.7 ** np.arange(40)
    problem = benchmark.designed(values_K, 40, np.float32)
    assert scipy.sparse.issparse(problem.scipy)
    wanted = np.linalg.svd(problem.scipy.toarray(), compute_uv=False)
    np.testing.assert_allclose(wanted, values_K, atol=1e-6)


def test_accuracy_is_relative_to_the_largest_value():
    a_MN = np.diag([4.0, 2.0, 1.0]).astype("float32")
    problem = benchmark.Problem(benchmark_operator(a_MN), a_MN, True)
    eye = np.eye(3)[:, :2]
    exact = (eye, np.array([4.0, 2.0]), eye)
    assert benchmark.accuracy(problem, exact, np.array([4.0, 2.0])) == (0, 0)
    wrong = (eye, np.array([4.0, 3.0]), eye)
    assert benchmark.accuracy(problem, wrong, np.array([4.0, 2.0])) == (0.25, 0.25)


def benchmark_operator(a_MN):
    import isvd

    return isvd.dense(a_MN)


@pytest.mark.filterwarnings("ignore")
def test_every_solver_reports(graph, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "RANK", 4)
    jax.clear_caches()
    solvers = [name for name in benchmark.SOLVERS if benchmark.installed(name)]
    rows = benchmark.measure(
        "graph",
        lambda: benchmark.sparse_problem(graph, np.float32),
        solvers,
        repetitions=1,
        limit=60,
    )
    assert [row["solver"] for row in rows] == solvers
    by_solver = {row["solver"]: row for row in rows}
    right = {"ours", "ours csr", "arpack", "propack", "halko", "fbpca", "sklearn randomized"}
    for solver in (right | {"matfree"}) & set(solvers):
        assert by_solver[solver]["accurate"] == "yes", by_solver[solver]
    for row in rows:
        assert row["milliseconds"] > 0
        assert row["over_ours"] == pytest.approx(
            row["milliseconds"] / by_solver["ours"]["milliseconds"]
        )


def test_more_is_asked_of_float64(graph, monkeypatch):
    monkeypatch.setattr(benchmark, "RANK", 4)
    with jax.enable_x64(True):
        (row,) = benchmark.measure(
            "graph",
            lambda: benchmark.sparse_problem(graph, np.float64),
            ["ours"],
            repetitions=1,
            limit=60,
        )
    assert row["accurate"] == "yes"
    assert row["value_error"] < 1e-12
    assert row["residual"] < 1e-8

"""The comparison is fair: accuracy is measured on what solvers return."""

import jax
import numpy as np
import pytest

import isvd
from benchmarks import isvd as benchmark
from benchmarks.isvd_matrices import Problem, random_graph, sparse_problem
from benchmarks.isvd_solvers import SOLVERS

FEW = {"rank": 4, "repetitions": 1, "limit": 60}


def small_problem(dtype):
    return sparse_problem(random_graph(300, 2400), dtype)


def test_accuracy_is_relative_to_the_largest_value():
    a_MN = np.diag([4.0, 2.0, 1.0]).astype("float32")
    problem = Problem(isvd.dense(a_MN), a_MN, True)
    eye = np.eye(3)[:, :2]
    exact = (eye, np.array([4.0, 2.0]), eye)
    assert benchmark.accuracy(problem, exact, np.array([4.0, 2.0])) == (0, 0)
    wrong = (eye, np.array([4.0, 3.0]), eye)
    assert benchmark.accuracy(problem, wrong, np.array([4.0, 2.0])) == (0.25, 0.25)


@pytest.mark.filterwarnings("ignore")
def test_every_solver_reports():
    solvers = [name for name, solver in SOLVERS.items() if solver.installed]
    rows = benchmark.measure("graph", lambda: small_problem(np.float32), solvers, **FEW)
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


def test_more_is_asked_of_float64():
    with jax.enable_x64(True):
        (row,) = benchmark.measure("graph", lambda: small_problem(np.float64), ["ours"], **FEW)
    assert row["accurate"] == "yes"
    assert row["value_error"] < 1e-12
    assert row["residual"] < 1e-8

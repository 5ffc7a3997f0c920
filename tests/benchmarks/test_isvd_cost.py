"""Costs are those of the products that were made."""

import numpy as np
import pytest

from benchmarks import isvd_cost
from benchmarks.isvd_matrices import random_graph


def test_products():
    graph = random_graph(300, 2400)
    rows = isvd_cost.products({"small": graph}, np.float32, repetitions=1)
    assert [row["how"] for row in rows] == ["csr", "ell", "scipy"] * 3
    assert {row["columns"] for row in rows} == {1, 8, 32}
    for row in rows:
        # entries x ns = microseconds x 1000
        assert row["nanoseconds_per_entry"] * graph.nnz == pytest.approx(1e3 * row["microseconds"])


def test_scaling_row():
    row = isvd_cost.scale_one(3000)
    assert row["nodes"] == 1000
    assert row["seconds"] > 0
    assert row["peak_mib"] > 10


def test_scaling_figure():
    rows = [
        {"edges": 10**i, "seconds": 0.02 * 10**i, "products": 10, "peak_mib": 512 * i}
        for i in (1, 2)
    ]
    left, right = isvd_cost.scaling_figure(rows).axes
    np.testing.assert_allclose(left.lines[0].get_ydata(), [20, 200])
    np.testing.assert_allclose(left.lines[1].get_ydata(), [20, 200])
    np.testing.assert_allclose(right.lines[0].get_ydata(), [0.5, 1])

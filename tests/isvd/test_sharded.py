"""Rows spread over eight devices: the same products and triplets, and what is communicated."""

import jax
import numpy as np
import pytest
import scipy.sparse
from jax.experimental.sparse import BCOO
from jax.sharding import AxisType, Mesh

from isvd import checks, sharded, spmm
from isvd.factorize import svd

KEY = jax.random.key(0)
COLLECTIVES = (
    "all-reduce(",
    "all-gather(",
    "all-to-all(",
    "collective-permute(",
    "reduce-scatter(",
)


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()[:8]), ("rows",), axis_types=(AxisType.Auto,))


def matrix(rows=203, columns=150):
    return scipy.sparse.random_array((rows, columns), density=0.05, rng=np.random.default_rng(0))


@pytest.mark.parametrize("rows", [203, 208, 5])
@pytest.mark.parametrize("form", ["sparse", "dense", "complex sparse"])
def test_products(mesh, form, rows):
    a_MN = matrix(rows) * (1 + 2j if form == "complex sparse" else 1)
    op = sharded.row_sharded(a_MN.toarray() if form == "dense" else a_MN, mesh, "rows")
    dense_MN = a_MN.toarray()
    rng = np.random.default_rng(1)
    x_NC, y_MC = (rng.normal(size=(size, 9)).astype("float32") for size in (150, rows))
    np.testing.assert_allclose(jax.jit(op.matmat)(x_NC), dense_MN @ x_NC, atol=1e-4)
    np.testing.assert_allclose(jax.jit(op.rmatmat)(y_MC), dense_MN.conj().T @ y_MC, atol=1e-4)
    assert checks.adjoint_defect(op, KEY) < 1e-5


@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_same_triplets_as_on_one_device(mesh, form):
    a_MN = matrix()
    op = sharded.row_sharded(a_MN.toarray() if form == "dense" else a_MN, mesh, "rows")
    options = {"rank": 2, "block": 2, "width": 24}  # it restarts, and soon ends
    spread, one = svd(op, KEY, **options), svd(spmm.sparse(a_MN), KEY, **options)
    assert spread.converged
    np.testing.assert_allclose(spread.s_K, one.s_K, rtol=1e-5)
    np.testing.assert_allclose(spread.s_K, np.linalg.svd(a_MN.toarray())[1][:2], rtol=1e-5)


def collectives(product, *args):
    text = jax.jit(product).lower(*args).compile().as_text()
    return [name for name in COLLECTIVES for _ in range(text.count(f" {name}"))]


def test_collectives_of_a_product(mesh):
    """None for A x, one for A^H y: a row of a block never leaves its device."""
    op = sharded.row_sharded(matrix(208), mesh, "rows")
    x_NC = np.ones((150, 8), "float32")
    assert collectives(op.matmat, x_NC) == []
    y_MC = jax.jit(op.matmat)(x_NC)
    assert len(y_MC.addressable_shards) == 8
    assert y_MC.addressable_shards[0].data.shape == (26, 8)
    assert collectives(op.rmatmat, y_MC) == ["all-reduce("]


def test_collectives_of_rows_that_the_devices_do_not_divide(mesh):
    op = sharded.row_sharded(matrix(203), mesh, "rows")
    x_NC = np.ones((150, 8), "float32")
    assert collectives(op.matmat, x_NC) == ["all-gather("]
    assert collectives(op.rmatmat, jax.jit(op.matmat)(x_NC)) == ["all-reduce("]


def test_wrong_requests(mesh):
    with pytest.raises(ValueError, match="axis='data', expected one of the mesh's, rows"):
        sharded.row_sharded(matrix(), mesh, "data")
    with pytest.raises(ValueError, match=r"matrix has shape \(3,\), expected two axes"):
        sharded.row_sharded(np.ones(3), mesh, "rows")
    with pytest.raises(ValueError, match="matrix is a BCOO, expected a scipy sparse matrix or an"):
        sharded.row_sharded(BCOO.fromdense(np.eye(3)), mesh, "rows")


def test_rows_of_a_list(mesh):
    op = sharded.row_sharded([[1.0, 2.0], [3.0, 4.0]], mesh, "rows")
    np.testing.assert_array_equal(op @ np.array([1.0, 10.0], "f"), [21, 43])

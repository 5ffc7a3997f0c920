"""What the battery of test_operators.py does not ask of sparse matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from jax.experimental import sparse as jax_sparse

from isvd import checks, spmm


def random_matrix(shape=(40, 30), seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * (rng.random(shape) < 0.2)).astype("float32")


@pytest.mark.parametrize("kind", ["csr", "csc", "coo", "lil", "dok", "bsr", "dia"])
@pytest.mark.parametrize("family", ["array", "matrix"])
def test_every_format_of_scipy(kind, family):
    a_MN = random_matrix()
    given = getattr(scipy.sparse, f"{kind}_{family}")(scipy.sparse.csr_array(a_MN))
    op = spmm.sparse(given)
    np.testing.assert_allclose(op.to_dense(), a_MN, rtol=1e-6)
    np.testing.assert_allclose(op.H.to_dense(), a_MN.T, rtol=1e-6)


@pytest.mark.parametrize("kind", [jax_sparse.BCOO, jax_sparse.BCSR])
def test_formats_of_jax_with_padding(kind):
    a_MN = random_matrix()
    np.testing.assert_allclose(
        spmm.sparse(kind.fromdense(a_MN, nse=400)).to_dense(), a_MN, rtol=1e-6
    )


@pytest.mark.parametrize("columns", [1, 2, 7, 8, 9, 33])
def test_any_number_of_columns(columns):
    a_MN = random_matrix()
    x_NC = np.random.default_rng(1).normal(size=(30, columns)).astype("float32")
    np.testing.assert_allclose(
        spmm.sparse(scipy.sparse.csr_array(a_MN)) @ x_NC, a_MN @ x_NC, atol=1e-5
    )


@pytest.mark.parametrize("density", [0.0, 0.001, 0.02, 0.4])
def test_layouts_agree(density):
    """Degrees from none to 900: rows in one piece, in several, in several of several."""
    rng = np.random.default_rng(0)
    matrix = scipy.sparse.random_array((120, 2200), density=density, rng=rng, dtype="float32")
    x_NC, y_MC = (rng.normal(size=(n, 3)).astype("float32") for n in (2200, 120))
    op, other = (spmm.sparse(matrix, layout=layout) for layout in ("ell", "csr"))
    assert op.dtype == other.dtype
    np.testing.assert_allclose(op.matmat(x_NC), other.matmat(x_NC), atol=1e-4)
    np.testing.assert_allclose(op.rmatmat(y_MC), other.rmatmat(y_MC), atol=1e-4)


@pytest.mark.parametrize(("entries", "kind"), [(2**14 - 1, "csr"), (2**14, "ell")])
def test_the_layout_is_chosen_by_the_number_of_entries(entries, kind):
    row_E, column_E = np.divmod(np.arange(entries), 256)
    given = row_E, column_E, np.ones(entries, "f"), (128, 256)
    chosen, asked = (
        spmm.sparse_from_entries(*given, **options) for options in ({}, {"layout": kind})
    )
    assert jax.tree.structure(chosen) == jax.tree.structure(asked)


def test_unknown_layout():
    with pytest.raises(ValueError, match="layout='coo' is not one of 'auto', 'ell', 'csr'"):
        spmm.sparse(scipy.sparse.csr_array(random_matrix()), layout="coo")


def test_other_platforms_are_given_no_padding():
    """What is lowered for TPU multiplies one column, for CPU eight."""
    op = spmm.sparse(scipy.sparse.csr_array(random_matrix()))
    product = jax.jit(lambda x_NC: op.matmat(x_NC)).trace(jnp.ones((30, 1)))
    assert "30x8" in product.lower(lowering_platforms=("cpu",)).as_text()
    assert "30x8" not in product.lower(lowering_platforms=("tpu",)).as_text()


def test_entries_are_added_zeros_kept_and_integers_made_floats():
    twice = scipy.sparse.coo_array(([1, 2, 0], ([0, 0, 1], [1, 1, 0])), shape=(2, 2))
    op = spmm.sparse(twice)
    assert op.dtype == jnp.float32
    np.testing.assert_array_equal(op.to_dense(), [[0, 3], [0, 0]])
    assert op.matmat.args[0].size == 2
    empty = spmm.sparse(scipy.sparse.csr_array((3, 2)))
    np.testing.assert_array_equal(empty @ np.ones((2, 4), "f"), np.zeros((3, 4)))


@pytest.mark.parametrize("layout", ["csr", "ell"])
def test_values_may_be_traced(layout):
    rows, columns = np.array([2, 0, 1]), np.array([1, 1, 0])

    @jax.jit
    def total(values):
        op = spmm.sparse_from_entries(rows, columns, values, (3, 2), layout=layout)
        return (op @ jnp.ones(2)).sum()

    np.testing.assert_allclose(jax.grad(total)(jnp.arange(3.0)), np.ones(3))


@pytest.mark.parametrize("layout", ["csr", "ell"])
def test_verify_finds_what_is_not_finite(layout):
    matrix = scipy.sparse.csr_array(random_matrix((40, 300)))
    matrix.data[0] = np.inf
    row = np.flatnonzero(matrix.indptr)[0] - 1
    with pytest.raises(ValueError, match=f"in rows {row} and columns {matrix.indices[0]}"):
        checks.verify(spmm.sparse(matrix, layout=layout), jax.random.key(0))


WRONG = {
    "a dense array": (lambda: spmm.sparse(np.ones((2, 2))), "not ndarray; `dense` is for arrays"),
    "one axis": (
        lambda: spmm.sparse(scipy.sparse.coo_array(np.ones(3))),
        r"a sparse array of shape \(3,\): expected two axes",
    ),
    "batched": (
        lambda: spmm.sparse(jax_sparse.BCOO.fromdense(jnp.ones((2, 2, 2)), n_batch=1)),
        "with 1 batch and 0 dense axes",
    ),
    "lengths": (
        lambda: spmm.sparse_from_entries([0], [0, 1], [1.0, 1.0], (2, 2)),
        r"rows_E has shape \(1,\), columns_E \(2,\) and values_E \(2,\)",
    ),
    "row": (
        lambda: spmm.sparse_from_entries([0, 2], [0, 1], [1.0, 1.0], (2, 3)),
        r"rows_E has 2 at entry 1, expected 0 to 1 in a matrix of shape \(2, 3\)",
    ),
    "column": (
        lambda: spmm.sparse_from_entries([0, 1], [0, -1], [1.0, 1.0], (2, 3)),
        "columns_E has -1 at entry 1, expected 0 to 2",
    ),
    "indices": (
        lambda: spmm.sparse_from_entries([0.0], [0.0], [1.0], (2, 3)),
        "rows_E has dtype float64, expected integers",
    ),
    "traced indices": (
        lambda: jax.eval_shape(
            lambda rows_E: spmm.sparse_from_entries(rows_E, [0], [1.0], (2, 3)), jnp.zeros(1, int)
        ),
        "rows_E: traced, expected known integers: make the operator outside of jit",
    ),
    "a BCOO as argument": (
        lambda: jax.jit(lambda x: spmm.sparse(x).to_dense())(jax_sparse.BCOO.fromdense(np.eye(3))),
        "indices: traced, expected known integers.*values alone may be traced",
    ),
    "a BCSR as argument": (
        lambda: jax.jit(lambda x: spmm.sparse(x).to_dense())(jax_sparse.BCSR.fromdense(np.eye(3))),
        "indices: traced, expected known integers",
    ),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_requests(case):
    request, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        request()

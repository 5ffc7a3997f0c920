"""Walk sums and propagated features against dense twins that are built the long way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from isvd import algebra, checks, design, functions, operators, spmm


def graph(seed=0, size=9, density=0.3, directed=False):
    """Weighted, with a loop of weight 2 and a node without edges."""
    rng = np.random.default_rng(seed)
    a_NN = rng.uniform(0.5, 2, (size, size)) * (rng.random((size, size)) < density)
    a_NN = a_NN if directed else np.triu(a_NN, 1) + np.triu(a_NN, 1).T
    a_NN[3, 3] = 2.0
    a_NN[:, 5] = a_NN[5] = 0.0
    return a_NN


def csr(a_NN):
    return scipy.sparse.csr_array(a_NN)


def link_twin(a_NN, weights, negative_weight, symmetric, degree_factor):
    degree = np.maximum(a_NN.sum(1), 1)
    if symmetric:
        step, factor = a_NN / np.sqrt(np.outer(degree, degree)), np.diag(np.sqrt(degree))
    else:
        step, factor = np.diag(1 / degree) @ a_NN, np.diag(degree)
    walks = sum(c * np.linalg.matrix_power(step, q + 1) for q, c in enumerate(weights))
    walks = walks @ factor if degree_factor else walks
    return walks - negative_weight * (1 - a_NN)


def assert_close(actual, wanted, tolerance=1e-5):
    actual, wanted = np.asarray(actual), np.asarray(wanted)
    assert actual.shape == wanted.shape
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def test_walk_weights():
    np.testing.assert_allclose(design.walk_weights(4), np.array([4, 3, 2, 1]) / 10)
    for window in (1, 2, 10):
        assert design.walk_weights(window).sum() == pytest.approx(1)


@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("degree_factor", [False, True])
def test_link_operator(symmetric, degree_factor, directed):
    a_NN = graph(directed=directed)
    op = design.link_operator(
        csr(a_NN),
        window=3,
        negative_weight=0.3,
        symmetric=symmetric,
        degree_factor=degree_factor,
    )
    wanted = link_twin(a_NN, [3 / 6, 2 / 6, 1 / 6], 0.3, symmetric, degree_factor)
    assert_close(op @ jnp.eye(9), wanted)
    assert_close(op.H @ jnp.eye(9), wanted.T)
    assert checks.adjoint_defect(op, jax.random.key(0)) < 1e-5


def test_a_factor_on_either_side_makes_it_asymmetric():
    """What the reference code overlooks for D^-1 A: M^T is not M there."""
    for options in ({"symmetric": False, "degree_factor": False}, {}):
        dense = np.asarray(design.link_operator(csr(graph()), **options).to_dense())
        assert np.abs(dense - dense.T).max() > 0.01
    dense = np.asarray(design.link_operator(csr(graph()), degree_factor=False).to_dense())
    assert_close(dense, dense.T)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dtype(dtype):
    with jax.enable_x64(dtype == "float64"):
        op = design.link_operator(csr(graph()), dtype=dtype)
        assert op.dtype == dtype
        assert op.matmat(jnp.ones((9, 2), dtype)).dtype == dtype
        wanted = link_twin(graph(), design.walk_weights(10), 0.02, True, True)
        assert_close(op.to_dense(), wanted, 50 * np.finfo(dtype).eps)


def test_entries_stored_twice_are_added():
    twice = scipy.sparse.coo_array(([1.0, 1.0, 1.0], ([0, 0, 1], [1, 1, 0])), shape=(2, 2))
    for matrix in (twice, twice.tocsr()):
        op = design.link_operator(matrix, window=1)
        assert_close(op.to_dense(), link_twin(twice.toarray(), [1.0], 0.02, True, True))


def test_weights_of_ones_own_can_be_learned():
    a_NN, weights = graph(), np.array([0.2, 0.5, 1.5])
    x = np.random.default_rng(1).normal(size=(9, 2))
    with jax.enable_x64(True):

        def value(weights, negative):
            op = design.link_operator(
                csr(a_NN), window=weights, negative_weight=negative, dtype=jnp.float64
            )
            return (op @ x).sum()

        got, slopes = jax.jit(jax.value_and_grad(value, argnums=(0, 1)))(weights, 0.3)
    twin = [link_twin(a_NN, w, 0.0, True, True) @ x for w in np.eye(3)]
    assert_close(slopes[0], [(t + 0.0).sum() for t in twin], 1e-10)
    assert_close(slopes[1], -((1 - a_NN) @ x).sum(), 1e-10)
    assert_close(got, (link_twin(a_NN, weights, 0.3, True, True) @ x).sum(), 1e-10)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("loops", [None, 0.0, 1.0, 1.5])
def test_normalized_adjacency(loops, symmetric):
    a_NN = graph()
    got = design.normalized_adjacency(csr(a_NN), loops=loops, symmetric=symmetric)
    if loops is not None:
        np.fill_diagonal(a_NN, loops)
    degree = np.maximum(a_NN.sum(1), 1)
    wanted = a_NN / (np.sqrt(np.outer(degree, degree)) if symmetric else degree[:, None])
    assert isinstance(got, scipy.sparse.csr_array)
    assert_close(got.toarray(), wanted, 1e-12)
    assert got.nnz == np.count_nonzero(wanted)


def test_normalized_adjacency_leaves_its_input_alone():
    matrix = csr(graph())
    design.normalized_adjacency(matrix)
    assert_close(matrix.toarray(), graph(), 1e-15)


def propagated_pair(num_hops, dtype="float32"):
    hat = design.normalized_adjacency(csr(graph(2, directed=True)), symmetric=False)
    x_NF = np.random.default_rng(3).normal(size=(9, 4)).astype(dtype)
    op = design.propagated(spmm.sparse(hat, dtype), operators.dense(x_NF), num_hops)
    dense = [np.linalg.matrix_power(hat.toarray(), hop) @ x_NF for hop in range(num_hops + 1)]
    return op, np.hstack(dense)


@pytest.mark.parametrize("num_hops", [0, 1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_propagated(num_hops, dtype):
    with jax.enable_x64(dtype == "float64"):
        op, wanted = propagated_pair(num_hops, dtype)
        assert op.dtype == dtype
        tolerance = 50 * np.finfo(dtype).eps
        for product in (lambda op, x: op @ x, jax.jit(lambda op, x: op @ x)):
            assert_close(product(op, jnp.eye(wanted.shape[1], dtype=dtype)), wanted, tolerance)
            assert_close(product(op.H, jnp.eye(9, dtype=dtype)), wanted.T, tolerance)
        assert checks.adjoint_defect(op, jax.random.key(1)) < tolerance


def test_rows_of_propagated():
    op, wanted = propagated_pair(2)
    rows = algebra.take_rows(op, [7, 0, 7])
    assert_close(rows.to_dense(), wanted[[7, 0, 7]])
    assert checks.adjoint_defect(rows, jax.random.key(2)) < 1e-5


def test_propagated_makes_one_loop_of_products_whatever_the_depth():
    calls = []
    step = functions.from_matmat(lambda x: (calls.append(1), x / 2)[1], (4, 4), block=True)
    features = operators.identity(4)
    text = str(jax.make_jaxpr(design.propagated(step, features, 9).matmat)(jnp.ones((40, 2))))
    assert text.count("length=9") == 1
    op = design.propagated(step, features, 9)
    assert_close(op.to_dense(), np.hstack([np.eye(4) / 2**hop for hop in range(10)]))


A, X = operators.dense(np.ones((3, 3), "f")), operators.dense(np.ones((3, 2), "f"))
WRONG = {
    "window": (lambda: design.walk_weights(0), "window=0, expected at least 1"),
    "fraction": (lambda: design.walk_weights(2.5), r"window=2\.5"),
    "no weights": (lambda: design.link_operator(csr(np.eye(2)), window=[]), r"shape \(0,\)"),
    "dense graph": (lambda: design.link_operator(np.eye(2)), "a ndarray, expected a scipy sparse"),
    "oblong": (lambda: design.normalized_adjacency(csr(np.ones((2, 3)))), r"\(2, 3\), expected a"),
    "complex graph": (
        lambda: design.link_operator(csr(1j * np.eye(2))),
        "adjacency has dtype complex128, expected real weights",
    ),
    "hops": (lambda: design.propagated(A, X, -1), "num_hops=-1, expected"),
    "rows": (lambda: design.propagated(A, X.T, 1), r"\(3, 3\) and features \(2, 3\): expected as"),
    "square": (lambda: design.propagated(X, X, 1), r"propagated: A has shape \(3, 2\)"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_errors_say_what_was_expected(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call()

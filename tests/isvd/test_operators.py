"""One battery for every operator: its dense twin, its adjoint, and every transformation."""

import functools
import operator as signs

import jax
import jax.experimental.sparse
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from jax.sharding import AxisType, Mesh, PartitionSpec
from jax.tree_util import Partial

from isvd import algebra, checks, operators, spmm


def draw(seed, *shape, dtype="float32"):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape)
    if np.dtype(dtype).kind == "c":
        x = x + 1j * rng.normal(size=shape)
    return x.astype(dtype)


def toeplitz_product(kernel, x):
    return jnp.convolve(kernel, x)


def band(kernel, size):
    a_MN = np.zeros((size + len(kernel) - 1, size), kernel.dtype)
    for column in range(size):
        a_MN[column : column + len(kernel), column] = kernel
    return a_MN


# name -> make(draw) -> (operator, the same matrix in numpy), where draw(seed, *shape) is an array.
OPERATORS = {}


def case(make):
    OPERATORS[make.__name__] = make
    return make


@case
def dense(draw):
    return operators.dense(draw(0, 5, 3)), draw(0, 5, 3)


@case
def one_row(draw):
    return operators.dense(draw(0, 1, 4)), draw(0, 1, 4)


@case
def user_vector_function(draw):
    kernel = draw(1, 3)
    product = Partial(toeplitz_product, kernel)
    return operators.from_matmat(product, (6, 4), kernel.dtype), band(kernel, 4)


@case
def user_block_function(draw):
    a_MN = draw(2, 4, 5)
    product = Partial(lambda a, x: a[:, :, None] * x, a_MN)  # fails on vectors: (4, 5, 1) * (5,)
    summed = Partial(lambda product, x: product(x).sum(1), product)
    return operators.from_matmat(summed, (4, 5), a_MN.dtype, block=True), a_MN


@case
def user_pair_of_functions(draw):
    a_MN = draw(3, 4, 5)
    backward = Partial(lambda a, y: a.conj().T @ y, a_MN)
    forward = Partial(jnp.matmul, a_MN)
    return operators.from_matmat(forward, (4, 5), a_MN.dtype, rmatmat=backward), a_MN


@case
def sparse(draw):
    a_MN = draw(0, 6, 5) * (np.arange(30).reshape(6, 5) % 3 == 1)
    a_MN[2] = 0
    return spmm.sparse(scipy.sparse.csr_array(a_MN)), a_MN


@case
def sparse_ell(draw):
    """Rows of 1, 4, 16, 17 and 300 entries, and empty ones; as many rows as take three levels."""
    count_M = [1, 0, 4, 16, 17, 300]
    a_MN = np.zeros((6, 300), draw(6, 1).dtype)
    for row, count in enumerate(count_M):
        a_MN[row, 300 - count :] = draw(60 + row, count)
    return spmm.sparse(scipy.sparse.csr_array(a_MN), layout="ell"), a_MN


@case
def sparse_from_entries(draw):
    a_MN, (values_E, index_E) = np.zeros((4, 6), draw(0, 1).dtype), (draw(0, 5), [3, 0, 3, 1, 3])
    np.add.at(a_MN, (index_E, [2, 0, 2, 5, 1]), values_E)
    return spmm.sparse_from_entries(index_E, [2, 0, 2, 5, 1], values_E, (4, 6)), a_MN


@case
def diagonal(draw):
    return operators.diagonal(draw(4, 4)), np.diag(draw(4, 4))


@case
def low_rank(draw):
    u_MK, v_NK = draw(5, 5, 2), draw(6, 3, 2)
    return operators.low_rank(u_MK, v_NK), u_MK @ v_NK.conj().T


@case
def ones(draw):
    dtype = draw(0, 1).dtype
    return operators.ones(3, 5, dtype), np.ones((3, 5), dtype)


@case
def identity(draw):
    dtype = draw(0, 1).dtype
    return operators.identity(4, dtype), np.eye(4, dtype=dtype)


@case
def composition(draw):
    a, b = dense(draw), user_vector_function(draw)
    return b[0] @ operators.dense(draw(7, 4, 3)) @ a[0].T, b[1] @ draw(7, 4, 3) @ a[1].T


@case
def sum_and_difference(draw):
    a, b, c = (draw(seed, 4, 3) for seed in (8, 9, 10))
    return operators.dense(a) + operators.dense(b) - operators.dense(c), a + b - c


@case
def multiples(draw):
    a, op = draw(11, 4, 3), operators.dense(draw(11, 4, 3))
    factor = draw(12, 1)[0]
    return factor * op / 2 + op * 3 - (-op), factor * a / 2 + 4 * a


@case
def power(draw):
    a = draw(13, 4, 4)
    return operators.dense(a) ** 3, a @ a @ a


@case
def power_of_nothing(draw):
    return operators.dense(draw(13, 4, 4)) ** 0, np.eye(4, dtype=draw(0, 1).dtype)


@case
def polynomial(draw):
    a, coef_Q = draw(14, 4, 4), draw(15, 4)
    wanted = sum(c * np.linalg.matrix_power(a, q) for q, c in enumerate(coef_Q))
    return algebra.polynomial(operators.dense(a), coef_Q), wanted


@case
def windowed_sum(draw):
    a, weight_Q = draw(14, 4, 4), draw(16, 3)
    wanted = sum(w * np.linalg.matrix_power(a, q + 1) for q, w in enumerate(weight_Q))
    return algebra.windowed_sum(operators.dense(a), weight_Q), wanted


@case
def geometric_sum(draw):
    a = draw(14, 4, 4)
    wanted = sum(0.5**q * np.linalg.matrix_power(a, q) for q in range(4)).astype(a.dtype)
    return algebra.geometric_sum(operators.dense(a), 0.5, 4), wanted


@case
def hstack(draw):
    a, b = draw(17, 4, 3), draw(18, 4, 2)
    return algebra.hstack([operators.dense(a), operators.dense(b)]), np.hstack([a, b])


@case
def vstack(draw):
    a, b = draw(19, 3, 4), draw(20, 2, 4)
    return algebra.vstack([operators.dense(a), operators.dense(b)]), np.vstack([a, b])


@case
def take_rows(draw):
    a, index = draw(21, 5, 3), [4, 0, 4]
    return algebra.take_rows(operators.dense(a), index), a[index]


@case
def take_columns(draw):
    a, index = draw(22, 3, 5), [2, 2, 0, 1]
    return algebra.take_columns(operators.dense(a), index), a[:, index]


@case
def centered(draw):
    a, scale_N = draw(23, 6, 3), np.array([1, 2, 4], draw(0, 1).real.dtype)
    return algebra.centered(operators.dense(a), scale_N=scale_N), (a - a.mean(0)) / scale_N


@case
def transpose(draw):
    op, a_MN = user_vector_function(draw)
    return op.T, a_MN.T


@case
def adjoint(draw):
    op, a_MN = multiples(draw)
    return op.H, a_MN.conj().T


def pair_of(name):
    """Two operators of one kind with other entries, their arrays stacked, and their matrices."""
    pairs = [
        OPERATORS[name](lambda seed, *shape, shift=shift: draw(seed + shift, *shape))
        for shift in (0, 100)
    ]
    if jax.tree.structure(pairs[0][0]) != jax.tree.structure(pairs[1][0]):  # fresh lambdas
        pairs = pairs[:1] * 2
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(op for op, _ in pairs))
    return both, [a_MN for _, a_MN in pairs]


each = pytest.mark.parametrize("name", list(OPERATORS))


def assert_close(actual, wanted):
    actual, wanted = np.asarray(actual), np.asarray(wanted)
    assert actual.shape == wanted.shape
    scale = max(np.abs(wanted).max(), 1e-30)
    tolerance = 100 * np.finfo(actual.dtype).eps
    np.testing.assert_allclose(actual / scale, wanted / scale, rtol=0, atol=tolerance)


@each
@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_products_are_those_of_the_dense_twin(name, dtype):
    with jax.enable_x64(dtype == "complex128"):
        op, a_MN = OPERATORS[name](functools.partial(draw, dtype=dtype))
        rows, columns = a_MN.shape
        x_NC, y_MC = draw(30, columns, 2, dtype=dtype), draw(31, rows, 2, dtype=dtype)
        assert op.shape == a_MN.shape
        assert op.dtype == a_MN.dtype == dtype
        assert op.matmat(jnp.asarray(x_NC)).dtype == dtype
        assert_close(op @ x_NC, a_MN @ x_NC)
        assert_close(op @ x_NC[:, 0], a_MN @ x_NC[:, 0])
        assert_close(op.H @ y_MC, a_MN.conj().T @ y_MC)
        assert_close(op.T @ y_MC, a_MN.T @ y_MC)
        assert_close(op.H.H @ x_NC, a_MN @ x_NC)
        assert_close(y_MC.T @ op, y_MC.T @ a_MN)
        assert_close(op.to_dense(), a_MN)
        assert checks.adjoint_defect(op, jax.random.key(0)) < 50 * np.finfo(dtype).eps


# Transformations ---------------------------------------------------------------------------------


@each
def test_arrays_are_arguments_of_one_program(name):
    """Two operators of one kind, with other entries, share a program without constants."""
    traces = []

    @jax.jit
    def product(op, x_NC):
        traces.append(name)
        return op.matmat(x_NC)

    for shift in (0, 100):
        op, a_MN = OPERATORS[name](lambda seed, *shape, shift=shift: draw(seed + shift, *shape))
        x_NC = draw(32, a_MN.shape[1], 2)
        assert_close(product(op, x_NC), a_MN @ x_NC)
    wanted = 2 if name in ("user_block_function", "user_pair_of_functions") else 1  # fresh lambdas
    assert len(traces) == wanted


@each
def test_vmap_over_operators_and_blocks(name):
    both, matrices = pair_of(name)
    x_2NC = draw(33, 2, matrices[0].shape[1], 3)
    got = jax.vmap(lambda op, x_NC: op @ x_NC)(both, x_2NC)
    if not jax.tree.leaves(both):  # nothing to map over
        got = jax.vmap(lambda x_NC: both @ x_NC)(x_2NC)
    assert_close(got, np.stack([a_MN @ x_NC for a_MN, x_NC in zip(matrices, x_2NC, strict=True)]))


@each
def test_gradient_by_entries_and_block(name):
    """Against central differences along a random direction, in float64."""
    with jax.enable_x64(True):
        op, a_MN = OPERATORS[name](functools.partial(draw, dtype="float64"))
        leaves, structure = jax.tree.flatten(op)
        arrays = [np.asarray(leaf, np.float64) for leaf in leaves if leaf.dtype.kind == "f"]
        arrays.append(draw(34, a_MN.shape[1], 2, dtype="float64"))

        def value(arrays):
            given = iter(arrays)
            filled = [next(given) if leaf.dtype.kind == "f" else leaf for leaf in leaves]
            op = jax.tree.unflatten(structure, filled)
            return jnp.sin(op @ next(given)).sum()

        direction = [draw(40 + i, *x.shape, dtype="float64") for i, x in enumerate(arrays)]
        slope = sum((g * d).sum() for g, d in zip(jax.grad(value)(arrays), direction, strict=True))
        step = 1e-6
        ends = [
            value([x + sign * step * d for x, d in zip(arrays, direction, strict=True)])
            for sign in (1, -1)
        ]
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-8)


@each
def test_scan_and_a_loop(name):
    op, a_MN = OPERATORS[name](draw)
    x_NC, wanted = draw(35, a_MN.shape[1], 2), draw(35, a_MN.shape[1], 2)
    got, _ = jax.lax.scan(lambda x, _: (op.H @ (op @ x), None), x_NC, length=2)
    for _ in range(2):
        wanted = a_MN.T @ (a_MN @ wanted)
    assert_close(got, wanted)


@each
def test_columns_spread_over_devices(name):
    op, a_MN = OPERATORS[name](draw)
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",), axis_types=(AxisType.Auto,))
    columns = PartitionSpec(None, "data")
    spread = jax.shard_map(
        lambda op, x_NC: op.matmat(x_NC),
        mesh=mesh,
        in_specs=(PartitionSpec(), columns),
        out_specs=columns,
    )
    x_NC = draw(36, a_MN.shape[1], 8)
    assert_close(jax.jit(spread)(op, x_NC), a_MN @ x_NC)


@pytest.mark.parametrize("name", ["power", "polynomial", "windowed_sum", "geometric_sum"])
@pytest.mark.parametrize("closure", [False, True])
def test_loops_of_operators_that_differ_between_devices(name, closure):
    """Each device has a matrix of its own, and all of them one block."""
    both, matrices = pair_of(name)
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",), axis_types=(AxisType.Auto,))
    x_NC = draw(36, 4, 2)

    def products(op, x_NC):
        op = inner = jax.tree.map(lambda leaf: leaf[0], op)
        if closure:
            op = operators.from_matmat(lambda x: inner @ x, inner.shape) ** 2
        return op.matmat(x_NC)[None], op.rmatmat(x_NC)[None]

    spread = jax.shard_map(
        products,
        mesh=mesh,
        in_specs=(PartitionSpec("data"), PartitionSpec()),
        out_specs=PartitionSpec("data"),
    )
    forward, backward = jax.jit(spread)(both, x_NC)
    for got, adjoint, a_MN in zip(forward, backward, matrices, strict=True):
        a_MN = a_MN @ a_MN if closure else a_MN
        assert_close(got, a_MN @ x_NC)
        assert_close(adjoint, a_MN.T @ x_NC)


@each
def test_shapes_without_values(name):
    op, a_MN = OPERATORS[name](draw)
    x_NC = jax.ShapeDtypeStruct((a_MN.shape[1], 3), jnp.float32)
    assert jax.eval_shape(lambda op, x: op @ x, op, x_NC).shape == (a_MN.shape[0], 3)


def test_complex_blocks_on_real_operators():
    for make in OPERATORS.values():
        op, a_MN = make(draw)
        x_NC = draw(37, a_MN.shape[1], 2, dtype="complex64")
        y_MC = draw(38, a_MN.shape[0], 2, dtype="complex64")
        assert_close(op @ x_NC, a_MN @ x_NC)
        assert_close(op.H @ y_MC, a_MN.T @ y_MC)


def test_factors_may_be_learned():
    a = draw(0, 3, 3)
    value, slope = jax.value_and_grad(lambda c: (c * operators.dense(a) @ a).sum())(2.0)
    np.testing.assert_allclose(value, 2 * (a @ a).sum(), rtol=1e-5)
    np.testing.assert_allclose(slope, (a @ a).sum(), rtol=1e-5)


def test_traced_indices_outside_select_nothing():
    """Negative ones too, which numpy counts from the end."""
    a, index_I = draw(0, 4, 3), jnp.array([-1, 3, -4, 4, 0])
    wanted = np.where([[False], [True], [False], [False], [True]], a[[0, 3, 0, 0, 0]], 0)

    @jax.jit
    def selected(index_I):
        rows = algebra.take_rows(operators.dense(a), index_I)
        columns = algebra.take_columns(operators.dense(a.T), index_I)
        return rows.to_dense(), rows.rmatmat(jnp.eye(5)).T, columns.to_dense().T

    for got in selected(index_I):
        np.testing.assert_array_equal(got, wanted)


def test_constant_columns_become_zeros():
    """As of scikit-learn's StandardScaler, also where the scale is traced and differentiated."""
    a = draw(0, 5, 3)
    a[:, 1] = 2

    @jax.jit
    def scaled(scale_N):
        return algebra.centered(operators.dense(a), scale_N=scale_N).to_dense()

    wanted = (a - a.mean(0)) / np.where(a.std(0) > 0, a.std(0), 1)
    np.testing.assert_allclose(scaled(a.std(0)), wanted, atol=1e-6)
    assert not np.abs(wanted[:, 1]).any()
    slope = jax.grad(lambda scale_N: scaled(scale_N).sum())(jnp.asarray(a.std(0)))
    assert np.isfinite(slope).all()


def test_derived_and_written_adjoint_agree():
    kernel = draw(1, 3)
    product = Partial(toeplitz_product, kernel)
    backward = Partial(lambda kernel, y: jnp.correlate(y, kernel), kernel)
    derived = operators.from_matmat(product, (6, 4))
    written = operators.from_matmat(product, (6, 4), rmatmat=backward)
    y_MC = draw(2, 6, 3)
    assert_close(written.rmatmat(y_MC), derived.rmatmat(y_MC))


@each
def test_the_adjoint_of_a_closure_over_an_operator_is_derived(name):
    op, a_MN = OPERATORS[name](draw)
    closure = operators.from_matmat(lambda x: op @ x, op.shape, op.dtype)
    y_MC = draw(31, a_MN.shape[0], 2)
    assert_close(jax.jit(closure.rmatmat)(y_MC), a_MN.T @ y_MC)


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_python_factors_do_not_widen(dtype):
    """Also where x64 would make complex128 of a Python number that stands alone."""
    with jax.enable_x64(True):
        a_MN, x_NC = draw(0, 4, 4, dtype=dtype), draw(1, 4, 2, dtype=dtype)
        op = 2j * operators.dense(a_MN)
        assert op.dtype == op.matmat(jnp.asarray(x_NC)).dtype == "complex64"
        assert_close(op @ x_NC, 2j * a_MN @ x_NC)
        assert_close((op / 2j).H @ x_NC, a_MN.conj().T @ x_NC)
        assert_close((op**2).to_dense(), -4 * a_MN @ a_MN)
        wider = np.complex128(2j) * operators.dense(a_MN)
        assert wider.dtype == (wider @ x_NC).dtype == "complex128"


@pytest.mark.parametrize(
    "make", [operators.identity, lambda size, dtype: operators.ones(size, size, dtype)]
)
def test_the_block_is_promoted(make):
    for dtype, wanted in (("complex64", "complex64"), ("bfloat16", "float32")):
        op = make(3, dtype)
        for product in (op.matmat, op.rmatmat):
            assert product(jnp.ones((3, 2))).dtype == wanted


def test_sums_by_sum():
    a, b = draw(0, 4, 3), draw(1, 4, 3)
    assert_close(sum([operators.dense(a), operators.dense(b)]).to_dense(), a + b)


def test_representation():
    assert repr(A43) == "LinearOperator(shape=(4, 3), dtype=float32)"


def test_a_function_of_vectors_is_mapped_over_columns():
    """The discrete Fourier transform of a block along its rows would be another matrix."""
    op = operators.from_matmat(jnp.fft.fft, (3, 3), "complex64")
    assert_close(op.to_dense(), np.fft.fft(np.eye(3), axis=0).astype("complex64"))
    told = operators.from_matmat(jnp.fft.fft, (3, 3), "complex64", block=True)
    x_NC = draw(0, 3, 2, dtype="complex64")
    assert_close(told @ x_NC, np.fft.fft(x_NC).astype("complex64"))


def test_the_type_is_that_of_the_products():
    """What was one type in tests may be another with x64: told before anything is computed."""
    with jax.enable_x64(True):
        a = draw(0, 4, 3, dtype="float64")
        with pytest.raises(ValueError, match="gives float64 for a vector of dtype float32"):
            operators.from_matmat(lambda x: a @ x, (4, 3))
        op = operators.from_matmat(lambda x: a @ x, (4, 3), "float64")
        assert_close(op.to_dense(), a)
    op = operators.from_matmat(lambda x: a.astype("f") @ x, (4, 3), np.float64)
    assert op.dtype == "float32"  # as everywhere without x64
    checks.verify(op, jax.random.key(0))
    # Entries of a lesser type are promoted by the product.
    half = operators.from_matmat(lambda x: a.astype("float16") @ x, (4, 3))
    assert half.rmatmat(draw(1, 4, 2)).dtype == "float32"


def test_polynomial_makes_one_pass():
    calls = []
    op = operators.from_matmat(lambda x: (calls.append(1), 2 * x)[1], (4, 4))
    summed = algebra.windowed_sum(op, np.ones(9, np.float32))
    text = str(jax.make_jaxpr(summed.matmat)(draw(0, 4, 2)))
    assert text.count("length=9") == 1
    assert_close(summed.to_dense(), np.eye(4, dtype="f") * sum(2.0**q for q in range(1, 10)))


# Errors ------------------------------------------------------------------------------------------

SPARSE_33 = scipy.sparse.csr_array(np.eye(3))
A43, A34, A44 = (operators.dense(draw(0, *shape)) for shape in ((4, 3), (3, 4), (4, 4)))
WRONG = {
    "inner sizes": (lambda: A43 @ A43, r"\(4, 3\) and \(4, 3\).*did you mean A @ B.T\?"),
    "sum": (lambda: A43 + A34, r"\(4, 3\) and \(3, 4\) differ; did you mean B.T\?"),
    "block": (lambda: A43 @ np.ones((4, 2)), r"x \(4, 2\).*did you mean A.T @ x\?"),
    "left": (lambda: np.ones((2, 3)) @ A43, r"x \(2, 3\), expected \(4,\) or \(rows, 4\)"),
    "factor": (lambda: np.ones(4) * A44, r"c has shape \(4,\).*diagonal\(d\) @ A"),
    "power of a wide one": (lambda: A34**2, r"A has shape \(3, 4\), expected a square one"),
    "negative power": (lambda: A44**-1, "n=-1, expected a whole number, at least 0"),
    "polynomial": (lambda: algebra.polynomial(A34, [1.0]), r"\(3, 4\), expected a square one"),
    "no coefficients": (lambda: algebra.polynomial(A44, []), r"coef_Q has shape \(0,\)"),
    "no terms": (lambda: algebra.geometric_sum(A44, 0.5, 0), "num_terms=0 must be at least 1"),
    "hstack": (lambda: algebra.hstack([A43, A34]), r"as many rows each, got shapes \(4, 3\), \(3"),
    "vstack": (lambda: algebra.vstack([A43, A34]), "as many columns each"),
    "rows outside": (lambda: algebra.take_rows(A43, [0, 4]), "index_I has 4, expected 0 to 3"),
    "negative rows": (lambda: algebra.take_rows(A43, [-1]), "index_I has -1, expected 0 to 3"),
    "a mask": (lambda: algebra.take_rows(A43, np.ones(4, bool)), "dtype bool.*flatnonzero"),
    "mean": (
        lambda: algebra.centered(A43, np.ones(4)),
        r"mean_N has shape \(4,\), expected \(3,\)",
    ),
    "vector as matrix": (lambda: operators.dense(np.ones(3)), "expected two axes"),
    "matrix as diagonal": (lambda: operators.diagonal(np.ones((3, 3))), "expected one axis"),
    "ranks": (lambda: operators.low_rank(np.ones((3, 2)), np.ones((3, 1))), r"\(M, K\) and \(N, K"),
    "empty": (lambda: operators.ones(0, 3), r"shape=\(0, 3\): expected"),
    "user's shape": (
        lambda: operators.from_matmat(lambda x: x, (4, 3)),
        r"matmat: expected a function from \(3,\) to \(4,\).*of 3 it gives shape \(3,\)",
    ),
    "user's error": (
        lambda: operators.from_matmat(lambda x: x.nonsense, (4, 3)),
        "with a vector it raises AttributeError",
    ),
    "user's type": (
        lambda: operators.from_matmat(jnp.fft.fft, (4, 4)),
        "matmat gives complex64 for a vector of dtype float32.*pass dtype='complex64'",
    ),
    "type of the user's adjoint": (
        lambda: operators.from_matmat(
            lambda x: 2 * x, (4, 4), rmatmat=lambda y: 2 * y.astype("bfloat16"), block=True
        ),
        "rmatmat gives bfloat16 for a block of dtype float32.*pass dtype='bfloat16'",
    ),
    "a pair for a product": (
        lambda: operators.from_matmat(lambda x: (x, x), (3, 3)),
        "with a vector it gives a tuple; with a block it gives a tuple",
    ),
    "one size": (lambda: operators.from_matmat(lambda x: x, 5), r"shape=5: expected \(rows, col"),
    "half a row": (lambda: operators.from_matmat(lambda x: x, (2.5, 3)), r"shape=\(2.5, 3\): exp"),
    "half a term": (lambda: algebra.geometric_sum(A44, 0.5, 2.5), "num_terms=2.5 must be"),
    "sparse block": (lambda: A43 @ SPARSE_33, "A @ x: x is a csr_array, expected an array"),
    "sparse left": (lambda: SPARSE_33 @ A34, "x @ A: x is a csr_array, expected an array"),
    "sparse as dense": (
        lambda: operators.dense(SPARSE_33),
        "a_MN is a csr_array, expected an array .`sparse` makes an operator",
    ),
    "JAX's sparse as dense": (
        lambda: operators.dense(jax.experimental.sparse.BCOO.fromdense(np.eye(3))),
        "a_MN is a BCOO, expected an array",
    ),
    "hstack of an array": (lambda: algebra.hstack([A43, np.eye(4)]), "got a ndarray; `dense` and"),
    "vstack of an array": (lambda: algebra.vstack([np.eye(3), A43]), "got a ndarray; `dense` and"),
    "whole numbers": (
        lambda: checks.verify(operators.dense(np.eye(3, dtype=int)), jax.random.key(0)),
        "A has dtype int32, expected a real or complex floating type",
    ),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_requests(case):
    request, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        request()


def test_what_has_no_meaning_is_a_type_error():
    for sign in (signs.mul, signs.truediv):
        with pytest.raises(TypeError):
            sign(A44, A44)
    for sign in (signs.add, signs.sub):
        for terms in ((A44, np.ones((4, 4))), (np.ones((4, 4)), A44), (jnp.ones(4), A44), (1, A44)):
            with pytest.raises(TypeError, match=r"B is a .*, expected an operator; `dense` and"):
                sign(*terms)


def test_verify_passes_every_operator():
    for make in OPERATORS.values():
        checks.verify(make(draw)[0], jax.random.key(0))


@pytest.mark.parametrize(
    "product",
    [jnp.abs, lambda x: x / jnp.linalg.norm(x), lambda x: jnp.where(x > 0, x, 2 * x)],
    ids=["abs", "norm", "where"],
)
def test_an_adjoint_that_cannot_be_derived(product):
    op = operators.from_matmat(product, (5, 5))
    with pytest.raises(ValueError, match="rmatmat cannot be derived: matmat is not linear"):
        op.H @ np.ones(5, np.float32)

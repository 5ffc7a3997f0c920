"""One battery for every operator: its dense twin, its adjoint, and every transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec
from jax.tree_util import Partial
from operator_cases import OPERATORS, assert_close, draw, pair_of, toeplitz_product

from isvd import algebra, checks, functions, operators

each = pytest.mark.parametrize("name", list(OPERATORS))


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
            op = functions.from_matmat(lambda x: inner @ x, inner.shape) ** 2
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
    derived = functions.from_matmat(product, (6, 4))
    written = functions.from_matmat(product, (6, 4), rmatmat=backward)
    y_MC = draw(2, 6, 3)
    assert_close(written.rmatmat(y_MC), derived.rmatmat(y_MC))


@each
def test_the_adjoint_of_a_closure_over_an_operator_is_derived(name):
    op, a_MN = OPERATORS[name](draw)
    closure = functions.from_matmat(lambda x: op @ x, op.shape, op.dtype)
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
    assert repr(operators.dense(draw(0, 4, 3))) == "LinearOperator(shape=(4, 3), dtype=float32)"


def test_a_function_of_vectors_is_mapped_over_columns():
    """The discrete Fourier transform of a block along its rows would be another matrix."""
    op = functions.from_matmat(jnp.fft.fft, (3, 3), "complex64")
    assert_close(op.to_dense(), np.fft.fft(np.eye(3), axis=0).astype("complex64"))
    told = functions.from_matmat(jnp.fft.fft, (3, 3), "complex64", block=True)
    x_NC = draw(0, 3, 2, dtype="complex64")
    assert_close(told @ x_NC, np.fft.fft(x_NC).astype("complex64"))


def test_the_type_is_that_of_the_products():
    """What was one type in tests may be another with x64: told before anything is computed."""
    with jax.enable_x64(True):
        a = draw(0, 4, 3, dtype="float64")
        with pytest.raises(ValueError, match="gives float64 for a vector of dtype float32"):
            functions.from_matmat(lambda x: a @ x, (4, 3))
        op = functions.from_matmat(lambda x: a @ x, (4, 3), "float64")
        assert_close(op.to_dense(), a)
    op = functions.from_matmat(lambda x: a.astype("f") @ x, (4, 3), np.float64)
    assert op.dtype == "float32"  # as everywhere without x64
    checks.verify(op, jax.random.key(0))
    # Entries of a lesser type are promoted by the product.
    half = functions.from_matmat(lambda x: a.astype("float16") @ x, (4, 3))
    assert half.rmatmat(draw(1, 4, 2)).dtype == "float32"


def test_polynomial_makes_one_pass():
    calls = []
    op = functions.from_matmat(lambda x: (calls.append(1), 2 * x)[1], (4, 4))
    summed = algebra.windowed_sum(op, np.ones(9, np.float32))
    text = str(jax.make_jaxpr(summed.matmat)(draw(0, 4, 2)))
    assert text.count("length=9") == 1
    assert_close(summed.to_dense(), np.eye(4, dtype="f") * sum(2.0**q for q in range(1, 10)))


def test_verify_passes_every_operator():
    for make in OPERATORS.values():
        checks.verify(make(draw)[0], jax.random.key(0))

"""Operators of every kind beside their matrices in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax.tree_util import Partial

from isvd import algebra, functions, operators, spmm


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
    return functions.from_matmat(product, (6, 4), kernel.dtype), band(kernel, 4)


@case
def user_block_function(draw):
    a_MN = draw(2, 4, 5)
    product = Partial(lambda a, x: a[:, :, None] * x, a_MN)  # fails on vectors: (4, 5, 1) * (5,)
    summed = Partial(lambda product, x: product(x).sum(1), product)
    return functions.from_matmat(summed, (4, 5), a_MN.dtype, block=True), a_MN


@case
def user_pair_of_functions(draw):
    a_MN = draw(3, 4, 5)
    backward = Partial(lambda a, y: a.conj().T @ y, a_MN)
    forward = Partial(jnp.matmul, a_MN)
    return functions.from_matmat(forward, (4, 5), a_MN.dtype, rmatmat=backward), a_MN


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


def assert_close(actual, wanted):
    actual, wanted = np.asarray(actual), np.asarray(wanted)
    assert actual.shape == wanted.shape
    scale = max(np.abs(wanted).max(), 1e-30)
    tolerance = 100 * np.finfo(actual.dtype).eps
    np.testing.assert_allclose(actual / scale, wanted / scale, rtol=0, atol=tolerance)

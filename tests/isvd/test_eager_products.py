"""Products outside of jit: what was compiled for one operator serves all others of its kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from jax.tree_util import Partial

from isvd import algebra, deepen, design, functions, operators, sharded, spmm

N = 6


def matrix(seed):
    return np.random.default_rng(seed).normal(size=(N, N)).astype("float32") / N


def graph(seed):
    return scipy.sparse.csr_array(np.abs(matrix(seed) + matrix(seed).T))


def powers(a_NN, coefficients):
    return sum(c * np.linalg.matrix_power(a_NN, q) for q, c in enumerate(coefficients))


def power(seed):
    return operators.dense(matrix(seed)) ** 3, powers(matrix(seed), [0, 0, 0, 1])


def polynomial(seed):
    coef_Q = np.float32([seed + 1, 2, 3])
    return algebra.polynomial(operators.dense(matrix(seed)), coef_Q), powers(matrix(seed), coef_Q)


def windowed_sum(seed):
    op = spmm.sparse_from_entries(*np.indices((N, N)).reshape(2, -1), matrix(seed).ravel(), (N, N))
    return algebra.windowed_sum(op, np.ones(2, "f")), powers(matrix(seed), [0, 1, 1])


def link_operator(seed):
    a = graph(seed).toarray()
    degree_N = np.maximum(a.sum(1), 1)
    p = a / np.sqrt(np.outer(degree_N, degree_N))
    wanted = powers(p, [0, 2 / 3, 1 / 3]) * degree_N**0.5 - 0.02 * (1 - a)
    return design.link_operator(graph(seed), window=2), wanted


def propagated(seed):
    a, x = matrix(seed), matrix(seed + 10)
    wanted = np.concatenate([x, a @ x, a @ a @ x], 1)
    return design.propagated(operators.dense(a), operators.dense(x), 2), wanted


def network(seed):
    """At first the linear network of one hop, of dropout as well, which drops nothing here."""
    a, w_HFC = matrix(seed), np.random.default_rng(seed).normal(size=(2, 3, N)).astype("f")
    params, op = deepen.init(w_HFC), operators.dense(a)

    def product(x_NF):
        return deepen.apply(params, op, x_NF[:, :3])

    return product, lambda x: x[:, :3] @ w_HFC[0] + a @ x[:, :3] @ w_HFC[1]


def row_sharded(seed):
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    return sharded.row_sharded(matrix(seed), mesh, "data"), matrix(seed)


OPERATORS = (power, polynomial, windowed_sum, link_operator, propagated, row_sharded)


@pytest.fixture
def compilations(caplog):
    """compilations(fn): how many programs fn() compiles."""

    def count(fn):
        caplog.clear()
        with jax.log_compiles():
            fn()
        return sum("Finished XLA compilation" in record.getMessage() for record in caplog.records)

    assert count(lambda: jax.jit(lambda x: x + 2)(1)) == 1
    return count


@pytest.mark.parametrize("make", OPERATORS)
def test_one_program_for_all_products(make, compilations):
    got = []
    for seed in range(2):
        op, wanted = make(seed)
        x_NC, y_MC = (np.float32(np.arange(2 * n).reshape(n, 2) / n) for n in wanted.shape[::-1])
        count = compilations(lambda: got.extend([op @ x_NC, op.H @ y_MC]))  # noqa: B023
        np.testing.assert_allclose(got[-2], wanted @ x_NC, atol=1e-4)
        np.testing.assert_allclose(got[-1], wanted.T @ y_MC, atol=1e-4)
    assert count == 0


def test_one_program_for_all_networks(compilations):
    x_NF, got = np.float32(np.arange(N * N).reshape(N, N) / N), []
    for seed in range(2):
        product, wanted = network(seed)
        count = compilations(lambda: got.append(product(jnp.asarray(x_NF))))  # noqa: B023
        np.testing.assert_allclose(got[-1], wanted(x_NF), atol=1e-4)
    assert count == 0


def test_one_program_for_all_gradients(compilations):
    x_NC, slopes = matrix(5), []
    slope = jax.grad(lambda w_Q, op: (algebra.windowed_sum(op, w_Q) @ x_NC).sum())
    for seed in range(2):
        op = operators.dense(matrix(seed))
        count = compilations(lambda: slopes.append(slope(jnp.ones(2), op)))  # noqa: B023
        wanted = [(powers(matrix(seed), [0] * q + [1]) @ x_NC).sum() for q in (1, 2)]
        np.testing.assert_allclose(slopes[-1], wanted, atol=1e-4)
    assert count == 0


def test_what_a_users_function_holds_is_not_kept():
    """A closure may hold what is traced, and a program that is kept outlives the trace."""
    a, x_NC = matrix(0), matrix(1)

    def total(s):
        return (functions.from_matmat(lambda x: s * (a @ x), (N, N)) ** 2 @ x_NC).sum()

    with jax.checking_leaks():
        value, slope = jax.jit(jax.value_and_grad(total))(2.0)
    np.testing.assert_allclose(value, 4 * (a @ a @ x_NC).sum(), rtol=1e-4)
    np.testing.assert_allclose(slope, 4 * (a @ a @ x_NC).sum(), rtol=1e-4)


def test_text_in_a_users_function():
    """No argument of a program: such products are made as they were."""
    a, x_NC = matrix(0), matrix(1)
    product = Partial(
        lambda a, x, precision: jnp.matmul(a, x, precision=precision), a, precision="highest"
    )
    backward = Partial(lambda a, y, how: a.T @ y if how else None, a, how="plain")
    op = functions.from_matmat(product, (N, N), rmatmat=backward, block=True) ** 2
    np.testing.assert_allclose(op @ x_NC, a @ a @ x_NC, atol=1e-5)
    np.testing.assert_allclose(op.H @ x_NC, a.T @ a.T @ x_NC, atol=1e-5)

"""What a second call compiles (nothing), and what a traced one leaves behind (nothing)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from isvd import functions, operators, solve
from isvd.factorize import svd

KEY = jax.random.key(0)
M, N = 30, 20
A_MN = np.random.default_rng(0).normal(size=(M, N)).astype("float32")


def low_rank_product(op):
    return solve.low_rank_product(op, svd(op, KEY, rank=3), jnp.ones(N)).sum()


def solution(op):
    return solve.pinv_solve(svd(op, KEY, rank=3), jnp.ones(M), op=op).sum()


def eigenvalues(op):
    return solve.eigh(op.H @ op, KEY, rank=3).values_K.sum()


@pytest.mark.parametrize("loss", [low_rank_product, solution, eigenvalues])
def test_a_second_gradient_compiles_nothing(loss):
    slope = jax.grad(lambda a_MN: loss(operators.dense(a_MN)))
    a_MN = jnp.asarray(A_MN)
    first = jax.block_until_ready(slope(a_MN))
    compiled = []

    def listen(name, seconds, **_):
        if "backend_compile" in name:
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + 41)(1.0)
        assert len(compiled) == 1  # that is: compilations are seen
        np.testing.assert_array_equal(slope(a_MN), first)
        assert len(compiled) == 1
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("loss", [low_rank_product, solution])
def test_gradient_where_a_user_holds_a_number(loss):
    """A whole number in a Partial is a leaf of the operator, without a shape of its own."""

    def of(a_MN):
        return functions.from_matmat(Partial(lambda a, c, x: c * (a @ x), a_MN, 3), (M, N))

    slope = jax.grad(lambda a_MN: loss(of(a_MN)))(A_MN)
    wanted = jax.grad(lambda a_MN: loss(operators.dense(3 * a_MN)))(A_MN)
    np.testing.assert_allclose(slope, wanted, rtol=1e-3, atol=1e-5)


def test_nothing_traced_outlives_its_trace():
    @jax.jit
    @jax.grad
    def slope(scale):
        op = functions.from_matmat(lambda x_N: scale * (A_MN @ x_N), (M, N))
        return svd(op, KEY, rank=1).s_K[0]

    with jax.checking_leaks():
        found = slope(2.0)
    np.testing.assert_allclose(found, np.linalg.norm(A_MN, 2), rtol=1e-5)

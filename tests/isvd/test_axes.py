"""Explicit axes, as `jax.make_mesh` makes them: the same numbers, and results on every device."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from isvd import adaptive, algebra, checks, functions, operators, sharded, solve
from isvd.factorize import svd

KEY = jax.random.key(0)
SMALL = {"rank": 3, "block": 2, "width": 16}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Explicit,))


@pytest.fixture(params=[False, True], ids=["axes of arrays", "axes of the context"])
def context(request, mesh):
    with jax.set_mesh(mesh) if request.param else contextlib.nullcontext():
        yield


def matrix(rows=64, columns=40):
    return np.random.default_rng(0).normal(size=(rows, columns)).astype("float32")


def spread(mesh, a):
    return jax.device_put(a, NamedSharding(mesh, PartitionSpec("rows")))


def values(op):
    return svd(op, KEY, **SMALL).s_K


def test_values(mesh, context):
    a_MN = matrix()
    spread_MN = spread(mesh, a_MN)
    dense = operators.dense(spread_MN)
    wanted_K, centred_K = (np.linalg.svd(x)[1][:3] for x in (a_MN, a_MN - a_MN.mean(0)))
    for s_K, wanted in [
        (values(dense), wanted_K),
        (jax.jit(lambda a: values(operators.dense(a)))(spread_MN), wanted_K),
        (values(functions.from_matmat(Partial(jnp.matmul, spread_MN), a_MN.shape)), wanted_K),
        (values(sharded.row_sharded(a_MN, mesh, "rows")), wanted_K),
        (values(algebra.centered(dense)), centred_K),
    ]:
        np.testing.assert_allclose(s_K, wanted, rtol=1e-5)
        assert s_K.sharding.is_fully_replicated


def test_gradient(mesh, context):
    a_MN = matrix()
    gradient = jax.jit(jax.grad(lambda a: values(operators.dense(a)).sum()))
    u_MK, _, vh_KN = np.linalg.svd(a_MN)
    got_MN = gradient(spread(mesh, a_MN))
    np.testing.assert_allclose(got_MN, u_MK[:, :3] @ vh_KN[:3], atol=1e-4)
    assert got_MN.sharding.spec[0] == "rows"


def test_whatever_multiplies(mesh):
    a_NN = matrix(40)
    a_NN = a_NN + a_NN.T
    u_MK, s_K, vh_KN = np.linalg.svd(a_NN)
    plain, op = operators.dense(a_NN), operators.dense(spread(mesh, a_NN))
    with jax.set_mesh(mesh):
        for function, options in [
            (solve.eigh, SMALL),
            (solve.spectral_norm, {"block": 2, "width": 16}),
            (solve.frobenius_norm, {}),
            (solve.trace, {}),
            (adaptive.svd_to_error, {"error": 0.8}),
        ]:
            got, wanted = (jax.tree.leaves(function(x, KEY, **options))[0] for x in (op, plain))
            np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)
        checks.verify(op, KEY)

        factors, x_N = svd(op, KEY, **SMALL), a_NN[0]
        best_NN = (u_MK[:, :3] * s_K[:3]) @ vh_KN[:3]
        np.testing.assert_allclose(
            solve.low_rank_product(op, factors, x_N), best_NN @ x_N, atol=1e-2
        )
        solved_N = np.linalg.pinv(best_NN, rcond=1e-4) @ x_N
        np.testing.assert_allclose(
            solve.pinv_solve(factors, spread(mesh, x_N)), solved_N, atol=1e-4
        )


@pytest.mark.parametrize("rows", [64, 61])
def test_products_of_spread_rows(mesh, context, rows):
    a_MN = matrix(rows)
    op = sharded.row_sharded(a_MN, mesh, "rows")
    y_MC = op @ a_MN.T[:, :3]
    np.testing.assert_allclose(y_MC, a_MN @ a_MN.T[:, :3], atol=1e-4)
    assert y_MC.sharding.is_fully_replicated == (rows == 61)
    np.testing.assert_allclose(op.T @ y_MC, a_MN.T @ a_MN @ a_MN.T[:, :3], rtol=1e-4, atol=1e-3)

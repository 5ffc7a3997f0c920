"""Models against numpy, and their derivatives against finite differences, at zeros too."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_depth import models

KEY = jax.random.key(0)


def weights(depth, dim=6, seed=0, zeros=()):
    w_ND = np.random.default_rng(seed).normal(size=(depth, dim))
    for layer, coordinate in zeros:
        w_ND[layer, coordinate] = 0
    return w_ND


ZEROS = [(), ((0, 1),), ((0, 1), (2, 1)), ((0, 2), (1, 2), (2, 2))]


@pytest.mark.parametrize("zeros", ZEROS)
def test_leave_one_out(zeros):
    w_ND = weights(4, zeros=zeros)
    wanted_ND = [np.prod(np.delete(w_ND, i, 0), 0) for i in range(4)]
    np.testing.assert_allclose(models.leave_one_out(jnp.array(w_ND)), wanted_ND, rtol=1e-5)


def test_leave_one_out_of_one_layer_is_one():
    np.testing.assert_array_equal(models.leave_one_out(jnp.zeros((1, 3))), np.ones((1, 3)))


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("depth", [1, 3, 5])
def test_the_derivative_of_the_product_is_exact_at_zeros(depth, zeros):
    zeros = [z for z in zeros if z[0] < depth]
    with jax.enable_x64(True):
        w_ND = jnp.array(weights(depth, zeros=zeros))
        push_D = jnp.array(np.random.default_rng(1).normal(size=6))
        value = lambda w_ND: models.product(w_ND) @ push_D  # noqa: E731
        slope_ND = jax.grad(value)(w_ND)
        for at in itertools.product(range(depth), range(6)):
            up, down = (value(w_ND.at[at].add(h)) for h in (0.5, -0.5))
            np.testing.assert_allclose(slope_ND[at], up - down, atol=1e-12)  # it is linear in each
        direction_ND = jnp.array(weights(depth, seed=2))
        _, forward = jax.jvp(value, (w_ND,), (direction_ND,))
        np.testing.assert_allclose(forward, (slope_ND * direction_ND).sum(), rtol=1e-12)


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("scheme", models.SCHEMES)
def test_starts(depth, scheme):
    w_ND = np.asarray(models.init_diagonal(KEY, depth=depth, dim=400, scale=0.2, scheme=scheme))
    assert w_ND.shape == (depth, 400)
    if scheme == "zero_first":
        assert not w_ND[0].any()
        np.testing.assert_allclose(w_ND[1:], 0.2)
    elif scheme == "balanced":
        np.testing.assert_allclose(w_ND, 0.2)
    elif scheme == "random_sign":
        np.testing.assert_allclose(np.abs(w_ND), 0.2)
        assert 0.4 < (w_ND > 0).mean() < 0.6
    else:
        assert w_ND.std() == pytest.approx(0.2, rel=0.15)


def test_default_scales_are_those_of_the_table():
    for depth, scale in (*models.INIT_SCALES.items(), (9, models.INIT_SCALES[5])):
        w_ND = models.init_diagonal(KEY, depth=depth, dim=2, scheme="balanced")
        np.testing.assert_allclose(w_ND, scale)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_both_solutions_are_solutions_and_one_is_balanced(depth):
    theta_D = jnp.array([2.0, 0.0, -0.5])
    for make in (models.balanced_solution, models.unbalanced_solution):
        np.testing.assert_allclose(models.product(make(theta_D, depth)), theta_D, rtol=1e-6)
    size_ND = np.abs(models.balanced_solution(theta_D, depth))
    np.testing.assert_allclose(size_ND, np.tile(size_ND[:1], (depth, 1)))
    assert depth == 1 or np.ptp(np.abs(models.unbalanced_solution(theta_D, depth)), axis=0).max()


def test_matrix_products():
    w_Nnn = np.random.default_rng(0).normal(size=(3, 4, 4)).astype("f")
    x_MD = np.random.default_rng(1).normal(size=(5, 16)).astype("f")
    total = w_Nnn[0] @ w_Nnn[1] @ w_Nnn[2]
    np.testing.assert_allclose(models.matrix_product(w_Nnn).reshape(4, 4), total, rtol=1e-4)
    wanted_M = np.einsum("mij,ij->m", x_MD.reshape(5, 4, 4), total)
    np.testing.assert_allclose(models.predict_matrix(w_Nnn, x_MD), wanted_M, rtol=1e-4)


def test_matrix_starts():
    eye = models.init_matrix(KEY, depth=3, dim=4, scale=0.1)
    np.testing.assert_allclose(eye, 0.1 * np.array([0, 1, 1])[:, None, None] * np.eye(4))
    turned = models.init_matrix(KEY, depth=3, dim=4, scale=0.1, scheme="orthogonal")
    assert not turned[0].any()
    for w_nn in turned[1:]:
        np.testing.assert_allclose(w_nn @ w_nn.T, 0.01 * np.eye(4), atol=1e-7)
    assert np.abs(turned[1] - turned[2]).max() > 0.01
    normal = models.init_matrix(KEY, depth=2, dim=50, scale=0.1, scheme="gaussian")
    assert float(normal.std()) == pytest.approx(0.1 / np.sqrt(50), rel=0.1)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_relu_network(depth):
    parts = models.init_relu(KEY, depth=depth, dim=7, width=5)
    x_MI = np.random.default_rng(0).normal(size=(20, 7)).astype("f")
    wanted = x_MI
    for layer, part in enumerate(parts):
        wanted = wanted @ np.asarray(part["w"]) + np.asarray(part["b"])
        wanted = np.maximum(wanted, 0) if layer < depth - 1 else wanted
    found_M = models.predict_relu(parts, x_MI)
    assert found_M.shape == (20,)
    np.testing.assert_allclose(found_M, wanted[:, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: models.init_diagonal(KEY, depth=0, dim=3), "depth=0, expected a whole number"),
        (lambda: models.init_diagonal(KEY, depth=2, dim=0), "dim=0, expected a whole number, at"),
        (lambda: models.init_diagonal(KEY, depth=2, dim=3, scheme="warm"), "scheme='warm', exp"),
        (lambda: models.init_matrix(KEY, depth=True, dim=3, scale=1.0), "depth=True, expected"),
        (lambda: models.init_matrix(KEY, depth=2, dim=3, scale=1.0, scheme="balanced"), "scheme="),
        (lambda: models.init_relu(KEY, depth=2, dim=3, width=0), "width=0, expected a whole"),
        (lambda: models.balanced_solution(jnp.ones(2), 0), "depth=0, expected"),
        (lambda: models.unbalanced_solution(jnp.ones(2), -1), "depth=-1, expected"),
    ],
)
def test_wrong_requests(call, words):
    with pytest.raises(ValueError, match=words):
        call()

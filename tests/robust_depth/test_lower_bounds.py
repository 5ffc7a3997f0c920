"""Lower bounds on the drop against what the drop is, where that is known."""

import functools

import jax
import jax.numpy as jnp
import pytest
from regressions import regression

from robust_depth import method, models
from robust_depth.flatness import flatness
from robust_depth.lower_bounds import descent_lower_bound, sampled_lower_bound
from robust_depth.problems import Problem, sample_relu_teacher


def linear_twin(model):
    """A model of one layer, which is linear, and the problem that says so: an exact drop."""
    if model == method.RELU:
        teacher = sample_relu_teacher(
            jax.random.key(0), num_rows=48, dim=20, width=5, num_test=2, outlier_fraction=0.2
        )
        weights = models.init_relu(jax.random.key(1), depth=1, dim=20, width=5)
        x_MD = jnp.concatenate([teacher.x_MD, jnp.ones((48, 1))], 1)  # and the bias
        w_1D = jnp.concatenate([weights[0]["w"][:, 0], weights[0]["b"]])[None]
        return weights, teacher, w_1D, Problem(x_MD, teacher.y_M, w_1D[0])
    problem = regression(dim=25)
    weights = (
        problem.theta_D[None] if model == method.DIAGONAL else problem.theta_D.reshape(1, 5, 5)
    )
    return weights, problem, problem.theta_D[None], problem


@pytest.mark.parametrize(
    "model", [method.DIAGONAL, pytest.param(method.MATRIX, marks=pytest.mark.slow), method.RELU]
)
def test_lower_bounds_against_the_exact_drop_of_one_layer(model):
    weights, problem, w_1D, twin = linear_twin(model)
    exact = flatness(w_1D, twin, 0.2)
    sampled = sampled_lower_bound(
        jax.random.key(2), weights, problem, model=model, radius=0.2, num_samples=500
    )
    descended = descent_lower_bound(
        jax.random.key(2), weights, problem, model=model, radius=0.2, num_steps=500, num_starts=2
    )
    most = float(exact.drop + exact.gap) + 1e-6
    assert 0 <= float(sampled) < float(descended) <= most
    assert float(descended) > 0.5 * float(exact.drop)
    still = descent_lower_bound(
        jax.random.key(2), weights, problem, model=model, radius=0.0, num_steps=3, num_starts=2
    )
    assert float(still) == 0


def test_lower_bounds_of_a_deep_diagonal_network():
    problem = regression()
    w_ND = models.balanced_solution(problem.theta_D, 2)
    exact = flatness(w_ND, problem, 0.3)
    options = {"model": method.DIAGONAL, "radius": 0.3}
    sampled, many = (
        float(sampled_lower_bound(jax.random.key(1), w_ND, problem, num_samples=samples, **options))
        for samples in (1, 1000)
    )
    one, starts = (
        float(
            descent_lower_bound(
                jax.random.key(1), w_ND, problem, num_steps=steps, num_starts=8, **options
            )
        )
        for steps in (1, 1000)
    )
    assert sampled <= many
    assert max(many, one) < starts <= float(exact.drop + exact.gap) + 1e-6
    assert starts > 0.3 * float(exact.drop)


@pytest.mark.parametrize(
    ("bound", "message"),
    [
        (functools.partial(sampled_lower_bound, num_samples=0), "num_samples=0, expected"),
        (functools.partial(descent_lower_bound, num_steps=1, num_starts=0), "num_starts=0, exp"),
        (functools.partial(descent_lower_bound, num_steps=0, num_starts=1), "num_steps=0, exp"),
    ],
)
def test_wrong_requests(bound, message):
    weights, problem, _, _ = linear_twin(method.DIAGONAL)
    with pytest.raises(ValueError, match=message):
        bound(jax.random.key(0), weights, problem, model=method.DIAGONAL, radius=0.1)
    with pytest.raises(ValueError, match="radius=-1, expected"):
        sampled_lower_bound(
            jax.random.key(0), weights, problem, model=method.DIAGONAL, radius=-1, num_samples=1
        )

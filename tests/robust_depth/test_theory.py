"""Laws of entry and exit against runs of the method; isometries against brute force."""

import functools
import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_depth import method, models, problems, theory

SETTING = {"num_rows": 200, "dim": 40, "sparsity": 4, "outlier_fraction": 0.1}


def trials(num_trials=10, seed=0, **changes):
    keys = jax.random.split(jax.random.key(seed), num_trials)
    sample = functools.partial(problems.sample_regression, **(SETTING | changes))
    return jax.jit(jax.vmap(sample))(keys)


def errors(problem, *, depth, scale, step_size, num_steps, record_every):
    """Records of balanced runs, (trials, R), and their steps."""
    w_ND = jnp.full((depth, problem.theta_D.shape[-1]), scale)
    _, info = jax.vmap(
        lambda one: method.run(
            w_ND, one, step_size=step_size, num_steps=num_steps, record_every=record_every
        )
    )(problem)
    return info.error, jnp.arange(0, num_steps, record_every)


@pytest.mark.parametrize("depth", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_law_of_entry(depth):
    p, eta = SETTING["outlier_fraction"], 0.01
    scale = 0.1 * 2 ** (1 / depth)  # ||theta*|| = 2
    problem = trials()
    law = theory.predicted_entry(
        problem.theta_D[0], depth=depth, scale=scale, step_size=eta, outlier_fraction=p
    )
    record_every = max(1, int(law) // 100)
    error_R, steps_R = errors(
        problem,
        depth=depth,
        scale=scale,
        step_size=eta,
        num_steps=200 * record_every,
        record_every=record_every,
    )
    measured = jnp.median(theory.entry_time(error_R, steps_R))
    assert 0.75 < float(measured / law) < 1.25, f"{measured} steps, by the law {law}"


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 6])
def test_law_of_growth_solves_its_equation(depth):
    """A thousand small steps of w' = eta c w^(N-1), which know nothing of the formula."""
    scale, rate, eta, target = 0.4, 0.3, 1e-4, 0.8
    w, steps = scale, 0
    while w**depth < target:
        w += eta * rate * w ** (depth - 1)
        steps += 1
    law = theory.growth_time(target, rate, depth=depth, scale=scale, step_size=eta)
    np.testing.assert_allclose(law, steps, rtol=2e-3)
    assert theory.growth_time(0.4**depth / 2, rate, depth=depth, scale=0.4, step_size=eta) == 0
    assert theory.growth_time(target, 0.0, depth=depth, scale=scale, step_size=eta) == jnp.inf


def test_slowest_coordinate_of_the_support_decides():
    options = {"depth": 3, "scale": 0.1, "step_size": 0.01, "outlier_fraction": 0.2}
    both = jnp.array([0.0, 2.0, -0.5])
    rate = 0.8 * np.sqrt(2 / np.pi) * 0.5 / np.sqrt(4.25)
    wanted = (0.1**-1 - 0.5 ** (-1 / 3)) / (0.01 * rate)
    np.testing.assert_allclose(theory.predicted_entry(both, **options), wanted, rtol=1e-5)


def test_exit_is_later_for_fewer_outliers_and_more_rows_and_never_without():
    options = {"depth": 3, "scale": 0.1, "step_size": 0.01}
    theta = jnp.array([1.0, 0.0])

    def law(num_rows, p):
        return float(theory.predicted_exit(theta, num_rows=num_rows, outlier_fraction=p, **options))

    np.testing.assert_allclose(law(48, 0.3), (10 - 1) / (0.01 * np.sqrt(0.3 / 48)), rtol=1e-5)
    assert law(48, 0.3) < law(48, 0.1) < law(96, 0.1) < law(96, 0.0) == np.inf


@pytest.mark.slow
def test_law_of_exit_is_right_in_order_of_magnitude():
    p, scale, eta = 0.3, 0.1, 0.01
    problem = trials(num_rows=48, dim=60, sparsity=2, outlier_fraction=p)
    options = {"depth": 2, "scale": scale, "step_size": eta}
    law = theory.predicted_exit(problem.theta_D[0], num_rows=48, outlier_fraction=p, **options)
    error_R, steps_R = errors(problem, num_steps=16000, record_every=20, **options)
    ratio = float(jnp.nanmedian(theory.exit_time(error_R, steps_R)) / law)
    assert 0.3 < ratio < 3
    entry = theory.entry_time(error_R, steps_R, threshold=0.5)
    stayed = theory.exit_time(error_R, steps_R) / entry
    assert float(jnp.nanmedian(stayed)) > 2


def test_times_from_a_record():
    steps_R = jnp.array([0, 5, 10, 15, 20])
    nan, inf = jnp.nan, jnp.inf
    error_R = jnp.array(
        [
            [1.0, 0.4, 0.1, 0.2, 0.9],  # enters, leaves
            [1.0, 0.6, 0.4, 0.1, 0.1],  # stays
            [1.0, 0.9, 0.8, 0.9, 1.5],  # never
            [1.0, 0.4, 0.1, nan, nan],  # diverges
            [0.1, 0.2, 0.6, 0.1, 0.7],  # is inside at once, returns
        ]
    )
    entry = theory.entry_time(error_R, steps_R, threshold=0.5)
    np.testing.assert_array_equal(entry, [5, 10, inf, 5, 0])
    leave = theory.exit_time(error_R, steps_R, threshold=0.5)
    np.testing.assert_array_equal(leave, [20, inf, nan, 15, 10])
    np.testing.assert_array_equal(theory.entry_time(error_R[0], steps_R, threshold=0.15), 10)
    np.testing.assert_array_equal(jax.vmap(theory.exit_time, (0, None))(error_R, steps_R), leave)


def test_gradient_flow_conserves_imbalance():
    with jax.enable_x64(True):
        problem = problems.sample_regression(
            jax.random.key(0), num_rows=50, dim=10, sparsity=2, dtype=jnp.float64
        )
        w_ND = models.init_diagonal(
            jax.random.key(1), depth=3, dim=10, scale=0.3, scheme="gaussian", dtype=jnp.float64
        )
        before = theory.imbalance(w_ND)
        square_ND = w_ND**2
        np.testing.assert_allclose(
            before, jnp.abs(square_ND[:, None] - square_ND[None]).max(), rtol=1e-12
        )

        def change(eta):
            state, _ = method.run(
                w_ND, problem, step_size=eta, num_steps=round(3 / eta), record_every=300
            )
            assert jnp.abs(state.weights - w_ND).max() > 0.1  # it did move
            return float(jnp.abs(theory.imbalance(state.weights) - before))

        coarse, fine = change(1e-2), change(1e-3)
        assert 1e-6 < coarse < 0.05 * before
        assert 5 < coarse / fine < 20  # O(eta)


def test_push_at_the_start():
    """By the law of large numbers `on` and `off` go down as 1 / sqrt(M)."""
    push = {}
    for num_rows in (400, 40_000):
        problem = problems.sample_regression(
            jax.random.key(2), num_rows=num_rows, dim=20, sparsity=3, outlier_scale=1e4
        )
        push[num_rows] = theory.initial_push(problem, outlier_fraction=0.1)
    few, many = push[400], push[40_000]
    np.testing.assert_allclose(many.push_D, many.rate_D, atol=5 * theory.noise_rate(40_000))
    assert many.on < 0.03 < few.on < 0.3
    assert many.off < 0.03 < few.off < 0.3
    wanted = np.abs(np.asarray(few.push_D)[np.asarray(problem.theta_D) == 0]).max()
    np.testing.assert_allclose(few.off, wanted / (0.9 * np.sqrt(2 / np.pi)), rtol=1e-5)


def test_noise_off_the_support():
    problem = trials(num_trials=200)
    push_D = np.asarray(jax.jit(jax.vmap(theory.initial_push))(problem).push_D)
    spread = push_D[np.asarray(problem.theta_D) == 0].std()
    np.testing.assert_allclose(spread, theory.noise_rate(200), rtol=0.05)
    np.testing.assert_allclose(theory.noise_rate(200, fraction=0.5), 0.05)


@pytest.mark.parametrize("sparsity", [1, 2, 3])
def test_isometry_on_a_support(sparsity):
    """No direction beats them, and a fine search comes near."""
    x_MD = jax.random.normal(jax.random.key(3), (12, 5))
    supports = theory.sample_supports(jax.random.key(4), num_supports=3, dim=5, sparsity=sparsity)
    low_S, high_S = theory.l1_isometry(x_MD, supports)
    x_MD = np.asarray(x_MD)
    v_Vk = np.random.default_rng(5).normal(size=(200_000, sparsity))
    v_Vk /= np.linalg.norm(v_Vk, axis=1, keepdims=True)
    for support, low, high in zip(*map(np.asarray, (supports, low_S, high_S)), strict=True):
        value_V = np.abs(v_Vk @ x_MD[:, support].T).mean(1) / np.sqrt(2 / np.pi)
        assert low * (1 - 1e-5) <= value_V.min() <= low * 1.01
        assert high * 0.99 <= value_V.max() <= high * (1 + 1e-5)


def test_isometry_improves_with_rows_and_sees_dependence():
    x_MD = jax.random.normal(jax.random.key(6), (400, 6))
    every = jnp.array(list(itertools.combinations(range(6), 2)))
    defect = {}
    for num_rows in (25, 400):
        low_S, high_S = theory.l1_isometry(x_MD[:num_rows], every)
        defect[num_rows] = max(float(high_S.max()) - 1, 1 - float(low_S.min()))
    assert defect[400] < 0.15 < defect[25] < 0.8
    twice_MD = x_MD[:25].at[:, 1].set(x_MD[:25, 0])
    low_S, _ = theory.l1_isometry(twice_MD, jnp.array([[0, 1]]))
    assert low_S[0] < 1e-6


def test_wrong_requests():
    x_MD = jnp.ones((40, 10))
    with pytest.raises(ValueError, match="need 1462240 vertices, more than max_vertices=200000"):
        theory.l1_isometry(x_MD, jnp.arange(5)[None])
    with pytest.raises(ValueError, match="supports of 5 coordinates, expected 1 to the 2 rows"):
        theory.l1_isometry(x_MD[:2], jnp.arange(5)[None])
    with pytest.raises(ValueError, match="sparsity=11, expected 1 to dim=10"):
        theory.sample_supports(jax.random.key(0), num_supports=1, dim=10, sparsity=11)
    with pytest.raises(ValueError, match="depth=0"):
        theory.growth_time(1.0, 1.0, depth=0, scale=0.1, step_size=0.1)


def test_importing_it_leaves_scikit_learn_alone():
    look = (
        "import sys, robust_depth.theory, robust_depth.baselines\n"
        "assert 'sklearn' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", look], check=True, timeout=120)

"""The method against a numpy loop, its derivative against finite differences, its claims."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

from robust_depth import method, models
from robust_depth.problems import Problem, sample_matrix_sensing, sample_regression
from robust_depth.problems import sample_relu_teacher as sample_relu

KEY = jax.random.key(1)
SIZES = {"num_rows": 24, "dim": 30, "sparsity": 2}
PROBLEM = sample_regression(KEY, **SIZES)


def numpy_run(w_ND, problem, etas):
    """Plain loop in float64, and the losses before each step."""
    x_MD, y_M = (np.asarray(part, "float64") for part in problem[:2])
    w_ND, losses = np.asarray(w_ND, "float64"), []
    for eta in etas:
        residual_M = x_MD @ w_ND.prod(0) - y_M
        losses.append(np.abs(residual_M).mean())
        push_D = x_MD.T @ np.sign(residual_M) / len(y_M)
        slope = [np.delete(w_ND, i, 0).prod(0) * push_D for i in range(len(w_ND))]
        w_ND = w_ND - eta * np.array(slope)
    return w_ND, np.array(losses)


SCHEDULES = {
    "a number": (0.01, np.full(60, 0.01)),
    "constant": (method.constant(0.02), np.full(60, 0.02)),
    "geometric": (method.geometric(0.05, 0.9), 0.05 * 0.9 ** np.arange(60)),
    "inverse_sqrt": (method.inverse_sqrt(0.05), 0.05 / np.sqrt(1 + np.arange(60))),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("depth", [1, 3])
def test_it_is_the_plain_loop(depth, schedule):
    step_size, etas = SCHEDULES[schedule]
    with jax.enable_x64(True):
        problem = jax.tree.map(lambda x: jnp.asarray(x, "float64"), PROBLEM)
        w_ND = models.init_diagonal(KEY, depth=depth, dim=30, scale=0.3, dtype="float64")
        state, info_R = method.run(w_ND, problem, step_size=step_size, num_steps=60, record_every=3)
    wanted_ND, losses = numpy_run(w_ND, problem, etas)
    np.testing.assert_allclose(state.weights, wanted_ND, rtol=1e-9)
    np.testing.assert_allclose(info_R.loss, losses[::3], rtol=1e-9)
    np.testing.assert_allclose(info_R.step_size, etas[::3], rtol=1e-9)
    assert state.step == 60
    assert state.best_loss == pytest.approx(losses.min(), rel=1e-9)
    at = int(losses.argmin())
    np.testing.assert_allclose(
        state.best_weights, numpy_run(w_ND, problem, etas[:at])[0], rtol=1e-9
    )


def test_polyak_steps_close_in_on_the_minimum():
    clean = sample_regression(KEY, num_rows=60, dim=20, sparsity=3, outlier_fraction=0.0)
    w_ND = models.init_diagonal(KEY, depth=1, dim=20)
    state, info_R = method.run(w_ND, clean, step_size=method.polyak(0.0), num_steps=400)
    wanted_R = np.asarray(info_R.loss) / np.asarray(info_R.norm) ** 2
    np.testing.assert_allclose(info_R.step_size, wanted_R, rtol=1e-4)
    assert method.relative_error(state.best_weights, clean) < 1e-3


@pytest.mark.parametrize("name", ["diagonal", "matrix", "relu"])
def test_the_slope_is_that_of_the_loss(name):
    """Away from kinks, in a random direction."""
    with jax.enable_x64(True):
        if name == "diagonal":
            model, problem = method.DIAGONAL, sample_regression(KEY, **SIZES, dtype="float64")
            weights = models.init_diagonal(KEY, depth=3, dim=30, scheme="gaussian", scale=1.0)
        elif name == "matrix":
            sizes = {"num_rows": 20, "dim": 4, "rank": 1}
            model, problem = method.MATRIX, sample_matrix_sensing(KEY, **sizes, dtype="float64")
            weights = models.init_matrix(KEY, depth=3, dim=4, scale=1.0, scheme="gaussian")
        else:
            sizes = {"num_rows": 20, "dim": 4, "width": 6}
            model, problem = method.RELU, sample_relu(KEY, **sizes, dtype="float64")
            weights = models.init_relu(KEY, depth=3, dim=4, width=5)
        weights = jax.tree.map(lambda w: w.astype("float64"), weights)
        rng = np.random.default_rng(0)
        along = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape)), weights)
        loss = jax.jit(functools.partial(method.l1_loss, model=model))
        slope = jax.jit(jax.grad(loss))(weights, problem)
        moved = [
            float(loss(jax.tree.map(lambda w, d, h=h: w + h * d, weights, along), problem))
            for h in (1e-7, -1e-7)
        ]
        products = jax.tree.map(lambda g, d: float((g * d).sum()), slope, along)
    inner = sum(jax.tree.leaves(products))
    np.testing.assert_allclose(inner, (moved[0] - moved[1]) / 2e-7, rtol=1e-5)


def test_rows_that_fit_do_not_push():
    problem = Problem(jnp.eye(2), jnp.array([1.0, 5.0]), jnp.ones(2))
    slope_ND = jax.grad(method.l1_loss)(jnp.ones((1, 2)), problem)
    np.testing.assert_array_equal(slope_ND, [[0.0, -0.5]])


def test_optax_takes_the_loss():
    """Plain SGD on it is the method."""
    w_ND = models.init_diagonal(KEY, depth=3, dim=30, scale=0.3)
    tx = optax.sgd(0.01)

    def update(carry, _):
        w_ND, opt_state = carry
        updates, opt_state = tx.update(jax.grad(method.l1_loss)(w_ND, PROBLEM), opt_state)
        return (optax.apply_updates(w_ND, updates), opt_state), None

    (by_optax_ND, _), _ = jax.jit(
        lambda w_ND: jax.lax.scan(update, (w_ND, tx.init(w_ND)), length=50)
    )(w_ND)
    state, _ = method.run(w_ND, PROBLEM, step_size=0.01, num_steps=50)
    np.testing.assert_allclose(state.weights, by_optax_ND, rtol=1e-4, atol=1e-6)


def test_a_run_can_be_cut():
    w_ND = models.init_diagonal(KEY, depth=2, dim=30, scale=0.1)
    eta = method.inverse_sqrt(0.1)
    whole, _ = method.run(w_ND, PROBLEM, step_size=eta, num_steps=40)
    half, _ = method.run(w_ND, PROBLEM, step_size=eta, num_steps=20)
    rest, _ = method.run(half, PROBLEM, step_size=eta, num_steps=20)
    jax.tree.map(np.testing.assert_array_equal, rest, whole)


def test_mini_batches_are_rows_drawn_by_step():
    w_ND = models.init_diagonal(KEY, depth=2, dim=30, scale=0.5)
    options = {"step_size": 0.05, "batch": 5, "key": jax.random.key(7)}
    state, _ = method.step(method.init(w_ND), PROBLEM, **options)
    row_B = jax.random.permutation(jax.random.fold_in(jax.random.key(7), 0), 24)[:5]
    part = PROBLEM._replace(x_MD=PROBLEM.x_MD[row_B], y_M=PROBLEM.y_M[row_B])
    wanted, _ = method.step(method.init(w_ND), part, step_size=0.05)
    np.testing.assert_allclose(state.weights, wanted.weights, rtol=1e-6)
    later, _ = method.step(state._replace(step=jnp.int32(9)), PROBLEM, **options)
    other, _ = method.step(state, PROBLEM, **options)
    assert np.abs(later.weights - other.weights).max() > 1e-4
    run, _ = method.run(w_ND, PROBLEM, num_steps=2, **options)
    np.testing.assert_allclose(run.weights, other.weights, rtol=1e-6)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", ["diagonal", "matrix"])
def test_rows_spread_over_devices(name, check_vma):
    if name == "diagonal":
        model, problem = method.DIAGONAL, PROBLEM
        weights = models.init_diagonal(KEY, depth=3, dim=30, scale=0.5)
    else:
        model, problem = method.MATRIX, sample_matrix_sensing(KEY, num_rows=24, dim=4, rank=1)
        weights = models.init_matrix(KEY, depth=3, dim=4, scale=0.5)
    options = {"step_size": 0.01, "num_steps": 20, "record_every": 5, "model": model}
    mesh = Mesh(np.array(jax.devices()[:4]), ("rows",))
    rows, everywhere = PartitionSpec("rows"), PartitionSpec()
    spread = jax.shard_map(
        lambda weights, problem: method.run(weights, problem, axis_name="rows", **options),
        mesh=mesh,
        in_specs=(everywhere, Problem(rows, rows, everywhere)),
        out_specs=everywhere,
        check_vma=check_vma,
    )
    found, wanted = jax.jit(spread)(weights, problem), method.run(weights, problem, **options)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), found, wanted)


def test_divergence_is_reported_with_step_and_norm():
    w_ND = models.init_diagonal(KEY, depth=4, dim=30, scale=1.0)
    state, info_R = method.run(w_ND, PROBLEM, step_size=30.0, num_steps=40, record_every=4)
    text = method.diverged(info_R, record_every=4)
    assert not np.isfinite(state.weights).all()
    first = 4 * int(np.argmax(~np.isfinite(info_R.loss)))
    assert f"by step {first}: at step {first - 4} the sub-gradient had norm" in text
    assert "step size of 30;" in text
    _, fine_R = method.run(w_ND, PROBLEM, step_size=0.01, num_steps=40, record_every=4)
    assert method.diverged(fine_R) is None


def test_the_error_is_that_of_the_truth():
    w_ND = models.balanced_solution(PROBLEM.theta_D, 3)
    assert method.relative_error(w_ND, PROBLEM) < 1e-6
    off_ND = w_ND.at[0].multiply(1.5)
    assert method.relative_error(off_ND, PROBLEM) == pytest.approx(0.5, rel=1e-5)
    network = sample_relu(KEY, num_rows=5, dim=3, width=2)
    parts = models.init_relu(KEY, depth=2, dim=3, width=2)
    assert np.isnan(method.relative_error(parts, network, model=method.RELU))


def test_state_keeps_its_types():
    for dtype in ("float32", "bfloat16"):
        problem = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), PROBLEM)
        before = method.init(models.init_diagonal(KEY, depth=2, dim=30, dtype=dtype))
        for eta in (0.1, method.inverse_sqrt(0.1), method.geometric(0.1, 0.9), method.polyak(0.0)):
            after, _ = jax.eval_shape(
                functools.partial(method.step, step_size=eta), before, problem
            )
            assert jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), after) == jax.tree.map(
                lambda x: (x.shape, x.dtype, x.weak_type), jax.eval_shape(lambda s: s, before)
            )


def test_one_program_for_all_step_sizes():
    w_ND = models.init_diagonal(KEY, depth=2, dim=30)
    run = lambda eta: method.run(w_ND, PROBLEM, step_size=method.constant(eta), num_steps=2)  # noqa: E731
    run(jnp.float32(0.1))
    traced = method.run._cache_size()
    run(jnp.float32(0.2))
    assert method.run._cache_size() == traced


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_steps": 10, "record_every": 3}, "record_every=3 and num_steps=10: expected"),
        ({"num_steps": 10, "record_every": 0}, "record_every=0"),
        ({"num_steps": 4, "batch": 3}, "batch and key go together"),
        ({"num_steps": 4, "batch": 25, "key": KEY}, "batch=25, expected 1 to the 24 rows"),
    ],
)
def test_wrong_requests(changes, words):
    w_ND = models.init_diagonal(KEY, depth=2, dim=30)
    with pytest.raises(ValueError, match=words):
        method.run(w_ND, PROBLEM, step_size=0.1, **changes)


# What the paper claims ---------------------------------------------------------------------------


@pytest.mark.parametrize("truth", ["nonnegative", "signed"])
def test_one_layer_fails_where_deeper_ones_recover(truth):
    """Facts: D = 60, M = 48, k = 2, 8000 steps; five trials each."""

    def trial(key, depth):
        key_problem, key_start = jax.random.split(key)
        problem = sample_regression(key_problem, num_rows=48, dim=60, sparsity=2, truth=truth)
        w_ND = models.init_diagonal(key_start, depth=depth, dim=60)
        state, _ = method.run(w_ND, problem, step_size=0.01, num_steps=8000, record_every=8000)
        return method.relative_error(state.weights, problem)

    keys = jax.random.split(jax.random.key(5), 5)
    for depth in (1, 2, 4):
        error_T = jax.vmap(functools.partial(trial, depth=depth))(keys)
        assert (error_T > 0.5).all() if depth == 1 else (error_T < 0.05).all(), (depth, error_T)


def test_matrices_are_recovered_by_three_factors_and_not_by_one():
    problem = sample_matrix_sensing(jax.random.key(0), num_rows=80, dim=10, rank=1)
    options = {"step_size": 0.01, "num_steps": 10_000, "record_every": 200, "model": method.MATRIX}
    errors = {}
    for depth, scale in ((1, 0.0), (3, 0.03)):
        start = models.init_matrix(KEY, depth=depth, dim=10, scale=scale)
        state, _ = method.run(start, problem, **options)
        errors[depth] = method.relative_error(state.best_weights, problem, model=method.MATRIX)
    assert errors[1] > 0.5
    assert errors[3] < 0.05

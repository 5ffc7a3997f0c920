"""Public functions of arrays under strict promotion, and with x64 on: types follow the inputs.

All are traced; a few of every kind run under jit, vmap and scan too.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asserts import assert_trees_close

from robust_depth import box, flatness, lower_bounds, method, models, problems, sweep, theory
from robust_depth.problems import NetworkProblem, Problem

MODULES = (box, flatness, lower_bounds, method, models, problems, sweep, theory)
RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
M, D, N = 8, 6, 3


def array(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


W_ND, THETA_D, RADIUS_G = array(N, D), array(D), jnp.asarray([0.1, 0.2], jnp.float32)
PROBLEM = Problem(array(M, D), array(M), THETA_D)
SQUARE, W_Nnn = Problem(array(M, 9), array(M), array(9)), array(N, 3, 3)
NETWORK = NetworkProblem(array(M, 4), array(M), array(2, 4), array(2))
LAYERS = [{"w": array(4, 5), "b": array(5)}, {"w": array(5, 1), "b": array(1)}]
LOW_D, HIGH_D, HALF = -jnp.abs(THETA_D), jnp.abs(THETA_D) + 1, jnp.float32(0.5)
ERROR_TR, STEP_R = jnp.abs(array(4, 5)), jnp.arange(5, dtype=jnp.int32)
SIZES = {"num_rows": M, "dim": D, "sparsity": 2}
START = {"scale": 0.1, "step_size": 0.01}
GRID = sweep.Grid(
    **SIZES,
    depths=(1, 3),
    scales=(None, 0.2),
    fractions=(0.0, 0.2),
    truth="signed",
    num_steps=4,
    record_every=2,
)
RELU_OPTIONS = {"model": method.RELU, "radius": 0.1}


def step(weights, problem, step_size=0.1, **options):
    return method.step(method.init(weights), problem, step_size=step_size, **options)


def run(weights, problem, step_size=0.1, **options):
    return method.run(weights, problem, step_size=step_size, num_steps=4, record_every=2, **options)


def part(function, *args, **options):
    return functools.partial(function, *args, **options)


# name -> (function of arrays, the arrays); before a comma the name of what is called
SAMPLERS = {
    **{
        f"sample_regression, {kind}": (
            part(problems.sample_regression, **SIZES, outlier_kind=kind, truth="signed"),
            (KEY,),
        )
        for kind in problems.OUTLIERS
    },
    "sample_regression, traced": (
        lambda key, p: problems.sample_regression(
            key, **SIZES, outlier_fraction=p, noise_scale=p, magnitude=(p, 2 * p)
        ),
        (KEY, HALF),
    ),
    "sample_matrix_sensing": (
        part(problems.sample_matrix_sensing, num_rows=M, dim=3, rank=1, positive=True),
        (KEY,),
    ),
    "sample_relu_teacher": (
        part(problems.sample_relu_teacher, num_rows=M, dim=4, width=5, num_test=2),
        (KEY,),
    ),
    **{
        f"init_diagonal, {scheme}": (
            part(models.init_diagonal, depth=N, dim=D, scheme=scheme),
            (KEY,),
        )
        for scheme in models.SCHEMES
    },
    **{
        f"init_matrix, {scheme}": (
            part(models.init_matrix, depth=N, dim=3, scale=0.1, scheme=scheme),
            (KEY,),
        )
        for scheme in ("zero_first", "orthogonal", "gaussian")
    },
    "init_relu": (part(models.init_relu, depth=N, dim=4, width=5), (KEY,)),
    "sample_supports": (part(theory.sample_supports, num_supports=2, dim=D, sparsity=2), (KEY,)),
    "noise_rate": (lambda p: theory.noise_rate(M, fraction=p), (HALF,)),
    "growth_time": (
        part(theory.growth_time, depth=N, **START),
        (jnp.abs(THETA_D), jnp.abs(THETA_D)),
    ),
    "trial_keys": (part(sweep.trial_keys, start=1, stop=3), (KEY,)),
    "trial_problem": (lambda key, p: sweep.trial_problem(key, GRID, p), (KEY, HALF)),
    "trial_start": (lambda key: sweep.trial_start(key, GRID, GRID.settings[-1]), (KEY,)),
    "run_trials": (part(sweep.run_trials, grid=GRID), (jax.random.split(KEY),)),
    "run_trials, schedule": (
        lambda keys_T, eta: sweep.run_trials(
            keys_T, GRID, step_size=method.geometric(eta, 0.9), together=2
        ),
        (jax.random.split(KEY), HALF),
    ),
}
# Whose results have the type of the arrays.
FOLLOWERS = {
    "product": (models.product, (W_ND,)),
    "product, gradient": (jax.grad(lambda w_ND: models.product(w_ND).sum()), (W_ND,)),
    "leave_one_out": (models.leave_one_out, (W_ND,)),
    "predict_diagonal": (models.predict_diagonal, (W_ND, PROBLEM.x_MD)),
    "balanced_solution": (lambda theta_D: models.balanced_solution(theta_D, N), (THETA_D,)),
    "unbalanced_solution": (lambda theta_D: models.unbalanced_solution(theta_D, N), (THETA_D,)),
    "matrix_product": (models.matrix_product, (W_Nnn,)),
    "predict_matrix": (models.predict_matrix, (W_Nnn, SQUARE.x_MD)),
    "predict_relu": (models.predict_relu, (LAYERS, NETWORK.x_MD)),
    "absolute": (method.absolute, (THETA_D,)),
    "l1_loss, gradient": (jax.value_and_grad(method.l1_loss), (W_ND, PROBLEM)),
    "relative_error": (method.relative_error, (W_ND, PROBLEM)),
    "relative_error, relu": (part(method.relative_error, model=method.RELU), (LAYERS, NETWORK)),
    "init": (method.init, (W_ND,)),
    "step": (step, (W_ND, PROBLEM)),
    "step, batch": (
        lambda w_ND, problem: step(w_ND, problem, batch=3, key=KEY),
        (W_ND, PROBLEM),
    ),
    "step, relu": (part(step, model=method.RELU), (LAYERS, NETWORK)),
    "constant": (lambda w, p, eta: step(w, p, method.constant(eta)), (W_ND, PROBLEM, HALF)),
    "geometric": (lambda w, p, eta: step(w, p, method.geometric(eta, eta)), (W_ND, PROBLEM, HALF)),
    "inverse_sqrt": (lambda w, p, eta: step(w, p, method.inverse_sqrt(eta)), (W_ND, PROBLEM, HALF)),
    "polyak": (lambda w, p, least: step(w, p, method.polyak(least)), (W_ND, PROBLEM, HALF)),
    "run": (run, (W_ND, PROBLEM)),
    "run, matrix": (part(run, step_size=method.polyak(0.0), model=method.MATRIX), (W_Nnn, SQUARE)),
    "run, relu": (
        part(run, step_size=method.inverse_sqrt(0.1), model=method.RELU),
        (LAYERS, NETWORK),
    ),
    "signal_rate": (part(theory.signal_rate, outlier_fraction=0.1), (THETA_D,)),
    "predicted_entry": (part(theory.predicted_entry, depth=N, **START), (THETA_D,)),
    "predicted_entry, two layers": (part(theory.predicted_entry, depth=2, **START), (THETA_D,)),
    "predicted_exit": (
        part(theory.predicted_exit, num_rows=M, depth=N, outlier_fraction=0.1, **START),
        (THETA_D,),
    ),
    "entry_time": (theory.entry_time, (ERROR_TR, STEP_R)),
    "exit_time": (theory.exit_time, (ERROR_TR, STEP_R)),
    "imbalance": (theory.imbalance, (W_ND,)),
    "initial_push": (part(theory.initial_push, outlier_fraction=0.1), (PROBLEM,)),
    "l1_isometry": (theory.l1_isometry, (PROBLEM.x_MD, jnp.asarray([[0, 1], [2, 4]], jnp.int32))),
    "reachable_box": (flatness.reachable_box, (W_ND, HALF)),
    "flatness": (part(flatness.flatness, max_steps=80), (W_ND, PROBLEM, HALF)),
    "flatness_curve": (flatness.flatness_curve, (W_ND, PROBLEM, RADIUS_G)),
    "largest_radius": (
        lambda w, p, drop: flatness.largest_radius(w, p, drop=drop, num_halvings=3),
        (W_ND, PROBLEM, HALF),
    ),
    "fit_slope": (flatness.fit_slope, (RADIUS_G, RADIUS_G)),
    "box_minimum": (box.box_minimum, (PROBLEM, LOW_D, HIGH_D)),
    "box_minimum, warm": (
        lambda problem, low_D, high_D, theta_D, dual_M: box.box_minimum(
            problem, low_D, high_D, center_D=theta_D, start=(theta_D, dual_M), max_steps=80
        ),
        (PROBLEM, LOW_D, HIGH_D, THETA_D, PROBLEM.y_M),
    ),
    "sampled_lower_bound": (
        lambda *arrays: lower_bounds.sampled_lower_bound(
            KEY, *arrays, num_samples=3, **RELU_OPTIONS
        ),
        (LAYERS, NETWORK),
    ),
    "descent_lower_bound": (
        lambda *arrays: lower_bounds.descent_lower_bound(
            KEY, *arrays, num_steps=3, num_starts=2, **RELU_OPTIONS
        ),
        (LAYERS, NETWORK),
    ),
    "best_error_TS": (
        lambda loss, error: sweep.Records(loss, error).best_error_TS(),
        (ERROR_TR[None], ERROR_TR[None]),
    ),
}
ALL = SAMPLERS | FOLLOWERS


def shapes_of(name, arrays, x64):
    """What comes out under strict promotion; of a new function each time."""
    function = ALL[name][0]
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("strict"):
        return jax.eval_shape(jax.jit(lambda *arrays: function(*arrays)), *arrays)


def types(shapes):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), shapes)


def floats(shapes):
    return {x.dtype for x in jax.tree.leaves(shapes) if jnp.issubdtype(x.dtype, jnp.inexact)}


@pytest.mark.parametrize("name", ALL)
def test_strict_promotion_and_x64_change_no_type(name):
    wide, narrow = (shapes_of(name, ALL[name][1], x64) for x64 in (True, False))
    assert types(wide) == types(narrow)
    assert floats(narrow) <= {jnp.dtype("float32")}


@pytest.mark.parametrize("name", FOLLOWERS)
def test_float64_stays_float64(name):
    def widen(x):
        wide = "float64" if jnp.issubdtype(x.dtype, jnp.inexact) else x.dtype
        return jax.ShapeDtypeStruct(x.shape, wide)

    arrays = jax.tree.map(widen, FOLLOWERS[name][1])
    assert floats(shapes_of(name, arrays, True)) == {jnp.dtype("float64")}


RUNNING = (
    "sample_regression, traced",
    "product, gradient",
    "l1_loss, gradient",
    "run",
    "predicted_entry",
    "exit_time",
    "initial_push",
    "reachable_box",
    "flatness",
    "descent_lower_bound",
    "trial_start",
)


@pytest.mark.parametrize("name", RUNNING)
def test_jit_vmap_and_scan(name):
    """One after the other, all at once, and in a loop: the same."""
    function, arrays = ALL[name]

    def other(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(1)
        return x * x.dtype.type(1.25) if jnp.issubdtype(x.dtype, jnp.inexact) else x

    arguments = [arrays, jax.tree.map(other, arrays)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *arguments)
    compiled = jax.jit(function)
    wanted = jax.tree.map(lambda *x: np.stack(x), *[compiled(*args) for args in arguments])
    mapped = jax.jit(jax.vmap(function))(*stacked)
    looped = jax.jit(lambda xs: jax.lax.scan(lambda _, x: (None, function(*x)), None, xs)[1])
    assert_trees_close(mapped, wanted, rtol=1e-4, atol=1e-5)
    assert_trees_close(looped(stacked), wanted, rtol=1e-4, atol=1e-5)


def test_no_public_function_is_missing():
    at_values = {"check_finite", "check_solution", "diverged", "box_minimum_lp"}
    on_the_host = {"init_scale", "success_rate", "memory_bytes"}
    within_flatness = {"equilibrate", "programme_at", "solve"}
    known = {name.split(",")[0] for name in ALL} | at_values | on_the_host | within_flatness
    for module in MODULES:
        public = {
            name
            for name, value in vars(module).items()
            if not name.startswith("_")
            and callable(value)
            and not inspect.isclass(value)
            and getattr(value, "__module__", None) == module.__name__
        }
        assert public
        assert public <= known, module.__name__

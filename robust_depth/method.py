"""The sub-gradient method on the mean absolute residual.

    loss(w) = mean_i |y_i - f(w, x_i)|,    w <- w - eta g,    g a sub-gradient with sign(0) = 0.

`init` and `step` are a pair in the manner of optax: pure, for any model, under jit, vmap, grad and
scan. `l1_loss` is the loss with that derivative, for optimisers of your own. `run` makes many steps
in one program.

Axes: M rows, D coordinates, R records.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from robust_depth import models
from robust_depth.problems import NetworkProblem, Problem

StepSize = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Model(NamedTuple):
    """What is fitted: a hashable pair of functions, so a static argument.

    Attributes:
        predict: (weights, x_MD) -> (M,).
        coefficients: weights -> theta_D, or None where a model has none.
    """

    predict: Callable[[Any, jax.Array], jax.Array]
    coefficients: Callable[[Any], jax.Array] | None = None


DIAGONAL = Model(models.predict_diagonal, models.product)
MATRIX = Model(models.predict_matrix, models.matrix_product)
RELU = Model(models.predict_relu)


class State(NamedTuple):
    """What the next step needs: steps made, weights, and the weights of the smallest loss."""

    step: jax.Array
    weights: Any
    best_weights: Any
    best_loss: jax.Array


class Info(NamedTuple):
    """What is worth looking at, before the update of a step.

    Attributes:
        loss: mean absolute residual, on the rows of this step.
        error: |theta - theta*| / |theta*|; NaN for models without theta.
        norm: Euclidean norm of the sub-gradient.
        step_size: eta of the step.
    """

    loss: jax.Array
    error: jax.Array
    norm: jax.Array
    step_size: jax.Array


# Loss --------------------------------------------------------------------------------------------


@jax.custom_jvp
def absolute(residual: jax.Array) -> jax.Array:
    """|r|, whose derivative at 0 is 0 (that of `jnp.abs` is 1): rows that fit do not push."""
    return jnp.abs(residual)


@absolute.defjvp
def _absolute_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (residual,), (tangent,) = primals, tangents
    return absolute(residual), jnp.sign(residual) * tangent


def l1_loss(
    weights: Any, problem: Problem | NetworkProblem, *, model: Model = DIAGONAL
) -> jax.Array:
    """mean |y - f(w, x)|, differentiable everywhere in the sense of the method.

    Its `jax.grad` for the diagonal network is g_i = (prod_{j != i} w_j) X^T sign(X theta - y) / M.
    Give it to any optax optimiser.
    """
    return absolute(model.predict(weights, problem.x_MD) - problem.y_M).mean()


# Step sizes: (step, loss, norm) -> eta -----------------------------------------------------------


def constant(eta: Any) -> StepSize:
    """eta."""
    return Partial(_constant, eta)


def geometric(eta: Any, rate: Any) -> StepSize:
    """eta * rate^t."""
    return Partial(_geometric, eta, rate)


def inverse_sqrt(eta: Any) -> StepSize:
    """eta / sqrt(t + 1)."""
    return Partial(_inverse_sqrt, eta)


def polyak(smallest_loss: Any) -> StepSize:
    """(loss - smallest_loss) / norm^2, for a loss whose minimum is known."""
    return Partial(_polyak, smallest_loss)


def _constant(eta: Any, step: jax.Array, loss: jax.Array, norm: jax.Array) -> jax.Array:
    return jnp.asarray(eta, loss.dtype)


def _geometric(eta: Any, rate: Any, step: jax.Array, loss: jax.Array, norm: Any) -> jax.Array:
    eta, rate = jnp.asarray(eta, loss.dtype), jnp.asarray(rate, loss.dtype)
    return eta * rate ** step.astype(loss.dtype)


def _inverse_sqrt(eta: Any, step: jax.Array, loss: jax.Array, norm: jax.Array) -> jax.Array:
    return jnp.asarray(eta, loss.dtype) * jax.lax.rsqrt(step.astype(loss.dtype) + 1)


def _polyak(smallest_loss: Any, step: jax.Array, loss: jax.Array, norm: jax.Array) -> jax.Array:
    over = jnp.maximum(loss - jnp.asarray(smallest_loss, loss.dtype), 0)
    return jnp.where(norm > 0, over / jnp.where(norm > 0, norm, 1) ** 2, 0)


# Method ------------------------------------------------------------------------------------------


def init(weights: Any) -> State:
    """The state of a method that begins at `weights`."""
    dtype = jax.tree.leaves(weights)[0].dtype
    return State(jnp.int32(0), weights, weights, jnp.asarray(jnp.inf, dtype))


def step(
    state: State,
    problem: Problem | NetworkProblem,
    *,
    step_size: Any,
    model: Model = DIAGONAL,
    batch: int | None = None,
    key: jax.Array | None = None,
    axis_name: str | None = None,
) -> tuple[State, Info]:
    """One step of the sub-gradient method, all layers at once.

    Args:
        step_size: eta, or one of the schedules above, or your own (step, loss, norm) -> eta.
        batch: rows of a mini-batch, which `fold_in(key, step)` draws without repetition; losses,
            the best one included, are then those of mini-batches.
        key: of the whole run; pass the same one each time.
        axis_name: average over this mapped axis (pmap, shard_map), each device of which holds
            as many rows.
    Raises:
        ValueError: if `batch` and `key` are not given together, or for more rows than there are.
    """
    if (batch is None) != (key is None):
        raise ValueError("batch and key go together: give both, or none")
    if batch is not None:
        num_rows = problem.y_M.shape[0]
        if not 1 <= batch <= num_rows:
            raise ValueError(f"batch={batch}, expected 1 to the {num_rows} rows")
        row_B = jax.random.permutation(jax.random.fold_in(key, state.step), num_rows)[:batch]
        problem = problem._replace(x_MD=problem.x_MD[row_B], y_M=problem.y_M[row_B])

    weights = state.weights
    if axis_name is not None:
        # shard_map sums gradients of what it knows to be replicated, which would make the mean
        # below too large by the number of devices; told that they vary, it does not.
        weights = jax.tree.map(lambda w: jax.lax.pcast(w, axis_name, to="varying"), weights)
    loss, slope = jax.value_and_grad(functools.partial(l1_loss, model=model))(weights, problem)
    if axis_name is not None:
        loss, slope = jax.lax.pmean((loss, slope), axis_name)

    squares = [jnp.vdot(g, g).real for g in jax.tree.leaves(slope)]
    norm = jnp.sqrt(jnp.stack(squares).sum())
    schedule = step_size if callable(step_size) else constant(step_size)
    eta = schedule(state.step, loss, norm)
    info = Info(loss, relative_error(state.weights, problem, model=model), norm, eta)

    better = loss < state.best_loss
    best_weights, best_loss = jax.tree.map(
        lambda new, old: jnp.where(better, new, old),
        (state.weights, loss),
        (state.best_weights, state.best_loss),
    )
    weights = jax.tree.map(lambda w, g: w - eta * g, state.weights, slope)
    return State(state.step + 1, weights, best_weights, best_loss), info


def relative_error(
    weights: Any, problem: Problem | NetworkProblem, *, model: Model = DIAGONAL
) -> jax.Array:
    """|theta - theta*| / |theta*|; NaN where the model or the problem has no theta."""
    if model.coefficients is None or isinstance(problem, NetworkProblem):
        return jnp.full((), jnp.nan, jax.tree.leaves(weights)[0].dtype)
    off_D = model.coefficients(weights) - problem.theta_D
    return jnp.linalg.norm(off_D) / jnp.linalg.norm(problem.theta_D)


@functools.partial(
    jax.jit, static_argnames=["num_steps", "record_every", "model", "batch", "axis_name"]
)
def run(
    weights: Any,
    problem: Problem | NetworkProblem,
    *,
    step_size: Any,
    num_steps: int,
    record_every: int = 1,
    model: Model = DIAGONAL,
    batch: int | None = None,
    key: jax.Array | None = None,
    axis_name: str | None = None,
) -> tuple[State, Info]:
    """`num_steps` steps from `weights`, a State or plain weights, in one program.

    A run that diverges goes on as NaN, which the records show: `diverged` reads them.

    Args:
        record_every: steps between records, which divide `num_steps`.
    Returns:
        The last state, which holds the best weights as well, and `Info` with a leading axis of R
        records: of steps 0, record_every, 2 record_every, ...
    Raises:
        ValueError: if the records do not divide the steps, and as `step`.
    """
    if record_every < 1 or num_steps < 1 or num_steps % record_every:
        raise ValueError(
            f"record_every={record_every} and num_steps={num_steps}: expected a number of steps "
            "that the records divide"
        )
    options = {"step_size": step_size, "model": model, "batch": batch, "key": key}
    one = functools.partial(step, problem=problem, axis_name=axis_name, **options)
    state = weights if isinstance(weights, State) else init(weights)

    def record(state: State, _: None) -> tuple[State, Info]:
        state, info = one(state)
        state = jax.lax.fori_loop(1, record_every, lambda _, state: one(state)[0], state)
        return state, info

    return jax.lax.scan(record, state, length=num_steps // record_every)


def diverged(info_R: Info, *, record_every: int = 1) -> str | None:
    """A sentence on the first record whose loss is not finite, or None. It waits for the device."""
    bad_R = ~jnp.isfinite(info_R.loss)
    if not bad_R.any():
        return None
    at = int(jnp.argmax(bad_R))
    before = max(at - 1, 0)
    return (
        f"the method diverged by step {at * record_every}: at step {before * record_every} the "
        f"sub-gradient had norm {float(info_R.norm[before]):.3g} with a step size of "
        f"{float(info_R.step_size[before]):.3g}; a smaller step size is needed"
    )

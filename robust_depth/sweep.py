"""Many trials of the diagonal network at many settings, in one program.

All settings of a trial, which are depths x starts x outlier fractions, see the same measurement
vectors, so that a step reads X once for all of them: its two products are those of matrices.
Shallower networks are padded with layers that stay at 1. Trials go one after the other, whose X
then stays in the cache of a core, or, on accelerators, many at once.

Axes: T trials, S settings, F fractions, R records, N layers (of the deepest), M rows,
D coordinates.
"""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from robust_depth import models
from robust_depth.arguments import check_choice, check_fraction, check_sizes
from robust_depth.method import constant
from robust_depth.problems import OUTLIERS, TRUTHS, Problem, sample_regression


class Setting(NamedTuple):
    """One column of a sweep: depth N, start alpha, outlier fraction p."""

    depth: int
    scale: float
    fraction: float


class Records(NamedTuple):
    """What a sweep measures, at steps 0, record_every, 2 record_every, ..., num_steps.

    Attributes:
        loss_TSR: mean absolute residual.
        error_TSR: |theta - theta*| / |theta*|.
    """

    loss_TSR: jax.Array
    error_TSR: jax.Array

    def best_error_TS(self) -> jax.Array:
        """The error at the record of the smallest loss: what can be known without the truth."""
        loss_TSR = jnp.where(jnp.isnan(self.loss_TSR), jnp.inf, self.loss_TSR)
        at_TS1 = jnp.argmin(loss_TSR, axis=-1)[..., None]
        return jnp.take_along_axis(self.error_TSR, at_TS1, axis=-1)[..., 0]


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is swept; hashable, so a static argument.

    Attributes:
        depths, scales, fractions: the settings are all their combinations. A scale of None is
            `models.init_scale(depth)`.
        num_rows, dim, sparsity, truth, magnitude, outlier_kind, outlier_scale, noise_scale: as in
            `problems.sample_regression`.
        scheme: as in `models.init_diagonal`.
        num_steps, record_every: steps of each run, and between its records.
    Raises:
        ValueError: for anything that is outside its range.
    """

    num_rows: int = 60
    dim: int = 100
    sparsity: int = 3
    depths: tuple[int, ...] = (1, 2, 3, 4, 5)
    scales: tuple[float | None, ...] = (None,)
    fractions: tuple[float, ...] = (0.1,)
    truth: str = "nonnegative"
    magnitude: tuple[float, float] = (1.0, 1.0)
    outlier_kind: str = "gaussian"
    outlier_scale: float = 10.0
    noise_scale: float = 0.0
    scheme: str = "zero_first"
    num_steps: int = 10_000
    record_every: int = 100
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_sizes(num_rows=self.num_rows, dim=self.dim, sparsity=self.sparsity)
        check_sizes(num_steps=self.num_steps, record_every=self.record_every)
        if self.sparsity > self.dim:
            raise ValueError(f"sparsity={self.sparsity}, expected 1 to dim={self.dim}")
        if self.num_steps % self.record_every:
            raise ValueError(
                f"record_every={self.record_every} does not divide num_steps={self.num_steps}"
            )
        for name in ("depths", "scales", "fractions"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name}={values}, expected one value or more, each once")
        for depth in self.depths:
            check_sizes(depth=depth)
        for fraction in self.fractions:
            check_fraction(fraction)
        check_choice("truth", self.truth, TRUTHS)
        check_choice("outlier_kind", self.outlier_kind, OUTLIERS)
        check_choice("scheme", self.scheme, models.SCHEMES)

    @property
    def settings(self) -> tuple[Setting, ...]:
        return tuple(
            Setting(depth, models.init_scale(depth) if scale is None else scale, fraction)
            for depth, scale, fraction in itertools.product(
                self.depths, self.scales, self.fractions
            )
        )

    @property
    def record_steps(self) -> np.ndarray:
        return np.arange(0, self.num_steps + 1, self.record_every)


def trial_keys(key: jax.Array, start: int, stop: int) -> jax.Array:
    """keys_T of trials start, ..., stop - 1: the same for a trial however they are cut up."""
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(start, stop))


def trial_problem(key: jax.Array, grid: Grid, fraction: Any) -> Problem:
    """The problem that the trial with this key solves."""
    return sample_regression(
        jax.random.fold_in(key, 0),
        num_rows=grid.num_rows,
        dim=grid.dim,
        sparsity=grid.sparsity,
        outlier_fraction=fraction,
        outlier_scale=grid.outlier_scale,
        outlier_kind=grid.outlier_kind,
        noise_scale=grid.noise_scale,
        truth=grid.truth,
        magnitude=grid.magnitude,
        dtype=grid.dtype,
    )


def trial_start(key: jax.Array, grid: Grid, setting: Setting) -> jax.Array:
    """w_ND that the trial with this key starts from."""
    return models.init_diagonal(
        jax.random.fold_in(key, 1),
        depth=setting.depth,
        dim=grid.dim,
        scale=setting.scale,
        scheme=grid.scheme,
        dtype=grid.dtype,
    )


@functools.partial(jax.jit, static_argnames=["grid", "together", "mesh", "axis"])
def run_trials(
    keys_T: jax.Array,
    grid: Grid,
    *,
    step_size: Any = 0.01,
    together: int | None = None,
    mesh: Mesh | None = None,
    axis: str = "data",
) -> Records:
    """Every setting of every trial.

    Args:
        keys_T: one for each trial, from `trial_keys`.
        step_size: eta or a schedule, as in `method.step`; losses and norms come as (S,).
        together: trials in one batch; by default 1 on CPU and 64 elsewhere. Results may differ in
            rounding.
        mesh, axis: spread the trials over the devices along this axis, which divide them.
    Raises:
        ValueError: if the devices do not divide the trials, or `together` is below 1.
    """
    if together is not None and together < 1:
        raise ValueError(f"together={together}, expected at least 1")
    if mesh is not None:
        devices, trials = mesh.shape[axis], keys_T.shape[0]
        if trials % devices:
            raise ValueError(f"{trials} trials do not divide over {devices} devices")
        spread = PartitionSpec(axis)
        inner = functools.partial(_run_trials, grid=grid, together=together)
        return jax.shard_map(
            inner, mesh=mesh, in_specs=(spread, PartitionSpec()), out_specs=spread, check_vma=False
        )(keys_T, step_size)
    return _run_trials(keys_T, step_size, grid=grid, together=together)


def _run_trials(keys_T: jax.Array, step_size: Any, *, grid: Grid, together: int | None) -> Records:
    one = functools.partial(_run_trial, grid=grid, step_size=step_size)
    if together is not None:
        return _map(one, keys_T, together)
    return jax.lax.platform_dependent(
        keys_T,
        cpu=functools.partial(_map, one, together=1),
        default=functools.partial(_map, one, together=64),
    )


def _map(one: Any, keys_T: jax.Array, together: int) -> Records:
    return jax.lax.map(one, keys_T, batch_size=None if together == 1 else together)


def _run_trial(key: jax.Array, *, grid: Grid, step_size: Any) -> Records:
    """`method.run` for all settings at once; loss_SR and error_SR."""
    settings, depth = grid.settings, max(grid.depths)
    fractions_F = jnp.array(grid.fractions, jnp.float32)
    sample = functools.partial(trial_problem, key, grid)
    x_MD, y_FM, theta_D = jax.vmap(sample, out_axes=Problem(None, 0, None))(fractions_F)
    y_SM = y_FM[np.array([grid.fractions.index(s.fraction) for s in settings])]
    padding = [((0, depth - s.depth), (0, 0)) for s in settings]
    start_NSD = jnp.stack(
        [
            jnp.pad(trial_start(key, grid, s), pad, constant_values=1)
            for s, pad in zip(settings, padding, strict=True)
        ],
        axis=1,
    )
    dtype = x_MD.dtype
    moving_NS1 = np.array([[layer < s.depth for s in settings] for layer in range(depth)])[
        ..., None
    ]
    x_DM = jax.lax.optimization_barrier(x_MD.T)  # both layouts: a product then transposes nothing
    schedule = step_size if callable(step_size) else constant(step_size)
    matmul = functools.partial(jnp.matmul, precision="highest")

    def residual(w_NSD: jax.Array) -> jax.Array:
        return matmul(models.product(w_NSD), x_DM) - y_SM

    def step(at: jax.Array, w_NSD: jax.Array) -> jax.Array:
        r_SM = residual(w_NSD)
        push_SD = matmul(jnp.sign(r_SM), x_MD) * jnp.asarray(1 / grid.num_rows, dtype)
        slope_NSD = jnp.where(moving_NS1, models.leave_one_out(w_NSD) * push_SD, 0)
        norm_S = jnp.sqrt((slope_NSD**2).sum((0, 2)))
        eta = schedule(at, jnp.abs(r_SM).mean(1), norm_S)  # what it does not use is not computed
        return w_NSD - jnp.broadcast_to(eta, norm_S.shape)[:, None] * slope_NSD

    def measure(w_NSD: jax.Array) -> tuple[jax.Array, jax.Array]:
        off_SD = models.product(w_NSD) - theta_D
        error_S = jnp.linalg.norm(off_SD, axis=1) / jnp.linalg.norm(theta_D)
        return jnp.abs(residual(w_NSD)).mean(1), error_S

    def record(w_NSD: jax.Array, first: jax.Array) -> tuple[jax.Array, tuple]:
        measured = measure(w_NSD)
        return jax.lax.fori_loop(first, first + grid.record_every, step, w_NSD), measured

    first_R = jnp.asarray(grid.record_steps[:-1], jnp.int32)
    last_NSD, (loss_RS, error_RS) = jax.lax.scan(record, start_NSD, first_R)
    loss_S, error_S = measure(last_NSD)
    return Records(
        jnp.concatenate([loss_RS, loss_S[None]]).T, jnp.concatenate([error_RS, error_S[None]]).T
    )


# Reading the records -----------------------------------------------------------------------------


def success_rate(error_TS: Any, *, threshold: float = 0.05) -> np.ndarray:
    """Share of the trials, 0 to 1, whose error is below the threshold; NaN counts as failure."""
    return np.mean(np.asarray(error_TS) < threshold, axis=0)


def memory_bytes(grid: Grid, *, trials: int, together: int = 1) -> int:
    """Bytes, about, that a call needs: records of all trials, and a few blocks of each batch."""
    item = np.dtype(grid.dtype).itemsize
    num_settings = len(grid.settings)
    records = 2 * trials * num_settings * len(grid.record_steps)
    weights = 4 * max(grid.depths) * num_settings * grid.dim
    batch = 3 * grid.num_rows * grid.dim + 4 * num_settings * grid.num_rows + weights
    return item * (records + together * batch)

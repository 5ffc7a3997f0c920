"""When the method enters the neighbourhood of the truth, when it leaves, and why.

While theta is small next to the truth, the push (1/M) X^T sign(y - X theta) on a coordinate is
about constant: a signal on the support, noise off it. A balanced start of alpha in every layer
then grows by w' = eta c w^(N-1) a step, and the two sizes of c give the times of entry and exit.

Axes: N layers, D coordinates, M rows, k coordinates of a support, S supports, R records.
"""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from robust_depth.arguments import check_sizes
from robust_depth.problems import Problem

ROOT_2_OVER_PI = math.sqrt(2 / math.pi)  # E |z| of a standard normal z


# Laws --------------------------------------------------------------------------------------------


def signal_rate(theta_D: jax.Array, *, outlier_fraction: Any = 0.0) -> jax.Array:
    """c_D, the expected push of clean rows at theta = 0.

        c_j = (1 - p) sqrt(2/pi) theta*_j / ||theta*||

    For x of independent N(0, 1) entries, E[x sign(x . theta*)] = sqrt(2/pi) theta* / ||theta*||.
    Corrupted rows are taken to push nowhere: gross Gaussian outliers of size s add
    p sqrt(2/pi) theta*_j / sqrt(||theta*||^2 + s^2) to that.
    """
    keep = 1 - jnp.asarray(outlier_fraction, theta_D.dtype)
    return keep * ROOT_2_OVER_PI * theta_D / jnp.linalg.norm(theta_D)


def noise_rate(num_rows: int, *, fraction: Any = 1.0) -> jax.Array:
    """sqrt(fraction / M), the standard deviation of the push on a coordinate off the support.

    Args:
        num_rows: M.
        fraction: of the rows that push at random. At theta = 0 all do, and this is exact for
            Gaussian measurements: there the push is N(0, 1/M). Around the truth the signs of
            clean rows change from step to step, and the corrupted rows alone go on: give p.
    """
    return jnp.sqrt(jnp.asarray(fraction, jnp.float32) / num_rows)


def growth_time(
    target: Any, rate: Any, *, depth: int, scale: Any, step_size: Any, dtype: Any = jnp.float32
) -> jax.Array:
    """Steps in which alpha^N, alpha in every layer, grows to `target` under a constant push.

        N  = 2:  ln(target^(1/2) / alpha) / (eta c)
        N != 2:  (alpha^(2-N) - target^((2-N)/N)) / ((N-2) eta c)

    from w' = eta c w^(N-1) up to w = target^(1/N). The second line holds for N = 1 as well, where
    it is (target - alpha) / (eta c): a coordinate that just adds up its push.

    Args:
        target, rate: arrays that broadcast, >= 0; c = 0 takes forever.
        depth, scale, step_size: N, alpha and a constant eta.
    Raises:
        ValueError: for a depth below 1.
    """
    check_sizes(depth=depth)
    target, rate, alpha, eta = (jnp.asarray(v, dtype) for v in (target, rate, scale, step_size))
    if depth == 2:
        total = jnp.log(jnp.sqrt(target) / alpha)
    else:
        total = (alpha ** (2 - depth) - target ** ((2 - depth) / depth)) / (depth - 2)
    moves = rate > 0
    steps = jnp.where(moves, total / (eta * jnp.where(moves, rate, 1)), jnp.inf)
    return jnp.where(target > alpha**depth, steps, 0)  # 0: it is there already


def predicted_entry(
    theta_D: jax.Array,
    *,
    depth: int,
    scale: Any,
    step_size: Any,
    outlier_fraction: Any = 0.0,
) -> jax.Array:
    """Steps to the truth by the law of growth: that of the slowest coordinate of the support.

    It is a law for balanced starts, alpha <= .1 ||theta*||^(1/N), and truths >= 0. Medians of
    10 trials with entries of 1, against `entry_time` with its threshold of .3, at M >= 20 k:
    .92 to 1.08 times the law for N = 2, 1.01 to 1.06 for N = 3, 1.04 to 1.09 for N = 4. At
    M = 10 k the measured time is 1.2 to 1.4 times it, as noise slows one of the coordinates; with
    entries from .5 to 1.5 it is .75 to .8 times it: once large entries are fitted, the rest is
    pushed harder. With N = 1 the error comes down so only where M is many times D.
    """
    size_D = jnp.abs(theta_D)
    rate_D = signal_rate(size_D, outlier_fraction=outlier_fraction)
    steps_D = growth_time(
        size_D, rate_D, depth=depth, scale=scale, step_size=step_size, dtype=theta_D.dtype
    )
    return jnp.where(size_D > 0, steps_D, 0).max()


def predicted_exit(
    theta_D: jax.Array,
    *,
    num_rows: int,
    depth: int,
    scale: Any,
    step_size: Any,
    outlier_fraction: Any,
) -> jax.Array:
    """Steps until a coordinate off the support, pushed by corrupted rows, has outgrown the start.

    The law of growth with c = sqrt(p/M) and the smallest entry of the truth as its target. It is
    rough, right in order of magnitude at best: clean rows push back, the push changes, and its
    largest is several standard deviations. Measured medians (`exit_time`, threshold .5; D = 60
    and 200, M = 15 k to 30 k) are .7 to 2.1 times it for p = .2 and .3, and for p = .1 anything
    from .7 times to never within 30 times the entry.
    """
    size_D = jnp.abs(theta_D)
    target = jnp.where(size_D > 0, size_D, jnp.inf).min()
    rate = noise_rate(num_rows, fraction=outlier_fraction)
    return growth_time(
        target, rate, depth=depth, scale=scale, step_size=step_size, dtype=theta_D.dtype
    )


# Measurements ------------------------------------------------------------------------------------


def entry_time(error_R: jax.Array, steps_R: jax.Array, *, threshold: Any = 0.3) -> jax.Array:
    """Step of the first record below the threshold; infinity if there is none.

    Args:
        error_R: relative errors, `Info.error` of a run; axes before the last are trials.
        steps_R: steps of the records.
        threshold: relative error that counts as having entered. The law is for the whole of
            the slowest entry. At .5 that is half there, and shallow models, which climb
            gradually, are early; below .2 they wait for the overshoot of a constant step size.
    """
    steps_R = jnp.asarray(steps_R, error_R.dtype)
    inside_R = error_R < threshold
    return jnp.where(inside_R.any(-1), steps_R[inside_R.argmax(-1)], jnp.inf)


def exit_time(error_R: jax.Array, steps_R: jax.Array, *, threshold: Any = 0.5) -> jax.Array:
    """Step of the first record above the threshold after entry; infinity for those that stay.

    NaN for runs that never entered. An error that is not finite counts as outside.

    Args: as `entry_time`; the threshold serves for entry and exit.
    """
    steps_R = jnp.asarray(steps_R, error_R.dtype)
    inside_R = error_R < threshold
    entered_R = jax.lax.cumsum(inside_R.astype(jnp.int32), axis=error_R.ndim - 1) > 0
    left_R = entered_R & ~(error_R <= threshold)
    steps = jnp.where(left_R.any(-1), steps_R[left_R.argmax(-1)], jnp.inf)
    return jnp.where(entered_R[..., -1], steps, jnp.nan)


def imbalance(w_ND: jax.Array) -> jax.Array:
    """max over layers i, l and coordinates j of |w_ij^2 - w_lj^2|.

    w_i g_i is the same in every layer, so gradient flow conserves each of these differences, and
    a step of eta changes them by eta^2 (g_i^2 - g_l^2) exactly: by O(eta) in a time t = eta T.
    """
    square_ND = jnp.square(w_ND)
    return (square_ND.max(0) - square_ND.min(0)).max()


# Isometry ----------------------------------------------------------------------------------------


class Push(NamedTuple):
    """The push at theta = 0 against its expectation.

    Attributes:
        push_D: (1/M) X^T sign(y), measured.
        rate_D: `signal_rate`.
        on: ||push - rate|| on the support, over (1 - p) sqrt(2/pi).
        off: largest |push| off the support, over the same.
    """

    push_D: jax.Array
    rate_D: jax.Array
    on: jax.Array
    off: jax.Array


def initial_push(problem: Problem, *, outlier_fraction: Any = 0.0) -> Push:
    """What the first steps of a small start feel: signal where on << 1, quiet where off << on.

    These are the quantities that a sign-restricted isometry would bound over all directions,
    measured exactly in the one direction of the truth.
    """
    num_rows = problem.y_M.shape[0]
    push_D = jnp.matmul(jnp.sign(problem.y_M), problem.x_MD, precision="highest") / num_rows
    rate_D = signal_rate(problem.theta_D, outlier_fraction=outlier_fraction)
    whole = jnp.linalg.norm(rate_D)
    support_D = problem.theta_D != 0
    on = jnp.linalg.norm(jnp.where(support_D, push_D - rate_D, 0)) / whole
    off = jnp.where(support_D, 0, jnp.abs(push_D)).max() / whole
    return Push(push_D, rate_D, on, off)


def sample_supports(key: jax.Array, *, num_supports: int, dim: int, sparsity: int) -> jax.Array:
    """Random supports, (S, k) indices, without repetition in each.

    Raises:
        ValueError: for a sparsity outside 1 to dim.
    """
    if not 1 <= sparsity <= dim:
        raise ValueError(f"sparsity={sparsity}, expected 1 to dim={dim}")
    keys, every_D = jax.random.split(key, num_supports), jnp.arange(dim, dtype=jnp.int32)
    return jax.vmap(lambda key: jax.random.permutation(key, every_D)[:sparsity])(keys)


def l1_isometry(
    x_MD: jax.Array, support_Sk: jax.Array, *, max_vertices: int = 200_000
) -> tuple[jax.Array, jax.Array]:
    """The smallest and the largest ||X v||_1 / (M sqrt(2/pi)) of unit v on each support, (S,) both.

    They are exact for each support. Over all k-sparse v they are exact if all supports are given
    (`itertools.combinations`); otherwise inner bounds: the least is at most `low.min()`, the
    largest at least `high.max()`. Both are 1 in expectation at any fixed v for Gaussian X.

    ||X v||_1 is linear on each cone that the planes x_i . v = 0 cut. A linear function over a norm
    is smallest at an edge of its cone, a v that is orthogonal to k - 1 rows: all are tried. The
    largest is max |X^T u| over the signs u of the cones, and those around the edges are all
    there are.

    Args:
        x_MD: its rows in general position, as continuous distributions give: no k of them
            dependent on the support. Otherwise `high` is an inner bound, and `low` too where the
            columns of a support have rank below k - 1.
        support_Sk: indices, from 1 to M of them.
        max_vertices: most (M choose k - 1) 2^(k - 1) to try, the cost of one support over M k.
    Raises:
        ValueError: if there are more, or for supports with more coordinates than rows.
    """
    num_rows, sparsity = x_MD.shape[0], support_Sk.shape[1]
    if not 1 <= sparsity <= num_rows:
        raise ValueError(f"supports of {sparsity} coordinates, expected 1 to the {num_rows} rows")
    vertices = math.comb(num_rows, sparsity - 1) * 2 ** (sparsity - 1)
    if vertices > max_vertices:
        raise ValueError(
            f"supports of {sparsity} coordinates and {num_rows} rows need {vertices} vertices, "
            f"more than max_vertices={max_vertices}; take fewer rows or coordinates"
        )
    chosen = list(itertools.combinations(range(num_rows), sparsity - 1))
    rows_Vr = jnp.asarray(chosen, jnp.int32).reshape(len(chosen), sparsity - 1)
    signs_Cr = jnp.asarray(list(itertools.product((-1, 1), repeat=sparsity - 1)), x_MD.dtype)
    unit = num_rows * ROOT_2_OVER_PI

    def one(support_k: jax.Array) -> tuple[jax.Array, jax.Array]:
        x_Mk = x_MD[:, support_k]

        def edge(rows_r: jax.Array) -> tuple[jax.Array, jax.Array]:
            q_kk, _ = jnp.linalg.qr(x_Mk[rows_r].T, mode="complete")
            v_k = q_kk[:, -1]  # orthogonal to the chosen rows
            value_M = jnp.matmul(x_Mk, v_k, precision="highest").at[rows_r].set(0)
            rest_k = jnp.matmul(jnp.sign(value_M), x_Mk, precision="highest")
            around_Ck = jnp.matmul(signs_Cr, x_Mk[rows_r], precision="highest")
            length_C = jnp.linalg.norm(rest_k + around_Ck, axis=-1)
            return jnp.abs(value_M).sum(), length_C.max()

        low_V, high_V = jax.vmap(edge)(rows_Vr)
        return low_V.min() / unit, high_V.max() / unit

    return jax.lax.map(one, support_Sk)

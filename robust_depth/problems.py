"""Measurements of which a part is grossly corrupted.

Axes: M rows, D coordinates, I inputs of a network.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robust_depth.arguments import check_choice, check_fraction, check_sizes, known

OUTLIERS = ("gaussian", "sign_flip", "adversarial")
TRUTHS = ("nonnegative", "signed")


class Problem(NamedTuple):
    """y = X theta + s, where s is zero on most rows.

    Attributes:
        x_MD: measurement vectors, one in each row.
        y_M: what was measured.
        theta_D: the truth, known to us and not to a method.
    """

    x_MD: jax.Array
    y_M: jax.Array
    theta_D: jax.Array


class NetworkProblem(NamedTuple):
    """Labels y = f(x) + s of a teacher network f, and clean ones to test on.

    Attributes:
        x_MD, y_M: inputs (M, I) and corrupted labels.
        test_x_MD, test_y_M: further inputs, as many, and their clean labels.
    """

    x_MD: jax.Array
    y_M: jax.Array
    test_x_MD: jax.Array
    test_y_M: jax.Array


def sample_regression(
    key: jax.Array,
    *,
    num_rows: int,
    dim: int,
    sparsity: int,
    outlier_fraction: Any = 0.1,
    outlier_scale: Any = 10.0,
    outlier_kind: str = "gaussian",
    noise_scale: Any = 0.0,
    truth: str = "nonnegative",
    magnitude: Any = (1.0, 1.0),
    dtype: Any = jnp.float32,
) -> Problem:
    """Sparse regression with gross outliers: the setting of the paper's experiments.

    X has independent N(0, 1) entries; the truth has `sparsity` entries that are not zero;
    round(outlier_fraction * num_rows) rows, drawn at random, are corrupted.

    Args:
        num_rows, dim, sparsity: M, D and k.
        outlier_fraction: p, from 0 to less than 1; may be traced, and differ under vmap.
        outlier_scale: c below.
        outlier_kind: what is added to a corrupted row x:
            "gaussian", c times a standard normal number;
            "sign_flip", -c sign(x . theta): always against the measurement;
            "adversarial", c x . v with one k-sparse unit vector v for all rows, off the truth's
            support where it fits: the corrupted rows agree on another vector.
        noise_scale: standard deviation of normal noise on every row.
        truth: "nonnegative" or "signed" entries.
        magnitude: their sizes are uniform between these two.
    Raises:
        ValueError: for sizes that do not fit, unknown kinds, or concrete fractions outside [0, 1).
    """
    check_sizes(num_rows=num_rows, dim=dim, sparsity=sparsity)
    if sparsity > dim:
        raise ValueError(f"sparsity={sparsity}, expected 1 to dim={dim}")
    check_choice("truth", truth, TRUTHS)
    check_fraction(outlier_fraction)
    key_x, key_truth, key_outliers = jax.random.split(key, 3)
    key_support, key_size, key_sign = jax.random.split(key_truth, 3)
    x_MD = jax.random.normal(key_x, (num_rows, dim), dtype)
    order_D = jax.random.permutation(key_support, dim)
    low, high = (jnp.asarray(bound, dtype) for bound in magnitude)
    size_D = low + (high - low) * jax.random.uniform(key_size, (dim,), dtype)
    if truth == "signed":
        size_D *= jax.random.rademacher(key_sign, (dim,), dtype)
    theta_D = jnp.where(order_D < sparsity, size_D, 0)
    other_D = jnp.where((order_D >= sparsity) & (order_D < 2 * sparsity), size_D, 0)
    if dim < 2 * sparsity:  # there is no room off the support
        other_D = jnp.where(order_D < sparsity, -size_D, 0)
    clean_M = _matvec(x_MD, theta_D)
    y_M = _corrupted(
        key_outliers,
        clean_M,
        _matvec(x_MD, other_D / jnp.linalg.norm(other_D)),
        outlier_fraction,
        outlier_scale,
        outlier_kind,
        noise_scale,
    )
    return Problem(x_MD, y_M, theta_D)


def sample_matrix_sensing(
    key: jax.Array,
    *,
    num_rows: int,
    dim: int,
    rank: int,
    outlier_fraction: Any = 0.1,
    outlier_scale: Any = 10.0,
    outlier_kind: str = "gaussian",
    noise_scale: Any = 0.0,
    positive: bool = False,
    dtype: Any = jnp.float32,
) -> Problem:
    """y_i = <A_i, M*> + s_i with Gaussian A_i and M* of low rank and unit Frobenius norm.

    Args:
        dim: n, of the square matrices. The problem has D = n^2 coordinates, row by row.
        rank: of M* = G H^T with Gaussian factors; H = G if `positive`, so that M* is symmetric
            and has no negative eigenvalue.
        outlier_kind: as in `sample_regression`; "adversarial" agrees on another such matrix.
    Raises:
        ValueError: as `sample_regression`.
    """
    check_sizes(num_rows=num_rows, dim=dim, rank=rank)
    if rank > dim:
        raise ValueError(f"rank={rank}, expected 1 to dim={dim}")
    check_fraction(outlier_fraction)
    key_x, key_truth, key_outliers = jax.random.split(key, 3)
    x_MD = jax.random.normal(key_x, (num_rows, dim * dim), dtype)

    def low_rank(key: jax.Array) -> jax.Array:
        left, right = jax.random.normal(key, (2, dim, rank), dtype)
        product = jnp.matmul(left, left.T if positive else right.T, precision="highest")
        return (product / jnp.linalg.norm(product)).reshape(-1)

    theta_D, other_D = (low_rank(key) for key in jax.random.split(key_truth))
    y_M = _corrupted(
        key_outliers,
        _matvec(x_MD, theta_D),
        _matvec(x_MD, other_D),
        outlier_fraction,
        outlier_scale,
        outlier_kind,
        noise_scale,
    )
    return Problem(x_MD, y_M, theta_D)


def sample_relu_teacher(
    key: jax.Array,
    *,
    num_rows: int,
    dim: int,
    width: int,
    num_test: int = 1000,
    outlier_fraction: Any = 0.1,
    outlier_scale: Any = 10.0,
    outlier_kind: str = "gaussian",
    noise_scale: Any = 0.0,
    dtype: Any = jnp.float32,
) -> NetworkProblem:
    """Labels of a random network with one hidden layer, f(x) = a . relu(B x), of variance near 1.

    Inputs are N(0, 1). "adversarial" labels come from a second such network.

    Raises:
        ValueError: as `sample_regression`.
    """
    check_sizes(num_rows=num_rows, dim=dim, width=width, num_test=num_test)
    check_fraction(outlier_fraction)
    key_x, key_test, key_teacher, key_outliers = jax.random.split(key, 4)
    x_MD = jax.random.normal(key_x, (num_rows, dim), dtype)
    test_x_MD = jax.random.normal(key_test, (num_test, dim), dtype)

    def teacher(key: jax.Array, x_MD: jax.Array) -> jax.Array:
        key_b, key_a = jax.random.split(key)
        b_IF = jax.random.normal(key_b, (dim, width), dtype) / jnp.sqrt(jnp.asarray(dim, dtype))
        a_F = jax.random.normal(key_a, (width,), dtype) / jnp.sqrt(jnp.asarray(width / 2, dtype))
        hidden_MF = jax.nn.relu(jnp.matmul(x_MD, b_IF, precision="highest"))
        return _matvec(hidden_MF, a_F)

    key_first, key_second = jax.random.split(key_teacher)
    y_M = _corrupted(
        key_outliers,
        teacher(key_first, x_MD),
        teacher(key_second, x_MD),
        outlier_fraction,
        outlier_scale,
        outlier_kind,
        noise_scale,
    )
    return NetworkProblem(x_MD, y_M, test_x_MD, teacher(key_first, test_x_MD))


def _corrupted(
    key: jax.Array,
    clean_M: jax.Array,
    other_M: jax.Array,
    fraction: Any,
    scale: Any,
    kind: str,
    noise_scale: Any,
) -> jax.Array:
    check_choice("outlier_kind", kind, OUTLIERS)
    key_rows, key_values, key_noise = jax.random.split(key, 3)
    num_rows, dtype = clean_M.shape[0], clean_M.dtype
    # A mask and not an index, so that the fraction may be traced.
    count = jnp.round(jnp.asarray(fraction, jnp.float32) * num_rows).astype(jnp.int32)
    corrupted_M = jax.random.permutation(key_rows, jnp.arange(num_rows, dtype=jnp.int32)) < count
    if kind == "gaussian":
        value_M = jax.random.normal(key_values, (num_rows,), dtype)
    elif kind == "sign_flip":
        value_M = -jnp.sign(clean_M)
    else:
        value_M = other_M
    noise_M = jnp.asarray(noise_scale, dtype) * jax.random.normal(key_noise, (num_rows,), dtype)
    return clean_M + noise_M + jnp.where(corrupted_M, jnp.asarray(scale, dtype) * value_M, 0)


def _matvec(x_MD: jax.Array, theta_D: jax.Array) -> jax.Array:
    return jnp.matmul(x_MD, theta_D, precision="highest")


def check_finite(problem: Problem | NetworkProblem) -> None:
    """ValueError naming the first part of a problem that has a NaN or an infinity, and where.

    For data of your own; it waits for the device, and passes over what a trace does not know.
    """
    for name, part in zip(problem._fields, problem, strict=True):
        bad = ~jnp.isfinite(part)
        if known(bad):
            where = tuple(int(i) for i in np.argwhere(bad)[0])
            raise ValueError(f"{name}{list(where)} is {part[where]}, expected finite numbers")

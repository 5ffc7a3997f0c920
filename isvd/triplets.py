"""What the methods of `svd` share: its result, its plan, and small functions of blocks.

Axes: M rows, N columns, K rank, B block.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class SVD(NamedTuple):
    """A ~= u diag(s) v^H.

    Attributes:
        u_MK, s_K, v_NK: singular vectors and values, largest first. The entry of largest modulus
            of each left vector is positive, so that runs can be compared.
        residual_K: |A^H u - s v| of each triplet (|A v - s u| is at rounding): some singular value
            lies within it of s, the error of s is about its square over the gap to the others,
            and the angle of u and v to the exact ones is about it over the gap. Subspace iteration
            gives |A v - s u|. Below rounding, eps * s[0], it means nothing.
        products: columns that were multiplied, by A or by A^H.
        converged: whether every residual is below tol * s[0].
    """

    u_MK: jax.Array
    s_K: jax.Array
    v_NK: jax.Array
    residual_K: jax.Array
    products: jax.Array
    converged: jax.Array


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is decided before anything is traced."""

    method: str
    rank: int
    block: int  # columns of a product
    kept: int  # triplets that a restart keeps
    narrow: int  # columns of the Krylov basis in its first cycles
    width: int  # and in later ones
    tol: float
    max_products: int
    report: Callable[[Any, Any], None] | None = None

    @property
    def locked(self) -> int:
        """Triplets that are kept when the basis is searched for further copies."""
        return -(-self.rank // self.block) * self.block


def signed(u_MK: jax.Array, v_NK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Turn each pair so that the left entry of largest modulus is real and positive."""
    peak_1K = jnp.take_along_axis(u_MK, jnp.abs(u_MK).argmax(0)[None], axis=0)
    size_1K = jnp.abs(peak_1K)
    turn_1K = jnp.where(size_1K > 0, peak_1K.conj() / jnp.where(size_1K > 0, size_1K, 1), 1)
    return u_MK * turn_1K, v_NK * turn_1K


def positive(x: jax.Array) -> jax.Array:
    return jnp.where((x > 0) & jnp.isfinite(x), x, 1)


def mixed_start(plan: Plan, noise_NB: jax.Array, warm_NB: jax.Array) -> jax.Array:
    """Random columns, of which the first ones are known columns with a little noise in them.

    Singular vectors alone span a space that products do not leave: every residual is 0, whatever
    larger value they miss. With about 10 tol of each vector in them, a missed one keeps residuals
    above `tol` until it is found.
    """
    warm_NB = warm_NB[:, : plan.block].astype(noise_NB.dtype)
    warm_NB /= positive(jnp.linalg.norm(warm_NB, axis=0))
    share = min(10 * max(plan.tol, float(jnp.finfo(noise_NB.dtype).eps)), len(noise_NB) ** -0.5)
    columns = warm_NB.shape[1]
    return noise_NB.at[:, :columns].set(warm_NB + share * noise_NB[:, :columns])


def relative_residual(residual_K: jax.Array, s_K: jax.Array) -> jax.Array:
    """The largest residual over s[0]."""
    return residual_K.max() / positive(s_K[0])


def report_pass(plan: Plan, products: jax.Array, residual_K: jax.Array, s_K: jax.Array) -> None:
    if plan.report is not None:
        jax.debug.callback(plan.report, products, relative_residual(residual_K, s_K))


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")


def thin_svd(x_MN: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """u, s, v^H of a matrix in memory.

    On NVIDIA GPUs by QR iterations: JAX's choice there, Jacobi rotations, leaves a small matrix's
    vectors orthonormal to 3e-5 only (float32, 104 x 104, on an H100; QR iterations to 2e-6).
    """

    def by(algorithm):
        return lambda x: tuple(jax.lax.linalg.svd(x, full_matrices=False, algorithm=algorithm))

    default, qr = jax.lax.linalg.SvdAlgorithm.DEFAULT, jax.lax.linalg.SvdAlgorithm.QR
    return jax.lax.platform_dependent(x_MN, cuda=by(qr), default=by(default))

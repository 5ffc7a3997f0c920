"""What the methods of `svd` share: its result, its plan, and small functions of blocks.

Axes: M rows, N columns, K rank, B block.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from isvd.closures import Product
from isvd.operators import LinearOperator


class SVD(NamedTuple):
    """A ~= u diag(s) v^H.

    Attributes:
        u_MK, s_K, v_NK: singular vectors and values, largest first. The entry of largest modulus
            of each left vector is positive, so that runs can be compared.
        residual_K: |A^H u - s v| of each triplet: some singular value lies within it of s, the
            error of s is about its square over the gap to the others, and the angle of u and v to
            the exact ones is about it over the gap. |A v - s u| is at rounding, up to some
            30 eps * s[0], and is added (by root of squares) where more than 20 K columns were
            multiplied; elsewhere, what is below that may be several times too small. Subspace
            iteration gives |A v - s u|.
        products: columns that were multiplied, by A or by A^H.
        converged: whether every residual is below tol * s[0].
    """

    u_MK: jax.Array
    s_K: jax.Array
    v_NK: jax.Array
    residual_K: jax.Array
    products: jax.Array
    converged: jax.Array

    def leading(self, rank: int) -> "SVD":
        """The first `rank` of these triplets; `products` and `converged` are those of all."""
        return self._replace(
            u_MK=self.u_MK[:, :rank],
            s_K=self.s_K[:rank],
            v_NK=self.v_NK[:, :rank],
            residual_K=self.residual_K[:rank],
        )


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
    """x, or 1 where it is no divisor: zero, infinite or NaN."""
    return jnp.where((x > 0) & jnp.isfinite(x), x, 1)


def power_of_two(x: jax.Array) -> jax.Array:
    """The one next to a positive number: products with it are exact, short of overflow."""
    return jax.lax.reduce_precision(x, int(jnp.finfo(x.dtype).nexp), 0)


def over(op: LinearOperator, scale: jax.Array) -> LinearOperator:
    """A / scale, which divides before a product and after it.

    Of entries of 1e-35, float32 holds few products with those of a unit vector. The first divisor
    is a power of two near the root of `scale`, so that the rest rounds as with one division.
    """
    root = power_of_two(jnp.sqrt(scale))
    forward, backward = (Partial(_over, root, scale / root, x) for x in (op.matmat, op.rmatmat))
    return LinearOperator(forward, backward, op.shape, op.dtype)


def _over(before: jax.Array, after: jax.Array, product: Product, x_NC: jax.Array) -> jax.Array:
    return product(x_NC / before) / after


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
    """Call the user's function, if there is one, also from inside jit."""
    if plan.report is not None:
        jax.debug.callback(plan.report, products, relative_residual(residual_K, s_K))


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b in full precision: GPUs and TPUs have less by default."""
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

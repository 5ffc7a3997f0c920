"""Orthonormal bases of tall blocks, by the quickest way that is safe.

Axes: N rows, B columns.
"""

import jax
import jax.numpy as jnp


def orthonormalize(x_NB: jax.Array, method: str | None = None) -> tuple[jax.Array, jax.Array]:
    """Q, R with x = Q R, Q (N, B) orthonormal to rounding whatever the rank of x, and R (B, B).

    Args:
        method: "householder", the quicker one on CPU and the default there; or "cholesky", which
            is products of matrices only, the default elsewhere: CholeskyQR2, where the block is
            too ill-conditioned for it shifted CholeskyQR3 (Fukaya et al., SISC 42, 2020), and
            where that fails too, Householder. Under `vmap` all three are computed.
    Raises:
        ValueError: if the block has more columns than rows, or for an unknown method.
    """
    if x_NB.shape[1] > x_NB.shape[0]:
        raise ValueError(f"x_NB has shape {x_NB.shape}, expected no more columns than rows")
    if method is None:
        return jax.lax.platform_dependent(x_NB, cpu=_householder, default=_cholesky)
    methods = {"householder": _householder, "cholesky": _cholesky}
    if method not in methods:
        raise ValueError(f"method={method!r}, expected one of {', '.join(methods)}")
    return methods[method](x_NB)


def _householder(x_NB: jax.Array) -> tuple[jax.Array, jax.Array]:
    return tuple(jnp.linalg.qr(x_NB))


@jax.jit  # a factorisation that fails on the way is no error, also where NaN is one by JAX's flag
def _cholesky(x_NB: jax.Array) -> tuple[jax.Array, jax.Array]:
    num_rows, num_columns = x_NB.shape
    # Columns of one size: the condition number is then near the least that scaling can give, and
    # no square overflows or underflows.
    largest = jnp.abs(x_NB).max(0)
    unit_NB = x_NB / jnp.where(largest > 0, largest, 1)
    length = jnp.linalg.norm(unit_NB, axis=0)
    unit_NB = unit_NB / jnp.where(length > 0, length, 1)

    eps = jnp.finfo(x_NB.dtype).eps
    shift = 11 * (num_rows * num_columns + num_columns * (num_columns + 1)) * eps * num_columns

    q_NB, r = _cholesky_pass(unit_NB, 0)
    q_NB, r, safe = _second_pass(q_NB, r)

    def shifted() -> tuple[jax.Array, jax.Array]:
        q_NB, r = _cholesky_pass(unit_NB, shift)
        q_NB, r = _cholesky_pass(q_NB, 0, r)
        q_NB, r, safe = _second_pass(q_NB, r)
        return jax.lax.cond(safe, lambda: (q_NB, r), lambda: _householder(unit_NB))

    q_NB, r = jax.lax.cond(safe, lambda: (q_NB, r), shifted)
    return q_NB, r * (length * largest)


def _cholesky_pass(
    x_NB: jax.Array, shift: float, r: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    return _divide(x_NB, gram(x_NB), shift, r)


def _second_pass(q_NB: jax.Array, r: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Once more, and whether that was enough: it is, if the first pass got near orthonormal."""
    g = gram(q_NB)
    safe = jnp.abs(g - jnp.eye(g.shape[0], dtype=g.dtype)).sum(0).max() < 0.1  # NaN is not
    return *_divide(q_NB, g, 0, r), safe


def _divide(
    x_NB: jax.Array, g: jax.Array, shift: float, r: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    eye = jnp.eye(g.shape[0], dtype=g.dtype)
    upper = jnp.linalg.cholesky(g + jnp.asarray(shift, g.dtype) * eye, upper=True)
    inverse = jax.scipy.linalg.solve_triangular(upper, eye)
    r = upper if r is None else jnp.matmul(upper, r, precision="highest")
    return jnp.matmul(x_NB, inverse, precision="highest"), r


def gram(x_NB: jax.Array) -> jax.Array:
    """x^H x, in full precision: what TF32 or bfloat16 gives is orthonormal to a thousandth."""
    return jnp.matmul(x_NB.conj().T, x_NB, precision="highest")

"""What `verify` and the defects find in operators that are right, wrong, or of extreme size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from isvd import checks, functions, operators


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def test_verify_passes_what_is_right_and_names_what_is_not():
    key = jax.random.key(0)
    checks.verify(operators.dense(random(0, 4, 3)), key)
    checks.verify(operators.dense(np.zeros((3, 2), np.float32)), key)
    a = random(0, 4, 4)
    wrong = functions.from_matmat(Partial(jnp.matmul, a), (4, 4), rmatmat=Partial(jnp.matmul, a))
    with pytest.raises(ValueError, match="rmatmat is not the adjoint"):
        checks.verify(wrong, key)
    with pytest.raises(ValueError, match="A is not linear"):
        checks.verify(functions.from_matmat(jnp.abs, (4, 4), rmatmat=jnp.abs), key)
    for size in (np.nan, np.float32(3e38)):
        a[1, 2] = size
        big = operators.dense(a) @ operators.diagonal(np.full(4, 1e3, "f"))
        with pytest.raises(ValueError, match=r"in rows 1 and columns 2: .* products overflow fl"):
            checks.verify(big, key)


NONLINEAR = {
    "abs": jnp.abs,
    "square": lambda x: x**2,
    "relu": jax.nn.relu,
    "where": lambda x: jnp.where(x > 0, x, 2 * x),
    "norm": lambda x: x / jnp.linalg.norm(x),
    "sort": jnp.sort,
    "offset": lambda x: 2 * x + 1,
}
ADDITIVE = {"conjugate": jnp.conj, "real part": lambda x: x.real.astype(x.dtype)}


@pytest.mark.parametrize("name", list(ADDITIVE))
def test_verify_sees_what_is_linear_over_real_numbers_only(name):
    product = ADDITIVE[name]
    for options in ({}, {"rmatmat": product}):
        op = functions.from_matmat(product, (5, 5), "complex64", **options)
        with pytest.raises(ValueError, match=r"A is not linear: .* c = \(2\+1j\), differ by"):
            checks.verify(op, jax.random.key(0))
    checks.verify(functions.from_matmat(product, (5, 5)), jax.random.key(0))


@pytest.mark.parametrize("name", list(NONLINEAR))
def test_verify_needs_no_adjoint_to_see_what_is_not_linear(name):
    key, product = jax.random.key(0), NONLINEAR[name]
    with pytest.raises(ValueError, match="A is not linear"):
        checks.verify(functions.from_matmat(product, (5, 5)), key)
    with pytest.raises(ValueError, match="A is not linear"):
        checks.verify(functions.from_matmat(product, (5, 5), rmatmat=lambda y: 2 * y), key)


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_verify_of_entries_whose_squares_are_no_numbers(size):
    key, a = jax.random.key(0), np.float32(size) * random(0, 6, 6)
    checks.verify(operators.dense(a), key)
    wrong = functions.from_matmat(lambda x: a @ x, (6, 6), rmatmat=lambda y: a @ y)
    with pytest.raises(ValueError, match="rmatmat is not the adjoint"):
        checks.verify(wrong, key)
    with pytest.raises(ValueError, match="A is not linear"):
        checks.verify(functions.from_matmat(lambda x: jnp.abs(a @ x), (6, 6)), key)

"""Operators of shapes, types and functions that do not fit say what would."""

import operator as signs

import jax
import jax.experimental.sparse
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from operator_cases import draw

from isvd import algebra, checks, functions, operators

SPARSE_33 = scipy.sparse.csr_array(np.eye(3))
A43, A34, A44 = (operators.dense(draw(0, *shape)) for shape in ((4, 3), (3, 4), (4, 4)))
WRONG = {
    "inner sizes": (lambda: A43 @ A43, r"\(4, 3\) and \(4, 3\).*did you mean A @ B.T\?"),
    "sum": (lambda: A43 + A34, r"\(4, 3\) and \(3, 4\) differ; did you mean B.T\?"),
    "block": (lambda: A43 @ np.ones((4, 2)), r"x \(4, 2\).*did you mean A.T @ x\?"),
    "left": (lambda: np.ones((2, 3)) @ A43, r"x \(2, 3\), expected \(4,\) or \(rows, 4\)"),
    "factor": (lambda: np.ones(4) * A44, r"c has shape \(4,\).*diagonal\(d\) @ A"),
    "power of a wide one": (lambda: A34**2, r"A has shape \(3, 4\), expected a square one"),
    "negative power": (lambda: A44**-1, "A \\*\\* n: n=-1, expected at least 0"),
    "polynomial": (lambda: algebra.polynomial(A34, [1.0]), r"\(3, 4\), expected a square one"),
    "no coefficients": (lambda: algebra.polynomial(A44, []), r"coef_Q has shape \(0,\)"),
    "no terms": (lambda: algebra.geometric_sum(A44, 0.5, 0), "num_terms=0, expected at least 1"),
    "hstack": (lambda: algebra.hstack([A43, A34]), r"as many rows each, got shapes \(4, 3\), \(3"),
    "vstack": (lambda: algebra.vstack([A43, A34]), "as many columns each"),
    "rows outside": (lambda: algebra.take_rows(A43, [0, 4]), "index_I has 4, expected 0 to 3"),
    "negative rows": (lambda: algebra.take_rows(A43, [-1]), "index_I has -1, expected 0 to 3"),
    "a mask": (lambda: algebra.take_rows(A43, np.ones(4, bool)), "dtype bool.*flatnonzero"),
    "mean": (
        lambda: algebra.centered(A43, np.ones(4)),
        r"mean_N has shape \(4,\), expected \(3,\)",
    ),
    "vector as matrix": (lambda: operators.dense(np.ones(3)), "expected two axes"),
    "matrix as diagonal": (lambda: operators.diagonal(np.ones((3, 3))), "expected one axis"),
    "ranks": (lambda: operators.low_rank(np.ones((3, 2)), np.ones((3, 1))), r"\(M, K\) and \(N, K"),
    "empty": (lambda: operators.ones(0, 3), r"shape=\(0, 3\): expected"),
    "user's shape": (
        lambda: functions.from_matmat(lambda x: x, (4, 3)),
        r"matmat: expected a function from \(3,\) to \(4,\).*of 3 it gives shape \(3,\)",
    ),
    "user's error": (
        lambda: functions.from_matmat(lambda x: x.nonsense, (4, 3)),
        "with a vector it raises AttributeError",
    ),
    "user's type": (
        lambda: functions.from_matmat(jnp.fft.fft, (4, 4)),
        "matmat gives complex64 for a vector of dtype float32.*pass dtype='complex64'",
    ),
    "type of the user's adjoint": (
        lambda: functions.from_matmat(
            lambda x: 2 * x, (4, 4), rmatmat=lambda y: 2 * y.astype("bfloat16"), block=True
        ),
        "rmatmat gives bfloat16 for a block of dtype float32.*pass dtype='bfloat16'",
    ),
    "a pair for a product": (
        lambda: functions.from_matmat(lambda x: (x, x), (3, 3)),
        "with a vector it gives a tuple; with a block it gives a tuple",
    ),
    "one size": (lambda: functions.from_matmat(lambda x: x, 5), r"shape=5: expected \(rows, col"),
    "half a row": (lambda: functions.from_matmat(lambda x: x, (2.5, 3)), r"shape=\(2.5, 3\): exp"),
    "half a term": (
        lambda: algebra.geometric_sum(A44, 0.5, 2.5),
        "num_terms=2.5, expected a whole",
    ),
    "sparse block": (lambda: A43 @ SPARSE_33, "A @ x: x is a csr_array, expected an array"),
    "sparse left": (lambda: SPARSE_33 @ A34, "x @ A: x is a csr_array, expected an array"),
    "sparse as dense": (
        lambda: operators.dense(SPARSE_33),
        "a_MN is a csr_array, expected an array .`sparse` makes an operator",
    ),
    "JAX's sparse as dense": (
        lambda: operators.dense(jax.experimental.sparse.BCOO.fromdense(np.eye(3))),
        "a_MN is a BCOO, expected an array",
    ),
    "hstack of an array": (lambda: algebra.hstack([A43, np.eye(4)]), "got a ndarray; `dense` and"),
    "vstack of an array": (lambda: algebra.vstack([np.eye(3), A43]), "got a ndarray; `dense` and"),
    "whole numbers": (
        lambda: checks.verify(operators.dense(np.eye(3, dtype=int)), jax.random.key(0)),
        "A has dtype int32, expected a real or complex floating type",
    ),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_requests(case):
    request, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        request()


def test_what_has_no_meaning_is_a_type_error():
    for sign in (signs.mul, signs.truediv):
        with pytest.raises(TypeError):
            sign(A44, A44)
    for sign in (signs.add, signs.sub):
        for terms in ((A44, np.ones((4, 4))), (np.ones((4, 4)), A44), (jnp.ones(4), A44), (1, A44)):
            with pytest.raises(TypeError, match=r"B is a .*, expected an operator; `dense` and"):
                sign(*terms)


@pytest.mark.parametrize(
    "product",
    [jnp.abs, lambda x: x / jnp.linalg.norm(x), lambda x: jnp.where(x > 0, x, 2 * x)],
    ids=["abs", "norm", "where"],
)
def test_an_adjoint_that_cannot_be_derived(product):
    op = functions.from_matmat(product, (5, 5))
    with pytest.raises(ValueError, match="rmatmat cannot be derived: matmat is not linear"):
        op.H @ np.ones(5, np.float32)

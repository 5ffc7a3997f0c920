"""Operators made of operators of whole numbers."""

import jax
import numpy as np
import pytest

from isvd import algebra, operators
from isvd.factorize import svd


@pytest.mark.parametrize("dtype", ["uint8", "int8", "bool", "int32"])
def test_centred_whole_numbers(dtype):
    """The sums of a column are over what eight bits hold."""
    rng = np.random.default_rng(0)
    a_MN = rng.integers(50, 100, size=(300, 8)).astype("int8" if dtype == "int8" else "int32")
    a_MN = (a_MN + 100 if dtype == "uint8" else a_MN > 75 if dtype == "bool" else a_MN).astype(
        dtype
    )
    op = algebra.centered(operators.dense(a_MN))
    wanted_MN = a_MN.astype("float64") - a_MN.mean(0)
    assert op.dtype == "float32"
    np.testing.assert_allclose(op.to_dense(), wanted_MN, atol=1e-4)
    s_K = svd(op, jax.random.key(0), rank=3).s_K
    np.testing.assert_allclose(s_K, np.linalg.svd(wanted_MN)[1][:3], rtol=1e-5)

"""What a GPU or TPU is asked to do, read from the programs that are lowered for it here."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import isvd
from isvd.triplets import thin_svd

KEY = jax.random.key(0)


def lowered(f, *args, platform):
    with jax.default_matmul_precision("default"):
        return jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def walks(a_NN):
    op = isvd.dense(a_NN)
    op = isvd.windowed_sum(op, jnp.array([0.5, 0.3], op.dtype)) - 0.1 * isvd.ones(*op.shape)
    return isvd.centered(op @ isvd.diagonal(jnp.ones(op.shape[1])))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("method", ["krylov", "subspace"])
def test_every_product_of_a_factorisation_is_in_full_precision(method, platform):
    """JAX's default there is TF32 or bfloat16, which leaves three digits."""
    text = lowered(
        lambda a: isvd.svd(walks(a), KEY, rank=4, method=method), jnp.ones((300, 300)),
        platform=platform,
    )  # fmt: skip
    products = re.findall(r"dot_general.*", text)
    assert len(products) > 10
    assert [line for line in products if "HIGHEST, HIGHEST" not in line] == []


@pytest.mark.parametrize("method", ["krylov", "subspace"])
def test_small_factorisations_avoid_jacobi_rotations_on_cuda(method):
    """cuSOLVER's leave vectors orthonormal to 3e-5 only."""
    text = lowered(
        lambda a: isvd.svd(isvd.dense(a), KEY, rank=4, method=method), jnp.ones((300, 200)),
        platform="cuda",
    )  # fmt: skip
    assert "cusolver_gesvd_ffi" in text
    assert "gesvdj" not in text


@pytest.mark.parametrize("shape", [(5, 5), (7, 3), (3, 7)])
def test_thin_svd_is_numpys(shape):
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    u, s, vh = jax.jit(thin_svd)(x)
    np.testing.assert_allclose(s, np.linalg.svd(x, compute_uv=False), rtol=1e-5)
    np.testing.assert_allclose((u * s) @ vh, x, atol=1e-5)

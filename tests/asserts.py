"""Comparisons that the tests share."""

import jax
import numpy as np


def assert_trees_close(actual, wanted, *, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Same structure, and every leaf close."""
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(wanted), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path))


def assert_trees_equal(actual, wanted) -> None:
    """Same structure, and every leaf equal bit for bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(wanted), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))

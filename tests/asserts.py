"""Comparisons that the tests share."""

import chex
import numpy as np


def assert_trees_close(actual, wanted, *, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Same structure, and every leaf close."""
    chex.assert_trees_all_close(actual, wanted, rtol=rtol, atol=atol)


def assert_trees_equal(actual, wanted) -> None:
    """Same structure, and every leaf equal bit for bit."""
    chex.assert_trees_all_equal(actual, wanted, strict=True)


def assert_close(actual, wanted, tolerance: float = 1e-4) -> None:
    """Same shape, and every entry close, relative to the largest."""
    actual, wanted = np.asarray(actual), np.asarray(wanted)
    assert actual.shape == wanted.shape
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())

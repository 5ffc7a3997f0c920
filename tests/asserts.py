"""Comparisons that the tests share."""

import chex


def assert_trees_close(actual, wanted, *, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Same structure, and every leaf close."""
    chex.assert_trees_all_close(actual, wanted, rtol=rtol, atol=atol)


def assert_trees_equal(actual, wanted) -> None:
    """Same structure, and every leaf equal bit for bit."""
    chex.assert_trees_all_equal(actual, wanted, strict=True)

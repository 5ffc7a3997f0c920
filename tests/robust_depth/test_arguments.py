"""What arguments have to be, where no other file of tests says it of a function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_depth import arguments


@pytest.mark.parametrize("size", [1, 7, np.int64(3), np.int32(1)])
def test_sizes(size):
    arguments.check_sizes(depth=1, dim=size)


@pytest.mark.parametrize("size", [0, -1, True, np.True_, 2.0, np.float32(2), "2", None])
def test_what_is_no_size(size):
    with pytest.raises(ValueError, match=r"dim=.*, expected a whole number, at least 1"):
        arguments.check_sizes(depth=1, dim=size)


def test_a_trace_knows_no_values():
    def look(x):
        assert not arguments.known(x > 0)
        arguments.check_fraction(x)
        arguments.check_radius("radius", x)
        return x

    bad = jnp.float32(-1)
    jax.jit(look)(bad)
    assert arguments.known(bad < 0)
    with pytest.raises(ValueError, match=r"outlier_fraction=-1.0, expected"):
        arguments.check_fraction(bad)
    with pytest.raises(ValueError, match=r"radius=-1.0, expected finite"):
        arguments.check_radius("radius", bad)
    with pytest.raises(ValueError, match=r"radius has shape \(2,\), expected 0 axes"):
        arguments.check_radius("radius", jnp.ones(2))

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Most of the time here is compilation, of programs that run for milliseconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def full_compilation():
    """For tests at the edge of rounding, which differs, by `pytest.mark.usefixtures`."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)

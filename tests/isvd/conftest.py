import jax
import pytest


@pytest.fixture(autouse=True, scope="session")
def quick_compilation():
    """Nearly all the time here is compilation, of programs that run for milliseconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)

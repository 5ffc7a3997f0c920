"""Eight simulated CPU devices for the whole suite, set before jax is imported.

Most of the suite's time is compilation. XLA's older code for fusions and LLVM without optimisation
compile in less than half the time, but run slower: what computes for longer than it compiles runs
in a process without both.

With JAX_PLATFORMS=cuda,cpu in the environment it runs on a GPU: float32 products are then in full
precision, and tests of several devices, or of equal bits, fail.
"""

import gc
import os
import sys

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    " --xla_backend_optimization_level=0",
)
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")  # a CPU knows no other
os.environ.setdefault("MPLBACKEND", "Agg")


def pytest_collection_modifyitems(items):
    """The README's commands come first: no file takes longer, and other processes are not idle."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Free the compiled programs of a file of tests.

    Each one maps memory, and a process that has more than vm.max_map_count maps (65,530 by
    default) is ended by a segmentation fault in the next compilation.
    """
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()

"""Problems and their solutions that tests of robust_depth share."""

import jax

from robust_depth import models
from robust_depth.problems import sample_regression

SOLUTIONS = {"balanced": models.balanced_solution, "unbalanced": models.unbalanced_solution}


def regression(seed=0, dtype="float32", **options):
    """The setting of the paper's experiments, at its smallest size."""
    options = {"num_rows": 48, "dim": 60, "sparsity": 2, "dtype": dtype, **options}
    return sample_regression(jax.random.key(seed), **options)

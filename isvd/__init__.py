"""The SVD of matrices that are never formed. So far: linear operators and their algebra.

Source: Abu-El-Haija et al., "Implicit SVD for Graph Representation Learning" (NeurIPS 2021,
arXiv 2111.06312).
"""

from isvd.algebra import (
    centered,
    geometric_sum,
    hstack,
    polynomial,
    take_columns,
    take_rows,
    vstack,
    windowed_sum,
)
from isvd.operators import (
    LinearOperator,
    adjoint_defect,
    dense,
    diagonal,
    from_matmat,
    identity,
    linearity_defect,
    low_rank,
    nonfinite,
    ones,
    verify,
)

__all__ = [
    "LinearOperator",
    "adjoint_defect",
    "centered",
    "dense",
    "diagonal",
    "from_matmat",
    "geometric_sum",
    "hstack",
    "identity",
    "linearity_defect",
    "low_rank",
    "nonfinite",
    "ones",
    "polynomial",
    "take_columns",
    "take_rows",
    "verify",
    "vstack",
    "windowed_sum",
]

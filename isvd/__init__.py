"""The SVD of matrices that are never formed, and what can be built on it.

`isvd.estimators` has the interface of scikit-learn, and needs it; `isvd.readers` and
`isvd.planetoid` read graphs.

Source: Abu-El-Haija et al., "Implicit SVD for Graph Representation Learning" (NeurIPS 2021,
arXiv 2111.06312).
"""

from isvd.adaptive import svd_to_error
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
from isvd.checks import adjoint_defect, linearity_defect, nonfinite, verify
from isvd.factorize import SVD, svd
from isvd.functions import from_matmat
from isvd.operators import LinearOperator, dense, diagonal, identity, low_rank, ones
from isvd.orthonormal import orthonormalize
from isvd.sharded import row_sharded
from isvd.solve import (
    Eigen,
    approximation,
    eigh,
    frobenius_norm,
    low_rank_product,
    pinv_solve,
    spectral_norm,
    trace,
)
from isvd.spmm import sparse, sparse_from_entries

__all__ = [
    "SVD",
    "Eigen",
    "LinearOperator",
    "adjoint_defect",
    "approximation",
    "centered",
    "dense",
    "diagonal",
    "eigh",
    "frobenius_norm",
    "from_matmat",
    "geometric_sum",
    "hstack",
    "identity",
    "linearity_defect",
    "low_rank",
    "low_rank_product",
    "nonfinite",
    "ones",
    "orthonormalize",
    "pinv_solve",
    "polynomial",
    "row_sharded",
    "sparse",
    "sparse_from_entries",
    "spectral_norm",
    "svd",
    "svd_to_error",
    "take_columns",
    "take_rows",
    "trace",
    "verify",
    "vstack",
    "windowed_sum",
]

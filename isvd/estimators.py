"""Estimators with scikit-learn's interface, for its pipelines: `TruncatedSVD` and `PCA`.

They take arrays, sparse matrices of scipy or JAX, and operators, and never make a sparse matrix
dense: PCA subtracts the mean as an operator of rank one. From an array it is subtracted in float64
beforehand, since of deviations from a large mean float32 keeps few digits. scikit-learn has to be
installed.

Results have JAX's dtypes: float32 also for float64 data, unless x64 is on, and scikit-learn's
`check_estimator` asks for that.

Axes: M samples, N features, K components.
"""

from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax.experimental.sparse import JAXSparse
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from isvd.algebra import centered
from isvd.arguments import check_integer
from isvd.factorize import svd
from isvd.operators import LinearOperator, dense
from isvd.solve import frobenius_norm
from isvd.spmm import sparse
from isvd.triplets import positive


class TruncatedSVD(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Linear dimensionality reduction by the leading singular vectors, without centring.

    Args:
        n_components: K, from 1 to min(M, N).
        tol: residual to reach, relative to the largest singular value; by default as of
            `isvd.svd`.
        random_state: a whole number from 0 to 2**32 - 1, numpy's RandomState, or None for one that
            numpy draws.

    Attributes:
        components_: (K, N), rows orthonormal; the entry of largest modulus of each is positive.
        singular_values_: (K,), largest first.
        explained_variance_, explained_variance_ratio_: (K,), of the transformed training data, and
            over the total variance of the features.
        residuals_: (K,), how far each triplet is from being singular.
        n_iter_: columns multiplied.
    """

    _centers = False

    def __init__(
        self, n_components: int = 2, *, tol: float | None = None, random_state: Any = None
    ):
        self.n_components = n_components
        self.tol = tol
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def fit(self, X: Any, y: Any = None) -> Self:
        """Factor a matrix (M, N): an array, a sparse one of scipy or JAX, or an operator.

        Raises:
            ValueError: for a matrix that is empty, not finite or of complex numbers, an operator
                that is not of real floating type, or settings outside their range.
        """
        self._fit(X)
        return self

    def fit_transform(self, X: Any, y: Any = None) -> np.ndarray:
        """The training data in terms of the components, (M, K): u times the singular values."""
        u_MK = self._fit(X)
        return u_MK * self.singular_values_

    def transform(self, X: Any) -> np.ndarray:
        """Other data of as many features in terms of the components, (M, K)."""
        check_is_fitted(self, "components_")
        op = self._operator(self._checked(X, reset=False), self._mean_N)
        return np.asarray(op.matmat(jnp.asarray(self.components_.T, op.dtype)))

    def inverse_transform(self, X: Any) -> np.ndarray:
        """The features (M, N) that components (M, K), an array or sparse, stand for."""
        check_is_fitted(self, "components_")
        X = check_array(X, accept_sparse=["csr", "csc", "coo"], dtype=[np.float64, np.float32])
        if X.shape[1] != len(self.components_):
            raise ValueError(f"X has shape {X.shape}, expected (M, {len(self.components_)})")
        return X @ self.components_ + self.mean_

    def _fit(self, X: Any) -> np.ndarray:
        x_MN = self._checked(X, reset=True)
        num_samples, num_features = x_MN.shape
        least = 2 if self._centers else 1
        if num_samples < least:
            raise ValueError(
                f"n_samples={num_samples}, expected at least {least}: one has no spread"
            )
        limit = min(x_MN.shape)
        rank = self.n_components
        least_of = f"the lesser of n_samples={num_samples} and n_features={num_features}"
        check_integer("n_components", rank, 1, limit, least_of)
        key_svd, key_norm = jax.random.split(jax.random.key(self._seed()))
        if isinstance(x_MN, LinearOperator):
            one_M1 = jnp.ones((num_samples, 1), x_MN.dtype)
            mean_N = np.asarray(x_MN.rmatmat(one_M1))[:, 0] / num_samples
        else:
            mean_N, total = _mean_and_variation(x_MN)
        op = self._operator(x_MN, mean_N)
        factors = svd(op, key_svd, rank=int(rank), tol=self.tol)
        u_MK, s_K, v_NK = (np.asarray(part) for part in factors[:3])
        peak_K = v_NK[np.abs(v_NK).argmax(0), np.arange(rank)]
        turn_K = np.where(peak_K < 0, -1, 1).astype(v_NK.dtype)
        u_MK, v_NK = u_MK * turn_K, v_NK * turn_K

        # Squares are of float64: float32 holds those of 1e-19 to 1e19.
        size = float(positive(factors.s_K[0]))
        if isinstance(x_MN, LinearOperator):
            around = centered(x_MN, jnp.asarray(mean_N, x_MN.dtype)) / size
            total = float(frobenius_norm(around, key_norm, samples=256)[0]) * size**2
        count = num_samples - 1 if self._centers else num_samples
        wide_K = s_K.astype(np.float64)
        variance_K = np.square(wide_K) / count if self._centers else (u_MK * wide_K).var(0)
        self.components_ = np.ascontiguousarray(v_NK.T)
        self._mean_N = mean_N if self._centers else np.zeros_like(mean_N)
        self.mean_ = self._mean_N.astype(s_K.dtype)
        self.singular_values_ = s_K
        with np.errstate(over="ignore"):
            self.explained_variance_ = variance_K.astype(s_K.dtype)
        # The components are part of it; of constant features both are rounding.
        whole = max(total / count, float(variance_K.sum()))
        ratio_K = variance_K / (whole if whole > 0 else 1)
        self.explained_variance_ratio_ = ratio_K.astype(s_K.dtype)
        self.residuals_ = np.asarray(factors.residual_K)
        self.n_iter_ = int(factors.products)
        self._n_features_out = int(rank)
        return u_MK

    def _checked(self, X: Any, *, reset: bool) -> Any:
        """X as an array, a scipy sparse matrix, or an operator."""
        if isinstance(X, JAXSparse):
            X = sparse(X)
        if isinstance(X, LinearOperator):
            if not jnp.issubdtype(X.dtype, jnp.floating):
                hint = (
                    "isvd.svd(isvd.centered(X), ...) gives the components of complex data"
                    if X.dtype.kind == "c"
                    else "make the operator of float32 entries"
                )
                raise ValueError(f"X has dtype {X.dtype}, expected a real floating type: {hint}")
            if reset:
                self.n_features_in_ = X.shape[1]
            elif X.shape[1] != self.n_features_in_:
                raise ValueError(
                    f"X has {X.shape[1]} features, but {type(self).__name__} is expecting "
                    f"{self.n_features_in_} features as input"
                )
            return X
        return validate_data(
            self,
            X,
            reset=reset,
            accept_sparse=["csr", "csc", "coo"],
            dtype=[np.float64, np.float32],
            ensure_min_samples=2 if reset and self._centers else 1,
        )

    def _operator(self, x_MN: Any, mean_N: np.ndarray) -> LinearOperator:
        """What is factored: the matrix, less the mean of its features if that is wanted."""
        if isinstance(x_MN, LinearOperator) or scipy.sparse.issparse(x_MN):
            op = x_MN if isinstance(x_MN, LinearOperator) else sparse(x_MN)
            return centered(op, jnp.asarray(mean_N, op.dtype)) if self._centers else op
        return dense((x_MN - mean_N).astype(x_MN.dtype) if self._centers else x_MN)

    def _seed(self) -> int:
        if isinstance(self.random_state, int | np.integer):
            check_integer("random_state", self.random_state, 0, 2**32 - 1)
            return int(self.random_state)
        return int(check_random_state(self.random_state).randint(2**31 - 1))


class PCA(TruncatedSVD):
    """Principal components: `TruncatedSVD` of the features around their mean.

    Attributes:
        mean_: (N,). The others are those of `TruncatedSVD`; explained variances are over M - 1.
    """

    _centers = True


def _mean_and_variation(x_MN: Any) -> tuple[np.ndarray, float]:
    """(mean_N, the sum of squares around it) of an array or a sparse matrix, in float64.

    The sum is of differences: that of squares less that of means loses the digits of large means.
    """
    if not scipy.sparse.issparse(x_MN):
        mean_N = x_MN.mean(0, dtype=np.float64)
        return mean_N, float(np.square(x_MN - mean_N).sum())
    num_rows, num_columns = x_MN.shape
    csr = x_MN.tocsr(copy=True)
    csr.sum_duplicates()
    mean_N = np.bincount(csr.indices, csr.data, num_columns) / num_rows
    zeros_N = num_rows - np.bincount(csr.indices, minlength=num_columns)
    stored = np.square(csr.data - mean_N[csr.indices]).sum()
    return mean_N, float(stored + (zeros_N * np.square(mean_N)).sum())

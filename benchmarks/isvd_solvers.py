"""The solvers that benchmarks.isvd compares: (problem, setting, rank) -> triplets.

`halko` is the algorithm of the official iSVD code (ten iterations, oversampling 30, Cholesky) on
scipy's products. Solvers of a GPU's libraries find their matrices there before the clock starts.

Axes: M rows, N columns, K = rank, Q = rank and oversampling.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.sparse.linalg

import isvd
from benchmarks.isvd_matrices import Problem

Triplets = tuple[np.ndarray, np.ndarray, np.ndarray]  # u (M, K), s (K,), v (N, K)


def ours(problem: Problem, tol: float, rank: int) -> Triplets:
    factors = isvd.svd(problem.operator, jax.random.key(0), rank=rank, tol=tol)
    return tuple(np.asarray(part) for part in factors[:3])


def ours_csr(problem: Problem, tol: float, rank: int) -> Triplets:
    operator = _once("csr", problem, lambda: problem.layout("csr"))
    return ours(problem._replace(operator=operator), tol, rank)


def svds(problem: Problem, tol: float, rank: int, *, solver: str) -> Triplets:
    u_MK, s_K, vh_KN = scipy.sparse.linalg.svds(
        problem.scipy, k=rank, tol=tol, solver=solver, rng=np.random.default_rng(0)
    )
    return _largest_first(u_MK, s_K, vh_KN)


def _largest_first(u_MK: np.ndarray, s_K: np.ndarray, vh_KN: np.ndarray) -> Triplets:
    order = np.argsort(-s_K)
    return u_MK[:, order], s_K[order], vh_KN[order].T


def halko(problem: Problem, iterations: int, rank: int) -> Triplets:
    a = problem.scipy
    dtype = problem.operator.dtype

    def orth(x: np.ndarray) -> np.ndarray:
        x = x / np.linalg.norm(x, axis=0)
        return scipy.linalg.solve_triangular(
            np.linalg.cholesky(x.T @ x + 1e-6 * np.eye(x.shape[1], dtype=dtype)), x.T, lower=True
        ).T

    q = np.random.default_rng(0).normal(size=(a.shape[1], rank + 30)).astype(dtype)
    for _ in range(iterations):
        q = a @ orth(q)
        q = a.T @ orth(q)
    q, _ = np.linalg.qr(a @ q)
    u, s, vh = np.linalg.svd((a.T @ q).T, full_matrices=False)
    return (q @ u)[:, :rank], s[:rank], vh[:rank].T


def sklearn_randomized(problem: Problem, iterations: int, rank: int) -> Triplets:
    from sklearn.utils.extmath import randomized_svd

    u_MK, s_K, vh_KN = randomized_svd(
        problem.scipy, rank, n_oversamples=30, n_iter=iterations, random_state=0
    )
    return u_MK, s_K, vh_KN.T


def fbpca_pca(problem: Problem, iterations: int, rank: int) -> Triplets:
    import fbpca

    def make() -> Any:  # it takes scipy's older kind of sparse matrix
        a = problem.scipy
        return scipy.sparse.csr_matrix(a) if scipy.sparse.issparse(a) else a

    np.random.seed(0)  # noqa: NPY002  (it draws from numpy's global state)
    # Its raw=True is the SVD.
    u_MK, s_K, vh_KN = fbpca.pca(
        _once("fbpca", problem, make), k=rank, raw=True, n_iter=iterations, l=rank + 30
    )
    return u_MK, s_K, vh_KN.T


def matfree_svd(problem: Problem, num_matvecs: int, rank: int) -> Triplets:
    """Golub-Kahan with one vector and full reorthogonalisation, compiled."""
    op = problem.operator
    v_N = jax.random.normal(jax.random.key(0), (op.shape[1],), op.dtype)
    u_KM, s_K, v_KN = _matfree_program()(op, v_N, num_matvecs, rank)
    return np.asarray(u_KM).T, np.asarray(s_K), np.asarray(v_KN).T


@functools.cache
def _matfree_program() -> Callable:
    from jax.custom_derivatives import linear_call
    from matfree import decomp, eig

    def run(op: Any, v_N: Any, num_matvecs: int, rank: int) -> Any:
        # It takes the adjoint by jax.vjp: given ours, since the derived one would be slower.
        def product(x_N: Any) -> Any:
            return linear_call(
                lambda op, x_N: op.matmat(x_N[:, None])[:, 0],
                lambda op, y_M: op.rmatmat(y_M[:, None])[:, 0],
                op, x_N,
            )  # fmt: skip

        found = eig.svd_partial(decomp.bidiag(num_matvecs))(product, v_N)
        return tuple(part[:rank] for part in found)

    return jax.jit(run, static_argnums=(2, 3))


def jax_lobpcg(problem: Problem, iterations: int, rank: int) -> Triplets:
    """JAX's own LOBPCG on A^H A."""
    op = problem.operator
    x_NK = jax.random.normal(jax.random.key(0), (op.shape[1], rank), op.dtype)
    s2_K, v_NK = _lobpcg_program()(op, x_NK, iterations)
    s_K = np.sqrt(np.maximum(np.asarray(s2_K), 0))
    return np.asarray(op.matmat(v_NK)) / s_K, s_K, np.asarray(v_NK)


@functools.cache
def _lobpcg_program() -> Callable:
    from jax.experimental.sparse.linalg import lobpcg_standard

    def run(op: Any, x_NK: Any, iterations: int) -> Any:
        return lobpcg_standard(lambda x: op.rmatmat(op.matmat(x)), x_NK, iterations, tol=0.0)[:2]

    return jax.jit(run, static_argnums=2)


def cupy_svds(problem: Problem, tol: float, rank: int) -> Triplets:
    import cupy
    import cupyx.scipy.sparse.linalg as library
    from cupyx.scipy.sparse import csr_matrix

    def move(x: Any) -> Any:
        return (
            csr_matrix(scipy.sparse.csr_matrix(x)) if scipy.sparse.issparse(x) else cupy.asarray(x)
        )

    def make() -> Any:
        return problem.elsewhere(library, move) if problem.elsewhere else move(problem.scipy)

    found = library.svds(_once("cupy", problem, make), k=rank, tol=tol)
    return _largest_first(*(cupy.asnumpy(x) for x in found))


def torch_lowrank(problem: Problem, iterations: int, rank: int) -> Triplets:
    """On matrices; on a GPU if there is one."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def make() -> Any:
        x = problem.scipy
        if not scipy.sparse.issparse(x):
            return torch.tensor(x, device=device)
        parts = (torch.tensor(part, device=device) for part in (x.indptr, x.indices, x.data))
        return torch.sparse_csr_tensor(*parts, size=x.shape)

    torch.manual_seed(0)
    found = torch.svd_lowrank(_once("torch", problem, make), q=rank + 30, niter=iterations)
    u_MQ, s_Q, v_NQ = (x.cpu().numpy() for x in found)
    return u_MQ[:, :rank], s_Q[:rank], v_NQ[:, :rank]


_moved: dict[tuple[str, int], tuple[Problem, Any]] = {}  # each lives with its problem's id


def _once(solver: str, problem: Problem, make: Callable[[], Any]) -> Any:
    """The problem in the solver's own arrays, kept for its next call."""
    if not any(kept is problem for kept, _ in _moved.values()):
        _moved.clear()  # one problem at a time, so that memory is given back
    if (solver, id(problem)) not in _moved:
        _moved[solver, id(problem)] = problem, make()
    return _moved[solver, id(problem)][1]


def _is_matrix(problem: Problem) -> bool:
    return problem.explicit


class Solver(NamedTuple):
    """A solver, and its settings from loose to tight."""

    run: Callable[[Problem, Any, int], Triplets]
    settings: Sequence[Any]
    library: str = "scipy"  # which it needs
    takes: Callable[[Problem], bool] = lambda problem: True

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.library) is not None


OURS = (1e-4, 1e-5, 1e-6, 1e-8, 1e-9, 1e-10)
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-8, 1e-10, 0.0)
SOLVERS = {
    "ours": Solver(ours, OURS),
    "ours csr": Solver(ours_csr, OURS, takes=lambda problem: problem.layout is not None),
    "arpack": Solver(functools.partial(svds, solver="arpack"), TOLERANCES),
    "propack": Solver(functools.partial(svds, solver="propack"), TOLERANCES),
    "lobpcg": Solver(functools.partial(svds, solver="lobpcg"), TOLERANCES),
    "halko": Solver(halko, (10, 20, 40, 80)),
    "fbpca": Solver(fbpca_pca, (2, 4, 8, 16, 32, 64), "fbpca", _is_matrix),
    "sklearn randomized": Solver(sklearn_randomized, (4, 8, 16, 32, 64), "sklearn", _is_matrix),
    "matfree": Solver(matfree_svd, (64, 128, 256, 512), "matfree"),
    "jax lobpcg": Solver(jax_lobpcg, (20, 40, 80, 160)),
    "cupy svds": Solver(cupy_svds, TOLERANCES, "cupy"),
    "torch lowrank": Solver(torch_lowrank, (4, 8, 16, 32, 64, 128), "torch", _is_matrix),
}

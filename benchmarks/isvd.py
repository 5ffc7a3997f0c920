"""The SVD of an operator beside other solvers, each of them made as accurate as ours.

    python -m benchmarks.isvd --json=isvd.json
    python -m benchmarks.isvd --float64 --solvers ours arpack propack

Every matrix is given to every solver that can take it: graphs as scipy sparse products (the walk
sum as a scipy LinearOperator in numpy's and scipy's products), dense matrices as arrays. Each
solver has a list of settings, from loose to tight. The first whose result meets the accuracy is
timed; one that never meets it is reported with its best and marked. Accuracy is measured by us on
the returned triplets: the largest error of a singular value and the larger of both residuals
|A v - s u|, |A^H u - s v|, each relative to the largest singular value; the reference values come
from a run of ours in float64 at a tolerance of 1e-10 (for the dense matrix from LAPACK).

On a GPU the peers are its libraries' solvers (`--solvers ours "cupy svds" "torch lowrank"`): CuPy's
Lanczos `svds` and PyTorch's randomised `svd_lowrank`. Their matrices lie there before the clock
starts. `ours csr` is ours with compressed rows.

Times are from arrays in memory to numpy arrays of the result, medians of interleaved repetitions;
the first call of ours includes compilation and has a column of its own. `halko` is the algorithm
of the official iSVD code (ten iterations, oversampling 30, Cholesky) on scipy's products.
"""

import argparse
import functools
import importlib.util
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
import scipy.sparse.linalg

from benchmarks import timing

RANK = 32
MATRICES = (
    "ppi walks",
    "hepth walks",
    "random graph 1e5, 1e6",
    "fast decay 2e4",
    "slow decay 2e4",
    "dense 4000 x 2000",
)
# What is asked of values and of residuals, relative to s[0].
ACCURACY = {"float32": (1e-6, 1e-4), "float64": (1e-12, 1e-8)}
COLUMNS = {
    "matrix": "matrix",
    "solver": "solver",
    "setting": "setting",
    "milliseconds": "ms",
    "spread_percent": "spread %",
    "over_ours": "this / ours",
    "first_seconds": "first call s",
    "value_error": "value error",
    "residual": "residual",
    "accurate": "accurate",
}

Triplets = tuple[np.ndarray, np.ndarray, np.ndarray]  # u (M, K), s (K,), v (N, K)


class Problem(NamedTuple):
    """One matrix in the forms that solvers take."""

    operator: Any  # ours
    scipy: Any  # array, sparse matrix or LinearOperator
    explicit: bool  # whether `scipy` is a matrix
    elsewhere: Callable | None = None  # (library, move) -> what `scipy` is, of another library
    layout: Callable[[str], Any] | None = None  # -> ours with that layout of sparse matrices


def sparse_problem(matrix: Any, dtype: Any) -> Problem:
    import isvd

    def ours(layout: str) -> Any:
        return isvd.sparse(matrix, dtype, layout=layout)

    return Problem(ours("auto"), scipy.sparse.csr_array(matrix, dtype=dtype), True, layout=ours)


def walk_problem(adjacency: Any, dtype: Any, *, window: int = 10, weight: float = 0.02) -> Problem:
    """The iSVD paper's matrix of a graph: a weighted sum of walks less the absent edges."""
    import jax.numpy as jnp

    import isvd

    degree_N = np.maximum(adjacency.sum(1), 1)
    root = scipy.sparse.diags_array(degree_N**-0.5)
    walk = scipy.sparse.csr_array(root @ adjacency @ root, dtype=dtype)
    coef_Q = (np.arange(window, 0, -1) / (window * (window + 1) / 2)).astype(dtype)
    n = adjacency.shape[0]
    scale_N1 = np.sqrt(degree_N)[:, None].astype(dtype)
    edges = scipy.sparse.csr_array(adjacency, dtype=dtype)

    def ours(layout: str) -> Any:
        op = isvd.windowed_sum(isvd.sparse(walk, layout=layout), jnp.asarray(coef_Q))
        absent = isvd.ones(n, n, dtype) - isvd.sparse(edges, layout=layout)
        return op @ isvd.diagonal(scale_N1[:, 0]) - weight * absent

    def linear(library: Any = scipy.sparse.linalg, move: Callable = lambda x: x) -> Any:
        """The products with another library's arrays, which `move` makes of ours."""
        walk_, edges_, scale_ = (move(x) for x in (walk, edges, scale_N1))

        def walks(x_NC: Any) -> Any:
            y_NC = coef_Q[-1] * x_NC
            for coef in coef_Q[-2::-1]:
                y_NC = walk_ @ y_NC + coef * x_NC
            return walk_ @ y_NC

        def absent(x_NC: Any) -> Any:
            return dtype(weight) * (x_NC.sum(0) - edges_ @ x_NC)

        def matmat(x_NC: Any) -> Any:
            return walks(scale_ * x_NC) - absent(x_NC)

        def rmatmat(x_NC: Any) -> Any:
            return scale_ * walks(x_NC) - absent(x_NC)

        def on_vectors(product: Callable) -> Callable:
            return lambda x: product(x.reshape(n, -1).astype(dtype, copy=False)).reshape(x.shape)

        return library.LinearOperator(
            (n, n),
            matvec=on_vectors(matmat),
            rmatvec=on_vectors(rmatmat),
            matmat=matmat,
            rmatmat=rmatmat,
            dtype=dtype,
        )

    return Problem(ours("auto"), linear(), False, linear, ours)


def random_graph(num_nodes: int, num_edges: int, seed: int = 0) -> scipy.sparse.csr_array:
    """Symmetric 0/1, with num_edges stored entries, ends drawn uniformly."""
    ends = np.random.default_rng(seed).integers(num_nodes, size=(2, num_edges // 2))
    half = scipy.sparse.coo_array((np.ones(num_edges // 2), tuple(ends)), (num_nodes,) * 2)
    whole = (half + half.T).tocsr()
    whole.data[:] = 1
    return whole


def designed(values_K: np.ndarray, size: int, dtype: Any, seed: int = 0) -> Problem:
    """U diag(s) V^T with sparse orthonormal U, V (random Givens rotations), as a sparse matrix."""
    rng = np.random.default_rng(seed)

    def rotations() -> scipy.sparse.csr_array:
        total = scipy.sparse.eye_array(size, format="csr")
        for _ in range(4):  # each mixes random pairs
            order, angle = rng.permutation(size), rng.uniform(0, 2 * np.pi, size // 2)
            i, j = order[: size // 2], order[size // 2 : 2 * (size // 2)]
            rows, columns = np.r_[i, i, j, j], np.r_[i, j, i, j]
            data = np.r_[np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)]
            rest = np.setdiff1d(np.arange(size), np.r_[i, j])
            rows, columns = np.r_[rows, rest], np.r_[columns, rest]
            data = np.r_[data, np.ones(len(rest))]
            total = scipy.sparse.coo_array((data, (rows, columns)), (size, size)).tocsr() @ total
        return total

    return sparse_problem(rotations() @ scipy.sparse.diags_array(values_K) @ rotations(), dtype)


def problems(names: Sequence[str], data: str, dtype: Any) -> dict[str, Callable[[], Problem]]:
    from isvd.readers import adjacency, read_asymproj

    def graph(name: str) -> Problem:
        split = read_asymproj(f"{data}/{name}")
        return walk_problem(adjacency(split.train_E2, split.num_nodes), dtype)

    def dense() -> Problem:
        import isvd

        rng = np.random.default_rng(0)
        a_MN = rng.normal(size=(4000, 2000)) @ np.diag(0.995 ** np.arange(2000))
        a_MN = np.ascontiguousarray(a_MN, dtype)
        return Problem(isvd.dense(a_MN), a_MN, True)

    index = np.arange(20_000)
    makers = (
        lambda: graph("ppi"),
        lambda: graph("ca-HepTh"),
        lambda: sparse_problem(random_graph(100_000, 1_000_000), dtype),
        lambda: designed(0.9**index + 1e-7, 20_000, dtype),
        lambda: designed((1 + index) ** -0.5, 20_000, dtype),
        dense,
    )
    every = dict(zip(MATRICES, makers, strict=True))
    return {name: every[name] for name in names}


# Solvers: setting -> triplets --------------------------------------------------------------------


def ours(problem: Problem, tol: float) -> Triplets:
    import jax

    import isvd

    factors = isvd.svd(problem.operator, jax.random.key(0), rank=RANK, tol=tol)
    return tuple(np.asarray(part) for part in factors[:3])


def ours_csr(problem: Problem, tol: float) -> Triplets:
    operator = _once("csr", problem, lambda: problem.layout("csr"))
    return ours(problem._replace(operator=operator), tol)


def svds(problem: Problem, tol: float, *, solver: str) -> Triplets:
    u_MK, s_K, vh_KN = scipy.sparse.linalg.svds(
        problem.scipy, k=RANK, tol=tol, solver=solver, rng=np.random.default_rng(0)
    )
    order = np.argsort(-s_K)
    return u_MK[:, order], s_K[order], vh_KN[order].T


def halko(problem: Problem, iterations: int) -> Triplets:
    a = problem.scipy
    dtype = problem.operator.dtype

    def orth(x: np.ndarray) -> np.ndarray:
        x = x / np.linalg.norm(x, axis=0)
        return scipy.linalg.solve_triangular(
            np.linalg.cholesky(x.T @ x + 1e-6 * np.eye(x.shape[1], dtype=dtype)), x.T, lower=True
        ).T

    q = np.random.default_rng(0).normal(size=(a.shape[1], RANK + 30)).astype(dtype)
    for _ in range(iterations):
        q = a @ orth(q)
        q = a.T @ orth(q)
    q, _ = np.linalg.qr(a @ q)
    u, s_K, vh_KN = np.linalg.svd((a.T @ q).T, full_matrices=False)
    return (q @ u)[:, :RANK], s_K[:RANK], vh_KN[:RANK].T


def sklearn_randomized(problem: Problem, iterations: int) -> Triplets:
    from sklearn.utils.extmath import randomized_svd

    u_MK, s_K, vh_KN = randomized_svd(
        problem.scipy, RANK, n_oversamples=30, n_iter=iterations, random_state=0
    )
    return u_MK, s_K, vh_KN.T


def fbpca_pca(problem: Problem, iterations: int) -> Triplets:
    import fbpca

    np.random.seed(0)  # noqa: NPY002  (it draws from numpy's global state)
    # Its raw=True is the SVD; it takes scipy's older kind of sparse matrix.
    u_MK, s_K, vh_KN = fbpca.pca(
        _once("fbpca", problem, lambda: _as_matrix(problem.scipy)),
        k=RANK, raw=True, n_iter=iterations, l=RANK + 30,
    )  # fmt: skip
    return u_MK, s_K, vh_KN.T


def _as_matrix(a: Any) -> Any:
    return scipy.sparse.csr_matrix(a) if scipy.sparse.issparse(a) else a


def matfree_svd(problem: Problem, num_matvecs: int) -> Triplets:
    """Golub-Kahan with one vector and full reorthogonalisation, compiled."""
    import jax

    v_N = jax.random.normal(jax.random.key(0), (problem.operator.shape[1],), problem.operator.dtype)
    u_KM, s_K, v_KN = _matfree_program()(problem.operator, v_N, num_matvecs)
    return np.asarray(u_KM).T, np.asarray(s_K), np.asarray(v_KN).T


@functools.cache
def _matfree_program() -> Callable:
    import jax
    from jax.custom_derivatives import linear_call
    from matfree import decomp, eig

    def run(op: Any, v_N: Any, num_matvecs: int) -> Any:
        # It takes the adjoint by jax.vjp: given ours, since the derived one would be slower.
        def product(x_N: Any) -> Any:
            return linear_call(
                lambda op, x_N: op.matmat(x_N[:, None])[:, 0],
                lambda op, y_M: op.rmatmat(y_M[:, None])[:, 0],
                op, x_N,
            )  # fmt: skip

        found = eig.svd_partial(decomp.bidiag(num_matvecs))(product, v_N)
        return tuple(part[:RANK] for part in found)

    return jax.jit(run, static_argnums=2)


def jax_lobpcg(problem: Problem, iterations: int) -> Triplets:
    """JAX's own LOBPCG on A^H A."""
    s2_K, v_NK = _lobpcg(problem.operator, iterations)
    s_K = np.sqrt(np.maximum(np.asarray(s2_K), 0))
    return np.asarray(problem.operator.matmat(v_NK)) / s_K, s_K, np.asarray(v_NK)


@functools.cache
def _lobpcg_program() -> Callable:
    import jax
    from jax.experimental.sparse.linalg import lobpcg_standard

    def run(op: Any, x_NK: Any, iterations: int) -> Any:
        return lobpcg_standard(lambda x: op.rmatmat(op.matmat(x)), x_NK, iterations, tol=0.0)[:2]

    return jax.jit(run, static_argnums=2)


def _lobpcg(op: Any, iterations: int) -> Any:
    import jax

    x_NK = jax.random.normal(jax.random.key(0), (op.shape[1], RANK), op.dtype)
    return _lobpcg_program()(op, x_NK, iterations)


_moved: dict[tuple[str, int], tuple[Problem, Any]] = {}  # each lives with its problem's id


def _once(solver: str, problem: Problem, make: Callable[[], Any]) -> Any:
    """The problem in the solver's own arrays, kept for its next call."""
    if not any(kept is problem for kept, _ in _moved.values()):
        _moved.clear()  # one problem at a time, so that memory is given back
    if (solver, id(problem)) not in _moved:
        _moved[solver, id(problem)] = problem, make()
    return _moved[solver, id(problem)][1]


def cupy_svds(problem: Problem, tol: float) -> Triplets:
    import cupy
    import cupyx.scipy.sparse.linalg as library
    from cupyx.scipy.sparse import csr_matrix

    def move(x: Any) -> Any:
        return (
            csr_matrix(scipy.sparse.csr_matrix(x)) if scipy.sparse.issparse(x) else cupy.asarray(x)
        )

    def make() -> Any:
        return problem.elsewhere(library, move) if problem.elsewhere else move(problem.scipy)

    u_MK, s_K, vh_KN = library.svds(_once("cupy", problem, make), k=RANK, tol=tol)
    u_MK, s_K, vh_KN = (cupy.asnumpy(x) for x in (u_MK, s_K, vh_KN))
    order = np.argsort(-s_K)
    return u_MK[:, order], s_K[order], vh_KN[order].T


def torch_lowrank(problem: Problem, iterations: int) -> Triplets:
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
    found = torch.svd_lowrank(_once("torch", problem, make), q=RANK + 30, niter=iterations)
    u_MQ, s_Q, v_NQ = (x.cpu().numpy() for x in found)
    return u_MQ[:, :RANK], s_Q[:RANK], v_NQ[:, :RANK]


TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-8, 1e-10, 0.0)
SOLVERS: dict[str, tuple[Callable, Sequence[Any]]] = {
    "ours": (ours, (1e-4, 1e-5, 1e-6, 1e-8, 1e-9, 1e-10)),
    "ours csr": (ours_csr, (1e-4, 1e-5, 1e-6, 1e-8, 1e-9, 1e-10)),
    "arpack": (functools.partial(svds, solver="arpack"), TOLERANCES),
    "propack": (functools.partial(svds, solver="propack"), TOLERANCES),
    "lobpcg": (functools.partial(svds, solver="lobpcg"), TOLERANCES),
    "halko": (halko, (10, 20, 40, 80)),
    "fbpca": (fbpca_pca, (2, 4, 8, 16, 32, 64)),
    "sklearn randomized": (sklearn_randomized, (4, 8, 16, 32, 64)),
    "matfree": (matfree_svd, (64, 128, 256, 512)),
    "jax lobpcg": (jax_lobpcg, (20, 40, 80, 160)),
    "cupy svds": (cupy_svds, TOLERANCES),
    "torch lowrank": (torch_lowrank, (4, 8, 16, 32, 64, 128)),
}
_NEEDS = {
    "fbpca": "fbpca",
    "sklearn randomized": "sklearn",
    "matfree": "matfree",
    "cupy svds": "cupy",
    "torch lowrank": "torch",
}
_MATRICES_ONLY = ("fbpca", "sklearn randomized", "torch lowrank")


def installed(solver: str) -> bool:
    return importlib.util.find_spec(_NEEDS.get(solver, "scipy")) is not None


def accuracy(problem: Problem, triplets: Triplets, values_K: np.ndarray) -> tuple[float, float]:
    u_MK, s_K, v_NK = (np.asarray(part, problem.operator.dtype) for part in triplets)
    left_MK = np.asarray(problem.operator.matmat(v_NK)) - u_MK * s_K
    right_NK = np.asarray(problem.operator.rmatmat(u_MK)) - v_NK * s_K
    residual = max(np.linalg.norm(left_MK, axis=0).max(), np.linalg.norm(right_NK, axis=0).max())
    error = np.abs(s_K - values_K).max()
    return float(error / values_K[0]), float(residual / values_K[0])


def measure(
    name: str, make: Callable[[], Problem], solvers: Sequence[str], repetitions: int, limit: float
) -> list[dict[str, Any]]:
    problem = make()
    values_K = reference_values(problem)
    most_error, most_residual = ACCURACY[problem.operator.dtype.name]
    rows, calls = [], {}
    for solver in solvers:
        run, settings = SOLVERS[solver]
        if solver in _MATRICES_ONLY and not problem.explicit:
            continue
        if solver == "ours csr" and problem.layout is None:
            continue
        row, first = None, None
        for setting in settings:
            start = time.perf_counter()
            try:
                triplets = run(problem, setting)
            except Exception as error:  # a solver that gives up is a result
                print(f"{name}, {solver} at {setting}: {type(error).__name__}: {error}")
                continue
            seconds = time.perf_counter() - start
            first = seconds if first is None else first
            value_error, residual = accuracy(problem, triplets, values_K)
            good = value_error < most_error and residual < most_residual
            row = {
                "matrix": name,
                "solver": solver,
                "setting": setting,
                "first_seconds": first,
                "value_error": value_error,
                "residual": residual,
                "accurate": "yes" if good else "NO",
            }
            if good or seconds > limit:
                break
        if row is not None:
            rows.append(row)
            calls[solver] = functools.partial(run, problem, row["setting"])
            print(row, flush=True)
    times = timing.interleave(calls, repetitions=repetitions)
    for row in rows:
        timer = times[row["solver"]]
        row["milliseconds"] = 1e3 * timer.median
        row["spread_percent"] = 100 * timer.spread
        row["over_ours"] = timer.median / times["ours"].median
        row["repetition_seconds"] = timer.repetitions
    return rows


def reference_values(problem: Problem) -> np.ndarray:
    import jax

    import isvd

    if isinstance(problem.scipy, np.ndarray):
        return np.linalg.svd(problem.scipy.astype(np.float64), compute_uv=False)[:RANK]
    with jax.enable_x64(True):
        op = jax.tree.map(
            lambda x: x.astype("float64") if x.dtype == np.float32 else x, problem.operator
        )
        op = isvd.LinearOperator(op.matmat, op.rmatmat, op.shape, np.dtype("float64"))
        factors = isvd.svd(op, jax.random.key(1), rank=RANK, tol=1e-10)
        if not factors.converged:
            raise RuntimeError("the reference did not converge")
        return np.asarray(factors.s_K)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--matrices", nargs="+", choices=MATRICES, default=list(MATRICES))
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    parser.add_argument("--repetitions", type=int, default=5, help="of each; default 5")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds of one try; default 20")
    parser.add_argument("--float64", action="store_true", help="in place of float32")
    parser.add_argument("--data", default="../shared/data/asymproj", help="folder of the graphs")
    parser.add_argument("--json", metavar="FILE", help="also write all numbers there")
    args = parser.parse_args(argv)
    solvers = [name for name in args.solvers if name != "ours" and installed(name)]
    machine = timing.machine("jax", "jaxlib", "numpy", "scipy")
    dtype = np.float64 if args.float64 else np.float32
    error, residual = ACCURACY[dtype.__name__]
    print(f"{machine}\nrank {RANK}, {dtype.__name__}, value error < {error}, residual < {residual}")
    import jax

    rows = []
    with jax.enable_x64(args.float64):
        for name, make in problems(args.matrices, args.data, dtype).items():
            rows += measure(name, make, ["ours", *solvers], args.repetitions, args.limit)
            print(timing.table(rows, COLUMNS), flush=True)  # each time, as the next may be stopped
    if args.json:
        timing.write_json(args.json, {"machine": machine, "solvers": rows})


if __name__ == "__main__":
    main()

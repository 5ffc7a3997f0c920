"""The matrices of the SVD's benchmarks, in the forms that solvers take.

Axes: N nodes, C columns of a block, Q steps of a walk, K singular values.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
import scipy.sparse.linalg

import isvd
from isvd import design, readers

MATRICES = (
    "ppi walks",
    "hepth walks",
    "random graph 1e5, 1e6",
    "fast decay 2e4",
    "slow decay 2e4",
    "dense 4000 x 2000",
)


class Problem(NamedTuple):
    """One matrix in the forms that solvers take."""

    operator: Any  # ours
    scipy: Any  # array, sparse matrix or LinearOperator
    explicit: bool  # whether `scipy` is a matrix
    elsewhere: Callable | None = None  # (library, move) -> what `scipy` is, of another library
    layout: Callable[[str], Any] | None = None  # -> ours with that layout of sparse matrices


def problems(names: Sequence[str], data: str, dtype: Any) -> dict[str, Callable[[], Problem]]:
    """What makes each of them, by name; the graphs are read from the folder `data`."""

    def dense() -> Problem:
        rng = np.random.default_rng(0)
        a_MN = rng.normal(size=(4000, 2000)) @ np.diag(0.995 ** np.arange(2000))
        a_MN = np.ascontiguousarray(a_MN, dtype)
        return Problem(isvd.dense(a_MN), a_MN, True)

    index = np.arange(20_000)
    makers = (
        lambda: walk_problem(read_graph(f"{data}/ppi"), dtype),
        lambda: walk_problem(read_graph(f"{data}/ca-HepTh"), dtype),
        lambda: sparse_problem(random_graph(100_000, 1_000_000), dtype),
        lambda: designed(0.9**index + 1e-7, 20_000, dtype),
        lambda: designed((1 + index) ** -0.5, 20_000, dtype),
        dense,
    )
    every = dict(zip(MATRICES, makers, strict=True))
    return {name: every[name] for name in names}


def read_graph(folder: str) -> scipy.sparse.csr_array:
    """The train edges of an asymproj folder."""
    split = readers.read_asymproj(folder)
    return readers.adjacency(split.train_E2, split.num_nodes)


def random_graph(num_nodes: int, num_edges: int, seed: int = 0) -> scipy.sparse.csr_array:
    """Symmetric 0/1, with num_edges stored entries, ends drawn uniformly."""
    ends = np.random.default_rng(seed).integers(num_nodes, size=(2, num_edges // 2))
    half = scipy.sparse.coo_array((np.ones(num_edges // 2), tuple(ends)), (num_nodes,) * 2)
    whole = (half + half.T).tocsr()
    whole.data[:] = 1
    return whole


def sparse_problem(matrix: Any, dtype: Any) -> Problem:
    def ours(layout: str) -> Any:
        return isvd.sparse(matrix, dtype, layout=layout)

    return Problem(ours("auto"), scipy.sparse.csr_array(matrix, dtype=dtype), True, layout=ours)


def walk_problem(adjacency: Any, dtype: Any, *, window: int = 10, weight: float = 0.02) -> Problem:
    """The iSVD paper's matrix of a graph: a weighted sum of walks less the absent edges."""

    def ours(layout: str) -> Any:
        leaf = functools.partial(isvd.sparse, layout=layout)
        return design.link_operator(
            adjacency, window=window, negative_weight=weight, dtype=dtype, leaf=leaf
        )

    n = adjacency.shape[0]
    walk = design.normalized_adjacency(adjacency, loops=None).astype(dtype)
    edges = scipy.sparse.csr_array(adjacency, dtype=dtype)
    degree_N = np.maximum(adjacency.sum(1, dtype=np.float64), 1)
    scale_N1 = np.sqrt(degree_N)[:, None].astype(dtype)
    coef_Q = design.walk_weights(window).astype(dtype)

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

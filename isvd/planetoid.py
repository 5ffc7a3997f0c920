"""The citation graphs of Planetoid: Cora, Citeseer and Pubmed, from files of Python 2.

`read_planetoid` takes them as their authors publish them, from pickles that are never trusted; a
file that is damaged is refused with the place and the reason.

Axes: E edges, N nodes, F features, I positions in a list of nodes; a literal 2 for the two ends.
"""

import itertools
import math
import os
import pickle
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse

from isvd.edge_text import is_number, rows_of
from isvd.readers import _MOST_NODES, _checked_edges, _existing, adjacency

_NUM_VALIDATION = 500


class Citations(NamedTuple):
    """A citation graph with bags of words, for the classification of its nodes.

    Attributes:
        adjacency: csr_array (N, N) float32 of 0 and 1, symmetric; loops of the data are in it.
        features: csr_array (N, F) float32, as in the files: not normalised.
        labels_N: int32, 0 to num_classes - 1, or -1 for a node that has none.
        train_I, validation_I, test_I: int32 ids, sorted and disjoint. The other nodes carry labels
            too, which the task does not allow to learn from.
    """

    adjacency: scipy.sparse.csr_array
    features: scipy.sparse.csr_array
    labels_N: np.ndarray
    num_classes: int
    train_I: np.ndarray
    validation_I: np.ndarray
    test_I: np.ndarray


def read_planetoid(folder: str | os.PathLike, name: str) -> Citations:
    """A citation graph, `cora`, `citeseer` or `pubmed`, with its usual split.

    The files ind.<name>.{x,y,tx,ty,allx,ally,graph} are pickles of Python 2; they are read by an
    unpickler that admits six names and calls nothing else. Nodes 0, 1, ... are the rows of allx,
    and row t of tx is node test.index[t]. Nodes of the graph that are in neither, as 15 of
    Citeseer, have no features and the label -1. Train nodes are the rows of x, which are the first
    of allx, validation nodes the next 500, and test nodes those of test.index.

    Source: Yang, Cohen, Salakhutdinov, "Revisiting Semi-Supervised Learning with Graph
    Embeddings" (ICML 2016).

    Raises:
        FileNotFoundError: naming the file that is missing.
        ValueError: naming the file which is damaged, does not fit the others, or is a pickle that
            asks for more than arrays, matrices and lists.
    """
    paths = {
        part: _existing(Path(folder, f"ind.{name}.{part}"))
        for part in ("x", "y", "tx", "ty", "allx", "ally", "graph", "test.index")
    }
    x, test_x, all_x = (_load_csr(paths[part]) for part in ("x", "tx", "allx"))
    y, test_y, all_y = (_load_one_hot(paths[part]) for part in ("y", "ty", "ally"))
    edges_E2, num_nodes = _load_neighbours(paths["graph"])
    num_train, num_known, num_features = x.shape[0], *all_x.shape
    num_classes = all_y.shape[1]
    test_I = _load_index(paths["test.index"], num_known, num_nodes)
    for part, got, wanted in (
        ("x", x.shape, (num_train, num_features)),
        ("y", y.shape, (num_train, num_classes)),
        ("tx", test_x.shape, (len(test_I), num_features)),
        ("ty", test_y.shape, (len(test_I), num_classes)),
        ("ally", all_y.shape, (num_known, num_classes)),
    ):
        if got != wanted:
            raise ValueError(
                f"{paths[part]}: shape {got}, expected {wanted} to fit the other files"
            )
    if num_known < num_train + _NUM_VALIDATION:
        raise ValueError(
            f"{paths['allx']}: {num_known} rows, expected {num_train} to train and "
            f"{_NUM_VALIDATION} to validate at least"
        )
    if (x != all_x[:num_train]).nnz or (y != all_y[:num_train]).any():
        raise ValueError(
            f"{paths['x']}: x and y are not the first {num_train} rows of allx and ally"
        )
    rows_I = np.concatenate([np.arange(num_known, dtype=np.int32), test_I])
    words = scipy.sparse.vstack([all_x, test_x]).tocoo()
    features = scipy.sparse.csr_array(
        (words.data, (rows_I[words.row], words.col.astype(np.int32))), (num_nodes, num_features)
    )
    features.sort_indices()
    labels_N = np.full(num_nodes, -1, np.int32)
    one_hot = np.concatenate([all_y, test_y])
    labels_N[rows_I] = one_hot.argmax(1)
    return Citations(
        adjacency(edges_E2, num_nodes, repeated="one"),
        features,
        labels_N,
        num_classes,
        np.arange(num_train, dtype=np.int32),
        np.arange(num_train, num_train + _NUM_VALIDATION, dtype=np.int32),
        np.sort(test_I),
    )


# The pickles -------------------------------------------------------------------------------------


class _Dtype:
    """What a pickle says of a dtype: the arguments of numpy.dtype, and a state with the order."""

    code, order = "", "|"

    def __init__(self, code: Any, *_: Any):
        self.code = code

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


class _Array:
    """What a pickle says of an array."""

    shape = dtype = fortran = raw = None

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, self.fortran, self.raw = state


def _reconstruct(*_: Any) -> _Array:
    return _Array()


class _Unpickler(pickle.Unpickler):
    """Loads what the files hold, and refuses every other name before anything is called.

    Arrays and dtypes are only described: numpy believes the state of a pickle, and one that is made
    up leads it out of its memory. `_checked_array` makes the arrays, with any numpy.
    """

    def __init__(self, file: Any):
        super().__init__(file, encoding="latin1")
        self._known = {
            ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _Dtype,
            # New for each file, as a pickle can set attributes of a class that has no state.
            ("scipy.sparse.csr", "csr_matrix"): type("_Attributes", (), {}),
            ("collections", "defaultdict"): defaultdict,
            ("__builtin__", "list"): list,
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")
        return self._known[module, name]


def _unpickle(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            return _Unpickler(file).load()
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to call for
        raise ValueError(f"{path}: not a pickle that can be read: {error}") from error


def _checked_array(path: Path, name: str, value: Any, ndim: int, kinds: str) -> np.ndarray:
    if not isinstance(value, _Array):
        raise ValueError(f"{path}: {name} is of type {type(value).__name__}, expected an array")
    dtype = f"{value.dtype.order}{value.dtype.code}" if isinstance(value.dtype, _Dtype) else "none"
    known = "integers" if kinds == "iu" else "integers or floats"
    if not re.fullmatch(f"[<>=|][{kinds}][1248]", dtype) or dtype[1:] == "f1":
        raise ValueError(f"{path}: {name} has dtype {dtype}, expected {known}")
    shape = value.shape
    if type(shape) is not tuple or len(shape) != ndim or not all(map(_is_size, shape)):
        raise ValueError(f"{path}: {name} has shape {shape!r}, expected {ndim} sizes")
    raw = value.raw.encode("latin1", "ignore") if isinstance(value.raw, str) else b""
    wanted = math.prod(shape) * int(dtype[2])
    if len(raw) != wanted:
        raise ValueError(f"{path}: {name} has {len(raw)} bytes, expected {wanted}")
    array = np.frombuffer(raw, dtype).reshape(shape, order="F" if value.fortran else "C")
    return array.astype(array.dtype.newbyteorder("="))


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MOST_NODES


# The parts ---------------------------------------------------------------------------------------


def _load_csr(path: Path) -> scipy.sparse.csr_array:
    fields = getattr(_unpickle(path), "__dict__", {})
    missing = {"data", "indices", "indptr", "_shape"} - set(fields)
    if missing:
        raise ValueError(f"{path}: no csr_matrix, {', '.join(sorted(missing))} missing")
    data = _checked_array(path, "data", fields["data"], 1, "fiu").astype(np.float32)
    indices = _checked_array(path, "indices", fields["indices"], 1, "iu")
    indptr = _checked_array(path, "indptr", fields["indptr"], 1, "iu").astype(np.int64)
    shape = fields["_shape"]
    if type(shape) is not tuple or len(shape) != 2 or not all(map(_is_size, shape)) or 0 in shape:
        raise ValueError(f"{path}: shape {shape!r}, expected two positive sizes")
    if len(indptr) != shape[0] + 1 or len(data) != len(indices):
        raise ValueError(
            f"{path}: {len(indptr)} row starts, {len(indices)} indices and {len(data)} values do "
            f"not make a matrix of shape {shape}"
        )
    if indptr[0] != 0 or indptr[-1] != len(data) or (np.diff(indptr) < 0).any():
        raise ValueError(f"{path}: row starts do not rise from 0 to the {len(data)} entries")
    outside = (indices < 0) | (indices >= shape[1])
    if outside.any():
        raise ValueError(
            f"{path}: column {indices[outside][0]}, expected 0 to {shape[1] - 1} in a matrix of "
            f"shape {shape}"
        )
    if not np.isfinite(data).all():
        raise ValueError(f"{path}: entries that are not finite")
    return scipy.sparse.csr_array((data, indices, indptr), shape)


def _load_one_hot(path: Path) -> np.ndarray:
    one_hot = _checked_array(path, "the array", _unpickle(path), 2, "fiu")
    wrong = ((one_hot != 0) & (one_hot != 1)).any(1) | (one_hot.sum(1) != 1)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(f"{path}: row {row} is {one_hot[row]}, expected one 1 and else 0")
    return one_hot


def _load_neighbours(path: Path) -> tuple[np.ndarray, int]:
    graph = _unpickle(path)
    if not isinstance(graph, dict) or not graph:
        raise ValueError(f"{path}: expected lists of neighbours by node, and at least one")
    num_nodes = len(graph)
    for node, neighbours in graph.items():
        if type(node) is not int or not 0 <= node < num_nodes:
            raise ValueError(f"{path}: node {node!r}, expected 0 to {num_nodes - 1}")
        if type(neighbours) is not list:
            raise ValueError(f"{path}: neighbours of node {node} are not a list")
        for other in neighbours:
            if type(other) is not int or not 0 <= other < num_nodes:
                raise ValueError(
                    f"{path}: node {node} has the neighbour {other!r}, expected 0 to "
                    f"{num_nodes - 1}"
                )
    from_E = np.repeat(list(graph), [len(neighbours) for neighbours in graph.values()])
    to_E = np.fromiter(itertools.chain.from_iterable(graph.values()), np.int64, len(from_E))
    return _checked_edges(str(path), np.stack([from_E, to_E], 1), num_nodes), num_nodes


def _load_index(path: Path, first: int, num_nodes: int) -> np.ndarray:
    index = []
    for line, columns in rows_of(path, None):
        if len(columns) != 1 or not is_number(columns[0]):
            raise ValueError(f"{path}, line {line}: {' '.join(columns)!r}, expected one id")
        if not first <= int(columns[0]) < num_nodes:
            raise ValueError(
                f"{path}, line {line}: id {columns[0]}, expected {first} to {num_nodes - 1}, the "
                "nodes of the graph after those of allx"
            )
        index.append(int(columns[0]))
    if not index or len(set(index)) < len(index):
        raise ValueError(f"{path}: {len(index)} ids of {len(set(index))} nodes, expected each once")
    return np.array(index, np.int32)

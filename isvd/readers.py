"""Graphs from files: edge lists, and the link-prediction splits of the paper.

Everything here is numpy and scipy. `read_edges` takes edge lists of many formats, `adjacency` makes
the matrix, `split_edges` holds edges out; `read_asymproj` reads splits as their authors publish
them. A file that is damaged is refused with the place and the reason. `isvd.planetoid` has the
citation graphs.

Axes: E edges, N nodes; a literal 2 for the two ends.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse

from isvd.edge_text import load_text

_MOST_NODES = 2**31 - 1  # ids are int32
# Suffix, without a last .gz, -> what separates columns; None is any white space.
_TEXT = {".csv": ",", ".tsv": "\t", ".txt": None, ".edges": None, "": None}


class Graph(NamedTuple):
    """A graph as a list of edges.

    Attributes:
        edges_E2: int32, every edge once, ids 0 to num_nodes - 1.
        num_nodes: with those that have no edge.
        names: names[i] is the id that node i has in the file, or None if ids are those of the file.
        num_repeated: rows of the file that repeat an earlier edge, and were left out: the edge
            weighs as one that is there once. Without `directed` its reverse repeats an edge, so
            this is half of the rows of a file that lists both.
        num_loops: edges from a node to itself, which are kept. In the `adjacency` of an undirected
            graph each is an entry 2 on the diagonal, unless `repeated` or `loops` say otherwise.
    """

    edges_E2: np.ndarray
    num_nodes: int
    names: np.ndarray | None = None
    num_repeated: int = 0
    num_loops: int = 0


class LinkSplit(NamedTuple):
    """Edges to learn from, and pairs to tell apart: `test_E2` are edges, `test_negative_E2` none.

    All are int32, with ids 0 to num_nodes - 1. The lengths of the three differ.
    """

    train_E2: np.ndarray
    test_E2: np.ndarray
    test_negative_E2: np.ndarray
    num_nodes: int


# From edges to a matrix and to a split -----------------------------------------------------------


def adjacency(
    edges_E2: Any,
    num_nodes: int,
    *,
    directed: bool = False,
    loops: str = "keep",
    repeated: str = "sum",
) -> scipy.sparse.csr_array:
    """The adjacency matrix (N, N) of a list of edges, float32 and in sorted rows.

    Args:
        edges_E2: integers, ids 0 to num_nodes - 1.
        directed: A[i, j] is of the edge from i to j. By default each edge is joined with its
            reverse, and the matrix is symmetric.
        loops: "keep" those of the list, "drop" them, or "add": one of weight 1 at every node, in
            place of those of the list.
        repeated: "sum" counts an entry as often as it is met, as the paper does. So an edge that
            is listed twice has weight 2, and so has a loop of an undirected graph, which is its
            own reverse. "one" gives a matrix of 0 and 1.
    Raises:
        ValueError: if there is no edge or no node, an id is out of range, the array is not one of
            integers of shape (E, 2), or an option is unknown.

    >>> adjacency([[0, 1], [2, 2]], 3).toarray()
    array([[0., 1., 0.],
           [1., 0., 0.],
           [0., 0., 2.]], dtype=float32)
    """
    _check_choice("loops", loops, ("keep", "drop", "add"))
    _check_choice("repeated", repeated, ("sum", "one"))
    edges_E2 = _checked_edges("edges_E2", edges_E2, num_nodes)
    if loops != "keep":
        edges_E2 = edges_E2[edges_E2[:, 0] != edges_E2[:, 1]]
    arcs_E2 = edges_E2 if directed else np.concatenate([edges_E2, edges_E2[:, ::-1]])
    if loops == "add":
        arcs_E2 = np.concatenate(
            [arcs_E2, np.arange(num_nodes, dtype=np.int32)[:, None].repeat(2, 1)]
        )
    weights_E = np.ones(len(arcs_E2), np.float32)
    matrix = scipy.sparse.coo_array((weights_E, tuple(arcs_E2.T)), (num_nodes, num_nodes)).tocsr()
    matrix.sum_duplicates()
    if repeated == "one":
        matrix.data[:] = 1
    return matrix


def split_edges(edges_E2: Any, num_nodes: int, *, fraction: float, seed: Any) -> LinkSplit:
    """Hold out a fraction of the edges, with as many random pairs that are no edges.

    The graph is undirected: an edge and its reverse are one, and go to one side. Repeated edges and
    loops are left out. The negative pairs are a uniform draw, without repetition, from the pairs of
    two nodes that have no edge in either part.

    Args:
        edges_E2: integers, ids 0 to num_nodes - 1.
        fraction: of the distinct edges to hold out, between 0 and 1; at least one edge goes to
            either side.
        seed: what `numpy.random.default_rng` takes. The same one gives the same split.
    Returns:
        LinkSplit, each pair with the smaller id first.
    Raises:
        ValueError: as `adjacency` does, and if fraction is out of range, there are fewer than two
            distinct edges, or fewer pairs without an edge than edges to hold out.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction={fraction}: expected a number between 0 and 1, both excluded")
    edges_E2, num_nodes = _checked_edges("edges_E2", edges_E2, num_nodes), int(num_nodes)
    low_E, high_E = edges_E2.min(1).astype(np.int64), edges_E2.max(1).astype(np.int64)
    # Pairs are numbered without gaps, (0, 1), (0, 2), (1, 2), (0, 3), ...: so a pair is a number.
    pairs_E = np.unique((high_E * (high_E - 1) // 2 + low_E)[low_E != high_E])
    num_edges, num_pairs = len(pairs_E), num_nodes * (num_nodes - 1) // 2
    if num_edges < 2:
        raise ValueError(f"{num_edges} distinct edges without loops, expected at least 2 to split")
    num_test = min(max(round(fraction * num_edges), 1), num_edges - 1)
    if num_pairs - num_edges < num_test:
        raise ValueError(
            f"{num_test} edges to hold out but only {num_pairs - num_edges} of {num_pairs} pairs "
            "have no edge, expected as many at least; hold out a smaller fraction"
        )
    rng = np.random.default_rng(seed)
    held_E = np.zeros(num_edges, bool)
    held_E[rng.choice(num_edges, num_test, replace=False)] = True
    rank_E = rng.choice(num_pairs - num_edges, num_test, replace=False)
    # Before edge e there are pairs_E[e] - e pairs without an edge, so the one of rank r comes after
    # as many edges as have that number at most r.
    before_E = np.searchsorted(pairs_E - np.arange(num_edges), rank_E, side="right")
    parts = (pairs_E[~held_E], pairs_E[held_E], rank_E + before_E)
    return LinkSplit(*map(_numbered_pairs, parts), num_nodes)


def _numbered_pairs(pairs_E: np.ndarray) -> np.ndarray:
    high_E = ((1 + np.sqrt(1.0 + 8.0 * pairs_E)) / 2).astype(np.int64)
    # The root is rounded; for large numbers that is one off.
    high_E -= high_E * (high_E - 1) // 2 > pairs_E
    high_E += high_E * (high_E + 1) // 2 <= pairs_E
    return np.stack([pairs_E - high_E * (high_E - 1) // 2, high_E], 1).astype(np.int32)


def _checked_edges(name: str, edges_E2: Any, num_nodes: int) -> np.ndarray:
    _check_size(num_nodes)
    edges_E2 = _checked_pairs(name, np.asarray(edges_E2))
    row = _first_outside(edges_E2, num_nodes)
    if row is not None:
        raise ValueError(
            f"{name} has the edge {_pair(edges_E2[row])} in row {row}, expected ids 0 to "
            f"{num_nodes - 1}"
        )
    return edges_E2.astype(np.int32)


def _check_size(num_nodes: int) -> None:
    if not isinstance(num_nodes, int | np.integer) or not 1 <= num_nodes <= _MOST_NODES:
        raise ValueError(f"num_nodes={num_nodes!r}: expected a whole number, 1 to {_MOST_NODES}")


def _size_for(ids_E2: np.ndarray) -> int:
    return min(max(int(ids_E2.max()) + 1, 1), _MOST_NODES)  # ids that do not fit are found later


def _checked_pairs(name: Any, edges_E2: np.ndarray) -> np.ndarray:
    if edges_E2.ndim and not edges_E2.shape[0]:
        raise ValueError(f"{name}: no edges, expected at least one")
    if edges_E2.ndim != 2 or edges_E2.shape[1] != 2:
        hint = "; did you mean its transpose?" if edges_E2.shape[:1] == (2,) else ""
        raise ValueError(f"{name} has shape {edges_E2.shape}, expected (edges, 2){hint}")
    if edges_E2.dtype.kind not in "iu":
        raise ValueError(f"{name} has dtype {edges_E2.dtype}, expected integers")
    return edges_E2


def _first_outside(edges_E2: np.ndarray, num_nodes: int) -> int | None:
    outside_E = ((edges_E2 < 0) | (edges_E2 >= num_nodes)).any(1)
    return int(outside_E.argmax()) if outside_E.any() else None


def _pair(pair_2: np.ndarray) -> str:
    return f"({pair_2[0]}, {pair_2[1]})"


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, known))}")


# Edge lists --------------------------------------------------------------------------------------


def read_edges(
    path: str | os.PathLike,
    *,
    directed: bool = False,
    remap: bool | None = None,
    num_nodes: int | None = None,
    delimiter: str | None = None,
    header: bool | None = None,
    ignore_extra: bool = False,
) -> Graph:
    """A graph from a file, whose suffix tells the format.

    * `.npy`: an array of integers of shape (E, 2).
    * `.npz`: a square matrix, saved by `scipy.sparse.save_npz`, whose nonzero entries are edges.
    * `.csv`, `.tsv`: two columns with commas or tabs between; the first row may be a header.
    * `.txt`, `.edges`: two columns with white space between, the format of SNAP.
    * `.csv.gz`, `.tsv.gz`, `.txt.gz`, `.edges.gz`, `.gz`: the same texts, compressed.

    In texts, `#` and `%` begin comments, at the start of a line or after a space. The ids are whole
    numbers, or, if the first row has one that is not, names: text like any other.

    An edge that is met again is left out, and counted in `num_repeated`; without `directed` its
    reverse is the same edge, as SNAP lists both. What is kept is the first of them, in the order
    and direction of the file. Loops are kept, and counted in `num_loops`. A matrix in a `.npz` is
    read as a list as well: an entry 1 on its diagonal is a loop, which `adjacency` makes a 2.

    Args:
        path: of the file.
        directed: whether an edge and its reverse are two edges.
        remap: whether to give the ids that occur new numbers 0, 1, ... in sorted order; the old
            ones come back in `names`. By default this is done if ids are names, or negative, or if
            fewer than half of the numbers 0 to the largest id occur; but not with `num_nodes`, nor
            for `.npz`. Nodes without edges are in the graph only without this.
        num_nodes: by default one more than the largest id, or the size of the matrix.
        delimiter: one character in place of the one that the suffix tells.
        header: whether the first row is a header. By default one is found where the first row has
            no number but the second has; with names there, where a header cannot be told from an
            edge, this is to be given.
        ignore_extra: whether to leave aside what is more than two columns, such as weights or
            times, and the values of a matrix. By default more columns, or values other than 1, are
            an error, for they would be lost.
    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is empty or damaged, with the file, the line and the reason; if
            the suffix is unknown; or if an id does not fit `num_nodes` or 31 bits.
    """
    path = _existing(path)
    if num_nodes is not None:
        _check_size(num_nodes)
        if remap:
            raise ValueError(f"num_nodes={num_nodes} and remap=True: give one, for both decide ids")
        remap = False
    ids_E2, size, place = _load_ids(path, delimiter, header, remap is not False, ignore_extra)
    if remap is None:
        remap = size is None and _are_scattered(ids_E2)
    names = None
    if remap:
        names, ids_E2 = np.unique(ids_E2, return_inverse=True)
        ids_E2, num_nodes = ids_E2.reshape(-1, 2), len(names)
    elif num_nodes is None:
        num_nodes = size or _size_for(ids_E2)
    row = _first_outside(ids_E2, num_nodes)
    if row is not None:
        raise ValueError(
            f"{place(row)}: edge {_pair(ids_E2[row])}, expected ids 0 to {num_nodes - 1}; "
            "remap=True takes any ids"
        )
    edges_E2 = ids_E2[_first_of_each(ids_E2, num_nodes, directed)].astype(np.int32)
    num_loops = int((edges_E2[:, 0] == edges_E2[:, 1]).sum())
    return Graph(edges_E2, int(num_nodes), names, len(ids_E2) - len(edges_E2), num_loops)


def _load_ids(
    path: Path, delimiter: str | None, header: bool | None, names: bool, ignore_extra: bool
) -> tuple[np.ndarray, int | None, Callable[[int], str]]:
    """The ids (E, 2), the number of nodes if the file tells it, and what tells the place of a row.

    With `names`, ids may be text.
    """
    if path.suffix in (".npy", ".npz") and (delimiter is not None or header is not None):
        raise ValueError(f"{path}: delimiter and header are for texts, not for {path.suffix}")
    if path.suffix == ".npy":
        return _load_array(path), None, lambda row: f"{path}, row {row}"
    if path.suffix == ".npz":
        return *_load_matrix(path, ignore_extra), lambda _: str(path)
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix not in _TEXT or not path.suffix:
        known = ".npy, .npz, .csv, .tsv, .txt, .edges, and .gz of the last four"
        unknown = "".join(path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:])
        raise ValueError(f"{path}: unknown suffix {unknown!r}, known are {known}")
    delimiter = _TEXT[suffix] if delimiter is None else delimiter
    ids_E2, place = load_text(path, delimiter, header, names, ignore_extra)
    return ids_E2, None, place


def _existing(path: str | os.PathLike) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return path


def _are_scattered(ids_E2: np.ndarray) -> bool:
    if ids_E2.dtype.kind == "U" or ids_E2.min() < 0:
        return True
    size = int(ids_E2.max()) + 1
    if size > 2 * ids_E2.size:  # no mask of that size
        return True
    seen_N = np.zeros(size, bool)
    seen_N[ids_E2] = True
    return 2 * int(seen_N.sum()) < size


def _first_of_each(ids_E2: np.ndarray, num_nodes: int, directed: bool) -> np.ndarray:
    from_E, to_E = ids_E2.T if directed else (ids_E2.min(1), ids_E2.max(1))
    _, first_E = np.unique(from_E.astype(np.int64) * num_nodes + to_E, return_index=True)
    return np.sort(first_E)


def _load_array(path: Path) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            array = np.load(file, allow_pickle=False)
    except Exception as error:  # a damaged header or archive raises errors of many types
        raise ValueError(f"{path}: not an array of numpy that can be read: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path}: expected one array, as numpy.save writes it")
    array = _checked_pairs(path, array)
    if array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{path}: id {array.max()} is over 63 bits")
    return array.astype(np.int64)


def _load_matrix(path: Path, ignore_values: bool) -> tuple[np.ndarray, int]:
    try:
        with open(path, "rb") as file:
            matrix = scipy.sparse.load_npz(file)
        if hasattr(matrix, "check_format"):
            matrix.check_format(full_check=True)
        matrix = matrix.tocoo()
    except Exception as error:
        raise ValueError(f"{path}: not a sparse matrix of scipy: {error}") from error
    if len(matrix.shape) != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{path}: a matrix of shape {matrix.shape}, expected a square one")
    kept_E = matrix.data != 0
    if not kept_E.any():
        raise ValueError(f"{path}: no edges, expected at least one nonzero entry")
    values_E = matrix.data[kept_E]
    if not ignore_values and (values_E != 1).any():
        raise ValueError(
            f"{path}: an entry is {values_E[values_E != 1][0]}, expected 0 or 1, for edges have "
            "no weights; ignore_extra=True takes every nonzero entry for an edge"
        )
    ids_E2 = np.stack([matrix.row[kept_E], matrix.col[kept_E]], 1).astype(np.int64)
    return ids_E2, matrix.shape[0]


# The splits of AsymProj --------------------------------------------------------------------------


def read_asymproj(folder: str | os.PathLike) -> LinkSplit:
    """A split for link prediction, as the paper takes it.

    The files train.txt.npy, test.txt.npy and test.neg.txt.npy are arrays of integers (E, 2), each
    undirected edge once. They are given as they are: loops, which some sets have, are scored with
    the other test edges. `num_nodes` is one more than the largest id of the train file.

    Source: Abu-El-Haija et al., "Learning Edge Representations via Low-Rank Asymmetric
    Projections" (CIKM 2017), whose repository has the files.

    Raises:
        FileNotFoundError: naming the file that is missing.
        ValueError: if an array is not as above, an id of the test files is not below `num_nodes`,
            or, in either direction, test edges are edges of the train file, or negatives are edges
            of the train or the test file.
    """
    paths = [_existing(Path(folder, f"{name}.txt.npy")) for name in ("train", "test", "test.neg")]
    train_E2, test_E2, negative_E2 = map(_load_array, paths)
    num_nodes = _size_for(train_E2)
    arrays = [
        _checked_edges(str(path), edges_E2, num_nodes)
        for path, edges_E2 in zip(paths, (train_E2, test_E2, negative_E2), strict=True)
    ]
    keys = [_pair_keys(edges_E2, num_nodes) for edges_E2 in arrays]
    train, test, negative = range(3)
    for part, other, what in (
        (test, train, "test edges"),
        (negative, train, "negatives"),
        (negative, test, "negatives"),
    ):
        wrong_E = np.isin(keys[part], keys[other])
        if wrong_E.any():
            raise ValueError(
                f"{paths[part]}: {wrong_E.sum()} of {len(wrong_E)} {what} are edges of "
                f"{paths[other].name}, for example {_pair(arrays[part][wrong_E.argmax()])}"
            )
    return LinkSplit(*arrays, num_nodes)


def _pair_keys(edges_E2: np.ndarray, num_nodes: int) -> np.ndarray:
    return edges_E2.min(1).astype(np.int64) * num_nodes + edges_E2.max(1)

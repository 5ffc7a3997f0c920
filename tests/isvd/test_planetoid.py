"""The reader of Planetoid against sets made here, damage of every kind, and the real sets."""

import os
import pickle
import re
from collections import defaultdict

import numpy as np
import pytest
import scipy.sparse
from graph_files import python2_pickle, real_data

from isvd import planetoid

NUM_KNOWN, NUM_TRAIN, NUM_NODES = 504, 4, 508
TEST_IDS = [507, 504, 506]  # 505 is missing


@pytest.fixture
def files(tmp_path):
    """A made set: allx[i] has words i % 5 and 5, node i has class i % 2; (what it is, write)."""
    all_x = np.eye(5, 6, dtype=np.float32)[np.arange(NUM_KNOWN) % 5]
    all_x[:, 5] = 1
    all_y = np.eye(2, dtype=np.int32)[np.arange(NUM_KNOWN) % 2]
    graph = defaultdict(list, {i: [(i + 1) % NUM_NODES] for i in range(NUM_NODES)})
    graph[3] = [4, 4, 3, 100]
    parts = {
        "x": scipy.sparse.csr_matrix(all_x[:NUM_TRAIN]),
        "y": all_y[:NUM_TRAIN],
        "tx": scipy.sparse.csr_matrix(np.eye(3, 6, dtype=np.float32)),
        "ty": np.eye(2, dtype=np.int32)[[1, 0, 0]],
        "allx": scipy.sparse.csr_matrix(all_x),
        "ally": all_y,
        "graph": graph,
    }

    def put(part, value):
        content = value.encode() if isinstance(value, str) else value
        (tmp_path / f"ind.toy.{part}").write_bytes(content)

    for part, value in parts.items():
        put(part, python2_pickle(value))
    put("test.index", "".join(f"{i}\n" for i in TEST_IDS))
    return tmp_path, parts, put


def test_read_planetoid(files):
    folder, parts, _ = files
    citations = planetoid.read_planetoid(folder, "toy")
    a = citations.adjacency
    a_NN = np.zeros((NUM_NODES, NUM_NODES))
    for node, neighbours in parts["graph"].items():
        a_NN[node, neighbours] = a_NN[neighbours, node] = 1
    np.testing.assert_array_equal(a.toarray(), a_NN)
    assert a[3, 3] == 1
    x = citations.features.toarray()
    np.testing.assert_array_equal(x[:NUM_KNOWN], parts["allx"].toarray())
    np.testing.assert_array_equal(x[TEST_IDS], np.eye(3, 6))
    assert not x[505].any()
    np.testing.assert_array_equal(citations.labels_N[:NUM_KNOWN], np.arange(NUM_KNOWN) % 2)
    assert citations.labels_N[504:].tolist() == [0, -1, 0, 1]
    assert citations.num_classes == 2
    np.testing.assert_array_equal(citations.train_I, np.arange(4))
    np.testing.assert_array_equal(citations.validation_I, np.arange(4, 504))
    assert citations.test_I.tolist() == sorted(TEST_IDS)


@pytest.mark.parametrize("dtype", [">i4", "<i8", "u1", "f4", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_every_layout_are_read(files, dtype, order):
    folder, parts, put = files
    put("ty", python2_pickle(parts["ty"].astype(dtype, order=order)))
    labels_N = planetoid.read_planetoid(folder, "toy").labels_N
    assert labels_N[TEST_IDS].tolist() == [1, 0, 0]


# Damage ------------------------------------------------------------------------------------------


class _Hostile:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("part", ["x", "ally", "graph"])
def test_a_hostile_pickle_is_refused_and_runs_nothing(files, part):
    folder, _, put = files
    mark = folder / "ran"
    bomb = pickle.dumps(_Hostile(mark), protocol=2)
    put(part, bomb)
    with pytest.raises(
        ValueError, match=rf"ind\.toy\.{part}: .*{os.name}\.system, which is refused"
    ):
        planetoid.read_planetoid(folder, "toy")
    assert not mark.exists()
    pickle.loads(bomb)  # the same bytes do run elsewhere, so the test can fail
    assert mark.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("__builtin__", "eval"),
        ("numpy", "load"),
        ("numpy.core.multiarray", "fromfile"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("collections", "OrderedDict"),
        ("scipy.sparse._csr", "csr_matrix"),
        ("copyreg", "_reconstructor"),
    ],
)
def test_every_other_name_is_refused(files, module, name):
    folder, _, put = files
    put("graph", f"c{module}\n{name}\n.")
    with pytest.raises(ValueError, match=rf"ind\.toy\.graph: .*{module}\.{name}, which is refused"):
        planetoid.read_planetoid(folder, "toy")


def csr(**changes):
    """A matrix (504, 6) whose attributes are changed after it was made, as damage would."""
    a = scipy.sparse.csr_matrix(np.ones((NUM_KNOWN, 6), np.float32))
    for name, value in changes.items():
        setattr(a, name, value(getattr(a, name)) if callable(value) else value)
    return a


def changed(position, value):
    def change(array):
        array[position] = value
        return array

    return change


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        (
            "allx",
            csr(data=lambda a: a.astype(object)),
            "data has dtype |O8, expected integers or floats",
        ),
        ("allx", csr(data=lambda a: a[:-1]), "3023 values do not make a matrix of shape (504, 6)"),
        ("allx", csr(data=changed(5, np.nan)), "entries that are not finite"),
        ("allx", csr(indices=changed(7, 6)), "column 6, expected 0 to 5 in a matrix of"),
        ("allx", csr(indices=changed(7, -1)), "column -1, expected 0 to 5"),
        (
            "allx",
            csr(indices=lambda a: a.astype(float)),
            "indices has dtype <f8, expected integers",
        ),
        ("allx", csr(indptr=changed(3, 0)), "row starts do not rise from 0 to the 3024 entries"),
        ("allx", csr(indptr=changed(504, 3000)), "row starts do not rise"),
        ("allx", csr(indptr=lambda a: a[:-1]), "504 row starts"),
        ("allx", csr(_shape=(504, -6)), "shape (504, -6), expected two positive sizes"),
        ("allx", csr(_shape=(504, 10**12)), "expected two positive sizes"),
        ("allx", np.ones((504, 6)), "no csr_matrix, _shape, data, indices, indptr missing"),
        ("x", csr(), "x and y are not the first 504 rows"),
        ("tx", csr(), "shape (504, 6), expected (3, 6) to fit the other files"),
        ("y", np.eye(2, dtype=np.int32), "shape (2, 2), expected (4, 2) to fit"),
        ("ally", np.ones((504, 2), np.int32), "row 0 is [1 1], expected one 1 and else 0"),
        ("ty", np.zeros((3, 2), np.int32), "row 0 is [0 0], expected one 1 and else 0"),
        ("ty", np.array([[1, None]] * 3), "the array has dtype |O8, expected"),
        ("ty", np.array([1, 0, 0]), "has shape (3,), expected 2 sizes"),
        ("ty", np.ones((3, 2), bool), "the array has dtype |b1, expected integers or floats"),
        ("ty", np.ones((3, 2), complex), "the array has dtype <c16, expected"),
        ("ty", np.zeros((3, 2), [("a", "i4")]), "the array has dtype |V4, expected"),
        ("ty", [[1, 0]], "the array is of type list, expected an array"),
        ("graph", {}, "expected lists of neighbours by node, and at least one"),
        ("graph", [1], "expected lists of neighbours by node"),
        ("graph", {0: [1], 2: [0]}, "node 2, expected 0 to 1"),
        ("graph", {0: [1], "1": [0]}, "node '1', expected 0 to 1"),
        ("graph", {0: [1], 1: [2]}, "node 1 has the neighbour 2, expected 0 to 1"),
        ("graph", {0: [1], 1: [True]}, "node 1 has the neighbour True"),
        ("graph", {0: [1], 1: 0}, "neighbours of node 1 are not a list"),
        ("graph", {0: [], 1: []}, "no edges, expected at least one"),
    ],
)
def test_damaged_pickles_are_refused(files, part, value, message):
    folder, _, put = files
    if part == "x":  # then y has to fit
        put("y", python2_pickle(np.eye(2, dtype=np.int32)[np.arange(NUM_KNOWN) % 2]))
        message = "504 rows, expected 504 to train and 500 to validate at least"
        part, written = "allx", "x"
    else:
        written = part
    put(written, python2_pickle(value))
    with pytest.raises(ValueError, match=rf"ind\.toy\.{part}: .*{re.escape(message)}"):
        planetoid.read_planetoid(folder, "toy")


def test_x_has_to_begin_allx(files):
    folder, parts, put = files
    x = parts["x"].copy()
    x.data[0] = 3
    put("x", python2_pickle(x))
    with pytest.raises(ValueError, match=r"ind\.toy\.x: x and y are not the first 4 rows of allx"):
        planetoid.read_planetoid(folder, "toy")


def test_a_cut_pickle_is_refused(files):
    folder, parts, put = files
    for content in (python2_pickle(parts["allx"])[:-100], b"", b"garbage"):
        put("allx", content)
        with pytest.raises(ValueError, match=r"ind\.toy\.allx: not a pickle that can be read"):
            planetoid.read_planetoid(folder, "toy")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("507\n503\n506\n", ", line 2: id 503, expected 504 to 507, the nodes of the graph after"),
        ("507\n508\n506\n", ", line 2: id 508"),
        ("507\n\nx\n", ", line 3: 'x', expected one id"),
        ("507 1\n", ", line 1: '507 1', expected one id"),
        ("507\n506\n507\n", ": 3 ids of 2 nodes, expected each once"),
        ("", ": 0 ids of 0 nodes"),
    ],
)
def test_damaged_test_index_is_refused(files, text, message):
    folder, _, put = files
    put("test.index", text)
    with pytest.raises(ValueError, match=rf"ind\.toy\.test\.index{re.escape(message)}"):
        planetoid.read_planetoid(folder, "toy")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ind\.cora\.x: no such file"):
        planetoid.read_planetoid(tmp_path, "cora")


# The real sets -----------------------------------------------------------------------------------

MISSING = [2407, 2489, 2553, 2682, 2781, 2953, 3042, 3063]
MISSING += [3212, 3214, 3250, 3292, 3305, 3306, 3309]


@pytest.mark.parametrize(
    ("name", "shape", "num_classes", "num_edges", "num_loops", "missing"),
    [
        ("cora", (2708, 1433), 7, 5278, 0, []),
        ("citeseer", (3327, 3703), 6, 4552, 124, MISSING),
    ],
)
def test_real_citations(name, shape, num_classes, num_edges, num_loops, missing):
    citations = planetoid.read_planetoid(real_data("planetoid"), name)
    a, x = citations.adjacency, citations.features
    assert x.shape == shape
    assert x.dtype == a.dtype == np.float32
    assert citations.num_classes == num_classes
    assert (a != a.T).nnz == 0
    assert set(a.data) == set(x.data) == {1}
    assert np.count_nonzero(a.diagonal()) == num_loops
    assert a.nnz == 2 * num_edges + num_loops
    np.testing.assert_array_equal(np.flatnonzero(citations.labels_N < 0), missing)
    assert not x[missing].nnz
    assert (np.diff(a.indptr)[missing] > 0).all()
    counts = np.bincount(citations.labels_N[citations.train_I])
    assert counts.tolist() == [20] * num_classes
    assert list(map(len, citations[4:])) == [20 * num_classes, 500, 1000]
    assert len(np.unique(np.concatenate(citations[4:]))) == 20 * num_classes + 1500


def test_rows_of_test_nodes_follow_the_test_index():
    """Papers cite papers of their class and their words; rows in the order of the file do not."""
    folder = real_data("planetoid")
    citations = planetoid.read_planetoid(folder, "cora")
    inside = citations.adjacency[citations.test_I][:, citations.test_I].tocoo()
    labels_I, x_IF = citations.labels_N[citations.test_I], citations.features[citations.test_I]
    wrong_I = np.argsort(np.loadtxt(folder / "ind.cora.test.index", int))  # as if it were sorted
    wrong_I = np.argsort(wrong_I)

    def agreement(labels_I, x_IF):
        same_class = (labels_I[inside.row] == labels_I[inside.col]).mean()
        return same_class, x_IF[inside.row].multiply(x_IF[inside.col]).sum(1).mean()

    right, wrong = agreement(labels_I, x_IF), agreement(labels_I[wrong_I], x_IF[wrong_I])
    assert right[0] > 0.75
    assert wrong[0] < 0.3
    assert right[1] > 2 * wrong[1]

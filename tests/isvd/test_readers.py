"""Readers against files made here, damage of every kind, and the real sets where they are."""

import gzip
import re

import numpy as np
import pytest
import scipy.sparse

from isvd import edge_text, readers

EDGES_E2 = [[0, 1], [1, 2], [3, 1]]


def write(path, content):
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def refuses(path, message, **options):
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}{message}')}"):
        readers.read_edges(path, **options)


# The matrix --------------------------------------------------------------------------------------


@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("loops", ["keep", "drop", "add"])
@pytest.mark.parametrize("repeated", ["sum", "one"])
def test_adjacency_is_the_count_of_its_definition(directed, loops, repeated):
    edges_E2 = np.array([[0, 1], [1, 0], [1, 2], [2, 2], [4, 1], [4, 1]])
    a_NN = np.zeros((6, 6), np.float32)  # nodes 3 and 5 have no edge
    for i, j in edges_E2:
        if i != j or loops == "keep":
            a_NN[i, j] += 1
            a_NN[j, i] += not directed
    a_NN = a_NN + (np.eye(6) if loops == "add" else 0)
    a_NN = np.minimum(a_NN, 1) if repeated == "one" else a_NN
    a = readers.adjacency(edges_E2, 6, directed=directed, loops=loops, repeated=repeated)
    np.testing.assert_array_equal(a.toarray(), a_NN)
    assert isinstance(a, scipy.sparse.csr_array)
    assert a.dtype == np.float32
    assert a.has_canonical_format


@pytest.mark.parametrize(
    ("edges_E2", "num_nodes", "options", "message"),
    [
        ([], 3, {}, "edges_E2: no edges, expected at least one"),
        (np.zeros((0, 2), int), 3, {}, "edges_E2: no edges"),
        ([[0, 1]], 0, {}, "num_nodes=0: expected a whole number, 1 to 2147483647"),
        ([[0, 1]], 2.0, {}, "num_nodes=2.0: expected a whole number"),
        ([[0, 1], [1, 2]], 2, {}, r"edges_E2 has the edge \(1, 2\) in row 1, expected ids 0 to 1"),
        ([[0, -1]], 2, {}, r"edges_E2 has the edge \(0, -1\) in row 0"),
        ([0, 1], 2, {}, r"shape \(2,\), expected \(edges, 2\)"),
        ([[0, 1, 1], [1, 0, 1]], 2, {}, r"shape \(2, 3\), .*did you mean its transpose"),
        ([[0.0, 1.0]], 2, {}, "dtype float64, expected integers"),
        ([[0, 1]], 2, {"loops": "no"}, "loops='no': expected one of 'keep', 'drop', 'add'"),
        ([[0, 1]], 2, {"repeated": "mean"}, "repeated='mean': expected one of 'sum', 'one'"),
    ],
)
def test_adjacency_refuses(edges_E2, num_nodes, options, message):
    with pytest.raises(ValueError, match=message):
        readers.adjacency(edges_E2, num_nodes, **options)


# Edge lists --------------------------------------------------------------------------------------

TEXTS = {
    "snap.txt": "# Nodes: 4\n# From To\n0\t1\n1\t2\n3\t1\n",
    "spaces.edges": "  0 1\n\n1   2  \n3 1",
    "comments.txt": "% a\n0 1 # first\n\n#b\n1 2\n  % c\n3 1\n",
    "windows.txt": "# c\r\n0 1\r\n1 2\r\n3 1\r\n",
    "mark.txt": "\ufeff0 1\n1 2\n3 1\n",
    "bare.csv": "0,1\n1,2\n3,1\n",
    "header.csv": "# made by hand\nsource,target\n0, 1\n1 ,2\n3,1\n",
    "quoted.csv": '"from","to"\r\n"0","1"\r\n"1","2"\r\n"3","1"\r\n',
    "tabs.tsv": "from\tto\n0\t1\n1\t2\n3\t1\n",
    "header.txt": "source target\n0 1\n1 2\n3 1\n",
    "header.edges.gz": "# c\nsource\ttarget\n0\t1\n1\t2\n3\t1\n",
    "snap.txt.gz": "# c\n0 1\n1 2\n3 1\n",
    "plain.gz": "0 1\n1 2\n3 1\n",
    "header.csv.gz": "a,b\n0,1\n1,2\n3,1\n",
}


@pytest.mark.parametrize("name", TEXTS)
def test_every_text_gives_the_same_edges(tmp_path, name):
    graph = readers.read_edges(write(tmp_path / name, TEXTS[name]))
    np.testing.assert_array_equal(graph.edges_E2, EDGES_E2)
    assert graph.edges_E2.dtype == np.int32
    assert graph[1:] == (4, None, 0, 0)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("way", ["quick", "slow"])
def test_either_way_alone_reads_every_text(tmp_path, name, way, monkeypatch):
    other = {"quick": "_parse", "slow": "_load_numbers"}[way]
    monkeypatch.setattr(edge_text, other, lambda *_: None)
    path = write(tmp_path / name, TEXTS[name])
    np.testing.assert_array_equal(readers.read_edges(path).edges_E2, EDGES_E2)


def test_delimiter_overrides_the_suffix(tmp_path):
    path = write(tmp_path / "graph.txt", "a;b\n0;1\n1;2\n3;1\n")
    np.testing.assert_array_equal(readers.read_edges(path, delimiter=";").edges_E2, EDGES_E2)
    with pytest.raises(ValueError, match="delimiter='::': expected one character"):
        readers.read_edges(path, delimiter="::")
    with pytest.raises(ValueError, match="delimiter='': expected one character"):
        readers.read_edges(path, delimiter="")


def test_arrays_and_matrices(tmp_path):
    np.save(tmp_path / "edges.npy", np.array(EDGES_E2, np.uint16))
    np.testing.assert_array_equal(readers.read_edges(tmp_path / "edges.npy").edges_E2, EDGES_E2)
    for directed in (False, True):
        a = readers.adjacency(EDGES_E2, 7, directed=directed)
        for layout in ("csr", "csc", "coo", "bsr"):
            scipy.sparse.save_npz(tmp_path / "a.npz", a.asformat(layout))
            graph = readers.read_edges(tmp_path / "a.npz", directed=directed)
            assert graph.num_nodes == 7
            assert graph.num_repeated == (0 if directed else 3)  # the reverse arcs
            again = readers.adjacency(*graph[:2], directed=directed)
            assert (again != a).nnz == 0
    assert readers.read_edges(tmp_path / "a.npz", num_nodes=9).num_nodes == 9
    assert readers.read_edges(tmp_path / "a.npz", remap=True).num_nodes == 4


def test_repeated_edges_and_loops(tmp_path):
    path = write(tmp_path / "g.txt", "2 1\n0 0\n1 2\n2 1\n0 0\n0 1\n")
    graph = readers.read_edges(path)
    np.testing.assert_array_equal(graph.edges_E2, [[2, 1], [0, 0], [0, 1]])
    assert graph[1:] == (3, None, 3, 1)
    graph = readers.read_edges(path, directed=True)
    np.testing.assert_array_equal(graph.edges_E2, [[2, 1], [0, 0], [1, 2], [0, 1]])
    assert graph[1:] == (3, None, 2, 1)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("70 5\n5 1000000000000\n", [5, 70, 10**12]),
        ("-1 5\n5 2\n", [-1, 2, 5]),
        ("b a\na ünö\n", ["a", "b", "ünö"]),
        ("7 b\nb 11\n", ["11", "7", "b"]),  # one name makes all of them names
    ],
)
@pytest.mark.parametrize("remap", [None, True])
def test_ids_that_are_scattered_or_names_are_remapped(tmp_path, text, names, remap):
    graph = readers.read_edges(write(tmp_path / "g.txt", text), remap=remap, header=False)
    assert graph.names.tolist() == names
    assert graph.num_nodes == 3
    named_E2 = [line.split() for line in text.splitlines()]
    assert graph.names[graph.edges_E2].astype(str).tolist() == named_E2


def test_remap_and_num_nodes_decide(tmp_path):
    path = write(tmp_path / "g.txt", "1 2\n2 9\n")
    assert readers.read_edges(path).names.tolist() == [1, 2, 9]
    assert readers.read_edges(path, remap=False)[1:3] == (10, None)
    assert readers.read_edges(path, num_nodes=12)[1:3] == (12, None)
    dense = write(tmp_path / "dense.txt", "1 2\n2 3\n")
    assert readers.read_edges(dense)[1:3] == (4, None)
    assert readers.read_edges(dense, remap=True).names.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="num_nodes=12 and remap=True: give one"):
        readers.read_edges(path, num_nodes=12, remap=True)
    with pytest.raises(ValueError, match="num_nodes=0: expected a whole number"):
        readers.read_edges(path, num_nodes=0)


def test_extra_columns_are_refused_unless_ignored(tmp_path):
    path = write(tmp_path / "g.csv", "from,to,weight\n0,1,0.5\n1,2,x\n3,1,2\n")
    refuses(path, ", line 2: 3 columns, expected 2; ignore_extra=True leaves the others aside")
    np.testing.assert_array_equal(readers.read_edges(path, ignore_extra=True).edges_E2, EDGES_E2)
    path = tmp_path / "w.npz"
    scipy.sparse.save_npz(path, scipy.sparse.csr_array(np.array([[0, 2.5], [0, 1]])))
    refuses(path, ": an entry is 2.5, expected 0 or 1")
    edges_E2 = readers.read_edges(path, ignore_extra=True).edges_E2
    np.testing.assert_array_equal(edges_E2, [[0, 1], [1, 1]])


def test_names_below_a_header_need_a_word(tmp_path):
    path = write(tmp_path / "g.csv", 'who,whom\n"Li, A.",bo\n')
    refuses(path, ", line 1: 'who,whom' may be a header or an edge; give header=True or")
    assert readers.read_edges(path, header=True).names.tolist() == ["Li, A.", "bo"]
    assert readers.read_edges(path, header=False).num_nodes == 4
    path = write(tmp_path / "g.txt", "from to\n0 1\n")
    assert readers.read_edges(path, header=True).num_nodes == 2
    path = write(tmp_path / "g.txt", "who whom\nann bo\n")
    refuses(path, ", line 1: 'who whom' may be a header or an edge; give header=True or")
    assert readers.read_edges(path, header=True).names.tolist() == ["ann", "bo"]
    assert readers.read_edges(path, header=False).num_nodes == 4


@pytest.mark.parametrize("mark", [",", ";"])
@pytest.mark.parametrize(
    ("text", "line", "options"),
    [
        ("0, 1\n1, 2\n", 1, {}),
        ("0, 1\n1, 2\n", 1, {"num_nodes": 3}),
        ("0 ,1\n1 ,2\n", 1, {}),
        ("0 , 1\n1 , 2\n", 1, {"ignore_extra": True}),
        ("0, 1, .5\n1, 2, .5\n", 1, {}),
        ("# c\nann, bo\nbo, cy\n", 2, {}),
        ("from, to\n0, 1\n", 2, {}),
        ("0 1\n1, 2\n", 2, {}),
    ],
)
def test_another_delimiter_beside_white_space_is_no_part_of_a_name(
    tmp_path, text, line, options, mark
):
    path = write(tmp_path / "g.txt", text.replace(",", mark))
    refuses(path, f", line {line}: a '{mark}' stands at the white space between", **options)
    with pytest.raises(ValueError, match=f"give delimiter='{mark}'$"):
        readers.read_edges(path, **options)


def test_the_remedy_reads_what_was_refused(tmp_path):
    np.savetxt(tmp_path / "g.txt", EDGES_E2, "%d", delimiter=", ")
    graph = readers.read_edges(tmp_path / "g.txt", delimiter=",")
    np.testing.assert_array_equal(graph.edges_E2, EDGES_E2)
    spaced = write(tmp_path / "g.edges", "a, b;\n")  # where they are parts of names
    names = readers.read_edges(spaced, delimiter=" ", header=False).names
    assert names.tolist() == ["a,", "b;"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("g.txt", "", ": no edges, expected at least one row"),
        ("g.txt", "# only\n\n", ": no edges, expected at least one row"),
        ("g.csv", "", ": no edges, expected at least one row"),
        ("g.txt.gz", "", ": no edges, expected at least one row"),
        ("g.txt", "# c\n0 1\n\n2\n", ", line 4: 1 column, expected 2"),
        ("g.txt", "# c\r\n0 1\r\n2 3 4\r\n", ", line 3: 3 columns, expected 2"),
        ("g.txt", "0 1\n1 1.5\n", ", line 2: '1.5' is not a whole number, as in the first row"),
        ("g.txt", "0 1\n1 2.0\n", ", line 2: '2.0' is not a whole number"),
        ("g.txt", "0 1\n1 two\n", ", line 2: 'two' is not a whole number"),
        ("g.txt", "0 1\n1 1_0\n", ", line 2: '1_0' is not a whole number"),
        ("g.txt", "0 1\n1 2\0\n", r", line 2: '2\x00' is not a whole number"),
        ("g.txt", f"0 1\n{2**63} 1\n", ", line 2: id 9223372036854775808 is over 63 bits"),
        ("g.txt", b"7 b\ncaf\xe9 b\n", r", line 2: 'caf\udce9' is not a name in UTF-8"),
        ("g.csv", "a,b\n0,1\n1,\n", ", line 3: '' is not a whole number"),
        ("g.csv", "0,1\n\n1;2\n", ", line 3: 1 column, expected 2"),
        ("g.csv.gz", "0,1\n\nx,2\n", ", line 3: 'x' is not a whole number"),
        # Not whether the first row is a header: neither answer would help.
        ("g.csv", "0;14\n1;15\n", ", line 2: 1 column, expected 2; give delimiter=';'"),
        ("g.csv", "ann;bo\n", ", line 1: 1 column, expected 2; give delimiter=';'"),
        ("g.tsv", "a|b\nc|d\n", ", line 2: 1 column, expected 2; give delimiter='|'"),
        ("g.csv", "0,14\n1,15\n".encode("utf-16"), r", line 2: '\x001\x00' is not a name in UTF-8"),
        ("g.graphml", "0 1\n", ": unknown suffix '.graphml', known are .npy"),
        ("g.npy.gz", "0 1\n", ": unknown suffix '.npy.gz'"),
        ("g.npy", "", ": not an array of numpy that can be read"),
        ("g.npy", "0 1\n", ": not an array of numpy that can be read"),
        ("g.npz", "0 1\n", ": not a sparse matrix of scipy"),
    ],
)
def test_damage_is_refused_with_its_place(tmp_path, name, content, message):
    refuses(write(tmp_path / name, content), message)


def test_ids_out_of_range_are_refused_with_their_line(tmp_path):
    path = write(tmp_path / "g.csv", "# c\na,b\n0,1\n\n1,7\n-3,1\n")
    refuses(path, ", line 5: edge (1, 7), expected ids 0 to 6", num_nodes=7)
    refuses(path, ", line 6: edge (-3, 1), expected ids 0 to 7; remap=True takes", remap=False)
    path = write(tmp_path / "g.txt", f"0 1\n1 {2**31 - 1}\n")
    refuses(path, ", line 2: edge (1, 2147483647), expected ids 0 to 2147483646", remap=False)
    path = write(tmp_path / "names.txt", "0 1\nb 1\n")
    refuses(path, ", line 2: 'b' is not a whole number, for ids are not remapped", num_nodes=3)
    path = tmp_path / "g.npy"
    np.save(path, [[0, 1], [1, -2]])
    refuses(path, ", row 1: edge (1, -2), expected ids 0 to 1", remap=False)


def test_a_cut_gzip_file_is_refused(tmp_path):
    rows = "".join(f"{i} {i * i % 5003}\n" for i in range(5000))
    path = write(tmp_path / "g.txt.gz", rows)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(
        ValueError, match=r"g\.txt\.gz, line \d+: damaged gzip file: Compressed file"
    ):
        readers.read_edges(path)
    write(path.with_suffix(""), rows).rename(path)
    refuses(path, ", line 1: damaged gzip file: Not a gzipped file")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 3), int), " has shape (3, 3), expected (edges, 2)"),
        (np.zeros((0, 2), int), ": no edges"),
        (np.zeros((3, 2)), " has dtype float64, expected integers"),
        (np.array([[0, 2**63]], np.uint64), ": id 9223372036854775808 is over 63 bits"),
        (np.array([[0, None]]), ": not an array of numpy that can be read: Object arrays"),
    ],
)
def test_arrays_of_another_kind_are_refused(tmp_path, array, message):
    np.save(tmp_path / "g.npy", array, allow_pickle=True)
    refuses(tmp_path / "g.npy", message)


def test_matrices_of_another_kind_are_refused(tmp_path):
    path = tmp_path / "g.npz"
    scipy.sparse.save_npz(path, scipy.sparse.csr_array((3, 4)))
    refuses(path, ": a matrix of shape (3, 4), expected a square one")
    scipy.sparse.save_npz(path, scipy.sparse.csr_array((3, 3)))
    refuses(path, ": no edges, expected at least one nonzero entry")
    a = scipy.sparse.csr_array(np.eye(3))
    a.indices[1] = 8
    scipy.sparse.save_npz(path, a)
    refuses(path, ": not a sparse matrix of scipy: ")
    path.write_bytes(path.read_bytes()[:-40])
    refuses(path, ": not a sparse matrix of scipy: ")
    refuses(path, ": delimiter and header are for texts", header=True)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.txt: no such file"):
        readers.read_edges(tmp_path / "none.txt")
    with pytest.raises(FileNotFoundError, match=r"train\.txt\.npy: no such file"):
        readers.read_asymproj(tmp_path)

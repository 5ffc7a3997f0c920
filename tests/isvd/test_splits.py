"""Splits of edges for training and test, drawn and read, and the real sets where they are."""

import numpy as np
import pytest
from graph_files import real_data

from isvd import readers

EDGES_E2 = [[0, 1], [1, 2], [3, 1]]


def pairs(edges_E2):
    return {tuple(sorted(pair)) for pair in edges_E2.tolist()}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_split_edges_is_a_partition_with_true_negatives(seed):
    edges_E2 = np.random.default_rng(seed).integers(0, 40, (300, 2))
    split = readers.split_edges(edges_E2, 45, fraction=0.25, seed=seed)
    every = {pair for pair in pairs(edges_E2) if pair[0] != pair[1]}
    train, test, negative = map(pairs, split[:3])
    assert train | test == every
    assert len(train) + len(test) == len(every)
    assert len(test) == len(split.test_E2) == round(0.25 * len(every))
    assert len(negative) == len(split.test_negative_E2) == len(test)
    assert not negative & every
    assert all(0 <= i < j < 45 for i, j in negative)
    assert {part.dtype for part in split[:3]} == {np.dtype(np.int32)}
    for seeds, same in (((seed, seed), True), ((seed, seed + 7), False)):
        parts = [readers.split_edges(edges_E2, 45, fraction=0.25, seed=s)[:3] for s in seeds]
        assert all(np.array_equal(*both) == same for both in zip(*parts, strict=True))


def test_negatives_are_uniform_over_the_pairs_without_an_edge():
    edges_E2 = np.array([[1, 0], [3, 4], [2, 2], [0, 1], [1, 3]])
    free = {(i, j) for j in range(5) for i in range(j)} - pairs(edges_E2)
    counts = dict.fromkeys(free, 0)
    for seed in range(1400):
        for pair in pairs(readers.split_edges(edges_E2, 5, fraction=0.4, seed=seed)[2]):
            counts[pair] += 1
    # 1400 draws of one pair out of 7: 200 each, standard deviation 13.
    assert len(counts) == 7
    assert all(abs(count - 200) < 66 for count in counts.values())


def test_all_free_pairs_can_be_taken():
    edges_E2 = np.array([(i, j) for j in range(6) for i in range(j)])[:-3]
    split = readers.split_edges(edges_E2, 6, fraction=0.25, seed=0)  # 3 of 12, and 3 pairs are free
    assert pairs(split.test_negative_E2) == {(2, 5), (3, 5), (4, 5)}
    with pytest.raises(ValueError, match="4 edges to hold out but only 3 of 15 pairs have no edge"):
        readers.split_edges(edges_E2, 6, fraction=0.33, seed=0)


def test_numbers_of_pairs_are_exact_for_the_largest_graphs():
    high_E = np.array([1, 2, 3, 10**5, 2**26 + 1, 2**31 - 2], np.int64)
    for low_E in (0 * high_E, high_E // 2, high_E - 1):
        pairs_E2 = readers._numbered_pairs(high_E * (high_E - 1) // 2 + low_E)
        np.testing.assert_array_equal(pairs_E2, np.stack([low_E, high_E], 1))


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 2, float("nan")])
def test_split_edges_refuses_fractions(fraction):
    with pytest.raises(ValueError, match=f"fraction={fraction}: expected a number between 0 and 1"):
        readers.split_edges(EDGES_E2, 4, fraction=fraction, seed=0)


def test_split_edges_needs_two_edges():
    with pytest.raises(ValueError, match="1 distinct edges without loops, expected at least 2"):
        readers.split_edges([[0, 1], [1, 0], [2, 2]], 4, fraction=0.5, seed=0)
    with pytest.raises(ValueError, match="no edges"):
        readers.split_edges(np.zeros((0, 2), int), 4, fraction=0.5, seed=0)


def write_asymproj(folder, train, test, negative):
    for name, edges in (("train", train), ("test", test), ("test.neg", negative)):
        np.save(folder / f"{name}.txt.npy", np.array(edges, np.int32))


def test_read_asymproj(tmp_path):
    write_asymproj(tmp_path, EDGES_E2, [[3, 3], [0, 2]], [[2, 3]])
    split = readers.read_asymproj(tmp_path)
    assert split.num_nodes == 4
    assert [part.tolist() for part in split[:3]] == [EDGES_E2, [[3, 3], [0, 2]], [[2, 3]]]
    assert {part.dtype for part in split[:3]} == {np.dtype(np.int32)}


@pytest.mark.parametrize(
    ("test", "negative", "message"),
    [
        ([[0, 4]], [[2, 3]], r"test\.txt\.npy has the edge \(0, 4\) in row 0, expected ids 0 to 3"),
        ([[0, 3]], [[2, -3]], r"test\.neg\.txt\.npy has the edge \(2, -3\) in row 0"),
        (
            [[0, 3]],
            [[0, 2], [2, 1], [1, 3]],
            r"test\.neg\.txt\.npy: 2 of 3 negatives are edges of train\.txt\.npy, .* \(2, 1\)$",
        ),
        (
            [[0, 3], [2, 1]],
            [[2, 3]],
            r"/test\.txt\.npy: 1 of 2 test edges are edges of train\.txt\.npy, .* \(2, 1\)$",
        ),
        ([[0, 3]], [[3, 0]], r"1 of 1 negatives are edges of test\.txt\.npy, .* \(3, 0\)$"),
        ([[0, 3]], [[0.5, 3]], None),
        (np.zeros((0, 2)), [[0, 3]], r"test\.txt\.npy: no edges"),
    ],
)
def test_read_asymproj_refuses(tmp_path, test, negative, message):
    write_asymproj(tmp_path, EDGES_E2, test, negative)
    if message is None:
        np.save(tmp_path / "test.neg.txt.npy", negative)
        message = r"test\.neg\.txt\.npy has dtype float64, expected integers"
    with pytest.raises(ValueError, match=message):
        readers.read_asymproj(tmp_path)


@pytest.mark.parametrize(
    ("name", "sizes", "num_nodes", "num_entries", "max_degree", "num_loops"),
    [
        ("ppi", (19349, 19356, 19356), 3852, 38294, 300, 404),
        ("ca-HepTh", (13330, 11496, 11496), 8638, 26652, 31, 8),
    ],
)
def test_real_splits(name, sizes, num_nodes, num_entries, max_degree, num_loops):
    split = readers.read_asymproj(real_data("asymproj", name))
    assert tuple(map(len, split[:3])) == sizes
    assert split.num_nodes == num_nodes
    a = readers.adjacency(split.train_E2, num_nodes)
    assert a.nnz == num_entries
    assert a.sum(1).max() == max_degree
    assert (a.diagonal() == 2).sum() == a.diagonal().astype(bool).sum() == num_loops
    graph = readers.read_edges(real_data("asymproj", name, "train.txt.npy"))
    np.testing.assert_array_equal(graph.edges_E2, split.train_E2)
    assert graph[1:] == (num_nodes, None, 0, num_loops)

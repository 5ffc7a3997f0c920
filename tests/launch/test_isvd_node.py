"""The node classification program on a planted graph; tests/test_readme.py runs it on Cora."""

import functools
import re
from collections import defaultdict

import jax
import numpy as np
import programs
import pytest
import scipy.sparse
from graph_files import python2_pickle
from programs import fixture_for, summary

from isvd import metrics, node_features, nodeclass, planetoid
from launch import isvd_node

NUM_TRAIN, NUM_KNOWN, NUM_TEST, NUM_WORDS = 8, 508, 40, 20
# The smallest that still has everything.
SMALL = ("--embedding_rank=3", "--pca_rank=6", "--num_hops=2", "--rank=2,4", "--dropout_copies=2")
SMALL += ("--ridge=0,0.1",)
OPTIONS = {"embedding_rank": 3, "pca_rank": 6, "num_hops": 2, "ranks": (2, 4)}

program = fixture_for(isvd_node)
assert_refused = functools.partial(programs.assert_refused, program="isvd_node")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two classes, even and odd nodes: most edges and most words are of one class."""
    folder, rng = tmp_path_factory.mktemp("planetoid"), np.random.default_rng(0)
    num_nodes = NUM_KNOWN + NUM_TEST
    label_N = np.arange(num_nodes) % 2
    of_label_W = np.arange(NUM_WORDS) % 2
    often = np.where(label_N[:, None] == of_label_W, 0.5, 0.1)
    words = (rng.random((num_nodes, NUM_WORDS)) < often).astype(np.float32)
    graph = defaultdict(list)
    for i in range(num_nodes):
        same = 2 * rng.integers(0, num_nodes // 2, 3) + label_N[i]
        graph[i] = [int(j) for j in (*same, rng.integers(num_nodes))]
    one_hot = np.eye(2, dtype=np.int32)[label_N]
    parts = {
        "x": scipy.sparse.csr_matrix(words[:NUM_TRAIN]),
        "y": one_hot[:NUM_TRAIN],
        "tx": scipy.sparse.csr_matrix(words[NUM_KNOWN:]),
        "ty": one_hot[NUM_KNOWN:],
        "allx": scipy.sparse.csr_matrix(words[:NUM_KNOWN]),
        "ally": one_hot[:NUM_KNOWN],
        "graph": graph,
    }
    for part, value in parts.items():
        (folder / f"ind.cora.{part}").write_bytes(python2_pickle(value))
    index = "".join(f"{i}\n" for i in range(NUM_KNOWN, num_nodes))
    (folder / "ind.cora.test.index").write_text(index)
    return folder


# Results -----------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_the_library(dataset, tmp_path, program):
    workdir = tmp_path / "run"
    flags = (f"--dataset={dataset}", *SMALL, "--seeds=2")
    answer = program(*flags, f"--workdir={workdir}")
    said = summary(answer)
    data = planetoid.read_planetoid(dataset, "cora")
    nodes = (data.adjacency, data.features, data.labels_N, data.train_I, data.validation_I)
    keys = [jax.random.fold_in(jax.random.key(0), 1 + i) for i in range(2)]
    options = OPTIONS | {"ridges": (0.0, 0.1), "draws": 2}
    fits = [nodeclass.classify(*nodes, key, **options) for key in keys]
    test = [metrics.accuracy(fit.scores_NC, data.labels_N, data.test_I) for fit in fits]
    assert list(said)[:4] == ["program", "workdir", "seconds", "steps"]
    assert said["test_accuracy_by_seed"] == test
    assert said["test_accuracy"] == pytest.approx(np.mean(test))
    assert said["test_accuracy_std"] == pytest.approx(np.std(test))
    wanted = np.mean([fit.accuracy_RP.max() for fit in fits])
    assert said["validation_accuracy"] == pytest.approx(wanted)
    assert said["validation_accuracy"] > 0.9
    assert said["rank_by_seed"] == [fit.rank for fit in fits]
    assert said["ridge_by_seed"] == [fit.ridge for fit in fits]
    assert said["rank"] in said["rank_by_seed"]
    assert said["ridge"] in said["ridge_by_seed"]
    assert (said["steps"], said["seeds"], said["name"]) == (0, 2, "cora")
    assert "deepened_test_accuracy" not in said
    assert "seed 2/2  validation " in answer[2]
    assert re.search(r"training rows with dropout: \d+ products, residual \S+ of", answer[2])

    with np.load(workdir / "predictions.npz") as saved:
        right = saved["predicted"] == saved["labels"]
        assert right[:, saved["test"]].mean(1).tolist() == test
        np.testing.assert_array_equal(saved["scores"][1], fits[1].scores_NC)
        assert saved["ranks"].tolist() == [2, 4]
        assert saved["ridges"].tolist() == [0, 0.1]
        np.testing.assert_array_equal(saved["validation_accuracy"][0], fits[0].accuracy_RP)
    key = jax.random.split(jax.random.split(keys[0])[0])[0]
    embedding_NR = node_features.node_embedding(data.adjacency, key, rank=3)
    with np.load(workdir / "embeddings.npz") as saved:
        assert set(saved) == {"left", "right", "singular_values", "residual"}
        both_NR = np.hstack([saved["left"], saved["right"]])
        np.testing.assert_allclose(both_NR, embedding_NR, atol=1e-5)
        wanted = (saved["left"] ** 2).sum(0)
        np.testing.assert_allclose(saved["singular_values"], wanted, rtol=1e-4)
        assert (saved["residual"] <= 1e-4 * saved["singular_values"][0]).all()
    for name in ("validation", "spectrum", "embedding"):
        assert (workdir / "figures" / f"{name}.png").stat().st_size > 1000

    again = summary(program(*flags, f"--workdir={workdir}"))
    assert {**again, "seconds": 0} == {**said, "seconds": 0}


def test_deepened(dataset, tmp_path, program):
    # The same sizes as those of SMALL, so that its programs serve again.
    deep = ("--deepen", "--deepen_steps=3", "--deepen_hops=2", "--deepen_pca_rank=6")
    deep += ("--deepen_embedding_rank=3", "--deepen_lr=0.1", "--nofigures")
    flags = (f"--dataset={dataset}", *SMALL, *deep)
    answer = program(*flags, f"--workdir={tmp_path / 'run'}")
    said = summary(answer)
    assert said["steps"] == 3
    # The network starts as the closed form, and validation nodes choose.
    assert said["deepened_validation_accuracy"] >= said["shallow_validation_accuracy"]
    assert 0.5 < said["deepened_test_accuracy"] <= 1
    assert 0.5 < said["shallow_test_accuracy"] <= 1
    assert 0 <= said["deepened_best_step_by_seed"][0] <= 3
    with np.load(tmp_path / "run" / "predictions.npz") as saved:
        right_N = saved["deepened_predicted"][0] == saved["labels"]
        assert right_N[saved["test"]].mean() == said["deepened_test_accuracy"]
        right_N = saved["deepened_predicted"][0][saved["validation"]]
        right_N = right_N == saved["labels"][saved["validation"]]
        assert right_N.mean() == said["deepened_validation_accuracy"]
    assert "smaller design: test " in answer[2]


@pytest.mark.parametrize(("copies", "ranks"), [(1, [16]), (0, [8])])
def test_ranks_are_tried_as_far_as_there_are_so_many(copies, ranks, dataset, tmp_path, program):
    flags = (f"--dataset={dataset}", "--embedding_rank=2", "--num_hops=1", "--pca_rank=none")
    workdir = tmp_path / "run"
    answer = program(*flags, f"--dropout_copies={copies}", f"--workdir={workdir}")
    assert summary(answer)["rank_by_seed"] == ranks
    # Two dimensions leave no second and third to show.
    assert "no figure of the embedding: it shows dimensions 2 and 3, and there are 2" in answer[2]
    assert not (workdir / "figures" / "embedding.png").exists()
    with np.load(workdir / "predictions.npz") as saved:
        assert saved["ranks"].tolist() == ranks
        assert saved["validation_accuracy"].shape == (1, 1, 3)


def test_passes_are_told_on_request(dataset, tmp_path, program):
    """They are no part of the settings: the numbers do not depend on them."""
    flags = (f"--dataset={dataset}", *SMALL, "--nofigures", f"--workdir={tmp_path / 'run'}")
    answer = program(*flags, "--report_passes")
    said = summary(answer)
    passes = re.findall(r"^(\d+) products: residual (\S+) of the largest value$", answer[2], re.M)
    (walks,) = re.findall(r"^walks: (\d+) products, residual", answer[2], re.M)
    assert passes
    assert int(passes[-1][0]) <= int(walks)
    again = program(*flags)
    assert {**summary(again), "seconds": 0} == {**said, "seconds": 0}
    assert "products: residual" not in again[2]


def test_nodes_are_coloured_by_their_label():
    left_NK, labels_N = np.random.default_rng(0).normal(size=(6, 3)), np.array([2, -1, 0, 2, 0, 1])
    (axes,) = isvd_node._embedding(left_NK, labels_N).axes
    (points,) = axes.collections
    order_N = [1, 0, 2, 3, 4, 5]  # without a label below the others
    np.testing.assert_allclose(points.get_offsets(), left_NK[order_N, 1:])
    np.testing.assert_array_equal(points.get_array(), labels_N[order_N])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        f"$\\mathdefault{{{label}}}$" for label in ("−1", "0", "1", "2")
    ]


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--dataset=",), "--dataset=: expected a folder with the files of Planetoid"),
        (("--dataset=/nonexistent",), "--dataset=/nonexistent: expected a folder with the files"),
        (("--name=citeseer",), "ind.citeseer.x: no such file; expected the files ind.citeseer.*"),
        (("--name=karate",), "--name=karate: expected one of cora, citeseer, pubmed"),
        (("--embedding_rank=549",), "--embedding_rank=549: expected 1 to 548, the nodes of"),
        (("--embedding_rank=0",), "--embedding_rank=0: expected an integer at least 1"),
        (
            ("--deepen", "--deepen_embedding_rank=549"),
            "--deepen_embedding_rank=549: expected 1 to 548, the nodes of the graph",
        ),
        (("--rank=4,17",), "--rank=4,17: expected numbers from 1 to 16, the rows (8 training"),
        (("--rank=9", "--dropout_copies=0"), "--rank=9: expected numbers from 1 to 8, the rows"),
        (("--rank=1.5",), "--rank=1.5: expected a comma-separated list, each an integer at least"),
        (("--rank=4,4",), "--rank=4,4: expected each number once"),
        (("--rank=",), "--rank=: expected one number at least"),
        (("--ridge=",), "--ridge=: expected one number at least"),
        (("--ridge=-1",), "--ridge=-1: expected a comma-separated list, each a finite number at"),
        (("--ridge=1e39",), "--ridge=1e39: expected a comma-separated list, each a finite number"),
        (("--num_hops=-1",), "--num_hops=-1: expected an integer at least 0"),
        (("--num_hops=100000000000",), "expected an integer at least 0 and at most 1000"),
        (("--dropout_copies=-1",), "--dropout_copies=-1: expected an integer at least 0"),
        (("--dropout_copies=99999999999",), "expected an integer at least 0 and at most 10000"),
        (("--deepen_hops=100000000000",), "expected an integer at least 0 and at most 1000"),
        (("--deepen_steps=99999999999",), "expected an integer at least 1 and at most 1000000"),
        (("--seeds=99999999999",), "expected an integer at least 1 and at most 1000000"),
        (("--preset=best",), "--preset=best: expected one of accurate, paper"),
    ],
)
def test_bad_flags(flags, words, dataset, tmp_path, program):
    answer = program(f"--dataset={dataset}", f"--workdir={tmp_path / 'run'}", *flags)
    assert_refused(answer, words)
    assert not (tmp_path / "run").exists()


def test_damaged_and_changed_files(dataset, tmp_path, program):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in dataset.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "ind.cora.tx").write_bytes(b"\x80\x02")
    flags = (f"--dataset={copy}", f"--workdir={tmp_path / 'run'}")
    assert_refused(program(*flags), f"--dataset={copy}: {copy}/ind.cora.tx: not a pickle")
    one_class = np.eye(2, dtype=np.int32)[np.zeros(NUM_TRAIN, int)]
    (copy / "ind.cora.tx").write_bytes((dataset / "ind.cora.tx").read_bytes())
    (copy / "ind.cora.y").write_bytes(python2_pickle(one_class))
    assert_refused(program(*flags), "ind.cora.x: x and y are not the first 8 rows of allx")
    all_y = np.eye(2, dtype=np.int32)[np.arange(NUM_KNOWN) % 2 * (np.arange(NUM_KNOWN) >= 8)]
    (copy / "ind.cora.ally").write_bytes(python2_pickle(all_y))
    assert_refused(program(*flags), "its training nodes have one class, expected two or more")
    assert not (tmp_path / "run").exists()


def test_a_foreign_folder_is_refused(dataset, tmp_path, program):
    (tmp_path / "thesis.txt").write_text("mine")
    answer = program(f"--dataset={dataset}", f"--workdir={tmp_path}")
    assert_refused(answer, f"--workdir={tmp_path}: holds files but no config.json")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]

"""The factorisation program: files, last line, refusals; and what all isvd programs share."""

import functools
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import programs
import pytest
import scipy.sparse
from programs import contents, fixture_for, summary

import isvd
from isvd import readers
from launch import isvd_common, isvd_factorize

SHAPE = (30, 20)
EDGES = "0 1\n1 2\n2 0\n3 1\n4 4\n5 0\n"

program = fixture_for(isvd_factorize, "--devices=1")
assert_refused = functools.partial(programs.assert_refused, program="isvd_factorize")


def matrix(seed=0, shape=SHAPE):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.fixture
def dense(tmp_path):
    np.save(tmp_path / "a.npy", matrix())
    return tmp_path / "a.npy"


# Results -----------------------------------------------------------------------------------------


def test_each_pass_is_shown_and_recorded(program, tmp_path):
    a = scipy.sparse.random_array((100, 80), density=0.2, rng=0)
    scipy.sparse.save_npz(tmp_path / "a.npz", a)
    answer = program(f"--matrix={tmp_path}/a.npz", "--rank=4", f"--workdir={tmp_path}/run")
    result = summary(answer)
    assert result["devices"] == 1
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    passes = [row for row in rows if "finished" not in row]
    last = 4 if passes[-1]["products"] > 20 * 4 else 0  # for the values, after many passes
    assert passes[-1]["products"] + last == result["products"]
    # That last product also shows |A v - s u|, which is at rounding.
    rounding = 30 * np.finfo("f").eps if last else 0
    assert passes[-1]["residual"] <= 1.0001 * result["residual"]
    assert result["residual"] <= 1.0001 * np.hypot(passes[-1]["residual"], rounding)
    for row in passes:
        assert f"{row['products']} products: residual {row['residual']:.1e}" in answer[2]


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_rows_are_spread_over_devices(kind, program, tmp_path):
    """As many rows as eight devices divide, or not; a finished run is any number's."""
    a = scipy.sparse.random_array((100, 80), density=0.2, rng=0) * 0.8 ** np.arange(80)
    path = tmp_path / ("a.npz" if kind == "sparse" else "a.npy")
    scipy.sparse.save_npz(path, a) if kind == "sparse" else np.save(path, a.toarray())
    flags = (f"--matrix={path}", "--rank=4", f"--workdir={tmp_path}/run")
    said = summary(program(*flags, "--devices=0"))
    assert said["devices"] == jax.device_count() == 8
    wanted_K = np.linalg.svd(a.toarray(), compute_uv=False)[:4]
    np.testing.assert_allclose(said["singular_values"], wanted_K, rtol=1e-5)
    with np.load(tmp_path / "run/factors.npz") as factors:
        product = factors["u"].T @ a.toarray() @ factors["v"]
    np.testing.assert_allclose(product, np.diag(wanted_K), atol=1e-4 * wanted_K[0])
    assert summary(program(*flags, "--devices=2"))["singular_values"] == said["singular_values"]


def saved_as(kind, tmp_path):
    """(path, further flags, the operator that the file describes, its dense twin)."""
    if kind == "dense":
        np.save(tmp_path / "a.npy", matrix())
        a_MN = matrix().astype("f")
        return tmp_path / "a.npy", (), isvd.dense(a_MN), a_MN
    if kind == "sparse":
        a = scipy.sparse.random_array(SHAPE, density=0.3, rng=0, format="coo")
        scipy.sparse.save_npz(tmp_path / "a.npz", a)
        return tmp_path / "a.npz", (), isvd.sparse(a.astype("f")), a.toarray()
    if kind == "integers":
        a_MN = np.arange(12).reshape(3, 4)
        np.save(tmp_path / "a.npy", a_MN)
        return tmp_path / "a.npy", (), isvd.dense(a_MN.astype("f")), a_MN
    if kind == "complex":
        a_MN = matrix() + 1j * matrix(1)
        np.save(tmp_path / "a.npy", a_MN)
        return tmp_path / "a.npy", (), isvd.dense(a_MN.astype("F")), a_MN
    (tmp_path / "a.txt").write_text(EDGES)
    edges_E2 = [list(map(int, line.split())) for line in EDGES.splitlines()]
    a = readers.adjacency(edges_E2, 6, directed=kind == "directed")
    flags = ("--directed",) if kind == "directed" else ()
    return tmp_path / "a.txt", flags, isvd.sparse(a), a.toarray()


@pytest.mark.parametrize("kind", ["dense", "sparse", "integers", "complex", "edges", "directed"])
def test_the_numbers_are_those_of_the_library(kind, tmp_path, program):
    path, flags, op, a_MN = saved_as(kind, tmp_path)
    workdir = tmp_path / "run"
    said = summary(program(f"--matrix={path}", "--rank=3", f"--workdir={workdir}", *flags))
    wanted = isvd.svd(op, jax.random.fold_in(jax.random.key(0), 1), rank=3)
    assert list(said)[:4] == ["program", "workdir", "seconds", "products"]
    assert (said["program"], said["workdir"]) == ("isvd_factorize", str(workdir))
    assert said["seconds"] > said["seconds_factorize"] > 0
    np.testing.assert_allclose(said["singular_values"], wanted.s_K, rtol=1e-5)
    assert said["residual"] <= 1e-5
    assert (said["products"], said["converged"]) == (int(wanted.products), True)
    assert (said["rank"], said["shape"]) == (3, list(a_MN.shape))
    with np.load(workdir / "factors.npz") as factors:
        assert set(factors) == {"u", "s", "v", "residual"}
        u_MK, s_K, v_NK = factors["u"], factors["s"], factors["v"]
        np.testing.assert_allclose(s_K, said["singular_values"])
        np.testing.assert_allclose(a_MN @ v_NK, u_MK * s_K, atol=1e-5 * s_K[0])
    assert (workdir / "figures" / "spectrum.png").stat().st_size > 1000
    config = json.loads((workdir / "config.json").read_text())
    assert (config["program"], config["matrix"], config["rank"]) == ("isvd_factorize", str(path), 3)
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["singular_values"] == said["singular_values"]


def test_names_headers_and_further_columns_of_an_edge_list(tmp_path, program):
    path, workdir = tmp_path / "a.csv", tmp_path / "run"
    flags = (f"--matrix={path}", "--rank=1", f"--workdir={workdir}")
    path.write_text("from,to\nanna,ben\nben,carl\n")
    assert_refused(program(*flags), "line 1: ", "give --header=true or --header=false")
    path.write_text("from,to,weight\nanna,ben,1\nben,carl,2\n")
    assert_refused(program(*flags, "--header"), "line 2: 3 columns", "--ignore_extra=true leaves")
    assert not workdir.exists()
    summary(program(*flags, "--header", "--ignore_extra"))
    with np.load(workdir / "factors.npz") as factors:
        assert factors["names"].tolist() == ["anna", "ben", "carl"]
        assert factors["u"].shape == (3, 1)


@pytest.mark.parametrize(
    ("flags", "told", "loop"),
    [
        ((), "rows that repeat an edge, left out: 2; loops, which count twice: 1", 2),
        (("--directed",), "rows that repeat an edge, left out: 1; loops: 1", 1),
    ],
)
def test_loops_and_repeated_edges_are_stated(flags, told, loop, tmp_path, program):
    """Of 5 0, 0 5 and 5 0 one is left, or one of each direction."""
    path = tmp_path / "a.txt"
    path.write_text(f"{EDGES}0 5\n5 0\n")
    flags = (f"--matrix={path}", "--rank=6", f"--workdir={tmp_path / 'run'}", *flags)
    answer = program(*flags)
    assert f"a.txt: 6 x 6, sparse with {11 if loop == 2 else 7} entries; {told}\n" in answer[2]
    a_NN = np.zeros((6, 6))
    for i, j in (map(int, line.split()) for line in f"{EDGES}0 5".splitlines()):
        a_NN[i, j] = 1
    a_NN = np.maximum(a_NN, a_NN.T) if loop == 2 else a_NN
    a_NN[4, 4] = loop
    wanted_K = np.linalg.svd(a_NN, compute_uv=False)
    np.testing.assert_allclose(summary(answer)["singular_values"], wanted_K, atol=1e-5)


def test_a_tolerance_that_is_not_reached_is_status_1(dense, tmp_path, program):
    flags = (f"--matrix={dense}", "--rank=4", "--nofigures", "--quiet")
    # Ten iterations were asked for, and are made whatever they give.
    said = summary(program(*flags, "--preset=paper", f"--workdir={tmp_path / 'ten'}"))
    assert not said["converged"]
    assert said["products"] == 2 * 11 * 8 + 4
    few = ("--method=subspace", "--tol=1e-6", "--max_products=10", f"--workdir={tmp_path / 'few'}")
    for _ in range(2):  # the finished run says so again
        answer = program(*flags, *few)
        said = summary(answer, status=1)
        assert said["products"] < 30
        assert said["residual"] > 1e-6
        assert answer[2].startswith("isvd_factorize: --tol=1e-06 was not reached: the residual is ")
    assert (tmp_path / "few" / "factors.npz").exists()


@pytest.mark.parametrize(
    ("method", "tol", "converged", "status"),
    [
        ("krylov", None, True, 0),
        ("krylov", None, False, 1),
        ("krylov", 1e-3, False, 1),
        ("subspace", 1e-3, False, 1),
        ("subspace", None, False, 0),
    ],
)
def test_status(method, tol, converged, status):
    cfg = isvd_factorize.FactorizeConfig(matrix="a.npy", method=method, tol=tol)
    result = {"converged": converged, "residual": 0.1, "products": 9, "singular_values": [1.0]}
    assert isvd_factorize._status(cfg, result) == status


def test_products_that_overflow_are_status_1(tmp_path, program):
    np.save(tmp_path / "a.npy", np.full(SHAPE, 3e38, "f"))
    flags = (f"--matrix={tmp_path / 'a.npy'}", "--rank=2", f"--workdir={tmp_path / 'run'}")
    for _ in range(2):  # the finished run says so again
        status, _, err = program(*flags, "--preset=paper", "--nofigures", "--quiet")
        assert status == 1
        assert "a.npy: products with it overflow float32" in err
        assert "divide it by its largest entry" in err


def test_matrix_of_zeros(tmp_path, program):
    scipy.sparse.save_npz(tmp_path / "a.npz", scipy.sparse.csr_array((9, 7)))
    flags = (f"--matrix={tmp_path / 'a.npz'}", "--rank=2", f"--workdir={tmp_path / 'run'}")
    said = summary(program(*flags))
    assert (said["singular_values"], said["residual"]) == ([0, 0], 0)


def test_quiet_and_figures(dense, tmp_path, program, monkeypatch):
    flags = (f"--matrix={dense}", "--rank=2")
    status, out, err = program(*flags, f"--workdir={tmp_path / 'quiet'}", "--quiet", "--nofigures")
    assert (status, out.count("\n"), err) == (0, 1, "")
    assert not (tmp_path / "quiet" / "figures").exists()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, err = program(*flags, f"--workdir={tmp_path / 'none'}")
    assert (status, out.count("\n")) == (0, 1)
    assert "30 x 20, dense" in err
    assert "no figures: matplotlib is missing" in err
    assert not (tmp_path / "none" / "figures").exists()


def test_without_a_workdir_there_is_a_new_one_each_time(dense, tmp_path, program, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = {summary(program(f"--matrix={dense}", "--nofigures"))["workdir"] for _ in range(2)}
    assert len(folders) == 2
    for folder in folders:
        assert re.fullmatch(r"runs/isvd_factorize-\d{8}-\d{6}(-\d+)?", folder)
        assert json.loads((tmp_path / folder / "config.json").read_text())["workdir"] == folder


# The folder of an earlier run --------------------------------------------------------------------


@pytest.fixture
def finished(dense, tmp_path, program):
    """Flags of a run that ended, and what it said."""
    flags = (f"--matrix={dense}", "--rank=3", f"--workdir={tmp_path / 'run'}", "--nofigures")
    return flags, summary(program(*flags))


def test_a_finished_run_gives_its_result_again(finished, tmp_path, program, monkeypatch):
    flags, said = finished
    before = contents(tmp_path / "run")
    monkeypatch.setattr(isvd_common, "compiled_svd", None)  # nothing is computed
    again = summary(program(*flags))
    assert again.keys() == said.keys()
    assert {**again, "seconds": 0} == {**said, "seconds": 0}
    assert contents(tmp_path / "run") == before
    again = summary(program(*flags[:-1]))
    assert {**again, "seconds": 0} == {**said, "seconds": 0}
    assert (tmp_path / "run" / "figures" / "spectrum.png").exists()


def test_a_finished_run_is_not_given_for_another_input(finished, dense, tmp_path, program):
    flags, _ = finished
    before = contents(tmp_path / "run")
    np.save(dense, matrix(1))
    assert_refused(program(*flags), "--workdir=", "input files have changed")
    dense.unlink()
    assert_refused(program(*flags), "--workdir=", "or are gone")
    assert_refused(program(*flags, "--rank=2"), "other settings: rank is 3 there and 2 here")
    assert contents(tmp_path / "run") == before


def test_damaged_arrays_are_not_drawn(finished, tmp_path, program):
    flags, _ = finished
    (tmp_path / "run" / "factors.npz").write_bytes(b"PK")
    assert_refused(program(*flags[:-1]), "--workdir=", "factors.npz cannot be read")


def test_a_run_that_did_not_end_starts_again(finished, tmp_path, program, monkeypatch):
    flags, said = finished
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text('{"step": 0, "auc": 1}\n{"ste')
    with monkeypatch.context() as patch:
        patch.setattr(isvd_common, "compiled_svd", interrupt)
        status, out, err = program(*flags)
        assert (status, out) == (130, "")
        assert f"stopped, without a result; the same command with --workdir={tmp_path}/run" in err
    assert summary(program(*flags))["singular_values"] == said["singular_values"]
    assert len(metrics.read_text().splitlines()) == 1


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_foreign_folders_are_refused(dense, tmp_path, program):
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    flags = (f"--matrix={dense}", f"--workdir={folder}")
    assert_refused(program(*flags), f"--workdir={folder}: holds files but no config.json")
    (folder / "config.json").write_text('{"program": "isvd_link"}')
    assert_refused(program(*flags), "belongs to isvd_link; expected a folder of isvd_factorize")
    assert sorted(os.listdir(folder)) == ["config.json", "thesis.txt"]


# Refusals ----------------------------------------------------------------------------------------

NOT_FINITE = matrix().copy()
NOT_FINITE[3, 4] = np.nan


def damaged_sparse(path):
    """A matrix one of whose column numbers is outside."""
    a = scipy.sparse.csr_array(np.eye(4))
    a.indices[2] = 77
    scipy.sparse.save_npz(path, a)


BAD_FILES = {
    "text.npy": lambda path: path.write_text("no array"),
    "empty.npy": lambda path: path.write_bytes(b""),
    "nan.npy": lambda path: np.save(path, NOT_FINITE),
    "huge.npy": lambda path: np.save(path, 1e300 * matrix()),
    "vector.npy": lambda path: np.save(path, np.arange(5.0)),
    "nothing.npy": lambda path: np.save(path, np.zeros((0, 4))),
    "words.npy": lambda path: np.save(path, np.array([["a", "b"]])),
    "objects.npy": lambda path: np.save(path, np.array([[{}]], object), allow_pickle=True),
    "text.npz": lambda path: path.write_text("no archive"),
    "arrays.npz": lambda path: np.savez(path, a=np.eye(3)),
    "outside.npz": damaged_sparse,
    "letters.txt": lambda path: path.write_text("0 1\n1 x\n"),
    "empty.txt": lambda path: path.write_text("# nothing\n"),
    "a.doc": lambda path: path.write_text("0 1\n"),
    "folder.npy": lambda path: path.mkdir(),
}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing.npy", "No such file or directory; expected a dense .npy"),
        ("missing.npz", "No such file or directory; expected a dense .npy"),
        ("missing.txt", "no such file; expected an edge list"),
        ("text.npy", "expected a dense .npy"),
        ("empty.npy", "expected a dense .npy"),
        ("nan.npy", "has entries that are NaN, infinite or beyond float32; expected finite ones"),
        ("huge.npy", "has entries that are NaN, infinite or beyond float32; expected finite ones"),
        ("vector.npy", "has shape (5,) and dtype float64, expected numbers (rows, columns)"),
        ("nothing.npy", "has shape (0, 4) and dtype float64, expected numbers (rows, columns)"),
        ("words.npy", "dtype <U1, expected numbers (rows, columns)"),
        ("objects.npy", "expected a dense .npy"),
        ("text.npz", "expected a dense .npy"),
        ("arrays.npz", "expected a dense .npy"),
        ("outside.npz", "expected a dense .npy"),
        ("letters.txt", ", line 2: 'x' is not a whole number"),
        ("empty.txt", "no edges, expected at least one row"),
        ("a.doc", "unknown suffix '.doc'"),
        ("folder.npy", "Is a directory; expected a dense .npy"),
    ],
)
def test_bad_files(name, words, tmp_path, program):
    path = tmp_path / name
    BAD_FILES.get(name, lambda _: None)(path)
    answer = program(f"--matrix={path}", "--rank=1", f"--workdir={tmp_path / 'run'}")
    assert_refused(answer, f"isvd_factorize: --matrix={path}", words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--rank=21",), "--rank=21: expected 1 to 20, since the matrix has shape (30, 20)"),
        (("--rank=0",), "--rank=0: expected an integer at least 1"),
        (("--rank=1.5",), "--rank=1.5: expected an integer at least 1"),
        (("--rank=many",), "--rank=many: expected an integer at least 1"),
        (("--method=qr",), "--method=qr: expected one of krylov, subspace"),
        (("--tol=1",), "--tol=1: expected from 0 to less than 1, or none"),
        (("--tol=-1e-3",), "--tol=-0.001: expected from 0 to less than 1, or none"),
        (
            ("--max_products=0",),
            "--max_products=0: expected an integer at least 1 and at most 2147483647",
        ),
        (("--max_products=2147483648",), "--max_products=2147483648: expected an integer at least"),
        (("--directed",), "--directed=true: expected an edge list with it, got --matrix="),
        (("--noheader",), "--header=false: expected an edge list with it, got --matrix="),
        (("--ignore_extra",), "--ignore_extra=true: expected an edge list with it"),
        (("--matrix=",), "--matrix=: expected a file"),
        (("--preset=none",), "--preset=none: expected one of accurate, paper"),
        (("--parallel=pmap",), "--parallel=pmap: expected one of jit"),
        (("--devices=9",), "--devices=9: there are 8 cpu devices; expected 1 to 8, or 0 for all"),
        (("--ranks=3",), "--ranks: unknown flag; did you mean --rank?"),
    ],
)
def test_bad_flags(flags, words, dense, tmp_path, program):
    answer = program(f"--matrix={dense}", f"--workdir={tmp_path / 'run'}", *flags)
    assert_refused(answer, words)
    assert not (tmp_path / "run").exists()


def test_the_programs_answer_without_jax(tmp_path):
    """--help and a wrong flag do not wait for it."""
    look = (
        "import sys\n"
        "from launch import isvd_factorize, isvd_link, isvd_node\n"
        "assert 'jax' not in sys.modules\n"
        "isvd_node.cli()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", look, "--help"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.getcwd()},
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "--dropout_copies=INT" in ended.stdout
    assert not list(tmp_path.iterdir())

"""Predict missing edges of a graph from the truncated SVD of its walk matrix

    M = [sum_q c_q P^q] E - negative_weight * (1 1^T - A),   q = 1 ... window,

of the adjacency matrix A with degrees D, where c_q falls linearly from walks of one step to the
longest. --normalization says what a step P is, --degree_factor whether E is there.

--graph is a folder with a split (train.txt.npy, test.txt.npy, test.neg.txt.npy), or an edge list,
of which a part is then held out for the test with as many pairs that are no edges. The graph is
undirected. Loops and repeated edges of an edge list are left out. A split is taken as it is: in its
train file a loop counts twice, and an edge as often as it is listed.

Files: embeddings.npz (left and right embedding of every node, names if the edge list has names),
scores.npz (test pairs and their scores). stdout ends with one line of JSON. Status 1 if the
tolerance was not reached: the files are written all the same.
"""

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from launch import UsageError, isvd_common, program
from launch.flags import field

PROGRAM = "isvd_link"
PRESETS: dict[str, dict[str, object]] = {
    "auto_rank": {"rank": "auto"},
    "paper": {"rank": "32"},
    "paper256": {"rank": "auto", "leaky_rank_choice": True},
}
_SPLIT_FILES = ("train.txt.npy", "test.txt.npy", "test.neg.txt.npy")
_FRACTION = 0.15  # of an edge list that is held out unless told


@dataclasses.dataclass(frozen=True)
class LinkConfig(program.SpreadConfig):
    graph: str = field("", "folder with a split, or an edge list", group="Graph")
    test_fraction: float | None = field(
        None, "edge list: share of the edges to test on; none: 0.15", min=0, max=1
    )
    ignore_extra: bool = field(False, "edge list: leave aside columns after the second")
    header: bool | None = field(None, "edge list: its first row is a header; none: find out")

    rank: str = field(
        "32", "dimensions of an embedding, or auto: chosen on held-out train edges", group="Model"
    )
    window: int = field(10, "longest walk", unit="steps", min=1, max=10**6)
    normalization: Literal["symmetric", "rows"] = field(
        "symmetric", "a step is P = D^-1/2 A D^-1/2, or D^-1 A, of which each row sums to one"
    )
    degree_factor: bool = field(
        True, "multiply walks by E = D^1/2 (of symmetric steps) or D (of rows); no: E = I"
    )
    negative_weight: float | None = field(
        0.02,
        "weight of pairs that are no edges; none: chosen on held-out train edges",
        min=0,
        max=1e38,  # float32 holds little more
    )
    tol: float | None = field(
        None, "residual to reach, relative to the largest value; none: 2.4e-5"
    )
    seeds: int = field(1, "random starts, whose mean and deviation are reported", min=1, max=10**6)
    leaky_rank_choice: bool = field(
        False, "with --rank=auto: the reference's rule, which sees half of each held-out edge"
    )

    def validate(self) -> None:
        isvd_common.check_tol(self.tol)
        if not self.graph:
            raise ValueError("--graph=: expected a folder with a split, or an edge list")
        if self.rank != "auto" and not re.fullmatch("0*[1-9][0-9]*", self.rank):
            raise ValueError(f"--rank={self.rank}: expected a whole number from 1, or auto")
        if self.leaky_rank_choice and self.rank != "auto":
            raise ValueError(
                f"--leaky_rank_choice=true: expected --rank=auto with it, got --rank={self.rank}"
            )
        if self.leaky_rank_choice and self.negative_weight is None:
            raise ValueError("--negative_weight=none: expected a number with --leaky_rank_choice")
        if self.test_fraction in (0, 1):
            raise ValueError(
                f"--test_fraction={self.test_fraction:g}: expected between 0 and 1, both excluded"
            )

    @property
    def design(self) -> dict[str, Any]:
        """Of `isvd.design.link_operator`, without the weight."""
        return {
            "window": self.window,
            "symmetric": self.normalization == "symmetric",
            "degree_factor": self.degree_factor,
        }


class _Problem(NamedTuple):
    split: Any
    names: np.ndarray | None
    rank: int
    negative_weight: float
    heldout: dict[str, dict[str, float]]  # as `_choose` has it


def _inputs(cfg: LinkConfig) -> list[Path]:
    path = Path(cfg.graph)
    return [path / name for name in _SPLIT_FILES] if path.is_dir() else [path]


def _prepare(cfg: LinkConfig, say: Callable[..., None]) -> _Problem:
    split, names, told = _read(cfg)
    num_train, num_test, num_nodes = len(split.train_E2), len(split.test_E2), split.num_nodes
    say(f"{cfg.graph}: {num_nodes} nodes, {num_train} edges to learn, {num_test} to test{told}")
    if cfg.rank != "auto" and int(cfg.rank) > num_nodes:
        raise UsageError(
            f"--rank={cfg.rank}: expected 1 to {num_nodes}, the nodes of the graph, or auto"
        )
    return _Problem(split, names, *_choose(cfg, split, say))


def _read(cfg: LinkConfig) -> tuple[Any, np.ndarray | None, str]:
    """The split, the names of nodes if there are any, and what is odd about the edges."""
    from isvd import readers

    if not Path(cfg.graph).is_dir():
        options = {"ignore_extra": cfg.ignore_extra, "header": cfg.header}
        graph = isvd_common.read_edges("graph", cfg.graph, **options)
        fraction = _FRACTION if cfg.test_fraction is None else cfg.test_fraction
        try:
            split = readers.split_edges(
                graph.edges_E2, graph.num_nodes, fraction=fraction, seed=cfg.seed
            )
        except ValueError as error:
            raise UsageError(
                f"--graph={cfg.graph} --test_fraction={fraction:g}: {error}"
            ) from error
        repeated = ("rows that repeat an edge, left out", graph.num_repeated)
        loops = ("loops, left out", graph.num_loops)
        return split, graph.names, isvd_common.counted(repeated, loops)
    for name, default in (("test_fraction", None), ("ignore_extra", False), ("header", None)):
        if getattr(cfg, name) != default:
            raise UsageError(
                f"--{name}={str(getattr(cfg, name)).lower()}: expected an edge list with it, but "
                f"--graph={cfg.graph} is a folder, which has its own split"
            )
    try:
        split = readers.read_asymproj(cfg.graph)
    except (OSError, ValueError) as error:
        wanted = f"a folder with {', '.join(_SPLIT_FILES)}"
        raise isvd_common.refusal("graph", cfg.graph, error, wanted) from error
    train_E2 = np.sort(split.train_E2, axis=1)
    num_repeated = len(train_E2) - len(np.unique(train_E2, axis=0))
    loops = ("loops to learn, which count twice", int((train_E2[:, 0] == train_E2[:, 1]).sum()))
    return split, None, isvd_common.counted(("repeated edges, added up", num_repeated), loops)


def _choose(
    cfg: LinkConfig, split: Any, say: Callable[..., None]
) -> tuple[int, float, dict[str, dict[str, float]]]:
    """(rank, weight, AUC on held-out train edges of what was to choose from, by its name)."""
    from isvd import linkpred

    if cfg.rank != "auto" and cfg.negative_weight is not None:
        return int(cfg.rank), cfg.negative_weight, {}
    ranks = linkpred.ranks_for(split.num_nodes) if cfg.rank == "auto" else (int(cfg.rank),)
    weights = linkpred.WEIGHTS if cfg.negative_weight is None else (cfg.negative_weight,)
    of = {"rank": ranks} if cfg.rank == "auto" else {}
    of |= {"weight": weights} if cfg.negative_weight is None else {}
    for name, values in of.items():
        say(f"choosing the {name} among {', '.join(map(str, values))} on held-out train edges")
    arguments = (split.train_E2, split.num_nodes, program.key_for(cfg, 0))
    options = {"ranks": ranks, "tol": cfg.tol, **cfg.design}
    try:
        if "weight" in of:
            choice = linkpred.choose_weight(*arguments, weights=weights, **options)
            weight, auc_WR = choice.negative_weight, choice.auc_WR
        else:
            choose = linkpred.choose_rank_leaky if cfg.leaky_rank_choice else linkpred.choose_rank
            choice = choose(*arguments, negative_weight=weights[0], **options)
            weight, auc_WR = weights[0], choice.auc_R[None]
    except ValueError as error:
        flags = {"rank": "--rank=auto", "weight": "--negative_weight=none"}
        raise UsageError(
            f"{' '.join(flags[name] for name in of)}: cannot be chosen on --graph={cfg.graph}: "
            f"{error}; expected a larger or sparser graph, or a number"
        ) from error
    auc = {"rank": auc_WR[weights.index(weight)], "weight": auc_WR[:, ranks.index(choice.rank)]}
    found = {
        name: {str(value): float(x) for value, x in zip(of[name], auc[name], strict=True)}
        for name in of
    }
    for name, chosen in {"rank": choice.rank, "weight": weight}.items():
        if name in of:
            told = ", ".join(f"{value}: {x:.4f}" for value, x in found[name].items())
            say(f"{name} {chosen} (AUC on held-out train edges by {name}: {told})")
    return choice.rank, weight, found


def _work(
    cfg: LinkConfig, problem: _Problem, folder: Any, say: Callable[..., None]
) -> tuple[dict[str, Any], program.Arrays]:
    import isvd
    from isvd import design, linkpred, metrics, readers

    split, rank = problem.split, problem.rank
    graph = readers.adjacency(split.train_E2, split.num_nodes)
    make, devices = isvd_common.spread(cfg)
    op = design.link_operator(
        graph,
        leaf=make or isvd.sparse,
        negative_weight=problem.negative_weight,
        **cfg.design,
    )
    keys = [program.key_for(cfg, 1 + start) for start in range(cfg.seeds)]
    say(f"compiling, then {cfg.seeds} x rank {rank}")
    report, _ = isvd_common.pass_reporter(say)
    factorize, compile_seconds = isvd_common.compiled_svd(
        op, keys[0], rank=rank, tol=cfg.tol, report=report
    )
    rows: list[dict[str, Any]] = []
    kept: tuple[isvd.SVD, np.ndarray, np.ndarray] | None = None
    for start, key in enumerate(keys):
        factors, seconds = factorize(op, key)
        positive_P, negative_Q = (
            np.asarray(linkpred.scores(factors, pairs))
            for pairs in (split.test_E2, split.test_negative_E2)
        )
        row = {
            "auc": metrics.roc_auc(positive_P, negative_Q),
            "residual": isvd_common.relative_residual(factors),
            "products": int(factors.products),
            "seconds_factorize": seconds,
            "converged": bool(factors.converged),
        }
        kept = kept or (factors, positive_P, negative_Q)
        rows.append(row)
        folder.scalars(start, row)
        say(
            f"start {start + 1}/{cfg.seeds}  AUC {row['auc']:.4f}  residual {row['residual']:.1e}  "
            f"{row['products']} products in {seconds:.2f} s"
        )
    assert kept is not None  # seeds is at least 1
    isvd_common.tell_if_not_pictured(cfg, rank, say)
    result = _result(cfg, problem, rows, compile_seconds, say)
    return {**result, "devices": devices}, _arrays(problem, *kept)


def _result(
    cfg: LinkConfig,
    problem: _Problem,
    rows: list[dict[str, Any]],
    compile_seconds: float,
    say: Callable[..., None],
) -> dict[str, Any]:
    column = {name: [row[name] for row in rows] for name in rows[0]}
    heldout, how = problem.heldout, "leaky" if cfg.leaky_rank_choice else "honest"
    result = {
        "products": max(column["products"]),
        "auc": float(np.mean(column["auc"])),
        "auc_std": float(np.std(column["auc"])),
        "auc_by_start": column["auc"],
        "rank": problem.rank,
        "residual": max(column["residual"]),
        "converged": all(column["converged"]),
        "seconds_factorize": float(np.mean(column["seconds_factorize"])),
        "compile_seconds": compile_seconds,
        "seeds": len(rows),
        "rank_choice": how if "rank" in heldout else None,
        "heldout_auc_by_rank": heldout.get("rank", {}),
        "negative_weight": problem.negative_weight,
        "heldout_auc_by_weight": heldout.get("weight", {}),
        "num_nodes": problem.split.num_nodes,
        "train_edges": len(problem.split.train_E2),
        "test_edges": len(problem.split.test_E2),
    }
    say(f"AUC {result['auc']:.4f} +- {result['auc_std']:.4f} over {len(rows)} random starts")
    return result


def _arrays(
    problem: _Problem, factors: Any, positive_P: np.ndarray, negative_Q: np.ndarray
) -> program.Arrays:
    """Those of the first random start."""
    embeddings = isvd_common.embedding_arrays(factors)
    if problem.names is not None:
        embeddings["names"] = problem.names
    scores = {"test": problem.split.test_E2, "test_negative": problem.split.test_negative_E2}
    scores |= {"train": problem.split.train_E2}
    scores |= {"test_score": positive_P, "test_negative_score": negative_Q}
    return {"embeddings": embeddings, "scores": scores}


# Figures -----------------------------------------------------------------------------------------


def _draw(arrays: program.Arrays) -> dict[str, Any]:
    embeddings, scores = arrays["embeddings"], arrays["scores"]
    figures = {
        "roc": _roc(scores["test_score"], scores["test_negative_score"]),
        "spectrum": isvd_common.spectrum(embeddings["singular_values"], embeddings["residual"]),
    }
    if embeddings["left"].shape[1] >= isvd_common.LEAST_PICTURED:
        figures["embedding"] = _embedding(embeddings["left"], scores["train"])
    return figures


def _roc(positive_P: np.ndarray, negative_Q: np.ndarray) -> Any:
    from isvd import metrics

    # One point for each distinct score, so that ties are crossed in a straight line.
    bar_T = np.append(np.unique(np.concatenate([positive_P, negative_Q])), np.inf)
    hit_T, false_T = (
        1 - np.searchsorted(np.sort(score_P), bar_T) / len(score_P)
        for score_P in (positive_P, negative_Q)
    )
    auc = metrics.roc_auc(positive_P, negative_Q)
    figure, axes = program.new_axes(
        f"Test pairs, AUC {auc:.4f}", "share of absent pairs taken", "share of edges found"
    )
    axes.plot(false_T, hit_T, color="#0072B2")
    axes.plot([0, 1], [0, 1], ":", color="#666666", label="chance")
    axes.set_aspect("equal")
    axes.legend(loc="lower right")
    return figure


def _embedding(left_NK: np.ndarray, train_E2: np.ndarray) -> Any:
    degree_N = np.bincount(train_E2.ravel(), minlength=len(left_NK))
    order_N = np.argsort(degree_N, kind="stable")  # the best connected on top
    figure, points = isvd_common.embedding(left_NK, np.log10(1 + degree_N), order_N)
    figure.colorbar(points, label="log10(1 + neighbours)")
    return figure


def _status(cfg: LinkConfig, result: dict[str, Any]) -> int:
    if result["converged"]:
        return 0
    # A finished run that is told again has null for what is no number.
    if result["auc"] is None or np.isnan(result["auc"]):
        weight = result["negative_weight"]
        told = f"--negative_weight={weight:g}: scores overflow; expected a smaller one"
    else:
        tol = "the default" if cfg.tol is None else f"{cfg.tol:g}"
        told = (
            f"--tol={tol} was not reached: the residual is {result['residual']:.1e}; give a larger "
            "--tol"
        )
    print(f"{PROGRAM}: {told}", file=sys.stderr)
    return 1


_PROGRAM = program.Program(PROGRAM, _inputs, _prepare, _work, _draw, _status)


def cli() -> None:
    program.cli(_PROGRAM, LinkConfig, PRESETS, __doc__)


if __name__ == "__main__":
    cli()

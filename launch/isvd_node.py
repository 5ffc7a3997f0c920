"""Classify the nodes of a citation graph in closed form, by the SVD of propagated features.

--dataset is a folder with the files ind.NAME.{x,y,tx,ty,allx,ally,graph,test.index} of Planetoid.
Validation nodes choose rank and ridge; test nodes are looked at once. --deepen also fits a smaller
design and fine-tunes it as a split-ReLU network. Files: predictions.npz, embeddings.npz (left and
right embedding of every node, of the first seed). stdout ends with one line of JSON; with several
seeds its accuracies are means.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from launch import UsageError, isvd_common, program
from launch.flags import field

PROGRAM = "isvd_node"
PRESETS: dict[str, dict[str, object]] = {
    "accurate": {},
    "paper": {"rank": (100,), "ridge": (0.0,), "dropout_copies": 1},
}
_RANKS = (50, 75, 100, 140)  # tried by default, as far as there are so many
_PARTS = ("x", "y", "tx", "ty", "allx", "ally", "graph", "test.index")
_DROPOUT = 0.5


@dataclasses.dataclass(frozen=True)
class NodeConfig(program.RunConfig):
    dataset: str = field("", "folder with the files of Planetoid", group="Data")
    name: Literal["cora", "citeseer", "pubmed"] = field("cora", "graph")

    embedding_rank: int = field(
        64, "dimensions of each side of the embedding", min=1, group="Model"
    )
    pca_rank: int | None = field(
        1000, "principal components of the features, as far as there are so many; none: all", min=1
    )
    num_hops: int = field(15, "propagation steps", unit="steps", min=0, max=1000)
    rank: tuple[int, ...] | None = field(
        None, "triplets of the fit to try; none: 50,75,100,140 as far as there are so many", min=1
    )
    ridge: tuple[float, ...] = field(
        (0.0, 1e-3, 1e-2),
        "ridges to try, relative to the largest value squared",
        min=0,
        max=1e6,  # from here on weights only shrink, until float32 has none left
    )
    dropout_copies: int = field(
        8, "draws of dropout that are averaged; 0: no dropout", min=0, max=10**4
    )
    seeds: int = field(1, "repetitions, whose mean and deviation are reported", min=1, max=10**6)
    report_passes: bool = field(
        False, "tell the residual after each pass; such programs are compiled at every start"
    )

    deepen: bool = field(False, "also fine-tune a smaller design", group="Deepening")
    deepen_steps: int = field(100, "updates", unit="steps", min=1, max=10**6)
    deepen_hops: int = field(5, "its propagation steps, which are its layers", min=0, max=1000)
    deepen_pca_rank: int = field(64, "its principal components", min=1)
    deepen_embedding_rank: int = field(16, "dimensions of each side of its embedding", min=1)
    deepen_lr: float = field(1e-3, "learning rate", min=0)

    def validate(self) -> None:
        if not self.dataset:
            raise ValueError("--dataset=: expected a folder with the files of Planetoid")
        for name in ("rank", "ridge"):
            values = getattr(self, name)
            if values is not None and len(set(values)) != len(values):
                text = ",".join(f"{value:g}" for value in values)
                raise ValueError(f"--{name}={text}: expected each number once")
            if values == ():
                raise ValueError(f"--{name}=: expected one number at least")


class _Problem(NamedTuple):
    data: Any  # isvd.planetoid.Citations
    ranks: tuple[int, ...]
    deep_ranks: tuple[int, ...]  # of the smaller design


class _Start(NamedTuple):
    """What one seed gives."""

    fit: Any  # isvd.nodeclass.Fit
    walks: Any  # isvd.SVD, of which the embedding is made
    row: dict[str, Any]
    deep_scores_NC: np.ndarray | None


def _inputs(cfg: NodeConfig) -> list[Path]:
    return [Path(cfg.dataset, f"ind.{cfg.name}.{part}") for part in _PARTS]


def _prepare(cfg: NodeConfig, say: Callable[..., None]) -> _Problem:
    from isvd import planetoid

    if not Path(cfg.dataset).is_dir():
        raise UsageError(f"--dataset={cfg.dataset}: expected a folder with the files of Planetoid")
    try:
        data = planetoid.read_planetoid(cfg.dataset, cfg.name)
    except (OSError, ValueError) as error:
        wanted = f"the files ind.{cfg.name}.* of Planetoid"
        raise isvd_common.refusal("dataset", cfg.dataset, error, wanted) from error
    if len(np.unique(data.labels_N[data.train_I])) < 2:
        raise UsageError(
            f"--dataset={cfg.dataset}: its training nodes have one class, expected two or more"
        )
    num_nodes = len(data.labels_N)
    for name in ("embedding_rank", *(("deepen_embedding_rank",) if cfg.deepen else ())):
        if getattr(cfg, name) > num_nodes:
            raise UsageError(
                f"--{name}={getattr(cfg, name)}: expected 1 to {num_nodes}, the nodes of the graph"
            )
    limit = _largest_rank(data, cfg, cfg.pca_rank, cfg.embedding_rank, cfg.num_hops)
    if cfg.rank is not None and max(cfg.rank) > limit:
        raise UsageError(
            f"--rank={','.join(map(str, cfg.rank))}: expected numbers from 1 to {limit}, the rows "
            f"({len(data.train_I)} training nodes{' and dropped copies' * bool(cfg.dropout_copies)}"
            ") and columns of what is fitted"
        )
    say(
        f"{cfg.name}: {num_nodes} nodes, {data.features.shape[1]} features, {data.num_classes} "
        f"classes; {len(data.train_I)} nodes to train, {len(data.validation_I)} to validate, "
        f"{len(data.test_I)} to test; compiling first"
    )
    sizes = (cfg.deepen_pca_rank, cfg.deepen_embedding_rank, cfg.deepen_hops)
    limits = (limit, _largest_rank(data, cfg, *sizes))
    ranks = cfg.rank or _RANKS
    # Cut here as `isvd.nodeclass.fit` cuts, so that its table's rows are known.
    return _Problem(data, *(tuple(sorted({min(k, most) for k in ranks})) for most in limits))


def _largest_rank(
    data: Any, cfg: NodeConfig, pca_rank: int | None, embedding: int, hops: int
) -> int:
    """The largest rank of a fit: the rows (with dropped copies) or the columns that it has."""
    num_nodes, num_features = data.features.shape
    width = num_features + 2 * embedding
    width = width if pca_rank is None else min(pca_rank, num_nodes, width)
    num_rows = len(data.train_I) * (2 if cfg.dropout_copies else 1)
    return min(num_rows, (hops + 1) * (width + 2 * embedding))


def _work(
    cfg: NodeConfig, problem: _Problem, folder: Any, say: Callable[..., None]
) -> tuple[dict[str, Any], program.Arrays]:
    starts = []
    # One function for all seeds: it is part of the compiled programs.
    report_pass = isvd_common.pass_reporter(say)[0] if cfg.report_passes else None
    for number in range(cfg.seeds):
        start = _run_seed(cfg, problem, program.key_for(cfg, 1 + number), say, report_pass)
        starts.append(start)
        row = start.row
        folder.scalars(number, row)
        words = [
            f"seed {number + 1}/{cfg.seeds}",
            f"validation {row['validation_accuracy']:.3f}  test {row['test_accuracy']:.3f}",
            f"rank {row['rank']}  ridge {row['ridge']:g}",
        ]
        if cfg.deepen:
            words.append(
                f"smaller design: test {row['shallow_test_accuracy']:.3f}, deepened "
                f"{row['deepened_test_accuracy']:.3f} (best after {row['deepened_best_step']} "
                f"of {cfg.deepen_steps} steps)"
            )
        say("  ".join([*words, f"{row['seconds_fit']:.1f} s"]))
    isvd_common.tell_if_not_pictured(cfg, cfg.embedding_rank, say)
    return _result(cfg, [start.row for start in starts], say), _arrays(cfg, problem, starts)


def _run_seed(
    cfg: NodeConfig,
    problem: _Problem,
    key: Any,
    say: Callable[..., None],
    report_pass: Callable[[Any, Any], None] | None,
) -> _Start:
    import jax

    from isvd import metrics, nodeclass

    kept = {}

    def report(what: str, factors: Any) -> None:
        kept.setdefault(what, factors)  # the smaller design comes later
        residual = isvd_common.relative_residual(factors)
        say(f"{what}: {factors.products.sum()} products, residual {residual:.1e} of the largest")

    told = {"report": report, "report_pass": report_pass}
    began, data = time.monotonic(), problem.data
    fit = nodeclass.classify(
        data.adjacency,
        data.features,
        data.labels_N,
        data.train_I,
        data.validation_I,
        key,
        num_hops=cfg.num_hops,
        embedding_rank=cfg.embedding_rank,
        pca_rank=cfg.pca_rank,
        ranks=problem.ranks,
        ridges=cfg.ridge,
        draws=cfg.dropout_copies,
        dropout=_DROPOUT,
        **told,
    )
    row: dict[str, Any] = {
        "validation_accuracy": float(np.nanmax(fit.accuracy_RP)),
        "test_accuracy": metrics.accuracy(fit.scores_NC, data.labels_N, data.test_I),
        "rank": fit.rank,
        "ridge": fit.ridge,
    }
    deep_scores_NC = None
    if cfg.deepen:
        more, deep_scores_NC = _deepened(cfg, problem, jax.random.fold_in(key, 1), told)
        row |= more
    row["seconds_fit"] = time.monotonic() - began
    return _Start(fit, kept["walks"], row, deep_scores_NC)


def _deepened(
    cfg: NodeConfig, problem: _Problem, key: Any, told: dict[str, Any]
) -> tuple[dict[str, Any], np.ndarray]:
    """Fit a smaller design, whose layers are small enough to train, and fine-tune it.

    A layer of the network has as many neurons as a block of the design has columns, twice over.
    """
    import jax
    import jax.numpy as jnp

    import isvd
    from isvd import deepen, design, metrics, node_features, nodeclass

    data = problem.data
    key_features, key_fit, key_tune = jax.random.split(key, 3)
    z = node_features.planetoid_features(
        data.adjacency,
        data.features,
        key_features,
        embedding_rank=cfg.deepen_embedding_rank,
        pca_rank=cfg.deepen_pca_rank,
        **told,
    )
    step = isvd.sparse(design.normalized_adjacency(data.adjacency), z.dtype, layout="csr")
    nodes = (data.labels_N, data.train_I, data.validation_I)
    fit = nodeclass.fit(
        design.propagated(step, z, cfg.deepen_hops),
        *nodes,
        key_fit,
        ranks=problem.deep_ranks,
        ridges=cfg.ridge,
        draws=cfg.dropout_copies,
        dropout=_DROPOUT,
        **told,
    )
    start = deepen.init(fit.weights_DC.reshape(cfg.deepen_hops + 1, z.shape[1], -1))
    x_NF = z.matmat(jnp.eye(z.shape[1], dtype=z.dtype))
    tuned = deepen.finetune(
        start, step, x_NF, *nodes, key_tune, steps=cfg.deepen_steps, learning_rate=cfg.deepen_lr
    )
    scores_NC = np.asarray(deepen.apply(tuned.params, step, x_NF))
    row = {
        "shallow_validation_accuracy": float(np.nanmax(fit.accuracy_RP)),
        "shallow_test_accuracy": metrics.accuracy(fit.scores_NC, data.labels_N, data.test_I),
        "deepened_validation_accuracy": metrics.accuracy(
            scores_NC, data.labels_N, data.validation_I
        ),
        "deepened_test_accuracy": metrics.accuracy(scores_NC, data.labels_N, data.test_I),
        "deepened_best_step": int(tuned.best_step),
    }
    return row, scores_NC


def _result(
    cfg: NodeConfig, rows: list[dict[str, Any]], say: Callable[..., None]
) -> dict[str, Any]:
    column = {name: [row[name] for row in rows] for name in rows[0]}
    # The commonest pair of settings; of equally common ones the first that was met.
    pairs = collections.Counter(zip(column["rank"], column["ridge"], strict=True))
    (rank, ridge), _ = pairs.most_common(1)[0]
    result = {
        "steps": cfg.deepen_steps if cfg.deepen else 0,
        "test_accuracy": float(np.mean(column["test_accuracy"])),
        "test_accuracy_std": float(np.std(column["test_accuracy"])),
        "validation_accuracy": float(np.mean(column["validation_accuracy"])),
        "rank": rank,
        "ridge": ridge,
        "test_accuracy_by_seed": column["test_accuracy"],
        "rank_by_seed": column["rank"],
        "ridge_by_seed": column["ridge"],
        "seconds_fit": column["seconds_fit"],
        "seeds": len(rows),
        "name": cfg.name,
    }
    if cfg.deepen:
        deep = [name for name in rows[0] if name.startswith(("shallow_", "deepened_"))]
        result |= {name: float(np.mean(column[name])) for name in deep if "accuracy" in name}
        result["deepened_best_step_by_seed"] = column["deepened_best_step"]
    say(
        f"test accuracy {result['test_accuracy']:.4f} +- {result['test_accuracy_std']:.4f} "
        f"over {len(rows)} seeds"
    )
    return result


def _arrays(cfg: NodeConfig, problem: _Problem, starts: list[_Start]) -> program.Arrays:
    data = problem.data
    arrays = {
        "predicted": np.stack([np.asarray(s.fit.scores_NC).argmax(1) for s in starts]),
        "scores": np.stack([np.asarray(s.fit.scores_NC) for s in starts]),
        "labels": data.labels_N,
        "train": data.train_I,
        "validation": data.validation_I,
        "test": data.test_I,
        "ranks": np.array(problem.ranks),
        "ridges": np.array(cfg.ridge),
        "validation_accuracy": np.stack([s.fit.accuracy_RP for s in starts]),
    }
    deep = [s.deep_scores_NC for s in starts if s.deep_scores_NC is not None]
    if deep:
        arrays["deepened_predicted"] = np.stack([scores_NC.argmax(1) for scores_NC in deep])
    return {
        "predictions": arrays,
        "embeddings": isvd_common.embedding_arrays(starts[0].walks),
    }


# Figures -----------------------------------------------------------------------------------------


def _draw(arrays: program.Arrays) -> dict[str, Any]:
    embeddings, predictions = arrays["embeddings"], arrays["predictions"]
    figures = {
        "validation": _validation(predictions),
        "spectrum": isvd_common.spectrum(embeddings["singular_values"], embeddings["residual"]),
    }
    if embeddings["left"].shape[1] >= isvd_common.LEAST_PICTURED:
        figures["embedding"] = _embedding(embeddings["left"], predictions["labels"])
    return figures


def _validation(table: Mapping[str, Any]) -> Any:
    """Validation accuracy by rank, a line for each ridge, the mean over seeds."""
    accuracy_RP = table["validation_accuracy"].mean(axis=0)
    figure, axes = program.new_axes(
        "What the validation nodes say of rank and ridge", "rank", "validation accuracy"
    )
    for ridge, accuracy_R in zip(table["ridges"], accuracy_RP.T, strict=True):
        axes.plot(table["ranks"], accuracy_R, "o-", label=f"ridge {ridge:g}")
    axes.set_xticks(table["ranks"])
    axes.legend()
    return figure


def _embedding(left_NK: np.ndarray, labels_N: np.ndarray) -> Any:
    order_N = np.argsort(labels_N >= 0, kind="stable")  # those without a label below
    style = {"cmap": "tab10", "vmin": -1, "vmax": 8}  # ten colours, of which -1 has the first
    figure, points = isvd_common.embedding(left_NK, labels_N, order_N, **style)
    figure.axes[0].legend(*points.legend_elements(num=None), title="label")
    return figure


_PROGRAM = program.Program(PROGRAM, _inputs, _prepare, _work, _draw, free=("report_passes",))


def cli() -> None:
    program.cli(_PROGRAM, NodeConfig, PRESETS, __doc__)


if __name__ == "__main__":
    cli()

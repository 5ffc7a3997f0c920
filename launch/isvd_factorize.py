"""The leading singular values and vectors of a matrix in a file.

--matrix is a dense matrix (.npy), a sparse one of scipy (.npz), or an edge list (.txt, .csv, ...),
whose adjacency matrix is factored: an edge that is listed again, or without --directed in reverse,
is left out; a loop counts twice, with --directed once. Factors go to factors.npz (u, s, v,
residual), in float32.
stdout ends with one line of JSON; its `residual` is the largest, relative to the largest value.
Status 1 if the tolerance was not reached: the factors are written all the same.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.sparse

from launch import UsageError, isvd_common, program
from launch.flags import field

PROGRAM = "isvd_factorize"
PRESETS: dict[str, dict[str, object]] = {
    "accurate": {"method": "krylov"},
    "paper": {"method": "subspace"},
}
_WANTED = "a dense .npy, a sparse .npz of scipy, or an edge list"


@dataclasses.dataclass(frozen=True)
class FactorizeConfig(program.SpreadConfig):
    matrix: str = field("", f"file with the matrix: {_WANTED}", group="Matrix")
    directed: bool = field(False, "edge list: an edge goes from the first node to the second")
    ignore_extra: bool = field(False, "edge list: leave aside columns after the second")
    header: bool | None = field(None, "edge list: its first row is a header; none: find out")

    rank: int = field(16, "singular triplets", min=1, group="Factorisation")
    method: Literal["krylov", "subspace"] = field(
        "krylov", "algorithm; subspace is the paper's, of ten iterations if --tol=none"
    )
    tol: float | None = field(
        None, "residual to reach, relative to the largest value; none: 2.4e-5 (krylov)"
    )
    max_products: int | None = field(
        None,
        "products with the matrix, about, after which to stop",
        unit="products",
        min=1,
        max=2**31 - 1,
    )

    def validate(self) -> None:
        isvd_common.check_tol(self.tol)
        if not self.matrix:
            raise ValueError(f"--matrix=: expected a file: {_WANTED}")
        listed = Path(self.matrix).suffix not in (".npy", ".npz")
        for name, default in (("directed", False), ("ignore_extra", False), ("header", None)):
            if getattr(self, name) != default and not listed:
                raise ValueError(
                    f"--{name}={str(getattr(self, name)).lower()}: expected an edge list with it, "
                    f"got --matrix={self.matrix}"
                )


class _Problem(NamedTuple):
    matrix: Any  # float32 or complex64
    names: np.ndarray | None = None  # of its rows, if an edge list has them
    told: str = ""  # of what is odd about an edge list


def _inputs(cfg: FactorizeConfig) -> list[Path]:
    return [Path(cfg.matrix)]


def _prepare(cfg: FactorizeConfig, say: Callable[..., None]) -> _Problem:
    problem = _read(cfg)
    matrix = problem.matrix
    with np.errstate(over="ignore"):  # found below
        matrix = matrix.astype(np.complex64 if matrix.dtype.kind == "c" else np.float32)
    values = matrix.data if scipy.sparse.issparse(matrix) else matrix
    if not np.isfinite(values).all():
        raise UsageError(
            f"--matrix={cfg.matrix}: has entries that are NaN, infinite or beyond float32; "
            "expected finite ones"
        )
    if cfg.rank > min(matrix.shape):
        raise UsageError(
            f"--rank={cfg.rank}: expected 1 to {min(matrix.shape)}, since the matrix has shape "
            f"{matrix.shape}"
        )
    return problem._replace(matrix=matrix)


def _read(cfg: FactorizeConfig) -> _Problem:
    from isvd import readers

    suffix = Path(cfg.matrix).suffix
    if suffix not in (".npy", ".npz"):
        options = {name: getattr(cfg, name) for name in ("directed", "ignore_extra", "header")}
        graph = isvd_common.read_edges("matrix", cfg.matrix, **options)
        matrix = readers.adjacency(graph.edges_E2, graph.num_nodes, directed=cfg.directed)
        loops = "loops" if cfg.directed else "loops, which count twice"
        odd = (("rows that repeat an edge, left out", graph.num_repeated), (loops, graph.num_loops))
        return _Problem(matrix, graph.names, isvd_common.counted(*odd))
    try:
        matrix = _read_dense(cfg.matrix) if suffix == ".npy" else _read_sparse(cfg.matrix)
    except Exception as error:  # damaged files raise errors of many types
        raise isvd_common.refusal("matrix", cfg.matrix, error, _WANTED) from error
    if matrix.dtype.kind not in "biufc" or matrix.ndim != 2 or 0 in matrix.shape:
        raise UsageError(
            f"--matrix={cfg.matrix}: has shape {matrix.shape} and dtype {matrix.dtype}, expected "
            "numbers (rows, columns), not empty"
        )
    return _Problem(matrix)


def _read_dense(path: str) -> np.ndarray:
    with open(path, "rb") as file:
        matrix = np.load(file, allow_pickle=False)
    if not isinstance(matrix, np.ndarray):
        raise ValueError("an archive, expected one array, as numpy.save writes it")
    return matrix


def _read_sparse(path: str) -> scipy.sparse.csr_array:
    with open(path, "rb") as file:
        matrix = scipy.sparse.load_npz(file)
    if hasattr(matrix, "check_format"):  # an index outside leads the products out of memory
        matrix.check_format(full_check=True)
    return scipy.sparse.csr_array(matrix)


def _work(
    cfg: FactorizeConfig, problem: _Problem, folder: Any, say: Callable[..., None]
) -> tuple[dict[str, Any], program.Arrays]:
    import jax

    import isvd

    matrix, names, told = problem
    is_sparse = scipy.sparse.issparse(matrix)
    make, devices = isvd_common.spread(cfg)
    op = (make or (isvd.sparse if is_sparse else isvd.dense))(matrix)
    kind = f"sparse with {matrix.nnz} entries" if is_sparse else "dense"
    say(f"{cfg.matrix}: {matrix.shape[0]} x {matrix.shape[1]}, {kind}{told}")
    say("compiling, then factoring")
    options = {"method": cfg.method, "tol": cfg.tol, "max_products": cfg.max_products}
    key = program.key_for(cfg, 1)
    report, passes = isvd_common.pass_reporter(say)
    factorize, compile_seconds = isvd_common.compiled_svd(
        op, key, rank=cfg.rank, report=report, **options
    )
    factors, seconds = factorize(op, key)
    jax.effects_barrier()
    for step, row in enumerate(passes):
        folder.scalars(step, row)
    residual = isvd_common.relative_residual(factors)
    result = {
        "products": int(factors.products),
        "singular_values": np.asarray(factors.s_K).tolist(),
        "residual": residual,
        "converged": bool(factors.converged),
        "rank": cfg.rank,
        "shape": list(matrix.shape),
        "seconds_factorize": seconds,
        "compile_seconds": compile_seconds,
        "devices": devices,
    }
    say(
        f"rank {cfg.rank} in {result['products']} products and {seconds:.2f} s (compiled in "
        f"{compile_seconds:.1f} s): largest value {result['singular_values'][0]:.6g}, "
        f"residual {residual:.1e} of it"
    )
    arrays = {"u": factors.u_MK, "s": factors.s_K, "v": factors.v_NK}
    arrays |= {"residual": factors.residual_K} | ({} if names is None else {"names": names})
    return result, {"factors": {name: np.asarray(x) for name, x in arrays.items()}}


def _draw(arrays: program.Arrays) -> dict[str, Any]:
    factors = arrays["factors"]
    return {"spectrum": isvd_common.spectrum(factors["s"], factors["residual"])}


def _status(cfg: FactorizeConfig, result: dict[str, Any]) -> int:
    if not np.isfinite(np.array(result["singular_values"], float)).all():  # null in a finished run
        print(
            f"{PROGRAM}: --matrix={cfg.matrix}: products with it overflow float32, and singular "
            "values are not finite; divide it by its largest entry",
            file=sys.stderr,
        )
        return 1
    # Subspace iteration without a tolerance was asked for its ten iterations, and made them.
    if result["converged"] or (cfg.method == "subspace" and cfg.tol is None):
        return 0
    tol = "the default" if cfg.tol is None else f"{cfg.tol:g}"
    print(
        f"{PROGRAM}: --tol={tol} was not reached: the residual is {result['residual']:.1e} after "
        f"{result['products']} products; give a larger --tol or --max_products",
        file=sys.stderr,
    )
    return 1


_PROGRAM = program.Program(PROGRAM, _inputs, _prepare, _work, _draw, _status)


def cli() -> None:
    program.cli(_PROGRAM, FactorizeConfig, PRESETS, __doc__)


if __name__ == "__main__":
    cli()

"""What the isvd programs share: reading their input, the compiled factorisation, its figures."""

import functools
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from launch import UsageError
from launch.program import RunConfig, SpreadConfig, new_axes

LEAST_PICTURED = 3  # dimensions of an embedding

# Input -------------------------------------------------------------------------------------------


def refusal(flag: str, value: str, error: Exception, wanted: str) -> UsageError:
    """What a reader says, as a sentence about the flag that named the file."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    path = os.fspath(Path(value))
    text = text.removeprefix(path) if text.startswith((f"{path}:", f"{path},")) else f": {text}"
    # The reader names its arguments, which are flags here, or are told by the suffix.
    text = re.sub(r"give delimiter='[^']+'", "name it .csv, with commas between columns", text)
    text = re.sub(
        r"\b(header|ignore_extra)=(True|False)", lambda m: f"--{m[1]}={m[2].lower()}", text
    )
    end = "" if "expected" in text else f"; expected {wanted}"
    return UsageError(f"--{flag}={value}{text}{end}")


def read_edges(flag: str, value: str, **options: Any) -> Any:
    """`isvd.readers.read_edges`, with errors that name the flag."""
    from isvd import readers

    try:
        return readers.read_edges(value, **options)
    except (OSError, ValueError) as error:
        raise refusal(flag, value, error, "an edge list that can be read") from error


def counted(*counts: tuple[str, int]) -> str:
    """What to put behind a description of a graph: "; what: count" of each count but 0."""
    return "".join(f"; {what}: {count}" for what, count in counts if count)


def check_tol(tol: float | None) -> None:
    if tol is not None and not 0 <= tol < 1:
        raise ValueError(f"--tol={tol:g}: expected from 0 to less than 1, or none")


# Computing ---------------------------------------------------------------------------------------


def compiled_svd(op: Any, key: Any, **options: Any) -> tuple[Callable[..., Any], float]:
    """(factorize(op, key) -> (SVD, seconds), seconds of compilation), the two told apart."""
    import jax

    import isvd

    began = time.monotonic()
    program = jax.jit(lambda op, key: isvd.svd(op, key, **options)).lower(op, key).compile()
    seconds = time.monotonic() - began

    def factorize(op: Any, key: Any) -> tuple[Any, float]:
        began = time.monotonic()
        factors = jax.block_until_ready(program(op, key))
        return factors, time.monotonic() - began

    return factorize, seconds


def spread(cfg: SpreadConfig) -> tuple[Callable[..., Any] | None, int]:
    """What makes operators whose rows are spread over devices, None on one, and their number."""
    import isvd
    from launch import parallel

    mesh = parallel.make_mesh(cfg.devices)
    make = functools.partial(isvd.row_sharded, mesh=mesh, axis=parallel.AXIS)
    return (make if mesh.size > 1 else None), mesh.size


def pass_reporter(say: Callable[..., None]) -> tuple[Callable[[Any, Any], None], list[dict]]:
    """`report` of `isvd.svd`, which says how far it is, and the list that it fills."""
    passes: list[dict[str, Any]] = []

    def report(products: Any, residual: Any) -> None:
        passes.append({"products": int(products), "residual": float(residual)})
        say(f"{products} products: residual {residual:.1e} of the largest value")

    return report, passes


def relative_residual(factors: Any) -> float:
    """The largest residual over s[0]; of several draws, which have a leading axis, the largest."""
    import jax.numpy as jnp

    from isvd import triplets

    relative = jnp.vectorize(triplets.relative_residual, signature="(k),(k)->()")
    return float(relative(factors.residual_K, factors.s_K).max())


def embedding_arrays(factors: Any) -> dict[str, np.ndarray]:
    """The arrays of embeddings.npz: those of both sides of each node, and how good they are."""
    from isvd import linkpred

    left_NK, right_NK = map(np.asarray, linkpred.embeddings(factors))
    arrays = {"left": left_NK, "right": right_NK, "singular_values": np.asarray(factors.s_K)}
    return arrays | {"residual": np.asarray(factors.residual_K)}


# Figures -----------------------------------------------------------------------------------------


def spectrum(s_K: Any, residual_K: Any) -> Any:
    """Values and residuals by index, both on one logarithmic axis."""
    s_K, residual_K = np.asarray(s_K, float), np.asarray(residual_K, float)
    figure, axes = new_axes("Singular values", "index, from 1", "value")
    index_K = np.arange(1, len(s_K) + 1)
    axes.plot(index_K, np.where(s_K > 0, s_K, np.nan), "o-", ms=3, color="#0072B2", label="value")
    # A matrix that was formed and factored whole has residuals of 0, which a log axis cannot show.
    shown_K = np.where(residual_K > 0, residual_K, np.nan)
    label = "residual" if (residual_K > 0).any() else "residual (all 0, not shown)"
    axes.plot(index_K, shown_K, "s--", ms=3, color="#D55E00", label=label)
    if (s_K > 0).any():
        axes.set_yscale("log")
    axes.legend()
    return figure


def tell_if_not_pictured(cfg: RunConfig, rank: int, say: Callable[..., None]) -> None:
    """Say why there will be no figure of `embedding`, if there are too few dimensions."""
    if cfg.figures and rank < LEAST_PICTURED:
        say(f"no figure of the embedding: it shows dimensions 2 and 3, and there are {rank}")


def embedding(left_NK: Any, colour_N: Any, order_N: Any, **style: Any) -> tuple[Any, Any]:
    """(figure, points) of the nodes in dimensions 2 and 3, the last of the order on top.

    The first dimension mostly tells how many neighbours a node has.
    """
    figure, axes = new_axes("Left embedding of the nodes", "dimension 2", "dimension 3")
    size = 6 if len(left_NK) > 500 else 18
    return figure, axes.scatter(*left_NK[order_N, 1:3].T, c=colour_N[order_N], s=size, **style)

"""What arguments have to be: each refusal names the argument, its value, and what is allowed."""

from typing import Any

import numpy as np

_DTYPES = ("float32", "float64", "complex64", "complex128")  # those that LAPACK factors


def check_integer(name: str, value: Any, low: int, high: int | None = None, why: str = "") -> None:
    """Refuse what is no whole number from `low` to `high`; `why` says where these come from."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name}={value!r}, expected a whole number")
    if value < low or (high is not None and value > high):
        span = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name}={value}, expected {span}{f', {why}' if why else ''}")


def checked_number(name: str, value: Any) -> float:
    """A real number whose value is known, as Python's: arrays without axes are numbers as well."""
    try:
        return float(value)
    except (TypeError, ValueError) as error:  # a traced one is a TypeError too
        raise ValueError(f"{name}={value!r}, expected a number, not traced") from error


def check_dtype(op: Any) -> None:
    """Refuse operators of integers, and of types that are too short to factor."""
    if op.dtype.name not in _DTYPES:
        raise ValueError(f"op has dtype {op.dtype}, expected one of {', '.join(_DTYPES)}")


def check_square(what: str, a: Any) -> None:
    """Refuse operators that are not square; `what` is the name of what needs them so."""
    if a.shape[0] != a.shape[1]:
        raise ValueError(f"{what}: A has shape {a.shape}, expected a square one")


def checked_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns as Python's numbers, if they are whole and at least 1."""
    pair = isinstance(shape, tuple | list) and len(shape) == 2
    if not pair or not all(isinstance(n, int | np.integer) and n >= 1 for n in shape):
        raise ValueError(f"shape={shape}: expected (rows, columns), whole numbers from 1")
    return tuple(map(int, shape))


def check_not_sparse(
    name: str, x: Any, wanted: str = "an array (`sparse` makes an operator of a sparse matrix)"
) -> None:
    """JAX makes no array of a sparse matrix, and says so in words about sequences."""
    if hasattr(x, "todense"):
        raise ValueError(f"{name} is a {type(x).__name__}, expected {wanted}")

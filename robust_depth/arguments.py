"""What arguments have to be: each refusal names the argument, its value, and what is allowed.

Values are looked at where they are concrete; a trace does not know them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_sizes(**sizes: Any) -> None:
    """ValueError unless each is a whole number, at least 1."""
    for name, size in sizes.items():
        whole = isinstance(size, int | np.integer) and not isinstance(size, bool)
        if not whole or size < 1:
            raise ValueError(f"{name}={size!r}, expected a whole number, at least 1")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """ValueError unless the value is one of these."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}, expected one of {', '.join(choices)}")


def check_fraction(fraction: Any) -> None:
    """ValueError unless it is a share of the rows, and not all."""
    if not isinstance(fraction, jax.core.Tracer) and not 0 <= float(fraction) < 1:
        raise ValueError(f"outlier_fraction={fraction}, expected from 0 to less than 1")


def check_radius(name: str, radius: Any, ndim: int = 0) -> None:
    """ValueError unless it is a finite number, at least 0, or an array of `ndim` axes of such."""
    if jnp.ndim(radius) != ndim:
        raise ValueError(f"{name} has shape {jnp.shape(radius)}, expected {ndim} axes")
    if not isinstance(radius, jax.core.Tracer):
        radius = np.asarray(radius)
        if not (np.isfinite(radius) & (radius >= 0)).all():
            raise ValueError(f"{name}={radius}, expected finite numbers, at least 0")


def known(bad: Any) -> bool:
    """Whether any of these is true, where that is known already: not while tracing."""
    return not isinstance(bad, jax.core.Tracer) and bool(np.any(bad))

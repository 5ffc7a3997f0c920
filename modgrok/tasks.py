"""Which tasks and which inputs a model trains on, and which are kept from it.

A task is a pair (a, b) and an input a pair (x, y), both in Z_p^2; the answer is a x + b y mod p.
There are p^2 of each. The choices are made once, on the host, with numpy: they take milliseconds.

`sample_tasks` and `split_inputs` draw from a random key. `reference_tasks` and `reference_inputs`
make the same choices as the paper's code does from its integer seeds.

Axes: W tasks to train on  U unseen tasks  M train inputs  O held-out inputs  p residues
Source: He, Doshi, Das, Gromov, "Learning to grok", NeurIPS 2024, arXiv 2406.02550.
"""

import functools
import math
import random
from typing import NamedTuple

import jax
import numpy as np

_LARGEST_MODULUS = 32749  # the largest prime for which a x + b y <= 2 (p - 1)^2 fits in an int32


class TaskSplit(NamedTuple):
    """Tasks (a, b), int32, no row twice."""

    train_W2: np.ndarray
    unseen_U2: np.ndarray


class InputSplit(NamedTuple):
    """Inputs (x, y), int32: every pair of Z_p^2 once. All tasks share the split."""

    train_M2: np.ndarray
    heldout_O2: np.ndarray


def sample_tasks(
    key: jax.Array,
    *,
    modulus: int,
    num_rectangles: int = 0,
    num_random: int = 0,
    num_unseen: int | None = None,
    exclude_zero: bool = False,
) -> TaskSplit:
    """Draw 4 num_rectangles + num_random distinct tasks to train on, and tasks never trained on.

    A rectangle is (a, b), (a, y), (x, b), (x, y): two corners and the two tasks that mix them.
    First corners are distinct and uniform. Each then gets a second corner, uniform among those
    that leave all tasks distinct, with x, y not in {a, b} and x != y (the reference's rule; a
    rectangle needs less). Where a corner finds none, all corners are drawn anew. Rows of the
    result: first corners, the three others of each, random ones.

    One key gives nested random sets: those of a smaller num_random come first in a larger one, and
    the unseen tasks are taken from the other end, so that a few of them are the same for all.

    Args:
        key: typed random key, spent here. Equal keys give equal tasks on every machine.
        num_unseen: how many tasks to keep unseen; None keeps all the rest.
        exclude_zero: leave the task (0, 0), which is always answered 0, out of both sets.
    Raises:
        ValueError: if there are fewer tasks than asked for, none is to be trained on or, with
            `num_unseen` None, left, or the rectangles find no room.
    """
    check_modulus(modulus)
    num_tasks = modulus**2 - exclude_zero
    num_train = 4 * num_rectangles + num_random
    _check_counts(modulus, num_rectangles, num_random, num_tasks)
    num_left = num_tasks - num_train
    if num_unseen is None:
        num_unseen = num_left
        if not num_left:
            raise ValueError(
                f"num_unseen=None asks for the rest of the tasks, but all {num_tasks} of"
                f" modulus={modulus} are trained on; train on fewer or give num_unseen=0"
            )
    if not 0 <= num_unseen <= num_left:
        raise ValueError(
            f"num_unseen={num_unseen}, expected from 0 to {num_left}: modulus={modulus} has"
            f" {num_tasks} tasks, of which {num_train} are trained on"
        )

    rng = _generator(key)
    most_placed = 0
    num_attempts = 20 + 200_000 // modulus**2  # seconds at most for a hopeless request
    for _ in range(num_attempts):
        order = [divmod(i, modulus) for i in rng.permutation(modulus**2).tolist()]
        if exclude_zero:
            order.remove((0, 0))  # enough: with this rule only a first corner can be (0, 0)
        rectangles = _grow_rectangles(rng, order[:num_rectangles], modulus)
        if len(rectangles) == 4 * num_rectangles:
            break
        most_placed = max(most_placed, (len(rectangles) - num_rectangles) // 3)
    else:
        raise ValueError(
            f"num_rectangles={num_rectangles} does not fit modulus={modulus}:"
            f" {num_attempts} attempts placed at most {most_placed}; ask for no more than that"
        )
    taken = set(rectangles)
    free = [task for task in order if task not in taken]
    return TaskSplit(_rows(rectangles + free[:num_random]), _rows(free[::-1][:num_unseen]))


def split_inputs(key: jax.Array, *, modulus: int, fraction: float) -> InputSplit:
    """Draw round(fraction p^2) of the p^2 inputs to train on; the others are held out."""
    num_train = _num_train_inputs(modulus, fraction)
    return _split(_generator(key).permutation(modulus**2), num_train, modulus)


def reference_tasks(
    seed: int, *, modulus: int, num_rectangles: int = 0, num_random: int = 0, num_unseen: int = 256
) -> TaskSplit:
    """The tasks that the paper's code trains on for an integer seed, in its order.

    They come from CPython's `random.Random(seed)`. Random and unseen tasks also depend on the order
    in which CPython walks a set of integer pairs: not promised, but found equal on CPython 3.10.13,
    3.11.7, 3.12.1 and 3.13.0. Unseen tasks: num_unseen of the rest, down to a multiple of 8.
    Where the reference finds no room for a rectangle and loops for ever, this raises.
    """
    check_modulus(modulus)
    _check_counts(modulus, num_rectangles, num_random, modulus**2)
    if num_unseen < 0:
        raise ValueError(f"num_unseen={num_unseen}, expected at least 0")
    rng = random.Random(seed)
    every = [(a, b) for a in range(modulus) for b in range(modulus)]
    tasks = rng.sample(every, num_rectangles)
    taken_pp = _occupied(tasks, modulus)
    for placed, (a, b) in enumerate(tasks[:]):
        free_pp = _second_corners(taken_pp, a, b)
        if not free_pp.any():
            raise ValueError(
                f"num_rectangles={num_rectangles} does not fit modulus={modulus} with the"
                f" reference's choices for seed={seed}: only {placed} could be placed"
            )
        x_values = [v for v in range(modulus) if v not in (a, b)]
        x, y = a, b
        while not free_pp[x, y]:
            x = rng.choice(x_values)
            y = rng.choice([v for v in x_values if v != x])
        tasks += [(a, y), (x, b), (x, y)]
        taken_pp[[a, x, x], [y, b, y]] = True
    # Sets, and lists made of them, for the order that they happen to have: see above.
    tasks += rng.sample(list(set(every) - set(tasks)), num_random)
    rest = list(set(every) - set(tasks))
    rng.shuffle(rest)
    unseen = rest[: min(num_unseen, len(rest)) // 8 * 8]
    if num_unseen and not unseen:
        raise ValueError(
            f"num_unseen={num_unseen} leaves no unseen task: {len(rest)} of the {len(every)} tasks"
            f" of modulus={modulus} are not trained on, and the reference keeps a multiple of 8"
        )
    return TaskSplit(_rows(tasks), _rows(unseen))


def reference_inputs(data_seed: int = 0, *, modulus: int, fraction: float) -> InputSplit:
    """The input split of the paper's code, which always uses data_seed 0."""
    num_train = _num_train_inputs(modulus, fraction)
    order = np.random.RandomState(data_seed).permutation(modulus**2)
    return _split(order, num_train, modulus)


def check_modulus(modulus: int) -> None:
    """Raise unless modulus is a prime for which answers can be computed in int32."""
    if not 2 <= modulus <= _LARGEST_MODULUS:
        size = "small" if modulus < 2 else "large"
        raise ValueError(
            f"modulus={modulus} is too {size}, expected a prime from 2 to {_LARGEST_MODULUS}"
        )
    if not is_prime(modulus):
        below, above = modulus - 1, modulus + 1
        while not is_prime(below):
            below -= 1
        while not is_prime(above):
            above += 1
        raise ValueError(
            f"modulus={modulus} is not a prime number; the nearest ones are {below} and {above}"
        )


@functools.cache
def inverses(modulus: int) -> np.ndarray:
    """inverse_p, int32: v inverse_p[v] = 1 mod p; 0 at v = 0, which has none."""
    inverse_p = np.array([0] + [pow(v, -1, modulus) for v in range(1, modulus)], np.int32)
    inverse_p.flags.writeable = False  # all callers get the same array
    return inverse_p


def is_prime(n: int) -> bool:
    """Whether n is a prime number."""
    return n >= 2 and all(n % divisor for divisor in range(2, math.isqrt(n) + 1))


def _check_counts(modulus: int, num_rectangles: int, num_random: int, num_tasks: int) -> None:
    for name, count in (("num_rectangles", num_rectangles), ("num_random", num_random)):
        if count < 0:
            raise ValueError(f"{name}={count}, expected at least 0")
    num_train = 4 * num_rectangles + num_random
    if not 1 <= num_train <= num_tasks:
        raise ValueError(
            f"num_rectangles={num_rectangles} and num_random={num_random} ask for {num_train} tasks"
            f" (4 for each rectangle), but modulus={modulus} allows from 1 to {num_tasks}"
        )


def _grow_rectangles(
    rng: np.random.Generator, corners: list[tuple[int, int]], modulus: int
) -> list[tuple[int, int]]:
    """The corners and three more tasks for each, up to the first for which there is no room."""
    tasks = corners[:]
    taken_pp = _occupied(corners, modulus)
    for a, b in corners:
        free = np.flatnonzero(_second_corners(taken_pp, a, b))
        if not free.size:
            break
        x, y = divmod(int(rng.choice(free)), modulus)
        tasks += [(a, y), (x, b), (x, y)]
        taken_pp[[a, x, x], [y, b, y]] = True
    return tasks


def _second_corners(taken_pp: np.ndarray, a: int, b: int) -> np.ndarray:
    """Where (x, y) may lie: x, y not in {a, b}, x != y, and (a, y), (x, b), (x, y) not taken."""
    free_pp = ~(taken_pp | taken_pp[a] | taken_pp[:, b, None])
    free_pp[[a, b]] = free_pp[:, [a, b]] = False
    np.fill_diagonal(free_pp, False)
    return free_pp


def _occupied(tasks: list[tuple[int, int]], modulus: int) -> np.ndarray:
    taken_pp = np.zeros((modulus, modulus), bool)
    taken_pp[tuple(_rows(tasks).T)] = True
    return taken_pp


def _num_train_inputs(modulus: int, fraction: float) -> int:
    check_modulus(modulus)
    num_inputs = modulus**2
    # Python rounds halves to even, as the reference does: 420 of 841 at fraction .5.
    num_train = round(num_inputs * fraction) if 0 < fraction < 1 else 0
    if not 0 < num_train < num_inputs:
        raise ValueError(
            f"fraction={fraction}, expected at least one of the {num_inputs} inputs of"
            f" modulus={modulus} on each side: from {1 / num_inputs:.4g} to"
            f" {1 - 1 / num_inputs:.4g}"
        )
    return num_train


def _split(order: np.ndarray, num_train: int, modulus: int) -> InputSplit:
    pairs_2 = np.stack(np.divmod(order, modulus), axis=1).astype(np.int32)
    return InputSplit(pairs_2[:num_train], pairs_2[num_train:])


def _rows(pairs: list[tuple[int, int]]) -> np.ndarray:
    return np.array(pairs, np.int32).reshape(-1, 2)


def _generator(key: jax.Array) -> np.random.Generator:
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))

"""Groups of tasks, which share gates in `modgrok.latent_depth`: by a rule, at random, or given.

Each function returns group_W, int32, the group of each task, numbered from 0.

Axes: W tasks, R rectangles
"""

from collections.abc import Sequence
from numbers import Integral

import jax
import numpy as np

from modgrok.tasks import inverses


def by_ratio(task_W2: np.ndarray, modulus: int) -> np.ndarray:
    """group_W by the class of b / a mod p: tasks that are multiples of each other.

    p + 1 classes, a = 0 one of them, and (0, 0) for itself; those that occur are numbered from 0.
    """
    a_W, b_W = np.asarray(task_W2).T
    ratio_W = b_W * inverses(modulus)[a_W] % modulus
    ratio_W = np.where(a_W != 0, ratio_W, np.where(b_W != 0, modulus, -1))
    return np.unique(ratio_W, return_inverse=True)[1].astype(np.int32)


def by_rectangle(num_tasks: int) -> np.ndarray:
    """group_W by rectangle, for tasks in the order of `tasks.sample_tasks` and of the paper's code.

    First corners come first, then the three other tasks of each.

    Raises:
        ValueError: if there are other tasks than those of whole rectangles.
    """
    if num_tasks % 4:
        raise ValueError(f"{num_tasks} tasks are no whole number of rectangles of 4")
    corner_R = np.arange(num_tasks // 4, dtype=np.int32)
    return np.concatenate([corner_R, np.repeat(corner_R, 3)])


def at_random(key: jax.Array, num_tasks: int, groups: int) -> np.ndarray:
    """group_W of equal sizes at random, the control; `key` is spent.

    Raises:
        ValueError: if they cannot be equal.
    """
    if groups < 1 or num_tasks % groups:
        raise ValueError(f"{num_tasks} tasks do not divide into groups={groups} of equal size")
    group_W = np.repeat(np.arange(groups, dtype=np.int32), num_tasks // groups)
    return group_W[np.asarray(jax.random.permutation(key, num_tasks))]


def given(parts: Sequence[Sequence[Sequence[int]]], task_W2: np.ndarray) -> np.ndarray:
    """group_W of a partition that the caller gives, as lists of tasks (a, b).

    Raises:
        ValueError: if a group is empty, or a task is in none, in two, or not one of `task_W2`, or
            `parts` is no list of lists of pairs of integers.
    """
    try:
        parts = [[(a, b) for a, b in part] for part in parts]
    except (TypeError, ValueError) as error:
        raise ValueError("groups are a list of lists of tasks [a, b]") from error
    for number in (number for part in parts for pair in part for number in pair):
        if isinstance(number, bool) or not isinstance(number, Integral):
            raise ValueError(f"groups are of tasks [a, b] of integers, got {number!r}")
    parts = [[(int(a), int(b)) for a, b in part] for part in parts]
    index = {(int(a), int(b)): w for w, (a, b) in enumerate(np.asarray(task_W2))}
    group_W = np.full(len(index), -1, np.int32)
    if not parts:
        raise ValueError("there are no groups")
    for group, part in enumerate(parts):
        if not len(part):
            raise ValueError(f"group {group} is empty")
        for pair in part:
            if pair not in index:
                raise ValueError(f"group {group} has {pair}, which is no training task")
            if group_W[index[pair]] >= 0:
                raise ValueError(f"task {pair} is in group {group_W[index[pair]]} and in {group}")
            group_W[index[pair]] = group
    missing = [pair for pair, w in index.items() if group_W[w] < 0]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(index)} training tasks are in no group, {missing[0]} first"
        )
    return group_W

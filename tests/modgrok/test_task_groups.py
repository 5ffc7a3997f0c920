"""Groups of tasks: that they are what their rule says, and partition the tasks."""

import jax
import numpy as np
import pytest

from modgrok import task_groups
from modgrok.tasks import sample_tasks

KEY = jax.random.key(0)
TASK_W2 = np.array([[1, 2], [3, 4], [0, 1], [2, 2]], np.int32)


def test_groups_by_ratio_are_multiples_of_each_other():
    task_W2 = np.array([(a, b) for a in range(5) for b in range(5)])
    group_W = task_groups.by_ratio(task_W2, 5)
    assert sorted(np.bincount(group_W)) == [1, *[4] * 6]
    for one in np.unique(group_W):
        part = task_W2[group_W == one]
        if len(part) > 1:
            multiples = {tuple(c * part[0] % 5) for c in range(1, 5)}
            assert multiples == set(map(tuple, part))
    few = task_groups.by_ratio(np.array([[0, 3], [1, 1], [2, 2]]), 5)
    assert sorted(set(few)) == [0, 1]


def test_groups_by_rectangle():
    tasks = sample_tasks(KEY, modulus=11, num_rectangles=4).train_W2
    group_W = task_groups.by_rectangle(16)
    for one in range(4):
        part = tasks[group_W == one]
        assert len(part) == 4
        assert len(set(part[:, 0])) == len(set(part[:, 1])) == 2
    with pytest.raises(ValueError, match="18 tasks are no whole number of rectangles"):
        task_groups.by_rectangle(18)


def test_random_groups_are_equal():
    group_W = task_groups.at_random(KEY, 12, 3)
    np.testing.assert_array_equal(np.bincount(group_W), [4, 4, 4])
    assert (group_W != np.sort(group_W)).any()
    with pytest.raises(ValueError, match="12 tasks do not divide into groups=5"):
        task_groups.at_random(KEY, 12, 5)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([[[1, 2], [3, 4]], [[0, 1]]], r"1 of 4 training tasks are in no group, \(2, 2\) first"),
        ([[[1, 2], [3, 4]], [[0, 1], [2, 2], [1, 2]]], r"task \(1, 2\) is in group 0 and in 1"),
        ([[[1, 2], [3, 4], [0, 1], [2, 2], [4, 4]]], r"group 0 has \(4, 4\), which is no training"),
        ([[[1, 2], [3, 4], [0, 1], [2, 2]], []], "group 1 is empty"),
        ([], "there are no groups"),
        ([[1, 2]], r"groups are a list of lists of tasks \[a, b\]"),
        ({"a": 1}, "groups are a list of lists"),
        (3, "groups are a list of lists"),
        ([[[1.9, 2], [3, 4]]], r"tasks \[a, b\] of integers, got 1\.9"),
        ([[[1, 2], ["3", 4]]], r"tasks \[a, b\] of integers, got '3'"),
        ([[[1, 2], [False, True]]], r"tasks \[a, b\] of integers, got False"),
    ],
)
def test_groups_must_partition_the_tasks(parts, message):
    with pytest.raises(ValueError, match=message):
        task_groups.given(parts, TASK_W2)


def test_a_given_partition():
    group_W = task_groups.given([[[3, 4], [0, 1]], [[2, 2], [1, 2]]], TASK_W2)
    np.testing.assert_array_equal(group_W, [1, 0, 0, 1])

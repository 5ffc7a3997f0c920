"""The choices of the paper's code. Golden values were produced by running it."""

import random

import jax
import numpy as np
import pytest
from task_sets import assert_task_split, pairs

from modgrok import tasks

P = 29  # the paper's modulus


def sums(rows):
    return tuple(rows.sum(0).tolist())


@pytest.mark.parametrize(
    ("seed", "m", "first", "first_rectangles", "last", "total", "zeros", "unseen", "unseen_total"),
    [
        (
            1,
            96,
            [(4, 21), (20, 2), (28, 9), (26, 28), (2, 6), (9, 0)],
            [(4, 16), (2, 21), (2, 16), (20, 17), (23, 2), (23, 17)],
            [(13, 17), (4, 6), (4, 17)],
            (5510, 5326),
            26,
            [(4, 11), (21, 1), (15, 28), (26, 1), (2, 22), (6, 27)],
            (3422, 3598),
        ),
        (
            2,
            128,
            [(1, 28), (3, 6), (2, 28), (12, 21), (5, 28), (25, 28)],
            [(1, 26), (23, 28), (23, 26), (3, 2), (1, 6), (1, 2)],
            [(18, 10), (15, 12), (15, 10)],
            (7406, 7182),
            38,
            [(0, 19), (4, 4), (9, 16), (12, 7), (4, 9), (24, 28)],
            (3489, 3646),
        ),
    ],
)
def test_reference_tasks_of_the_published_checkpoints(
    seed, m, first, first_rectangles, last, total, zeros, unseen, unseen_total
):
    split = tasks.reference_tasks(seed, modulus=P, num_rectangles=m)
    assert_task_split(split, P, 4 * m)
    train = pairs(split.train_W2)
    assert train[:6] == first
    assert train[m : m + 6] == first_rectangles
    assert train[-3:] == last
    assert sums(split.train_W2) == total
    assert sum(0 in task for task in train) == zeros
    assert pairs(split.unseen_U2[:6]) == unseen
    assert (len(split.unseen_U2), sums(split.unseen_U2)) == (256, unseen_total)


@pytest.mark.parametrize(
    ("m", "total", "first_rectangle"),
    [
        (2, (108, 118), [(4, 26), (27, 21), (27, 26)]),
        (4, (248, 246), [(4, 10), (2, 21), (2, 10)]),
        (8, (482, 434), [(4, 15), (26, 21), (26, 15)]),
        (16, (892, 866), [(4, 0), (16, 21), (16, 0)]),
        (32, (1806, 1792), [(4, 1), (0, 21), (0, 1)]),
        (64, (3616, 3654), [(4, 26), (11, 21), (11, 26)]),
        (128, (7324, 7026), [(4, 12), (19, 21), (19, 12)]),
    ],
)
def test_reference_rectangles_of_the_phase_diagram(m, total, first_rectangle):
    train_W2 = tasks.reference_tasks(1, modulus=P, num_rectangles=m).train_W2
    assert sums(train_W2) == total
    assert pairs(train_W2[m : m + 3]) == first_rectangle
    assert pairs(train_W2[: min(m, 3)]) == [(4, 21), (20, 2), (28, 9)][: min(m, 3)]


@pytest.mark.parametrize(
    ("n", "total"),
    [
        (8, (92, 136)),
        (16, (212, 249)),
        (32, (380, 492)),
        (64, (767, 836)),
        (128, (1651, 1633)),
        (256, (3534, 3496)),
        (512, (7269, 7097)),
    ],
)
def test_reference_random_tasks(n, total):
    train_W2 = tasks.reference_tasks(1, modulus=P, num_random=n).train_W2
    assert (len(train_W2), sums(train_W2)) == (n, total)
    assert pairs(train_W2[:6]) == [(2, 3), (16, 25), (0, 19), (8, 28), (14, 28), (20, 19)]
    assert ((0, 0) in pairs(train_W2)) == (n == 512)


def plain_reference(seed, p, num_rectangles, num_random, num_unseen):
    """The reference's sampler word for word, on the global generator that it uses."""
    random.seed(seed)
    every = [(a, b) for a in range(p) for b in range(p)]
    corners = random.sample(every, num_rectangles)
    chosen = corners.copy()
    for a, b in corners:
        while True:
            x = random.choice([v for v in range(p) if v != a and v != b])
            y = random.choice([v for v in range(p) if v != a and v != b and v != x])
            if not {(a, y), (x, b), (x, y)} & set(chosen):
                break
        chosen += [(a, y), (x, b), (x, y)]
    extra = random.sample(list(set(every) - set(chosen)), num_random)
    unseen = list(set(every) - set(chosen + extra))
    random.shuffle(unseen)
    unseen = unseen[:num_unseen]
    return chosen + extra, unseen[: len(unseen) // 8 * 8]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("p", "num_rectangles", "num_random", "num_unseen"),
    [(29, 20, 30, 100), (13, 5, 9, 256), (7, 2, 3, 20), (5, 1, 2, 16)],
)
def test_reference_tasks_for_any_modulus_and_mixture(
    seed, p, num_rectangles, num_random, num_unseen
):
    state = random.getstate()
    try:
        train, unseen = plain_reference(seed, p, num_rectangles, num_random, num_unseen)
    finally:
        random.setstate(state)
    split = tasks.reference_tasks(
        seed,
        modulus=p,
        num_rectangles=num_rectangles,
        num_random=num_random,
        num_unseen=num_unseen,
    )
    assert pairs(split.train_W2) == train
    assert pairs(split.unseen_U2) == unseen
    assert random.getstate() == state, "the global generator is not ours to advance"


def test_reference_inputs():
    splits = {f: tasks.reference_inputs(modulus=P, fraction=f) for f in (0.5, 0.6, 0.8)}
    for train_M2, heldout_O2 in splits.values():
        assert pairs(train_M2[:6]) == [(18, 11), (5, 0), (22, 5), (7, 28), (23, 2), (14, 2)]
        assert sorted(pairs(np.concatenate([train_M2, heldout_O2]))) == [
            (x, y) for x in range(P) for y in range(P)
        ]
    assert pairs(splits[0.8].heldout_O2[:6]) == [
        (18, 6), (21, 12), (15, 26), (20, 18), (4, 23), (8, 28)
    ]  # fmt: skip
    assert pairs(splits[0.6].heldout_O2[:6]) == [
        (19, 6), (18, 1), (24, 17), (5, 18), (4, 8), (5, 9)
    ]  # fmt: skip
    assert sums(splits[0.8].train_M2) == (9489, 9433)
    assert sums(splits[0.6].train_M2) == (7046, 7116)
    assert sums(splits[0.5].train_M2) == (5815, 5866)
    assert [(0, 0) in pairs(splits[f].train_M2) for f in (0.6, 0.8)] == [True, True]


@pytest.mark.parametrize(
    ("fraction", "num_train"),
    # .5 of 841 is 420.5: Python rounds halves to even.
    [(0.8, 673), (0.7, 589), (0.6, 505), (0.5, 420), (0.4, 336), (0.3, 252), (0.2, 168)],
)
def test_number_of_train_inputs(fraction, num_train):
    reference = tasks.reference_inputs(modulus=P, fraction=fraction)
    ours = tasks.split_inputs(jax.random.key(0), modulus=P, fraction=fraction)
    assert len(reference.train_M2) == len(ours.train_M2) == num_train


def test_reference_data_seed_changes_the_split():
    first, second = (
        tasks.reference_inputs(seed, modulus=7, fraction=0.8).train_M2 for seed in (0, 1)
    )
    assert (first != second).any()

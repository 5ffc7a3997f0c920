"""modgrok/tasks.py: the rules of our own choices, and what is refused, of the reference's too."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from task_sets import assert_task_split, pairs

from modgrok import tasks


def rectangles(train_W2, num_rectangles):
    """(a, b) and its three partners, in the order of the rows."""
    corners = pairs(train_W2[:num_rectangles])
    partners = pairs(train_W2[num_rectangles : 4 * num_rectangles])
    return [(c, *partners[3 * i : 3 * i + 3]) for i, c in enumerate(corners)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    modulus=st.sampled_from([5, 7, 11, 13, 29]),
    share=st.floats(0, 0.7),
    num_random=st.integers(0, 5),
    exclude_zero=st.booleans(),
)
def test_sampled_tasks_follow_the_rectangular_rule(seed, modulus, share, num_random, exclude_zero):
    m = int(share * modulus**2 / 4)
    if m + num_random == 0:
        num_random = 1
    split = tasks.sample_tasks(
        jax.random.key(seed),
        modulus=modulus,
        num_rectangles=m,
        num_random=num_random,
        exclude_zero=exclude_zero,
    )
    assert_task_split(split, modulus, 4 * m + num_random)
    assert len(split.train_W2) + len(split.unseen_U2) == modulus**2 - exclude_zero
    if exclude_zero:
        assert (0, 0) not in pairs(np.concatenate(split))
    for (a, b), mixed_ay, mixed_xb, (x, y) in rectangles(split.train_W2, m):
        assert (mixed_ay, mixed_xb) == ((a, y), (x, b))
        assert not {x, y} & {a, b}
        assert x != y


def test_corners_are_uniform_and_partners_uniform_among_the_valid():
    """The last rectangle of three at p = 5, over many keys, against all partners it could have."""
    p, m, num_keys = 5, 3, 1500
    corner_counts = np.zeros((p, p))
    ranks = []
    for seed in range(num_keys):
        train_W2 = tasks.sample_tasks(jax.random.key(seed), modulus=p, num_rectangles=m).train_W2
        *_, (a, b) = pairs(train_W2[:m])
        *_, partner = pairs(train_W2)
        taken = set(pairs(train_W2[:-3]))
        valid = [
            (x, y)
            for x in set(range(p)) - {a, b}
            for y in set(range(p)) - {a, b, x}
            if not {(a, y), (x, b), (x, y)} & taken
        ]
        corner_counts[tuple(train_W2[0])] += 1
        # A rank among n options, spread evenly over its n-th of [0, 1]: uniform if the choice is.
        ranks.append((valid.index(partner) + np.random.default_rng(seed).random()) / len(valid))
    assert stats.kstest(ranks, "uniform").pvalue > 1e-3
    assert stats.chisquare(corner_counts.ravel()).pvalue > 1e-3


def test_random_tasks_are_uniform():
    counts = np.zeros((5, 5))
    for seed in range(500):
        split = tasks.sample_tasks(jax.random.key(seed), modulus=5, num_random=10, num_unseen=5)
        np.add.at(counts, tuple(split.train_W2.T), 1)
    # Without replacement counts vary a little less than chi-squared assumes.
    assert stats.chisquare(counts.ravel()).pvalue > 1e-3


def test_random_sets_of_one_key_are_nested_and_share_unseen_tasks():
    small, large = (
        tasks.sample_tasks(jax.random.key(3), modulus=7, num_random=n, num_unseen=9)
        for n in (8, 40)
    )
    np.testing.assert_array_equal(small.train_W2, large.train_W2[:8])
    np.testing.assert_array_equal(small.unseen_U2, large.unseen_U2)


def test_number_of_unseen_tasks():
    def unseen(num_unseen):
        split = tasks.sample_tasks(
            jax.random.key(0), modulus=7, num_rectangles=5, num_random=10, num_unseen=num_unseen
        )
        return split.unseen_U2

    assert [len(unseen(n)) for n in (None, 19, 12, 0)] == [19, 19, 12, 0]
    np.testing.assert_array_equal(unseen(12), unseen(None)[:12])


def test_all_tasks_can_be_trained_on_when_none_is_asked_to_stay_unseen():
    split = tasks.sample_tasks(jax.random.key(0), modulus=5, num_random=25, num_unseen=0)
    assert sorted(pairs(split.train_W2)) == [(a, b) for a in range(5) for b in range(5)]
    assert split.unseen_U2.shape == (0, 2)


def test_dense_sets_are_found_by_starting_over():
    """Ten rectangles at p = 7: one greedy attempt in two hundred gets that far."""
    for seed in range(5):
        split = tasks.sample_tasks(jax.random.key(seed), modulus=7, num_rectangles=10)
        assert_task_split(split, 7, 40)


def test_keys_decide_everything():
    def draw(seed):
        key = jax.random.key(seed)
        chosen = tasks.sample_tasks(key, modulus=11, num_rectangles=5, num_random=7)
        return [*chosen, *tasks.split_inputs(key, modulus=11, fraction=0.6)]

    for one, same, other in zip(draw(0), draw(0), draw(1), strict=True):
        np.testing.assert_array_equal(one, same)
        assert (one != other).any()


def test_draws_stay_what_they_were():
    """A resumed run draws its tasks anew from its key, so these numbers must not move.

    If they do after an upgrade of numpy, its generator has changed: say so in the changelog,
    since unfinished runs cannot be resumed across it, and store the new numbers.
    """
    key_tasks, key_inputs = jax.random.split(jax.random.key(0))
    train_W2, unseen_U2 = tasks.sample_tasks(
        key_tasks, modulus=7, num_rectangles=1, num_random=2, num_unseen=2
    )
    train_M2, _ = tasks.split_inputs(key_inputs, modulus=7, fraction=0.1)
    assert pairs(train_W2) == [(3, 3), (3, 5), (4, 3), (4, 5), (0, 5), (2, 6)]
    assert pairs(unseen_U2) == [(4, 1), (1, 0)]
    assert pairs(train_M2) == [(0, 1), (2, 4), (0, 5), (1, 6), (2, 1)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    modulus=st.sampled_from([2, 3, 5, 7, 13]),
    position=st.floats(0, 1),
)
def test_input_split_is_a_partition_for_every_allowed_fraction(seed, modulus, position):
    lowest = 1 / modulus**2
    fraction = lowest + position * (1 - 2 * lowest)
    split = tasks.split_inputs(jax.random.key(seed), modulus=modulus, fraction=fraction)
    assert len(split.train_M2) == round(fraction * modulus**2)
    assert len(split.heldout_O2) > 0
    assert split.train_M2.dtype == split.heldout_O2.dtype == np.int32
    assert sorted(pairs(np.concatenate(split))) == [
        (x, y) for x in range(modulus) for y in range(modulus)
    ]


# What is refused


def ours(**arguments):
    return tasks.sample_tasks(jax.random.key(0), **arguments)


def reference(**arguments):
    return tasks.reference_tasks(1, **arguments)


@pytest.mark.parametrize("sample", [ours, reference])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"modulus": 9, "num_random": 4},
            "modulus=9 is not a prime number; the nearest ones are 7 and 11",
        ),
        (
            {"modulus": 1, "num_random": 4},
            "modulus=1 is too small, expected a prime from 2 to 32749",
        ),
        (
            {"modulus": 32771, "num_random": 4},
            "modulus=32771 is too large, expected a prime from 2 to 32749",
        ),
        (
            {"modulus": 7, "num_rectangles": -1},
            "num_rectangles=-1, expected at least 0",
        ),
        (
            {"modulus": 7, "num_rectangles": 3, "num_random": -1},
            "num_random=-1, expected at least 0",
        ),
        (
            {"modulus": 7},
            "num_rectangles=0 and num_random=0 ask for 0 tasks (4 for each rectangle),"
            " but modulus=7 allows from 1 to 49",
        ),
        (
            {"modulus": 7, "num_rectangles": 8, "num_random": 18},
            "num_rectangles=8 and num_random=18 ask for 50 tasks (4 for each rectangle),"
            " but modulus=7 allows from 1 to 49",
        ),
    ],
)
def test_impossible_tasks_are_refused(sample, arguments, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
        sample(**arguments)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("sample", "arguments", "message"),
    [
        (
            ours,
            {"modulus": 7, "num_random": 49, "exclude_zero": True},
            "num_rectangles=0 and num_random=49 ask for 49 tasks (4 for each rectangle),"
            " but modulus=7 allows from 1 to 48",
        ),
        (
            ours,
            {"modulus": 7, "num_rectangles": 12, "num_unseen": 1},
            "num_rectangles=12 does not fit modulus=7:"
            " 4101 attempts placed at most 10; ask for no more than that",
        ),
        (
            ours,
            {"modulus": 7, "num_random": 48, "exclude_zero": True},
            "num_unseen=None asks for the rest of the tasks, but all 48 of modulus=7 are trained"
            " on; train on fewer or give num_unseen=0",
        ),
        (
            ours,
            {"modulus": 7, "num_random": 40, "num_unseen": 10},
            "num_unseen=10, expected from 0 to 9:"
            " modulus=7 has 49 tasks, of which 40 are trained on",
        ),
        (
            ours,
            {"modulus": 7, "num_random": 40, "num_unseen": -1},
            "num_unseen=-1, expected from 0 to 9:"
            " modulus=7 has 49 tasks, of which 40 are trained on",
        ),
        (
            reference,
            {"modulus": 7, "num_rectangles": 12},
            "num_rectangles=12 does not fit modulus=7 with the reference's choices for seed=1:"
            " only 9 could be placed",
        ),
        (
            reference,
            {"modulus": 7, "num_random": 42},
            "num_unseen=256 leaves no unseen task: 7 of the 49 tasks of modulus=7 are not trained"
            " on, and the reference keeps a multiple of 8",
        ),
        (
            reference,
            {"modulus": 7, "num_random": 42, "num_unseen": -8},
            "num_unseen=-8, expected at least 0",
        ),
    ],
)
def test_requests_that_cannot_be_met_say_what_can(sample, arguments, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
        sample(**arguments)
    assert str(error.value) == message


@pytest.mark.parametrize("modulus", [2, 3])
def test_smallest_moduli_have_hardly_a_rectangle(modulus):
    """At p = 2 none exists; at p = 3 one does, but not from every corner."""
    if modulus == 3:
        split = tasks.sample_tasks(jax.random.key(0), modulus=3, num_rectangles=1)
        assert_task_split(split, 3, 4)
    with pytest.raises(ValueError, match=f"placed at most {modulus - 2}; ask for no more"):
        tasks.sample_tasks(
            jax.random.key(0), modulus=modulus, num_rectangles=modulus - 1, num_unseen=0
        )


def our_inputs(**arguments):
    return tasks.split_inputs(jax.random.key(0), **arguments)


@pytest.mark.parametrize("split", [our_inputs, tasks.reference_inputs])
@pytest.mark.parametrize("fraction", [-0.5, 0.0, 0.009, 0.991, 1.0, 1.5, float("nan")])
def test_fractions_that_leave_an_empty_set_are_refused(split, fraction):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
        split(modulus=7, fraction=fraction)
    assert str(error.value) == (
        f"fraction={fraction}, expected at least one of the 49 inputs of modulus=7 on each side:"
        " from 0.02041 to 0.9796"
    )


@pytest.mark.parametrize("modulus", [2, 29])
def test_inverses(modulus):
    inverse_p = tasks.inverses(modulus)
    assert inverse_p.dtype == np.int32
    assert (np.arange(modulus) * inverse_p % modulus).tolist() == [0] + [1] * (modulus - 1)


@pytest.mark.parametrize("split", [our_inputs, tasks.reference_inputs])
def test_inputs_of_no_field_are_refused(split):
    with pytest.raises(ValueError, match=r"^modulus=15 is not a prime number"):
        split(modulus=15, fraction=0.5)


def test_is_prime():
    assert [n for n in range(-3, 32) if tasks.is_prime(n)] == [
        2,
        3,
        5,
        7,
        11,
        13,
        17,
        19,
        23,
        29,
        31,
    ]
    assert tasks.is_prime(32749)
    assert not tasks.is_prime(181**2)

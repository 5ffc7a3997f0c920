"""Batches of examples: balanced, paired, with right answers, uniform on the given inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from modgrok.sequences import answers, check_batch, in_batches, sample_sequences

P, S, R = 7, 5, 3
TASK_W2 = np.array([[1, 2], [0, 0], [6, 6], [0, 3]], np.int32)
INPUT_M2 = np.array([[0, 0], [1, 3], [6, 2], [5, 5], [2, 0], [0, 4]], np.int32)
W, M, B = len(TASK_W2), len(INPUT_M2), R * len(TASK_W2)

sample = jax.jit(sample_sequences, static_argnames=("modulus", "shots", "batch", "paired"))
draw = functools.partial(sample, modulus=P, shots=S, batch=B)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_rows_are_task_major_and_answers_are_right(paired, seed):
    tokens_BT = draw(jax.random.key(seed), TASK_W2, INPUT_M2, paired=paired)
    assert tokens_BT.shape == (B, 3 * S)
    assert tokens_BT.dtype == jnp.int32
    given = {tuple(xy) for xy in INPUT_M2.tolist()}
    for row, tokens_T in enumerate(np.asarray(tokens_BT).tolist()):
        a, b = TASK_W2[row // R].tolist()
        for x, y, z in zip(tokens_T[0::3], tokens_T[1::3], tokens_T[2::3], strict=True):
            assert (x, y) in given
            assert z == (a * x + b * y) % P


def test_answers_are_every_third_token():
    tokens_BT = draw(jax.random.key(0), TASK_W2, INPUT_M2)
    z_BS = np.asarray(tokens_BT).reshape(B, S, 3)[..., 2]
    np.testing.assert_array_equal(answers(tokens_BT), z_BS)


@pytest.mark.parametrize("paired", [True, False])
def test_pairing_gives_every_task_the_same_inputs(paired):
    tokens_BT = np.asarray(draw(jax.random.key(0), TASK_W2, INPUT_M2, paired=paired))
    xy_WRS2 = tokens_BT.reshape(W, R, S, 3)[..., :2]
    other_tasks_agree = (xy_WRS2 == xy_WRS2[:1]).all()
    assert other_tasks_agree == paired
    # The sequences of one task differ in either case.
    assert len({xy.tobytes() for xy in xy_WRS2[0]}) == R


@pytest.mark.parametrize("paired", [True, False])
def test_inputs_are_uniform_and_independent(paired):
    shots, batch = 40, 400 if paired else 40
    tasks_W2 = TASK_W2[:1] if paired else np.repeat(TASK_W2, 10, axis=0)
    tokens_BT = sample(
        jax.random.key(3), tasks_W2, INPUT_M2, modulus=P, shots=shots, batch=batch, paired=paired
    )
    xy_BS2 = np.asarray(tokens_BT).reshape(-1, shots, 3)[..., :2]
    index_BS = (xy_BS2[:, :, None] == INPUT_M2).all(-1).argmax(-1)
    assert stats.chisquare(np.bincount(index_BS.ravel(), minlength=M)).pvalue > 1e-3
    # Neighbours, with replacement: all M^2 ordered pairs are equally likely.
    pair_N = (M * index_BS[:, 0::2] + index_BS[:, 1::2]).ravel()
    assert stats.chisquare(np.bincount(pair_N, minlength=M * M)).pvalue > 1e-3


def test_key_decides():
    one, same, other = (draw(jax.random.key(k), TASK_W2, INPUT_M2) for k in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_largest_modulus_does_not_overflow():
    p = 32749
    tokens_BT = sample(
        jax.random.key(0),
        np.full((1, 2), p - 1),
        np.full((1, 2), p - 1),
        modulus=p,
        shots=1,
        batch=1,
    )
    assert tokens_BT[0, 2] == 2 * (p - 1) ** 2 % p


@pytest.mark.parametrize(
    ("batch", "num_tasks", "nearest"), [(10, 4, 8), (11, 4, 12), (1, 4, 4), (0, 4, 4), (-4, 4, 4)]
)
def test_batch_must_be_balanced(batch, num_tasks, nearest):
    message = (
        f"batch={batch} is not a multiple of the {num_tasks} tasks.*nearest that is: {nearest}"
    )
    with pytest.raises(ValueError, match=message):
        check_batch(batch, num_tasks)
    with pytest.raises(ValueError, match=message):
        sample_sequences(
            jax.random.key(0), TASK_W2[:num_tasks], INPUT_M2, modulus=P, shots=S, batch=batch
        )


def test_shots_must_be_positive():
    with pytest.raises(ValueError, match="shots=0, expected at least 1"):
        sample_sequences(jax.random.key(0), TASK_W2, INPUT_M2, modulus=P, shots=0, batch=B)


def test_a_concrete_number_of_tasks_must_divide_the_batch():
    draw = functools.partial(
        sample_sequences, jax.random.key(0), TASK_W2, INPUT_M2, modulus=P, shots=S, batch=B
    )
    for num_tasks in (7, np.int64(7)):
        with pytest.raises(ValueError, match="batch=12 is not a multiple of the 7 tasks"):
            draw(num_tasks=num_tasks)
    assert draw(num_tasks=3).shape == (B, 3 * S)


def test_a_number_of_tasks_needs_draws_that_do_not_depend_on_the_shape():
    with (
        jax.threefry_partitionable(False),
        pytest.raises(ValueError, match="num_tasks needs jax_threefry_partitionable=True"),
    ):
        sample_sequences(
            jax.random.key(0), TASK_W2, INPUT_M2, modulus=P, shots=S, batch=B, num_tasks=2
        )


@pytest.mark.parametrize(("rows", "shape"), [(3, (3, 3)), (4, (2, 4)), (100, (1, 7))])
def test_batches_have_every_row_once_and_are_filled_with_the_first(rows, shape):
    x_B2 = np.arange(14).reshape(7, 2)
    one, two = in_batches((x_B2, x_B2[:, 0]), rows)
    assert (one.shape, two.shape) == ((*shape, 2), shape)
    flat = np.asarray(one).reshape(-1, 2)
    np.testing.assert_array_equal(flat[:7], x_B2)
    assert (flat[7:] == x_B2[0]).all()
    np.testing.assert_array_equal(two, one[..., 0])

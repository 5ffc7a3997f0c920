"""Scores against a plain loop over sequences and shots; what rows and devices do not change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asserts import assert_trees_close
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from modgrok import evaluation, interop, sequences
from modgrok.evaluation import DECIDING, REPORTED, SETS, evaluate, score_tasks, take_tasks
from modgrok.tasks import InputSplit, TaskSplit
from tests.modgrok import reference_forward

P, S = 5, 3
ARRAYS = reference_forward.random_state_dict(0, vocab=6, width=8, heads=2, layers=1)
CFG, PARAMS = interop.from_state_dict(ARRAYS)
KEY = jax.random.key(0)
# All sets have one size, so that they are one program; their contents tell them apart.
TASKS = TaskSplit(
    np.array([[1, 2], [3, 4], [0, 1]], np.int32), np.array([[2, 2], [4, 1], [0, 3]], np.int32)
)
INPUTS = InputSplit(
    np.array([[1, 2], [0, 4], [2, 2]], np.int32), np.array([[4, 1], [1, 1], [3, 3]], np.int32)
)
OPTIONS = {"cfg": CFG, "modulus": P, "shots": S}
score = functools.partial(score_tasks, PARAMS, KEY, *(TASKS[0], INPUTS[0]), **OPTIONS)


def loop(tokens_BT, num_tasks):
    """Accuracy and loss (W, S) in plain Python over the numpy forward pass."""
    logits_BTV = reference_forward.forward(ARRAYS, tokens_BT[:, :-1])
    accuracy_WS, loss_WS = np.zeros((2, num_tasks, S))
    repeats = len(tokens_BT) // num_tasks
    for row, tokens_T in enumerate(tokens_BT):
        for shot in range(S):
            logits_V = logits_BTV[row, 3 * shot + 1]
            z = tokens_T[3 * shot + 2]
            accuracy_WS[row // repeats, shot] += (logits_V.argmax() == z) / repeats
            loss_WS[row // repeats, shot] += np.log(np.exp(logits_V - logits_V[z]).sum()) / repeats
    return accuracy_WS, loss_WS


def test_scores_are_those_of_a_plain_loop():
    scores = score(num_sequences=4)
    tokens_BT = sequences.sample_sequences(
        KEY, TASKS.train_W2, INPUTS.train_M2, modulus=P, shots=S, batch=12
    )
    accuracy_WS, loss_WS = loop(np.asarray(tokens_BT), 3)
    np.testing.assert_allclose(scores.accuracy_WS, accuracy_WS, atol=1e-6)
    np.testing.assert_allclose(scores.loss_WS, loss_WS, rtol=1e-4, atol=1e-4)
    assert len(np.unique(accuracy_WS)) > 2
    assert scores.num_sequences == 4
    np.testing.assert_allclose(scores.last_shot, accuracy_WS[:, -1].mean(), atol=1e-6)


@pytest.mark.parametrize("rows", [5, 12, 1])
def test_rows_change_no_score(rows):
    """5 leaves a last pass of 2 rows, filled up with 3 that must not count."""
    assert_trees_close(score(num_sequences=4, rows=rows), score(num_sequences=4))


def test_rows_bound_the_forward_pass():
    program = str(jax.make_jaxpr(lambda: score(num_sequences=4, rows=5))())
    assert f"f32[5,{S},6]" in program
    assert f"f32[12,{S},6]" not in program


@pytest.mark.parametrize("rows", [1024, 5])
def test_eight_devices_give_the_same_scores(rows):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    params = jax.device_put(PARAMS, NamedSharding(mesh, PartitionSpec()))
    scores = score_tasks(
        params,
        KEY,
        TASKS[0],
        INPUTS[0],
        num_sequences=4,
        rows=rows,
        row_sharding=sharding,
        **OPTIONS,
    )
    assert_trees_close(scores, score(num_sequences=4))


def test_four_sets_have_their_own_tasks_inputs_and_keys():
    sets = evaluate(PARAMS, KEY, TASKS, INPUTS, sequences_per_task=4, **OPTIONS)
    assert sets._fields == SETS
    keys = jax.random.split(KEY, 4)
    of_sets = [(task, inputs) for task in TASKS for inputs in INPUTS]
    for scores, key, (task_W2, input_M2) in zip(sets, keys, of_sets, strict=True):
        tokens_BT = sequences.sample_sequences(key, task_W2, input_M2, modulus=P, shots=S, batch=12)
        accuracy_WS, loss_WS = loop(np.asarray(tokens_BT), 3)
        np.testing.assert_allclose(scores.accuracy_WS, accuracy_WS, atol=1e-6)
        np.testing.assert_allclose(scores.loss_WS, loss_WS, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("asked", "wanted"), [(3, [3] * 4), (np.int64(3), [3] * 4), ((4, 2), [4, 4, 2, 2])]
)
def test_number_of_sequences(asked, wanted):
    run = functools.partial(evaluate, sequences_per_task=asked, **OPTIONS)
    sets = jax.eval_shape(run, PARAMS, KEY, TASKS, INPUTS)
    assert [s.accuracy_WS.shape for s in sets] == [(3, S)] * 4
    program = str(jax.make_jaxpr(run)(PARAMS, KEY, TASKS, INPUTS))
    for count in wanted:
        assert f"i32[{3 * count},{3 * S}]" in program


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_sequences": 0}, "num_sequences=0, expected at least 1"),
        ({"num_sequences": 4, "rows": 0}, "rows=0, expected at least 1"),
        (
            {"num_sequences": 4, "gate": np.ones((1, 3, 1))},
            r"gate has shape \(1, 3, 1\), expected \(1,\) or \(3, 1\)",
        ),
    ],
)
def test_impossible_requests(options, message):
    with pytest.raises(ValueError, match=message):
        score(**options)


def test_deciding_and_reported_tasks_part_the_unseen_ones():
    accuracy_WS = jnp.arange(14.0).reshape(7, 2)
    scores = evaluation.SetScores(accuracy_WS, -accuracy_WS, jnp.int32(9))
    parts = [take_tasks(scores, index) for index in (DECIDING, REPORTED)]
    assert [p.accuracy_WS[:, 0].tolist() for p in parts] == [[0, 4, 8, 12], [2, 6, 10]]
    assert [p.loss_WS[:, 0].tolist() for p in parts] == [[0, -4, -8, -12], [-2, -6, -10]]
    assert all(p.num_sequences == 9 for p in parts)
    together = sorted(x for p in parts for x in p.accuracy_WS[:, 0].tolist())
    assert together == accuracy_WS[:, 0].tolist()


@pytest.mark.parametrize(
    ("curve", "wanted"),
    [
        ([0.1, 0.5, 0.9, 0.6], (0.9, 20, 0.6, 0.3)),  # rises, then falls
        ([0.1, 0.5, 0.7, 0.9], (0.9, 30, 0.9, 0.0)),  # monotone: nothing lost
        ([0.9, 0.5, 0.3, 0.1], (0.9, 0, 0.1, 0.8)),  # best at once
        ([0.2, 0.8, 0.8, 0.7], (0.8, 10, 0.7, 0.1)),  # the earlier of two
        ([0.4], (0.4, 0, 0.4, 0.0)),
    ],
)
def test_transience_on_known_curves(curve, wanted):
    result = evaluation.transience(range(0, 10 * len(curve), 10), curve)
    assert result == pytest.approx(wanted)
    assert isinstance(result.best_step, int)


def test_other_tasks_decide_on_the_best_step():
    result = evaluation.transience([10, 20, 30, 40], [0.3, 0.9, 0.5, 0.6], [0.2, 0.4, 0.8, 0.8])
    assert result == pytest.approx((0.5, 30, 0.6, -0.1))

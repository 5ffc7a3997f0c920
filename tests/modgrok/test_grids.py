"""Grids over queries: masks against sets of lines and spans, and the oracles as known answers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from modgrok import controls, grids, sequences

P, SHOTS, CONTEXTS = 5, 7, 4
EVERY = np.stack(np.divmod(np.arange(P**2), P), axis=1).astype(np.int32)
TASK_C2 = EVERY[[7, 13, 19, 22]]
CONTEXT_CT = sequences.sample_sequences(
    jax.random.key(3), TASK_C2, EVERY, modulus=P, shots=SHOTS, batch=CONTEXTS, paired=False
)
SHOT_K = np.array([0, 1, 2, 6])
ask = functools.partial(grids.shot_grids, modulus=P)


@functools.cache
def found(name):
    return ask(getattr(controls, name)(P).predict, CONTEXT_CT, TASK_C2, SHOT_K)


def spans(examples):
    """(on a line of one example, in the span of all), as sets of inputs."""
    multiples = {(c * x % P, c * y % P) for x, y in examples for c in range(P)} | {(0, 0)}
    span = multiples
    for _ in range(2):
        span = {((a + x) % P, (b + y) % P) for a, b in span for x, y in multiples}
    return multiples, span


def test_masks_are_lines_and_spans():
    grid = found("ratio_matching")
    for k, c in np.ndindex(len(SHOT_K), CONTEXTS):
        examples = np.asarray(CONTEXT_CT)[c].reshape(-1, 3)[: SHOT_K[k], :2]
        for mask_KCpp, wanted in zip(grid[1:], spans(map(tuple, examples.tolist())), strict=True):
            mask_pp = np.asarray(mask_KCpp[k, c])
            assert set(zip(*np.nonzero(mask_pp), strict=True)) == wanted
    assert not np.asarray(grid.ratio_KCpp & ~grid.regression_KCpp).any()


def test_an_example_at_the_origin_and_two_on_one_line_span_no_more():
    context_T = np.array([0, 0, 0, 1, 2, 0, 2, 4, 0, 3, 3, 0])
    ratio_N, regression_N = grids.known(context_T, EVERY, 3, modulus=P)
    np.testing.assert_array_equal(ratio_N, regression_N)
    assert ratio_N.sum() == P
    assert grids.known(context_T, EVERY, 4, modulus=P)[1].all()
    assert grids.known(context_T, EVERY, 1, modulus=P)[1].sum() == 1


def test_ratio_matching_is_right_on_its_mask_and_guesses_elsewhere():
    grid = found("ratio_matching")
    wanted = np.where(grid.ratio_KCpp, 1, 1 / P)
    np.testing.assert_allclose(grid.right_KCpp, wanted, rtol=1e-6)
    scores = grids.overlap(grid.right_KCpp, grid.ratio_KCpp)
    share_KC = np.asarray(grid.ratio_KCpp).mean((-2, -1))
    np.testing.assert_allclose(scores.recall_KC, 1)
    np.testing.assert_allclose(scores.outside_KC[share_KC < 1], 1 / P, rtol=1e-5)
    precision_KC = share_KC / (share_KC + (1 - share_KC) / P)
    np.testing.assert_allclose(scores.precision_KC, precision_KC, rtol=1e-5)


def test_bayes_is_right_on_the_span():
    grid = found("bayes")
    np.testing.assert_allclose(grid.right_KCpp, np.where(grid.regression_KCpp, 1, 1 / P), rtol=1e-6)
    scores = grids.overlap(grid.right_KCpp, grid.ratio_KCpp)
    assert (np.asarray(scores.recall_KC) == 1).all()
    assert np.asarray(scores.outside_KC)[-1].min() == 1
    everything = grids.overlap(grid.right_KCpp, grid.regression_KCpp)
    np.testing.assert_allclose(np.asarray(everything.precision_KC)[-1], 1)
    assert np.isnan(np.asarray(everything.outside_KC)[-1]).all()


def test_overlap_of_a_grid_by_hand():
    right_pp, mask_pp = (
        jnp.array([[1.0, 0.0], [0.5, 1.0]]),
        jnp.array([[True, True], [False, True]]),
    )
    precision, recall, outside = grids.overlap(right_pp, mask_pp)
    np.testing.assert_allclose([precision, recall, outside], [2 / 2.5, 2 / 3, 0.5])
    precision, recall, outside = grids.overlap(0 * right_pp, mask_pp)
    np.testing.assert_array_equal([precision, recall, outside], [np.nan, 0, 0])


def test_any_function_will_do_and_a_partial_is_traced_once():
    traced = []

    def predict(bias_V, tokens_BT):
        traced.append(1)
        return jnp.broadcast_to(bias_V, (*tokens_BT[:, ::3].shape, P + 1))

    # One answer to all: right where a x + b y is that.
    for answer in (0, 3):
        bias_V = jnp.eye(P + 1)[answer]
        grid = ask(Partial(predict, bias_V), CONTEXT_CT, TASK_C2, SHOT_K, rows=7)
        z_CN = (TASK_C2 @ EVERY.T) % P
        wanted = np.broadcast_to((z_CN == answer).reshape(CONTEXTS, P, P), grid.right_KCpp.shape)
        np.testing.assert_array_equal(grid.right_KCpp, wanted)
    count = len(traced)
    ask(Partial(predict, jnp.eye(P + 1)[P]), CONTEXT_CT, TASK_C2, SHOT_K, rows=7)
    assert len(traced) == count
    plain = ask(lambda tokens_BT: predict(bias_V, tokens_BT), CONTEXT_CT, TASK_C2, SHOT_K)
    np.testing.assert_array_equal(plain.right_KCpp, wanted)


def test_devices_change_no_answer_and_share_the_work():
    """25 queries over eight devices: at most four of them on each."""
    spread = NamedSharding(
        jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data")
    )
    predict = controls.bayes(P).predict
    grid = ask(predict, CONTEXT_CT, TASK_C2, SHOT_K, row_sharding=spread)
    for value_KCpp, wanted_KCpp in zip(grid, found("bayes"), strict=True):
        np.testing.assert_array_equal(value_KCpp, wanted_KCpp)

    def flops(row_sharding):
        """Of one device."""
        options = {"modulus": P, "rows": 128, "row_sharding": row_sharding}
        lowered = grids._shot_grids.lower(predict, CONTEXT_CT, TASK_C2, SHOT_K, **options)
        return lowered.compile().cost_analysis()["flops"]

    assert flops(spread) < flops(None) / 4


def test_refusals():
    with pytest.raises(ValueError, match="expected 2 whole sequences"):
        ask(controls.bayes(P).predict, CONTEXT_CT, TASK_C2[:2], SHOT_K)
    with pytest.raises(ValueError, match="modulus=6 is not a prime"):
        grids.shot_grids(len, CONTEXT_CT, TASK_C2, SHOT_K, modulus=6)
    for shot in (-1, SHOTS, 1.5):
        with pytest.raises(
            ValueError, match=rf"shot_K=\[0(\.0)?, {shot}\], expected whole numbers from 0 to 6"
        ):
            ask(controls.bayes(P).predict, CONTEXT_CT, TASK_C2, [0, shot])

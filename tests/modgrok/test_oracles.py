"""modgrok/oracles.py: predictors against slow twins, closed forms against enumeration and paper."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from modgrok import oracles, tasks

P = 29  # the paper's modulus
PREDICTORS = [oracles.ratio_matching, oracles.bayes]
CLOSED_FORMS = [oracles.ratio_matching_accuracy, oracles.bayes_accuracy]


def grid(modulus):
    return np.stack(np.divmod(np.arange(modulus**2), modulus), axis=1)


def make_sequences(task_B2, xy_BS2, modulus):
    z_BS = (xy_BS2 * task_B2[:, None]).sum(-1) % modulus
    tokens_BS3 = np.concatenate([xy_BS2, z_BS[..., None]], axis=-1)
    return tokens_BS3.reshape(len(task_B2), -1).astype(np.int32)


def sample(seed, modulus, *, batch, shots, task_W2=None, input_M2=None):
    """Sequences of independent tasks and inputs, from the given ones or all."""
    rng = np.random.default_rng(seed)
    task_W2 = grid(modulus) if task_W2 is None else task_W2
    input_M2 = grid(modulus) if input_M2 is None else input_M2
    task_B2 = task_W2[rng.integers(len(task_W2), size=batch)]
    return make_sequences(
        task_B2, input_M2[rng.integers(len(input_M2), size=(batch, shots))], modulus
    )


def corrupt(tokens_BT, modulus, seed=0):
    """A third of the labels replaced by any residue."""
    rng = np.random.default_rng(seed)
    wrong = tokens_BT.copy()
    z_BS = wrong[:, 2::3]
    z_BS[:] = np.where(rng.random(z_BS.shape) < 1 / 3, rng.integers(modulus, size=z_BS.shape), z_BS)
    return wrong


def standard_error(accuracy, count):
    """Of a mean of `count` independent right-or-wrong answers."""
    return np.sqrt(accuracy * (1 - accuracy) / count)


# Slow twins: the two predictors in plain Python, one query at a time


def plain_ratio_matching(examples, query, p):
    if query == (0, 0):
        return [1.0] + [0.0] * (p - 1)
    for x, y, z in examples:
        for c in range(p):
            if (x, y) != (0, 0) and (c * x % p, c * y % p) == query:
                return [float(v == c * z % p) for v in range(p)]
    return [1 / p] * p


def plain_bayes(examples, query, p, pool):
    alive = [(a, b) for a, b in pool if all((a * x + b * y) % p == z for x, y, z in examples)]
    answers = [(a * query[0] + b * query[1]) % p for a, b in alive]
    return [answers.count(v) / len(alive) if alive else 1 / p for v in range(p)]


def plain(predict_one, tokens_BT, *arguments):
    probs = []
    for row in tokens_BT.reshape(len(tokens_BT), -1, 3).tolist():
        shots = [tuple(shot) for shot in row]
        probs.append([predict_one(shots[:k], s[:2], *arguments) for k, s in enumerate(shots)])
    return np.array(probs)


@pytest.mark.parametrize("modulus", [2, 3, 5, 7])
@pytest.mark.parametrize("labels", ["clean", "corrupted"])
def test_predictors_equal_their_slow_twins(modulus, labels):
    tokens_BT = sample(modulus, modulus, batch=40, shots=7)
    if labels == "corrupted":
        tokens_BT = corrupt(tokens_BT, modulus)
    pool_W2 = np.random.default_rng(1).permutation(grid(modulus))[: modulus + 1]
    everything = grid(modulus).tolist()
    for actual, wanted in [
        (
            oracles.ratio_matching(tokens_BT, modulus),
            plain(plain_ratio_matching, tokens_BT, modulus),
        ),
        (
            oracles.bayes(tokens_BT, modulus),
            plain(plain_bayes, tokens_BT, modulus, everything),
        ),
        (
            oracles.bayes(tokens_BT, modulus, pool_W2),
            plain(plain_bayes, tokens_BT, modulus, pool_W2.tolist()),
        ),
    ]:
        assert actual.shape == (40, 7, modulus)
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, wanted, rtol=1e-6)


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_predictions_ignore_the_own_answer_and_the_future(predictor):
    tokens_BT = sample(0, 7, batch=50, shots=6)
    changed = tokens_BT.copy()
    changed[:, 3 * 3 + 2] = (changed[:, 3 * 3 + 2] + 1) % 7  # the label of shot 3
    changed[:, 4 * 3 :] = sample(1, 7, batch=50, shots=2)
    before, after = predictor(tokens_BT, 7), predictor(changed, 7)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] != after[:, 4:]).any()


def test_pool_decides_where_two_examples_do_not():
    """Example (1, 0) -> 2 leaves a = 2. A pool with b = 3 for that a alone knows the rest."""
    tokens_BT = np.array([[1, 0, 2, 0, 1, 3]])
    np.testing.assert_allclose(oracles.bayes(tokens_BT, 5)[0, 1], [0.2] * 5)
    pool_W2 = np.array([[2, 3], [1, 4], [0, 0]])
    np.testing.assert_array_equal(oracles.bayes(tokens_BT, 5, pool_W2)[0, 1], [0, 0, 0, 1, 0])
    no_such_a_W2 = np.array([[1, 4], [0, 0]])
    np.testing.assert_allclose(oracles.bayes(tokens_BT, 5, no_such_a_W2)[0, 1], [0.2] * 5)


# Closed forms


@pytest.mark.parametrize(
    ("predictor", "closed_form"), list(zip(PREDICTORS, CLOSED_FORMS, strict=True))
)
@pytest.mark.parametrize(
    ("modulus", "shots", "inputs"),
    [
        (2, 4, None),
        (3, 3, None),
        (3, 4, [(0, 0), (0, 1), (0, 2), (1, 1), (2, 2)]),
        (5, 3, [(1, 2), (2, 4), (3, 0), (0, 4)]),
        (5, 3, [(0, 0), (0, 0), (1, 3), (1, 3), (4, 1)]),
    ],
    ids=["p2-all", "p3-all", "p3-with-origin", "p5-without-origin", "p5-repeated"],
)
def test_closed_forms_are_the_mean_over_every_sequence(
    predictor, closed_form, modulus, shots, inputs
):
    """No sampling: every task with every sequence of inputs, once."""
    input_M2 = None if inputs is None else np.array(inputs)
    xy_RS2 = np.array(list(itertools.product(inputs or grid(modulus).tolist(), repeat=shots)))
    task_W2 = grid(modulus)
    tokens_BT = make_sequences(
        np.repeat(task_W2, len(xy_RS2), axis=0), np.tile(xy_RS2, (len(task_W2), 1, 1)), modulus
    )
    accuracy_BS = oracles.expected_accuracy(predictor(tokens_BT, modulus), tokens_BT[:, 2::3])
    wanted_S = np.asarray(accuracy_BS, np.float64).mean(0)
    np.testing.assert_allclose(closed_form(modulus, shots, input_M2), wanted_S, rtol=2e-6)


def test_ratio_matching_percentages():
    accuracy_S = oracles.ratio_matching_accuracy(P, 32)
    assert (accuracy_S.shape, accuracy_S.dtype) == ((32,), np.float64)
    np.testing.assert_allclose(
        100 * accuracy_S[[0, 1, 2, 3, 5, 8, 13, 31]],
        [3.56, 6.77, 9.88, 12.88, 18.58, 26.45, 37.90, 66.24],
        atol=0.005,
    )
    covered_S = (P * accuracy_S - 1) / (P - 1)  # without the guess
    np.testing.assert_allclose(
        100 * covered_S[[1, 2, 3, 31]], [3.44, 6.66, 9.77, 65.04], atol=0.005
    )


def test_bayes_percentages():
    accuracy_S = oracles.bayes_accuracy(P, 32)
    assert (accuracy_S.shape, accuracy_S.dtype) == ((32,), np.float64)
    np.testing.assert_allclose(100 * accuracy_S[:4], [3.563, 6.774, 96.678, 99.885], atol=0.0005)
    np.testing.assert_allclose(100 * accuracy_S[4], 99.996, atol=0.0005)
    assert 0.99999 < accuracy_S[5] < 1


@pytest.mark.parametrize(
    ("modulus", "wanted"),
    [(7, [0.160, 0.263, 0.882, 0.983, 0.998]), (13, [0.082, 0.148, 0.930, 0.995])],
)
def test_bayes_accuracy_of_small_moduli(modulus, wanted):
    np.testing.assert_allclose(oracles.bayes_accuracy(modulus, len(wanted)), wanted, atol=0.0005)


@pytest.mark.parametrize("modulus", [2, 3, 7, 29])
def test_uniform_inputs_are_the_split_that_holds_them_all(modulus):
    """And both are the textbook formulas for uniform inputs."""
    k_S = np.arange(9)
    p, q = float(modulus), float(modulus) ** -k_S
    covered_S = p**-2 + (1 - p**-2) * (1 - (1 - (p - 1) / p**2) ** k_S)
    rank_S3 = np.stack([q**2, (p + 1) * q - (p + 1) * q**2, 1 - (p + 1) * q + p * q**2], axis=1)
    span_3 = p ** np.array([-2.0, -1, 0])
    ratio_S = covered_S + (1 - covered_S) / p
    bayes_S = rank_S3 @ (span_3 + (1 - span_3) / p)
    for closed_form, wanted_S in zip(CLOSED_FORMS, (ratio_S, bayes_S), strict=True):
        for input_M2 in (None, grid(modulus)):
            np.testing.assert_allclose(closed_form(modulus, 9, input_M2), wanted_S, rtol=1e-12)


@pytest.mark.parametrize(
    ("fraction", "side", "wanted"),
    [
        (0.8, "train_M2", [6.83, 12.97, 26.61, 66.39]),
        (0.8, "heldout_O2", [7.10, 13.96, 28.75, 68.46]),
        (0.6, "heldout_O2", [6.80, 13.15, 27.13, 67.02]),
    ],
)
def test_ratio_matching_percentages_on_a_finite_split(fraction, side, wanted):
    input_M2 = getattr(tasks.reference_inputs(modulus=P, fraction=fraction), side)
    accuracy_S = oracles.ratio_matching_accuracy(P, 32, input_M2)
    np.testing.assert_allclose(100 * accuracy_S[[1, 3, 8, 31]], wanted, atol=0.005)


@pytest.mark.parametrize(
    ("seed", "num_rectangles", "wanted"),
    [
        (1, 96, [0.052, 0.110, 0.965, 0.999]),
        (2, 128, [0.044, 0.086, 0.970, 0.9995]),
        (1, 2, [0.199, 0.896, 0.996, 1]),
    ],
)
def test_bayes_with_the_training_tasks_as_pool(seed, num_rectangles, wanted):
    """What memorising the tasks can reach. The wanted values were simulated on 4000 sequences."""
    pool_W2 = tasks.reference_tasks(seed, modulus=P, num_rectangles=num_rectangles).train_W2
    tokens_BT = sample(0, P, batch=4000, shots=4, task_W2=pool_W2)
    accuracy_BS = oracles.expected_accuracy(
        oracles.bayes(tokens_BT, P, pool_W2), tokens_BT[:, 2::3]
    )
    accuracy_S = np.asarray(accuracy_BS).mean(0)
    # Both sides are samples; .0005 is half of the last digit given.
    error_S = np.sqrt(2) * standard_error(np.array(wanted), 4000) + 0.0005
    assert (np.abs(accuracy_S - wanted) < 3 * error_S).all(), accuracy_S


@pytest.mark.parametrize("fraction", [None, 0.2])
@pytest.mark.parametrize(
    ("predictor", "closed_form"), list(zip(PREDICTORS, CLOSED_FORMS, strict=True))
)
def test_sampled_accuracy_agrees_with_the_closed_form(predictor, closed_form, fraction):
    input_M2 = fraction and tasks.reference_inputs(modulus=P, fraction=fraction).train_M2
    batch, shots = 2000, 32
    tokens_BT = sample(5, P, batch=batch, shots=shots, input_M2=input_M2)
    probs_BSp = predictor(tokens_BT, P)
    wanted_S = closed_form(P, shots, input_M2)
    right_BS = oracles.predict(jax.random.key(0), probs_BSp) == tokens_BT[:, 2::3]
    shared_BS = oracles.expected_accuracy(probs_BSp, tokens_BT[:, 2::3])
    for accuracy_BS in (right_BS, shared_BS):  # sharing ties only takes variance away
        error_S = np.abs(np.asarray(accuracy_BS).mean(0) - wanted_S)
        assert (error_S <= 3 * standard_error(wanted_S, batch) + 1e-6).all()


def test_ratio_matching_is_optimal_until_two_examples_and_not_after():
    ratio_S, bayes_S = (closed_form(P, 32) for closed_form in CLOSED_FORMS)
    np.testing.assert_allclose(ratio_S[:2], bayes_S[:2], rtol=1e-12)
    assert (bayes_S[2:] > ratio_S[2:] + 0.3).all()
    assert (np.diff(ratio_S) > 0).all()


# From distributions to answers


def test_predict_takes_the_likeliest_and_breaks_ties_evenly():
    probs_BSp = jnp.tile(jnp.array([[[0.1, 0.4, 0.1, 0.4], [0.0, 0.0, 1.0, 0.0]]]), (4000, 1, 1))
    z_BS = oracles.predict(jax.random.key(0), probs_BSp)
    assert z_BS.dtype == jnp.int32
    counts = np.bincount(z_BS[:, 0], minlength=4)
    assert counts[[0, 2]].sum() == 0
    assert abs(counts[1] - 2000) < 3 * np.sqrt(1000)
    assert (z_BS[:, 1] == 2).all()
    assert (oracles.predict(jax.random.key(1), probs_BSp)[:, 0] != z_BS[:, 0]).any()


def test_expected_accuracy_shares_ties():
    probs_BSp = jnp.array([[[0.1, 0.4, 0.1, 0.4], [0.0, 0.0, 1.0, 0.0], [0.25] * 4]])
    for z_S, wanted in [([1, 2, 3], [0.5, 1, 0.25]), ([0, 1, 0], [0, 0, 0.25])]:
        np.testing.assert_array_equal(
            oracles.expected_accuracy(probs_BSp, jnp.array([z_S])), [wanted]
        )


# Where the predictors run, and what they refuse


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_predictors_compose_and_do_not_depend_on_placement(predictor):
    tokens_BT = sample(0, 5, batch=16, shots=4)
    wanted = predictor(tokens_BT, 5)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("data")
    sharded = jax.shard_map(lambda t: predictor(t, 5), mesh=mesh, in_specs=rows, out_specs=rows)
    np.testing.assert_array_equal(jax.jit(sharded)(tokens_BT), wanted)
    split = jax.vmap(lambda t: predictor(t, 5))(tokens_BT.reshape(4, 4, -1))
    np.testing.assert_array_equal(split.reshape(wanted.shape), wanted)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        wide = predictor(tokens_BT.astype(np.int64), 5)
        assert wide.dtype == jnp.float32
        assert oracles.expected_accuracy(wide, tokens_BT[:, 2::3]).dtype == jnp.float32
        assert oracles.predict(jax.random.key(0), wide).dtype == jnp.int32
    np.testing.assert_array_equal(wide, wanted)


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_memory_is_bounded_for_the_paper_s_evaluation(predictor):
    """4000 sequences of 32 shots and 841 tasks: all pairs at once would be 431 MB."""
    tokens_BT = jax.ShapeDtypeStruct((4000, 96), jnp.int32)
    memory = predictor.lower(tokens_BT, P).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 64 * 2**20


def test_large_batches_are_worked_on_in_pieces_with_the_same_result():
    modulus, batch = 29, 2600  # 2**20 // 841 = 1246 at a time: two pieces and a rest
    tokens_BT = sample(0, modulus, batch=batch, shots=3)
    whole = oracles.bayes(tokens_BT, modulus)
    parts = [oracles.bayes(tokens_BT[i : i + 650], modulus) for i in range(0, batch, 650)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_malformed_sequences_are_refused(predictor):
    with pytest.raises(ValueError, match=r"tokens_BT has shape \(2, 8\), expected \(sequences, 3"):
        predictor(np.zeros((2, 8), np.int32), 5)
    with pytest.raises(ValueError, match=r"tokens_BT has shape \(9,\), expected \(sequences, 3"):
        predictor(np.zeros(9, np.int32), 5)


@pytest.mark.parametrize("shape", [(0, 2), (4, 3), (2,)])
def test_malformed_pools_and_inputs_are_refused(shape):
    rows = np.zeros(shape, np.int32)
    wanted = re.escape(f" has shape {shape}, expected (rows, 2) with at least one row")
    with pytest.raises(ValueError, match="pool_W2" + wanted):
        oracles.bayes(np.zeros((1, 6), np.int32), 5, rows)
    for closed_form in CLOSED_FORMS:
        with pytest.raises(ValueError, match="input_M2" + wanted):
            closed_form(5, 3, rows)


@pytest.mark.parametrize(
    "call",
    [
        lambda: oracles.matches(np.zeros((1, 6), np.int32), 6),
        lambda: oracles.ratio_matching(np.zeros((1, 6), np.int32), 6),
        lambda: oracles.bayes(np.zeros((1, 6), np.int32), 6),
        lambda: oracles.ratio_matching_accuracy(6, 3),
        lambda: oracles.bayes_accuracy(6, 3),
    ],
)
def test_moduli_that_are_not_prime_are_refused(call):
    with pytest.raises(ValueError, match="modulus=6 is not a prime number"):
        call()

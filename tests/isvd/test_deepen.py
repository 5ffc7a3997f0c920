"""The split-ReLU network: linear at the start, and no longer after one step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse

from isvd import deepen
from isvd.design import normalized_adjacency, propagated
from isvd.operators import dense
from isvd.spmm import sparse

N, F, C, L = 12, 4, 3, 2
LABELS, TRAIN, VALIDATION = np.arange(N) % C, np.arange(6), np.arange(6, N)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


@functools.cache
def problem():
    """A directed graph, so that A and A^T differ; features, and weights of each block."""
    a_NN = np.random.default_rng(0).random((N, N)) < 0.3
    hat = normalized_adjacency(scipy.sparse.csr_array(a_NN.astype("d")), symmetric=False)
    return hat, draw(1, N, F).astype("f"), draw(2, L + 1, F, C).astype("f")


def network(dtype="float32"):
    hat, x_NF, weights_HFC = problem()
    params = deepen.init(weights_HFC.astype(dtype))
    return params, sparse(hat, dtype), jnp.asarray(x_NF.astype(dtype)), weights_HFC


def moved(params, size=0.3):
    """Parameters away from the start, where every unit matters."""
    leaves, structure = jax.tree.flatten(params)
    leaves = [p + size * draw(10 + i, *p.shape).astype(p.dtype) for i, p in enumerate(leaves)]
    return jax.tree.unflatten(structure, leaves)


def twin(params, a_NN, x_NF):
    """The formulas of the paper, in numpy."""
    wop, won, bo, wp, wn, bp = (np.asarray(p, np.float64) for p in params)
    relu, eye = (lambda z: np.maximum(z, 0)), np.eye(x_NF.shape[1])
    h, total = np.asarray(x_NF, np.float64), 0
    for hop in range(len(wop)):
        total = total + relu(h @ wop[hop] + bo[hop]) - relu(h @ won[hop])
        if hop < len(wp):
            positive = relu(a_NN @ (h @ (eye + wp[hop]) + bp[hop]))
            h = positive - relu(a_NN @ h @ (wn[hop] - eye))
    return total


def test_at_the_start_it_is_the_closed_form_model():
    params, hat, x_NF, weights_HFC = network()
    linear = propagated(hat, dense(x_NF), L) @ weights_HFC.reshape(-1, C)
    got = deepen.apply(params, hat, x_NF)
    assert got.shape == (N, C)
    np.testing.assert_allclose(got, linear, atol=1e-5)
    np.testing.assert_allclose(jax.jit(deepen.apply)(params, hat, x_NF), linear, atol=1e-5)


def test_at_the_start_its_input_jacobian_is_that_of_the_linear_model():
    params, hat, x_NF, weights_HFC = network()
    got = jax.jacobian(lambda x: deepen.apply(params, hat, x))(x_NF)
    a_NN = problem()[0].toarray()
    powers = [np.linalg.matrix_power(a_NN, hop) for hop in range(L + 1)]
    wanted = sum(np.einsum("nm,fc->ncmf", p, w) for p, w in zip(powers, weights_HFC, strict=True))
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_away_from_the_start_it_follows_the_formulas():
    params, hat, x_NF, _ = network()
    params = moved(params)
    got = deepen.apply(params, hat, x_NF)
    wanted = twin(params, problem()[0].toarray(), x_NF)
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    linear = deepen.apply(network()[0], hat, x_NF)
    assert np.abs(got - linear).max() > 0.1


def test_without_hops_there_is_one_layer():
    _, hat, x_NF, weights_HFC = network()
    params = deepen.init(weights_HFC[:1])
    np.testing.assert_allclose(deepen.apply(params, hat, x_NF), x_NF @ weights_HFC[0], atol=1e-5)


def test_gradient_against_differences():
    """Along a random direction in each of the parameters."""
    with jax.enable_x64(True):
        params, hat, x_NF, _ = network("float64")
        params = moved(params)

        @jax.jit
        def loss_fn(params):
            logits_NC = deepen.apply(params, hat, x_NF)
            return optax.softmax_cross_entropy_with_integer_labels(logits_NC, LABELS).mean()

        grads = jax.grad(loss_fn)(params)
        for name, value in params._asdict().items():
            direction = 1e-6 * draw(5, *value.shape)
            ends = [loss_fn(params._replace(**{name: value + d})) for d in (direction, -direction)]
            slope = (getattr(grads, name) * direction).sum()
            np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2, rtol=1e-5, err_msg=name)


def test_increments_of_zero_are_not_dead():
    params, hat, x_NF, _ = network()
    grads = jax.grad(lambda p: jnp.sin(deepen.apply(p, hat, x_NF)).sum())(params)
    for name, grad in grads._asdict().items():
        assert np.abs(grad).max() > 1e-3, name


def test_dropout_is_for_training_only():
    params, hat, x_NF, _ = network()
    calm = deepen.apply(params, hat, x_NF, dropout=0.5)
    np.testing.assert_array_equal(calm, deepen.apply(params, hat, x_NF))
    one, two = (deepen.apply(params, hat, x_NF, key=jax.random.key(i), dropout=0.5) for i in (0, 1))
    assert np.abs(one - calm).max() > 0.1
    assert np.abs(one - two).max() > 0.1


def test_dropout_of_the_output_keeps_its_mean():
    """Without hops: pre-activations of opposite sign, each with its own mask, have mean H W."""
    _, hat, x_NF, weights_HFC = network()
    params = deepen.init(weights_HFC[:1])
    keys = jax.random.split(jax.random.key(0), 4000)
    many = jax.vmap(lambda k: deepen.apply(params, hat, x_NF, key=k, dropout=0.25))(keys)
    wanted = x_NF @ weights_HFC[0]
    np.testing.assert_allclose(many.mean(0), wanted, atol=0.1)
    values = np.unique(np.round(np.asarray(many)[:, 0, 0] / wanted[0, 0], 4))
    np.testing.assert_allclose(values, [0, 4 / 3], atol=1e-3)


# Fine-tuning -------------------------------------------------------------------------------------


def finetuned(start=None, key=0, labels=LABELS, **options):
    params, hat, x_NF, _ = network()
    options = {"steps": 40, "learning_rate": 0.01, **options}
    return deepen.finetune(
        params if start is None else start,
        hat,
        x_NF,
        labels,
        TRAIN,
        VALIDATION,
        jax.random.key(key),
        **options,
    )


def test_one_step_leaves_the_linear_set():
    """Wn = -Wp no longer, and the network bends: f(x) + f(-x) is 0 only of linear maps."""
    params, hat, x_NF, _ = network()

    def loss_fn(params):
        logits_NC = deepen.apply(params, hat, x_NF)
        return optax.softmax_cross_entropy_with_integer_labels(logits_NC, LABELS).mean()

    after = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss_fn)(params))
    assert np.abs(after.step_pos_LFF + after.step_neg_LFF).max() > 1e-4
    assert np.abs(after.out_pos_HFC + after.out_neg_HFC).max() > 1e-4
    after = after._replace(out_bias_HC=params.out_bias_HC, step_bias_LF=params.step_bias_LF)
    for given, bends in ((params, False), (after, True)):
        odd = deepen.apply(given, hat, x_NF) + deepen.apply(given, hat, -x_NF)
        assert (np.abs(odd).max() > 1e-3) == bends


def test_the_loss_falls_and_the_first_is_known():
    params, hat, x_NF, _ = network()
    result = finetuned(dropout=0.0, weight_decay=1e-3)
    logits_NC = np.asarray(deepen.apply(params, hat, x_NF), np.float64)
    log_p = logits_NC - np.log(np.exp(logits_NC).sum(1, keepdims=True))
    squares = sum(float((np.asarray(p) ** 2).sum()) for p in params)
    first = -log_p[TRAIN, LABELS[TRAIN]].mean() + 1e-3 * squares
    assert result.loss_S[0] == pytest.approx(first, rel=1e-5)
    assert result.loss_S[-1] < 0.5 * first
    assert result.loss_S.shape == (40,)
    assert result.accuracy_S1.shape == (41,)


def accuracy(params):
    _, hat, x_NF, _ = network()
    logits_NC = np.asarray(deepen.apply(params, hat, x_NF))
    return (logits_NC.argmax(1) == LABELS)[VALIDATION].mean()


def test_the_best_on_validation_is_kept():
    result = finetuned(learning_rate=0.05)
    accuracies = np.asarray(result.accuracy_S1)
    assert accuracies[0] == pytest.approx(accuracy(network()[0]))
    assert int(result.best_step) == accuracies.argmax()  # the first of equals
    assert accuracy(result.params) == pytest.approx(accuracies.max())
    assert accuracies.max() > accuracies[0]


def test_where_nothing_is_better_the_closed_form_stays():
    params, *_ = network()
    result = finetuned(learning_rate=0.0)
    assert int(result.best_step) == 0
    jax.tree.map(np.testing.assert_array_equal, result.params, params)


@pytest.mark.parametrize("learning_rate", [np.nan, 1e38])
def test_weights_that_are_no_numbers_are_never_the_best(learning_rate):
    """Though the largest of NaN is class 0, which here is right everywhere."""
    params, hat, x_NF, _ = network()
    before = jnp.argmax(deepen.apply(params, hat, x_NF), 1)[VALIDATION]
    assert (before != 0).any()
    result = finetuned(labels=np.zeros(N, int), learning_rate=learning_rate)
    accuracies = np.asarray(result.accuracy_S1)
    assert accuracies[0] == pytest.approx((before == 0).mean())
    assert np.isnan(accuracies[-1])
    assert int(result.best_step) == np.nanargmax(accuracies)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.params))


def test_options_change_the_result():
    first = finetuned()
    np.testing.assert_array_equal(first.loss_S, finetuned().loss_S)
    changes = {"key": 3, "learning_rate": 0.1, "dropout": 0.0, "weight_decay": 0.1}
    for name, value in changes.items():
        assert np.abs(finetuned(**{name: value}).loss_S - first.loss_S).max() > 1e-4


WRONG = {
    "weights": (lambda: deepen.init(np.ones((4, 3))), r"shape \(4, 3\).*reshape the closed-form"),
    "features": (
        lambda: deepen.apply(network()[0], network()[1], jnp.ones((N, F + 1))),
        rf"x_NF \({N}, {F + 1}\), expected \(N, N\) and \(N, {F}\)",
    ),
    "whole features": (
        lambda: deepen.apply(network()[0], network()[1], jnp.ones((N, F), int)),
        "x_NF has dtype int32, expected a real floating type",
    ),
    "float labels": (lambda: finetuned(labels=LABELS / 1), "labels_N has dtype float64, expected"),
    "steps": (lambda: finetuned(steps=0), "steps=0"),
    "dropout": (lambda: finetuned(dropout=1.0), "dropout=1.0"),
    "dropout of one pass": (
        lambda: deepen.apply(*network()[:3], key=jax.random.key(0), dropout=1.5),
        "dropout=1.5, expected from 0 to less than 1",
    ),
    "dropout of all": (
        lambda: deepen.apply(*network()[:3], dropout=1.0),
        "dropout=1.0, expected from 0 to less than 1",
    ),
    "both sets": (
        lambda: deepen.finetune(
            *network()[:3], LABELS, TRAIN, np.arange(5, N), jax.random.key(0), steps=1
        ),
        "train_T and validation_V share 1 nodes, the first is 5",
    ),
    "classes": (
        lambda: finetuned(start=deepen.init(np.ones((3, F, 2), "f"))),
        "train_T has a node with label 2, expected 0 to 1",
    ),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_errors_say_what_was_expected(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call()

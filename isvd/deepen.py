"""A closed-form linear network made deep: split-ReLU layers that start as the linear model.

relu(z) - relu(-z) = z, so a layer that keeps a positive and a negative copy of its weights is
linear while they are opposite. `init` makes the network that equals the closed-form classifier in
value and in derivative; the first step of training leaves the linear set almost surely.

Axes: N nodes, F features, C classes, L hops, H = L + 1 blocks of features, T training
nodes, V validation nodes, S steps.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from isvd.arguments import check_integer
from isvd.closures import Product, Static, compiled
from isvd.node_labels import check_disjoint, checked_labels, checked_nodes
from isvd.operators import LinearOperator


class Params(NamedTuple):
    """Weights of the split-ReLU network. Propagation weights are increments on +I and -I."""

    out_pos_HFC: jax.Array
    out_neg_HFC: jax.Array
    out_bias_HC: jax.Array
    step_pos_LFF: jax.Array
    step_neg_LFF: jax.Array
    step_bias_LF: jax.Array


class Finetuned(NamedTuple):
    """The best parameters on the validation nodes, and the course of training.

    Attributes:
        params: those of the highest validation accuracy; the earliest of equals, so the closed-form
            model itself if nothing was better.
        best_step: updates that they had, from 0 to S.
        loss_S: the loss of each step, before its update, in nats, weight decay included.
        accuracy_S1: validation accuracy from 0 to 1, before training and after each step; NaN,
            which is never better, where logits are.
    """

    params: Params
    best_step: jax.Array
    loss_S: jax.Array
    accuracy_S1: jax.Array


def init(weights_HFC: Any) -> Params:
    """The network that computes sum_l A^l X W_l.

    Args:
        weights_HFC: the closed-form weights of each block: w_DC.reshape(num_hops + 1, F, C).
    Raises:
        ValueError: if there are not three axes.
    Source: section 4, the split-ReLU network.
    """
    weights_HFC = jnp.asarray(weights_HFC)
    if weights_HFC.ndim != 3 or not weights_HFC.size:
        raise ValueError(
            f"weights_HFC has shape {weights_HFC.shape}, expected (hops + 1, features, classes); "
            "reshape the closed-form weights"
        )
    hops, width, classes = weights_HFC.shape[0] - 1, *weights_HFC.shape[1:]
    zeros = functools.partial(jnp.zeros, dtype=weights_HFC.dtype)
    return Params(
        out_pos_HFC=weights_HFC,
        out_neg_HFC=-weights_HFC,
        out_bias_HC=zeros((hops + 1, classes)),
        step_pos_LFF=zeros((hops, width, width)),
        step_neg_LFF=zeros((hops, width, width)),
        step_bias_LF=zeros((hops, width)),
    )


def apply(
    params: Params,
    adjacency_hat: LinearOperator,
    x_NF: jax.Array,
    *,
    key: jax.Array | None = None,
    dropout: float = 0.0,
) -> jax.Array:
    """logits_NC = sum_l O_l, from H_0 = X:

        O_l     = relu(H_l Wop_l + bo_l) - relu(H_l Won_l)
        H_{l+1} = relu(A (H_l (I + Wp_l) + bp_l)) - relu(A H_l (Wn_l - I)).

    Args:
        key, dropout: for training. Pre-activations are dropped with this probability, from 0 to
            below 1, by a mask of its own for each branch, before the bias and before A. Without a
            key nothing is dropped.
    Raises:
        ValueError: if shapes do not fit, features are no floating-point numbers, or `dropout` is
            outside its range.
    """
    _check_dropout(dropout)
    width = params.out_pos_HFC.shape[1]
    num_nodes = adjacency_hat.shape[0]
    if adjacency_hat.shape != (num_nodes, num_nodes) or x_NF.shape != (num_nodes, width):
        raise ValueError(
            f"adjacency_hat has shape {adjacency_hat.shape} and x_NF {x_NF.shape}, expected (N, N) "
            f"and (N, {width})"
        )
    if not jnp.issubdtype(x_NF.dtype, jnp.floating):
        raise ValueError(f"x_NF has dtype {x_NF.dtype}, expected a real floating type")
    return compiled(_apply, Static(float(dropout)), params, adjacency_hat.matmat, key)(x_NF)


def _apply(
    dropout: Static, params: Params, step: Product, key: jax.Array | None, x_NF: jax.Array
) -> jax.Array:
    num_nodes = x_NF.shape[0]
    num_hops = params.step_pos_LFF.shape[0]
    keys_H = None if key is None else jax.random.split(key, num_hops + 1)
    drop = functools.partial(_drop, dropout.value)
    relu, mm = jax.nn.relu, functools.partial(jnp.matmul, precision="highest")

    def output(h_NF: jax.Array, w: tuple, key: jax.Array | None) -> jax.Array:
        pos_FC, neg_FC, bias_C = w
        pos_NC = drop(mm(h_NF, pos_FC), key, 0) + bias_C
        return relu(pos_NC) - relu(drop(mm(h_NF, neg_FC), key, 1))

    def layer(carry: tuple, inputs: tuple) -> tuple[tuple, None]:
        h_NF, logits_NC = carry
        (pos_FF, neg_FF, bias_F), out, key = inputs
        logits_NC = logits_NC + output(h_NF, out, key)
        pos_NF = drop(h_NF + mm(h_NF, pos_FF), key, 2) + bias_F
        neg_NF = drop(mm(h_NF, neg_FF) - h_NF, key, 3)
        h_NF = relu(step(pos_NF)) - relu(step(neg_NF))
        return (h_NF, logits_NC), None

    outs, steps = params[:3], params[3:]
    last_key = None if key is None else keys_H[-1]
    keys_L = None if key is None else keys_H[:-1]
    start = (x_NF, jnp.zeros_like(x_NF, shape=(num_nodes, params.out_pos_HFC.shape[2])))
    inputs = (steps, tuple(w[:-1] for w in outs), keys_L)
    (h_NF, logits_NC), _ = jax.lax.scan(layer, start, inputs, length=num_hops)
    return logits_NC + output(h_NF, tuple(w[-1] for w in outs), last_key)


def _check_dropout(dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}, expected from 0 to less than 1")


def _drop(rate: float, x: jax.Array, key: jax.Array | None, branch: int) -> jax.Array:
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(jax.random.fold_in(key, branch), 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)


def finetune(
    params: Params,
    adjacency_hat: LinearOperator,
    x_NF: jax.Array,
    labels_N: Any,
    train_T: Any,
    validation_V: Any,
    key: jax.Array,
    *,
    steps: int,
    learning_rate: float = 1e-3,
    dropout: float = 0.5,
    weight_decay: float = 1e-5,
) -> Finetuned:
    """Full-batch Adam on the cross-entropy of the training nodes.

    The loss has weight_decay times the sum of squares of all parameters, biases too, as in the
    reference. Validation accuracy is measured without dropout before training and after each step,
    and the best parameters are kept: they are never worse there than the closed-form model.

    Args:
        labels_N: classes, from 0; those of other nodes than the two sets are not looked at.
        train_T, validation_V: node numbers, none in both.
    Raises:
        ValueError: for nodes, labels or settings outside their range.
    """
    num_nodes, classes = x_NF.shape[0], params.out_pos_HFC.shape[2]
    labels_N = checked_labels(labels_N, num_nodes)
    for name, index in (("train_T", train_T), ("validation_V", validation_V)):
        largest = labels_N[checked_nodes(name, index, labels_N)].max()
        if largest >= classes:
            raise ValueError(f"{name} has a node with label {largest}, expected 0 to {classes - 1}")
    check_disjoint(train_T, validation_V)
    check_integer("steps", steps, 1)
    _check_dropout(dropout)
    settings = (int(steps), float(dropout))
    rates = jnp.asarray([learning_rate, weight_decay], x_NF.dtype)
    index = (jnp.asarray(train_T), jnp.asarray(validation_V))
    return _finetune(
        settings, params, adjacency_hat, x_NF, jnp.asarray(labels_N), index, key, rates
    )


@functools.partial(jax.jit, static_argnums=0)
def _finetune(
    settings: tuple[int, float],
    params: Params,
    adjacency_hat: LinearOperator,
    x_NF: jax.Array,
    labels_N: jax.Array,
    index: tuple[jax.Array, jax.Array],
    key: jax.Array,
    rates: jax.Array,
) -> Finetuned:
    steps, dropout = settings
    (train_T, validation_V), (learning_rate, weight_decay) = index, rates
    tx = optax.adam(learning_rate)

    def loss_fn(params: Params, key: jax.Array) -> jax.Array:
        logits_NC = apply(params, adjacency_hat, x_NF, key=key, dropout=dropout)
        loss_T = optax.softmax_cross_entropy_with_integer_labels(
            logits_NC[train_T], labels_N[train_T]
        )
        squares = sum(jnp.sum(w**2) for w in jax.tree.leaves(params))
        return loss_T.mean() + weight_decay * squares

    def measure(params: Params) -> jax.Array:
        logits_NC = apply(params, adjacency_hat, x_NF)
        logits_VC = logits_NC[validation_V]
        predicted_V = logits_VC.argmax(1).astype(labels_N.dtype)
        accuracy = (predicted_V == labels_N[validation_V]).mean()
        return jnp.where(jnp.isnan(logits_VC).any(), jnp.nan, accuracy)

    def step(state: tuple, number: jax.Array) -> tuple[tuple, tuple]:
        params, opt_state, best, best_step, best_accuracy = state
        loss, grads = jax.value_and_grad(loss_fn)(params, jax.random.fold_in(key, number))
        with jax.numpy_dtype_promotion("standard"):  # optax mixes types
            updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        accuracy = measure(params)
        better = accuracy > best_accuracy
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), params, best)
        best_step = jnp.where(better, number + 1, best_step)
        best_accuracy = jnp.where(better, accuracy, best_accuracy)
        return (params, opt_state, best, best_step, best_accuracy), (loss, accuracy)

    first = measure(params)
    state = (params, tx.init(params), params, jnp.int32(0), first)
    state, (loss_S, accuracy_S) = jax.lax.scan(step, state, jnp.arange(steps, dtype=jnp.int32))
    return Finetuned(state[2], state[3], loss_S, jnp.concatenate([first[None], accuracy_S]))

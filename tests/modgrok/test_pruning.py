"""What gates have learned: posterior, pruning, gated evaluation, flops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from asserts import assert_trees_equal
from gated_networks import (
    CFG,
    GROUP_W,
    INPUT_M2,
    KEY,
    LOGITS_GL,
    TASK_W2,
    batch_at,
    params_of,
)
from jax.extend.core import jaxprs_in_params

from modgrok import evaluation, latent_depth
from modgrok.latent_depth import LatentConfig
from modgrok.model import Config, apply, init_params
from modgrok.tasks import InputSplit, TaskSplit
from modgrok.training import (
    OptimizerConfig,
    make_optimizer,
)


def test_posterior():
    found = latent_depth.posterior({"gates": {"logits_GL": LOGITS_GL}})
    q = 1 / (1 + np.exp(-np.asarray(LOGITS_GL, float)))
    np.testing.assert_allclose(found.inclusion_GL, q, rtol=1e-5)
    np.testing.assert_array_equal(found.keep_GL, [[0, 1, 1], [1, 0, 1]])
    np.testing.assert_allclose(found.expected_depth_G, q.sum(1), rtol=1e-5)
    np.testing.assert_array_equal(found.kept_G, [2, 2])
    bits = -(q * np.log2(q) + (1 - q) * np.log2(1 - q))
    np.testing.assert_allclose(found.entropy_G, bits.mean(1), rtol=1e-4)
    np.testing.assert_allclose(found.variance_G, (q * (1 - q)).mean(1), rtol=1e-4)
    assert latent_depth.overlap(found.keep_GL) == pytest.approx(1 / 3)
    assert latent_depth.overlap(found.keep_GL[:1]) == 1
    assert latent_depth.overlap(np.zeros((2, 3))) == 1


def test_unseen_tasks_have_the_mean_of_the_logits():
    params = {"gates": {"logits_GL": LOGITS_GL}}
    seen_WL, unseen_L = latent_depth.task_gates(params, GROUP_W)
    np.testing.assert_array_equal(seen_WL, np.array([[0, 1, 1], [1, 0, 1]])[GROUP_W])
    np.testing.assert_array_equal(unseen_L, [0, 0, 1])  # means -1, 0, 3


@pytest.mark.parametrize("keep", [[0, 1, 1], [1, 0, 0]])
def test_the_pruned_network_is_the_rounded_one(keep):
    """And skipping closed blocks changes nothing."""
    params, tokens_BT, gate_L = params_of(), batch_at(0), jnp.array(keep, jnp.float32)
    wanted = jax.jit(functools.partial(apply, cfg=CFG))(params, tokens_BT, gate=gate_L)
    small = latent_depth.pruned_config(CFG, keep)
    assert small.layers == sum(keep)
    pruned = latent_depth.prune(params, keep)
    assert set(pruned) == {"embedding", "blocks", "ln_f"}
    found = jax.jit(functools.partial(apply, cfg=small))(pruned, tokens_BT)
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(found / scale, wanted / scale, atol=1e-6)
    skipped = jax.jit(functools.partial(apply, cfg=CFG, skip=True))(params, tokens_BT, gate=gate_L)
    np.testing.assert_allclose(skipped / scale, wanted / scale, atol=1e-6)


def test_skipped_blocks_are_not_computed():
    """Weights that are no numbers do no harm in a block that nobody uses; gates differ by row."""
    params, tokens_BT = params_of(layers=7), batch_at(0)[:2]
    cfg = dataclasses.replace(CFG, layers=7)
    params = {**params, "blocks": jax.tree.map(lambda w: w.at[3].set(np.nan), params["blocks"])}
    gate_LB = jnp.array([[1, 0]] * 3 + [[0, 0]] + [[0, 1]] * 3, jnp.float32)
    run = jax.jit(functools.partial(apply, cfg=cfg), static_argnames="skip")
    both = run(params, tokens_BT, gate=gate_LB, skip=True)
    for row in (0, 1):
        alone = run(params, tokens_BT[row : row + 1], gate=gate_LB[:, row], skip=True)
        np.testing.assert_allclose(both[row], alone[0], rtol=1e-4, atol=1e-5)
    assert np.isnan(run(params, tokens_BT, gate=gate_LB, skip=False)).all()


def test_an_optimiser_is_pruned_with_its_weights():
    latent = LatentConfig()
    config = OptimizerConfig(name="muon", warmup_steps=0, schedule_steps=9)
    tx = make_optimizer(config, latent=latent)
    params, keep = params_of(), [1, 0, 1]
    state = tx.init(params).inner_states["weights"].inner_state
    pruned = latent_depth.prune(state, keep)
    wanted = make_optimizer(config).init(latent_depth.prune(params, keep))
    assert_trees_equal(pruned, wanted)


def test_nothing_is_left_to_prune_to():
    with pytest.raises(ValueError, match="keeps no block"):
        latent_depth.prune(params_of(), [0, 0, 0])
    with pytest.raises(ValueError, match="keep_L has 2 layers, the blocks 3"):
        latent_depth.prune(params_of(), [1, 0])


def test_evaluation_uses_the_gates_of_each_task():
    params = params_of(2)
    tasks, inputs = TaskSplit(TASK_W2, TASK_W2[:2]), InputSplit(INPUT_M2, INPUT_M2)
    gates = latent_depth.task_gates(params, GROUP_W)
    options = {"cfg": CFG, "modulus": 5, "shots": 2}
    scores = evaluation.evaluate(
        params, KEY, tasks, inputs, sequences_per_task=3, rows=5, gates=gates, **options
    )
    key = jax.random.split(KEY, 4)[0]
    for task in (1, 3):  # one of each group
        alone = evaluation.score_tasks(
            params, key, TASK_W2[task : task + 1], INPUT_M2, num_sequences=3,
            gate=gates[0][task], **options,
        )  # fmt: skip
        np.testing.assert_allclose(
            scores.seen_train.loss_WS[task], alone.loss_WS[0], rtol=1e-4, atol=1e-5
        )


def test_flops_count_the_blocks_that_are_kept():
    cfg = Config(vocab=7, width=32, heads=4, layers=10)
    whole, four = (
        latent_depth.forward_flops(cfg, shots=8, keep_L=keep)
        for keep in (None, [0, 1, 1, 0, 0, 1, 0, 0, 0, 1])
    )
    small = dataclasses.replace(cfg, layers=4)
    assert four == latent_depth.forward_flops(small, shots=8)
    assert 0.3 < four / whole < 0.5


def product_flops(jaxpr):
    """Flops of the matrix products of a program, loops counted as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            size = np.prod([shape[axis] for axis in contracted])
            total += 2 * int(size * np.prod(equation.outvars[0].aval.shape))
        inner = sum(map(product_flops, jaxprs_in_params(equation.params)))
        total += inner * equation.params.get("length", 1)
    return total


@pytest.mark.parametrize(("layers", "shots"), [(2, 8), (9, 8), (3, 31)])
def test_flops_are_the_products_of_the_program(layers, shots):
    """Unrolled, in a loop over blocks, and with attention in two halves."""
    cfg, batch = Config(vocab=7, width=32, heads=4, layers=layers), 16
    params = jax.eval_shape(lambda key: init_params(key, cfg), KEY)
    tokens_BT = jax.ShapeDtypeStruct((batch, 3 * shots), jnp.int32)
    closed = jax.make_jaxpr(functools.partial(apply, cfg=cfg))(params, tokens_BT)
    # Queries, keys and values of the first block are of the ids, which the formula leaves out.
    saved = 2 * 3 * cfg.width**2 * (batch * (3 * shots - 1) - cfg.vocab)
    flops = batch * latent_depth.forward_flops(cfg, shots=shots) - saved
    assert product_flops(closed.jaxpr) == flops


def test_gradient_norms_by_block():
    grads = params_of()
    norm_L = latent_depth.block_norms(grads)
    for layer in range(3):
        block = jax.tree.map(lambda w: w[layer], grads["blocks"])  # noqa: B023
        assert norm_L[layer] == pytest.approx(float(optax.tree.norm(block)), rel=1e-5)

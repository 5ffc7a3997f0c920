"""Gates: divergences and gradients against closed forms, samples, schedules, pruning."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from asserts import assert_trees_close, assert_trees_equal
from gated_networks import (
    CFG,
    DATA,
    GROUP_W,
    INPUT_M2,
    KEY,
    LOGITS_GL,
    TASK_W2,
    batch_at,
    params_of,
)
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from modgrok import latent_depth, latent_figures
from modgrok.latent_depth import LatentConfig
from modgrok.model import apply
from modgrok.training import (
    OptimizerConfig,
    TrainState,
    answer_loss,
    init_state,
    make_optimizer,
    train_chunk,
    train_step,
)

SHALLOW = dataclasses.replace(CFG, layers=2)  # for training steps, which compile longest
SGD = optax.sgd(1.0)  # its step is the gradient
ONE = LatentConfig(soft_steps=1, anneal_steps=2, target_depth=1, kl_weight=0.3, depth_weight=0.2)
TWO = dataclasses.replace(ONE, groups=2, share_weight=0.1, prior="aggregated")

jit_step = jax.jit(
    train_step, static_argnames=("cfg", "tx", "micro_batches", "axis_name", "latent")
)


def start(groups=1, tx=SGD, step=3):
    params = params_of(groups, layers=2)
    return TrainState(jnp.int32(step), params, tx.init(params), None)


# The divergence from the prior


def test_kl_against_one_half_is_ln_2_less_the_entropy():
    logits_GL = jnp.linspace(-12, 12, 49)[None]
    kl_GL = latent_depth.kl_divergence(logits_GL, LatentConfig())
    q = 1 / (1 + np.exp(-np.linspace(-12, 12, 49)))
    np.testing.assert_allclose(
        kl_GL[0], np.log(2) + q * np.log(q) + (1 - q) * np.log(1 - q), rtol=1e-4, atol=1e-6
    )
    assert (kl_GL > -1e-7).all()
    assert kl_GL[0, 24] == pytest.approx(0, abs=1e-7)
    assert (jnp.delete(kl_GL[0], 24) > 1e-3).all()


def test_kl_against_the_mean_over_groups():
    latent = LatentConfig(groups=2, prior="aggregated")
    q = 1 / (1 + np.exp(-np.asarray(LOGITS_GL, float)))
    p = q.mean(0)
    wanted = q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))
    np.testing.assert_allclose(latent_depth.kl_divergence(LOGITS_GL, latent), wanted, rtol=1e-4)
    same = jnp.tile(LOGITS_GL[:1], (2, 1))
    np.testing.assert_allclose(latent_depth.kl_divergence(same, latent), 0, atol=1e-6)
    # The mean has no gradient of its own: d KL / dA = q (1 - q) (logit q - logit p).
    slope = jax.grad(lambda a: latent_depth.kl_divergence(a, latent).sum())(LOGITS_GL)
    logit_p = np.log(p / (1 - p))
    np.testing.assert_allclose(slope, q * (1 - q) * (LOGITS_GL - logit_p), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", [(1.0, 2.0), (2.0, 1.0), (3.0, 5.0)])
def test_kl_of_a_beta_prior_is_zero_at_its_mode_and_its_density_elsewhere(beta):
    latent = LatentConfig(prior="beta", beta=beta)
    a, b = beta
    q = np.linspace(0.05, 0.95, 19)
    kl = latent_depth.kl_divergence(jnp.array(np.log(q / (1 - q)))[None], latent)[0]
    log_density = (a - 1) * np.log(q) + (b - 1) * np.log(1 - q)
    np.testing.assert_allclose(np.diff(kl), -np.diff(log_density), rtol=1e-3, atol=1e-5)
    assert (kl > 0).all()
    mode = (a - 1) / (a + b - 2)
    logit = 30.0 if mode == 1 else -30.0 if mode == 0 else np.log(mode / (1 - mode))
    at_mode = latent_depth.kl_divergence(jnp.array([[logit]]), latent)
    np.testing.assert_allclose(at_mode, 0, atol=1e-5)


@pytest.mark.parametrize("prior", latent_depth.PRIORS)
def test_far_logits_stay_finite(prior):
    latent = dataclasses.replace(TWO, prior=prior)
    far = jnp.array([[-500.0, 500.0, 0.0], [500.0, -500.0, 90.0]])
    value, slope = jax.value_and_grad(lambda a: latent_depth.penalty(a, latent, 100))(far)
    assert np.isfinite(value)
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("prior", ["uniform", "beta"])
def test_penalty_slopes_against_finite_differences(prior):
    latent = dataclasses.replace(TWO, prior=prior)

    def value(a):
        return latent_depth.penalty(a, latent, 100)

    slope = np.asarray(jax.grad(value)(LOGITS_GL))
    for g, layer in np.ndindex(slope.shape):
        step = jnp.zeros_like(LOGITS_GL).at[g, layer].set(0.05)
        difference = (value(LOGITS_GL + step) - value(LOGITS_GL - step)) / 0.1
        assert slope[g, layer] == pytest.approx(float(difference), rel=0.02, abs=2e-4)


def test_sharing_has_the_exact_slope_and_is_least_where_groups_agree():
    """The paper's code takes the logarithm of a number, which leaves the + 1 out."""
    latent = LatentConfig(groups=2, share_weight=1.0, entropy_weight=0.0)
    slope = jax.grad(lambda a: latent_depth.shared_penalty(a, latent))(LOGITS_GL)
    q = jax.nn.sigmoid(LOGITS_GL)
    u = q.mean(0)
    np.testing.assert_allclose(slope, -(jnp.log(u) + 1) / 2 * q * (1 - q) / 3, rtol=1e-4, atol=1e-6)
    agree = latent_depth.shared_penalty(jnp.array([[20.0, -20.0]] * 2), latent)
    differ = latent_depth.shared_penalty(jnp.array([[20.0, -20.0], [-20.0, 20.0]]), latent)
    assert agree < 1e-4
    assert differ == pytest.approx(0.5 * np.log(2), rel=1e-3)


def test_the_depth_term_of_100_open_blocks_is_no_thousand_nats():
    latent = LatentConfig(target_depth=12, entropy_weight=0, depth_weight=0.1)
    at_start = latent_depth.shared_penalty(jnp.full((1, 100), latent.init), latent)
    assert 0.1 < at_start < 10
    default = LatentConfig(target_depth=12, entropy_weight=0)
    assert latent_depth.shared_penalty(jnp.full((1, 100), default.init), default) < 100
    at_target = latent_depth.shared_penalty(
        jnp.where(jnp.arange(100) < 12, 30.0, -30.0)[None], latent
    )
    assert at_target == pytest.approx(0, abs=1e-6)


def test_ramps_start_at_zero_never_fall_and_do_not_jump():
    latent = LatentConfig(soft_steps=10, anneal_steps=20)
    early, late = np.array([latent_depth.ramps(latent, s) for s in range(80)]).T
    assert (early[:11] == 0).all()
    assert (late[:31] == 0).all()
    for ramp in (early, late):
        assert (np.diff(ramp) >= 0).all()
        assert np.diff(ramp).max() == pytest.approx(1 / 20, rel=1e-4)
        assert ramp[-1] == 1
    assert late[latent.ramp_end] == 1
    assert late[latent.ramp_end - 1] < 1
    at_once = LatentConfig(soft_steps=3, anneal_steps=0)
    assert np.array(latent_depth.ramps(at_once, at_once.ramp_end)).tolist() == [1, 1]
    assert latent_depth.ramps(at_once, at_once.ramp_end - 1)[1] == 0


# Samples


def test_samples_are_open_as_often_as_the_posterior_says():
    logits_GL, count = jnp.array([[-2.0, 0.0, 1.0, 3.0]]), 4000
    keys = jax.random.split(KEY, count)
    noise = jax.vmap(lambda k: latent_depth.logistic_noise(k, 1, 4))(keys)
    q = jax.nn.sigmoid(logits_GL[0])
    for tau in (0.5, 5.0):
        hard = latent_depth.concrete(logits_GL, noise, tau=tau, hard=True)
        soft = latent_depth.concrete(logits_GL, noise, tau=tau, hard=False)
        assert set(np.unique(hard)) == {0.0, 1.0}
        assert np.mean((soft > 0.01) & (soft < 0.99)) > 0.5
        np.testing.assert_array_equal(hard, soft > 0.5)
        error = np.sqrt(q * (1 - q) / count)
        assert (np.abs(hard.mean((0, 1)) - q) < 4 * error).all()
    drawn = jax.vmap(lambda k: latent_depth.sample_gates(k, {"gates": {"logits_GL": logits_GL}}))
    assert (np.abs(drawn(keys).mean((0, 1)) - q) < 4 * error).all()


def test_hard_samples_pass_the_slope_of_soft_ones():
    noise = latent_depth.logistic_noise(KEY, 2, 3)
    weight = jnp.arange(6.0).reshape(2, 3)

    def total(a, hard):
        return (weight * latent_depth.concrete(a, noise, tau=5.0, hard=hard)).sum()

    slopes = [jax.grad(total)(LOGITS_GL, hard) for hard in (False, True)]
    soft = jax.nn.sigmoid((LOGITS_GL + noise) / 5)
    np.testing.assert_allclose(slopes[0], weight * soft * (1 - soft) / 5, rtol=1e-5)
    np.testing.assert_array_equal(slopes[0], slopes[1])


def test_groups_and_steps_draw_apart_and_more_groups_change_no_earlier_one():
    few, many = (latent_depth.logistic_noise(KEY, groups, 3) for groups in (2, 5))
    np.testing.assert_array_equal(few, many[:2])
    assert len(np.unique(many)) == 15
    keys = [latent_depth.step_key(KEY, jnp.int32(s)) for s in range(3)]
    batches = [jax.random.fold_in(KEY, s) for s in range(3)]
    data = np.array([jax.random.key_data(k) for k in (*keys, *batches)])
    assert len(np.unique(data, axis=0)) == 6


# One step


def test_a_step_is_the_gradient_of_loss_and_penalty_under_the_sampled_gates():
    state, tokens_BT, key = start(2), batch_at(0), jax.random.key(7)
    group_B = jnp.repeat(GROUP_W, 4)
    noise = latent_depth.logistic_noise(key, 2, 2)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def objective(params):
        logits_GL = params["gates"]["logits_GL"]
        z_GL = latent_depth.concrete(logits_GL, noise, tau=5.0, hard=True)
        loss, _ = answer_loss(params, tokens_BT, SHALLOW, gate=z_GL[group_B].T)
        return loss + latent_depth.penalty(logits_GL, TWO, 3), loss

    grads, loss = objective(state.params)
    options = {"cfg": SHALLOW, "tx": SGD, "latent": TWO, "gate_key": key, "group_B": group_B}
    after, metrics = jit_step(state, tokens_BT, **options)
    assert_trees_close(after.params, jax.tree.map(lambda w, g: w - g, state.params, grads))
    assert metrics.loss == pytest.approx(float(loss), rel=1e-5)
    found = latent_depth.posterior(state.params)
    assert metrics.expected_depth == pytest.approx(float(found.expected_depth_G.mean()), rel=1e-5)
    weights = {name: g for name, g in grads.items() if name != "gates"}
    assert metrics.grad_norm == pytest.approx(float(optax.tree.norm(weights)), rel=1e-4)

    # One group after another, in two parts: the paper's order of things.
    options |= {"micro_batches": 2, "latent": dataclasses.replace(TWO, loop="groups")}
    other, other_metrics = jit_step(state, tokens_BT, **options)
    assert_trees_close(other, after, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(other_metrics, metrics, rtol=1e-5)


def chunk(state, latent, num_steps=2, tx=SGD, **options):
    return train_chunk.__wrapped__(
        state, KEY, TASK_W2, INPUT_M2, cfg=SHALLOW, tx=tx, num_steps=num_steps, latent=latent,
        group_W=None if latent.groups == 1 else GROUP_W, **DATA, **options,
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["jit", "shard_map"])
def test_eight_devices_draw_the_same_gates_as_one(mode):
    """Over the change from soft to hard samples, at step 1. pmap is shard_map underneath."""
    mesh, state = Mesh(np.array(jax.devices()), ("data",)), start(2, step=0)
    if mode == "jit":
        placed = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
        rows = NamedSharding(mesh, PartitionSpec("data"))
        found = jax.jit(lambda s: chunk(s, TWO, batch_sharding=rows))(placed)
    else:
        body = functools.partial(chunk, latent=TWO, axis_name="data", micro_batches=2)
        everywhere = PartitionSpec()
        found = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=everywhere, out_specs=everywhere))(
            state
        )
    assert_trees_close(found, one_device(), rtol=1e-4, atol=1e-5)


@functools.cache
def one_device():
    return jax.device_get(jax.jit(lambda s: chunk(s, TWO))(start(2, step=0)))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_gates_have_their_own_rate_and_no_decay(name):
    """Without a gradient weights decay and gates stay; with one Adam's first step is the rate."""
    latent = LatentConfig(lr=0.25)
    config = OptimizerConfig(name=name, lr=0.1, weight_decay=1.0, warmup_steps=0, schedule_steps=9)
    tx = make_optimizer(config, latent=latent)
    params = params_of()
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    np.testing.assert_array_equal(updates["gates"]["logits_GL"], 0)
    assert np.abs(updates["blocks"]["fc"]).max() > 0
    slope = {**zeros, "gates": {"logits_GL": jnp.ones((1, 3))}}
    updates, _ = jax.jit(tx.update)(slope, tx.init(params), params)
    np.testing.assert_allclose(updates["gates"]["logits_GL"], -0.25, rtol=1e-5)
    plain = make_optimizer(config)
    weights = {name: w for name, w in params.items() if name != "gates"}
    wanted, _ = jax.jit(plain.update)(
        jax.tree.map(jnp.zeros_like, weights), plain.init(weights), weights
    )
    assert_trees_equal({k: v for k, v in updates.items() if k != "gates"}, wanted)


def test_initial_state_has_open_gates():
    latent = LatentConfig(groups=2, init=1.5)
    state = jax.eval_shape(lambda key: init_state(key, CFG, SGD, ema=True, latent=latent), KEY)
    assert state.params["gates"]["logits_GL"].shape == (2, 3)
    assert state.ema["gates"]["logits_GL"].dtype == jnp.float32
    np.testing.assert_array_equal(latent_depth.init_gates(latent, CFG)["logits_GL"], 1.5)


def test_depth_falls_to_its_target():
    latent = LatentConfig(
        soft_steps=5, anneal_steps=10, target_depth=1, depth_weight=1.0, lr=0.3, entropy_weight=1.0
    )
    tx = make_optimizer(OptimizerConfig(lr=1e-3, warmup_steps=1, schedule_steps=99), latent=latent)
    state, metrics = jax.jit(lambda s: chunk(s, latent, 80, tx=tx))(start(1, tx, step=0))
    found = latent_depth.posterior(state.params)
    assert abs(found.expected_depth_G[0] - 1) < 0.3
    assert found.variance_G[0] < 0.05
    assert metrics.gate_entropy[-1] < metrics.gate_entropy[0]


# Bad requests


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": 0}, "groups=0, expected a whole number, at least 1"),
        ({"groups": 1.5}, "groups=1.5, expected a whole number"),
        ({"prior": "flat"}, "prior='flat', expected one of uniform, aggregated, beta"),
        ({"loop": "both"}, "loop='both', expected 'joint' or"),
        ({"beta": (0.5, 2.0)}, r"beta=\(0.5, 2.0\), expected two finite numbers of at least 1"),
        ({"beta": (float("nan"), 2.0)}, "expected two finite numbers"),
        ({"beta": [float("inf"), 2.0]}, "expected two finite numbers"),
        ({"init": float("inf")}, "init=inf, expected a finite number"),
        ({"anneal_steps": 1.5}, "anneal_steps=1.5, expected a whole number"),
        ({"beta": (1.0, 1.0)}, "not both 1"),
        ({"soft_steps": -1}, "soft_steps=-1"),
        ({"kl_weight": -0.1}, "kl_weight=-0.1, expected finite and at least 0"),
        ({"depth_weight": float("nan")}, "depth_weight=nan, expected finite"),
        ({"tau": 0.0}, "tau=0.0, expected finite and above 0"),
        ({"target_depth": 0}, "target_depth=0, expected above 0, or None"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LatentConfig(**settings)


def test_impossible_steps():
    with pytest.raises(ValueError, match="target_depth=4, expected at most layers=3"):
        latent_depth.init_gates(LatentConfig(target_depth=4), CFG)
    post = dataclasses.replace(CFG, norm="post")
    with pytest.raises(ValueError, match="norm='post', expected 'pre' with latent depth"):
        latent_depth.init_gates(LatentConfig(), post)
    with pytest.raises(ValueError, match="latent depth needs gate_key, and group_B for several"):
        train_step(start(2), batch_at(0), cfg=SHALLOW, tx=SGD, latent=TWO, gate_key=KEY)
    alone = functools.partial(train_step, start(2), batch_at(0), cfg=SHALLOW, tx=SGD, latent=TWO)
    with pytest.raises(ValueError, match=r"groups have shape \(4,\), expected \(16,\)"):
        alone(gate_key=KEY, group_B=GROUP_W)
    with pytest.raises(ValueError, match="groups from 0 to 2, expected ids from 0 to 1"):
        alone(gate_key=KEY, group_B=np.arange(16) % 3)
    with pytest.raises(ValueError, match="skip=True needs a gate"):
        apply(params_of(), batch_at(0), CFG, skip=True)


@pytest.mark.parametrize("length", [3, 5])
def test_groups_must_be_those_of_the_tasks(length):
    """JAX would fill or cut them, and clamp ids."""
    with pytest.raises(ValueError, match=rf"groups have shape \({length},\), expected \(4,\)"):
        train_chunk(
            start(2), KEY, TASK_W2, INPUT_M2, cfg=SHALLOW, tx=SGD, num_steps=1, latent=TWO,
            group_W=np.zeros(length, np.int32), **DATA,
        )  # fmt: skip
    for group_W in ([0, 1, 2, 0], [0, -1, 1, 0]):
        with pytest.raises(ValueError, match="expected ids from 0 to 1"):
            latent_depth.check_groups(np.array(group_W), 4, 2)
        with pytest.raises(ValueError, match="expected ids from 0 to 1"):
            latent_depth.task_gates(params_of(2), np.array(group_W))
    for group_W in (np.zeros(0, np.int32), np.zeros(3)):
        with pytest.raises(
            ValueError, match=rf"{len(group_W)} groups of dtype .*, expected one whole"
        ):
            latent_depth.check_groups(group_W, len(group_W), 2)
    with pytest.raises(ValueError, match="2 groups, expected the group of each task or row"):
        latent_depth.task_gates(params_of(2))


@pytest.mark.parametrize("kind", [list, np.array, jnp.array])
def test_groups_that_jit_closes_over(kind):
    params, group_W = params_of(2), kind([0, 1, 1, 0])
    inside = jax.jit(lambda params: latent_depth.task_gates(params, group_W))(params)
    wanted = latent_depth.rounded(params["gates"]["logits_GL"])[np.array([0, 1, 1, 0])]
    np.testing.assert_array_equal(inside[0], wanted)


def test_gates_and_parameters_of_any_type_can_be_skipped():
    """As they come from files: numpy's arrays, and doubles where these are on."""
    params, tokens_BT = jax.tree.map(np.asarray, params_of()), batch_at(0)
    gate = [1.0] + [0.0] * (CFG.layers - 2) + [1.0]
    wanted = apply(params, tokens_BT, CFG, gate=jnp.array(gate))
    with jax.enable_x64(True):
        for given in (gate, np.array(gate), jnp.array(gate)):
            for skip in (True, False):
                found = apply(params, tokens_BT, CFG, gate=given, skip=skip)
                assert found.dtype == jnp.float32
                np.testing.assert_allclose(found, wanted, atol=1e-5)


# Figures


def test_figures_show_what_they_are_given():
    figure = latent_figures.posterior_map(jax.nn.sigmoid(LOGITS_GL), group_names=["a", "b"])
    axes = figure.axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), jax.nn.sigmoid(LOGITS_GL), rtol=1e-5)
    assert len(axes.collections[0].get_offsets()) == 4
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    history = {"step": [1, 2, 3], "expected_depth": [3, np.nan, 1], "gate_variance": [0.2, 0.1, 0]}
    top = latent_figures.depth_curves(history, target=1).axes[0]
    np.testing.assert_array_equal(top.lines[0].get_ydata(), [3, 1])
    assert "target (1)" in [text.get_text() for text in top.get_legend().get_texts()]
    norms = {"gated": {"step 0": [1, 0, 2]}, "plain": {"step 9": [1, 1, 1], "step 0": [3, 3, 3]}}
    gated, plain = latent_figures.gradient_by_block(norms).axes
    assert gated.get_yscale() == "log"
    assert (gated.get_title(), plain.get_title()) == ("gated", "plain")
    np.testing.assert_array_equal(gated.lines[0].get_ydata(), [1, np.nan, 2])
    assert gated.lines[0].get_color() == plain.lines[1].get_color() != plain.lines[0].get_color()
    with pytest.raises(ValueError, match="norms is empty"):
        latent_figures.gradient_by_block({})
    with pytest.raises(ValueError, match="expected \\(groups, layers\\)"):
        latent_figures.posterior_map([0.5])
    with pytest.raises(ValueError, match="1 names for 2 groups"):
        latent_figures.posterior_map(LOGITS_GL, group_names=["a"])
    with pytest.raises(ValueError, match="history lacks the column gate_variance"):
        latent_figures.depth_curves({"step": [], "expected_depth": []})

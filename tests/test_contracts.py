"""What lets these packages be embedded: public functions are pure, under every transformation.

Each is compared with its plain call under jit, vmap, grad, scan and eval_shape; types hold under
strict promotion and with x64 on.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from asserts import assert_trees_close, assert_trees_equal
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import modgrok
from modgrok import (
    controls,
    corruption,
    fourier,
    grids,
    interpret,
    interventions,
    latent_depth,
    oracles,
    prompts,
)
from modgrok.tasks import InputSplit, TaskSplit
from modgrok.training import answer_loss

CFG = modgrok.Config(vocab=5, width=8, heads=2, layers=1)
TASKS = TaskSplit(np.array([[1, 2], [3, 4]], np.int32), np.array([[2, 2], [4, 1]], np.int32))
INPUTS = InputSplit(np.array([[1, 2], [0, 4]], np.int32), np.array([[4, 1], [1, 1]], np.int32))
KEYS = jax.random.split(jax.random.key(0), 2)
TX = optax.sgd(0.5)
SIZES = {"modulus": 5, "shots": 2}


def random_params(seed):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: modgrok.init_params(key, CFG), KEYS[0])
    return jax.tree.map(lambda x: jnp.array(rng.normal(0, 0.5, x.shape), jnp.float32), shapes)


PARAMS = [random_params(seed) for seed in (0, 1)]
TOKENS = [
    modgrok.sample_sequences(key, TASKS.train_W2, INPUTS.train_M2, batch=4, **SIZES) for key in KEYS
]
PROBS = [oracles.bayes(tokens_BT, 5) for tokens_BT in TOKENS]


def state(params):
    return modgrok.TrainState(jnp.int32(0), params, TX.init(params), None)


def train_step(params, tokens_BT):
    return modgrok.train_step(state(params), tokens_BT, cfg=CFG, tx=TX)


def train_chunk(params, key):
    return modgrok.train_chunk(
        state(params), key, TASKS[0], INPUTS[0], cfg=CFG, tx=TX, num_steps=2, batch=4, **SIZES
    )


def evaluate(params, key):
    return modgrok.evaluate(params, key, TASKS, INPUTS, cfg=CFG, sequences_per_task=2, **SIZES)


def capture(params, tokens_BT):
    return modgrok.apply(params, tokens_BT, CFG, positions="all", capture=True)


LATENT = modgrok.LatentConfig(groups=2, target_depth=1, prior="aggregated", share_weight=0.1)
LOGITS = [jnp.array([[0.5], [-1.0]], jnp.float32), jnp.array([[2.0], [0.3]], jnp.float32)]
GATED = [{**p, "gates": {"logits_GL": a}} for p, a in zip(PARAMS, LOGITS, strict=True)]


def gated_chunk(params, key):
    """Whose gates share the optimiser of the weights."""
    return modgrok.train_chunk(
        state(params), key, TASKS[0], INPUTS[0], cfg=CFG, tx=TX, num_steps=2, batch=4,
        latent=LATENT, group_W=np.array([1, 0], np.int32), **SIZES,
    )  # fmt: skip


def gated_gradients(params, key):
    noise_GL = latent_depth.logistic_noise(key, 2, CFG.layers)
    return latent_depth.gradients(
        lambda p, gate: answer_loss(p, TOKENS[0], CFG, gate=gate), params,
        jnp.array([0, 1, 1, 0], jnp.int32), latent=dataclasses.replace(LATENT, loop="groups"),
        noise_GL=noise_GL, step=jnp.int32(700),
    )  # fmt: skip


def attention_scores(params, tokens_BT):
    seen = capture(params, tokens_BT)[1]
    return interpret.attention_scores(seen.attention_LBHTT, tokens_BT, modulus=5)


def ablate(params, tokens_BT):
    mask_GLX = interventions.one_at_a_time(CFG.layers, CFG.heads)
    return interventions.ablate(params, tokens_BT, mask_GLX, KEYS[0], cfg=CFG, kind="resample")


def label_corruption(tokens_BT, key):
    predict = functools.partial(oracles.ratio_matching, modulus=5)
    return corruption.label_corruption(predict, tokens_BT, key, modulus=5)


def corrupt_several(tokens_BT, key):
    predict = functools.partial(oracles.bayes, modulus=5)
    return corruption.corrupt_several(predict, tokens_BT, key, [(1, 1)], modulus=5)


def patch_activations(params, key):
    found = prompts.matched_prompts(key, TASKS[0], ALL_INPUTS, match=0, batch=2, **SIZES)
    return interventions.patch_activations(params, found, cfg=CFG)


def shot_grids(params, tokens_BT):
    predict = interpret.network(params, CFG).predict
    return grids.shot_grids(predict, tokens_BT, TASKS[0][[0, 1, 1, 0]], [0, 1], modulus=5, rows=8)


def grid_features(params, tokens_BT):
    grid_NT = interpret.input_grid(tokens_BT[0], TASKS[0][0], modulus=5, shot=0)
    return interpret.grid_features(interpret.network(params, CFG), grid_NT, shot=0, rows=25)


def ratio_similarity(key):
    feature_GND = jax.random.normal(key, (2, 25, 3), jnp.float32)
    return interpret.ratio_similarity(feature_GND, key, modulus=5, num=3)


ALL_INPUTS = np.stack(np.divmod(np.arange(25), 5), axis=1)
GRIDS = [jax.random.normal(key, (3, 5, 5)) for key in KEYS]

# name -> (function of arrays, two sets of arguments)
FUNCTIONS = {
    "sample_sequences": (
        lambda key: modgrok.sample_sequences(key, TASKS[0], INPUTS[0], batch=4, **SIZES),
        [(x,) for x in KEYS],
    ),
    "answers": (modgrok.answers, [(x,) for x in TOKENS]),
    "init_params": (lambda key: modgrok.init_params(key, CFG), [(x,) for x in KEYS]),
    "apply": (lambda p, t: modgrok.apply(p, t, CFG), list(zip(PARAMS, TOKENS, strict=True))),
    "apply, capture": (capture, list(zip(PARAMS, TOKENS, strict=True))),
    "answer_loss": (lambda p, t: answer_loss(p, t, CFG), list(zip(PARAMS, TOKENS, strict=True))),
    "train_step": (train_step, list(zip(PARAMS, TOKENS, strict=True))),
    "train_chunk": (train_chunk, list(zip(PARAMS, KEYS, strict=True))),
    "evaluate": (evaluate, list(zip(PARAMS, KEYS, strict=True))),
    "factor": (modgrok.OptimizerConfig().factor, [(jnp.int32(3),), (jnp.int32(30_000),)]),
    "ratio_matching": (lambda t: oracles.ratio_matching(t, 5), [(x,) for x in TOKENS]),
    "bayes": (lambda t: oracles.bayes(t, 5), [(x,) for x in TOKENS]),
    "predict": (oracles.predict, list(zip(KEYS, PROBS, strict=True))),
    "expected_accuracy": (
        oracles.expected_accuracy,
        [(p, modgrok.answers(t)) for p, t in zip(PROBS, TOKENS, strict=True)],
    ),
    "train_chunk, gated": (gated_chunk, list(zip(GATED, KEYS, strict=True))),
    "gradients of groups": (gated_gradients, list(zip(GATED, KEYS, strict=True))),
    "sample_gates": (latent_depth.sample_gates, list(zip(KEYS, GATED, strict=True))),
    "penalty": (
        lambda a, step: latent_depth.penalty(a, LATENT, step),
        list(zip(LOGITS, map(jnp.int32, (900, 1300)), strict=True)),
    ),
    "posterior": (latent_depth.posterior, [(p,) for p in GATED]),
    "attention_scores": (attention_scores, list(zip(PARAMS, TOKENS, strict=True))),
    "ablate": (ablate, list(zip(PARAMS, TOKENS, strict=True))),
    "label_corruption": (label_corruption, list(zip(TOKENS, KEYS, strict=True))),
    "principal_components": (
        lambda x: interpret.principal_components(x, components=2),
        [(x,) for x in GRIDS],
    ),
    "pair_shares": (lambda x: fourier.pair_shares(x, modulus=5, kind="log"), [(x,) for x in GRIDS]),
    "shuffled": (
        lambda key, x: fourier.shuffled(key, x, modulus=5, kind="log", pairs=True, num=2),
        list(zip(KEYS, GRIDS, strict=True)),
    ),
}


# Of these only the types are looked at.
TRACED = {
    "logit_lens": (lambda p, t: interventions.logit_lens(p, t, cfg=CFG), (PARAMS[0], TOKENS[0])),
    "corrupt_several": (corrupt_several, (TOKENS[0], KEYS[0])),
    "patch_activations": (patch_activations, (PARAMS[0], KEYS[0])),
    "shot_grids": (shot_grids, (PARAMS[0], TOKENS[0])),
    "grid_features": (grid_features, (PARAMS[0], TOKENS[0])),
    "ratio_similarity": (ratio_similarity, (KEYS[0],)),
    "controls": (lambda t: controls.ratio_matching(5).capture(t), (TOKENS[0],)),
} | {name: (function, arguments[0]) for name, (function, arguments) in FUNCTIONS.items()}


def both(arguments):
    return jax.tree.map(lambda *x: jnp.stack(x), *arguments)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_jit_vmap_scan_and_eval_shape(name):
    """One after the other, all at once, in a loop, and without running: the same."""
    function, arguments = FUNCTIONS[name]
    compiled, before = jax.jit(function), jax.tree.map(jnp.copy, both(arguments))
    wanted = both([compiled(*args) for args in arguments])
    mapped = jax.jit(jax.vmap(function))(*both(arguments))
    assert_trees_close(mapped, wanted, rtol=1e-5, atol=1e-6)

    @jax.jit
    def looped(arguments):
        return jax.lax.scan(lambda _, args: (None, function(*args)), None, arguments)[1]

    assert_trees_close(looped(both(arguments)), wanted, rtol=1e-5, atol=1e-6)
    shapes = jax.eval_shape(function, *arguments[0])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
        lambda x: (x.shape[1:], x.dtype), wanted
    )
    assert_trees_equal(both(arguments), before)


def test_gradients_flow_through_a_chunk():
    """Of its last loss, in the weights it began with: against central differences."""
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda w: jnp.array(rng.normal(size=w.shape), w.dtype), PARAMS[0])

    def along(t):
        params = jax.tree.map(lambda w, d: w + t * d, PARAMS[0], direction)
        return train_chunk(params, KEYS[0])[1].loss[-1]

    slope, value = jax.jit(jax.grad(along))(0.0), jax.jit(along)
    assert abs(slope) > 1e-3
    np.testing.assert_allclose(slope, (value(0.01) - value(-0.01)) / 0.02, rtol=0.03)


def test_forward_mode_agrees_with_reverse_mode():
    def squares(params):
        return (modgrok.apply(params, TOKENS[0], CFG) ** 2).sum()

    (slope, gradient) = jax.jit(
        lambda w, d: (jax.jvp(squares, (w,), (d,))[1], jax.grad(squares)(w))
    )(*PARAMS)  # fmt: skip
    products = jax.tree.map(lambda g, d: (g * d).sum(), gradient, PARAMS[1])
    np.testing.assert_allclose(slope, sum(jax.tree.leaves(products)), rtol=1e-4)


def strict_programs():
    """Everything up to the optimiser's own call, whose step count times a float is not strict."""
    half = modgrok.Config(vocab=5, width=8, heads=2, layers=3, dtype="bfloat16", remat=True)
    deep = jax.eval_shape(lambda key: modgrok.init_params(key, half), KEYS[0])
    gradient = jax.grad(lambda p, t: answer_loss(p, t, half)[0])
    yield gradient, (deep, TOKENS[0])
    for name, program in TRACED.items():
        if name not in ("train_step", "train_chunk", "train_chunk, gated"):
            yield program


@pytest.mark.parametrize("x64", [False, True])
def test_strict_promotion(x64):
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("strict"):
        for function, arguments in strict_programs():
            # jit of a new function, since traces of the default mode are kept.
            jax.eval_shape(jax.jit(lambda *args, f=function: f(*args)), *arguments)


@pytest.mark.parametrize("name", TRACED)
def test_x64_changes_no_type(name):
    function, arguments = TRACED[name]
    wanted = jax.eval_shape(function, *arguments)
    with jax.enable_x64(True):
        shapes = jax.eval_shape(lambda *args: function(*args), *arguments)
    assert jax.tree.map(lambda x: x.dtype, shapes) == jax.tree.map(lambda x: x.dtype, wanted)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("x64", [False, True])
def test_state_comes_back_as_it_went_in(name, x64):
    tx = modgrok.make_optimizer(modgrok.OptimizerConfig(name=name))
    with jax.enable_x64(x64):
        before = jax.eval_shape(lambda key: modgrok.init_state(key, CFG, tx, ema=True), KEYS[0])
        after, _ = jax.eval_shape(
            functools.partial(modgrok.train_step, cfg=CFG, tx=tx, ema_decay=0.9), before, TOKENS[0]
        )
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), before) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.weak_type), after
    )


def test_x64_changes_no_number():
    wanted = jax.jit(train_chunk)(PARAMS[0], KEYS[0])
    with jax.enable_x64(True):
        found = jax.jit(train_chunk)(PARAMS[0], KEYS[0])
    assert_trees_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_config_is_static_without_being_declared():
    run = jax.jit(modgrok.apply)
    shapes = {layers: run.eval_shape(*deep(layers)).shape for layers in (1, 2)}
    assert shapes == {1: (4, 2, 5), 2: (4, 2, 5)}


def deep(layers):
    cfg = dataclasses.replace(CFG, layers=layers)
    return jax.eval_shape(lambda key: modgrok.init_params(key, cfg), KEYS[0]), TOKENS[0], cfg


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_meshes_of_both_kinds(axis_type):
    """Under an explicit mesh a caller says `auto_axes`."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",), axis_types=(axis_type,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    step = jax.jit(train_step)
    wanted = step(PARAMS[0], TOKENS[0])
    params = jax.device_put(PARAMS[0], everywhere)
    tokens_BT = jax.device_put(TOKENS[0], NamedSharding(mesh, PartitionSpec("data")))
    if axis_type is AxisType.Explicit:
        step = jax.jit(jax.sharding.auto_axes(train_step, out_sharding=PartitionSpec()))
    with jax.set_mesh(mesh):
        found = step(params, tokens_BT)
    assert_trees_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_public_names_are_all_there():
    assert sorted(modgrok.__all__) == list(modgrok.__all__)
    for name in modgrok.__all__:
        assert getattr(modgrok, name).__doc__, name

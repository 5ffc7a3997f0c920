"""Schedule, optimisers and steps against plain numpy; chunks, micro-batches, many devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from asserts import assert_trees_close, assert_trees_equal
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from modgrok import interop, sequences
from modgrok.model import Config, init_params
from modgrok.training import (
    OptimizerConfig,
    TrainState,
    answer_loss,
    init_state,
    make_optimizer,
    train_chunk,
    train_step,
)
from tests.modgrok import reference_forward

CFG = Config(vocab=6, width=8, heads=2, layers=1)
KEY = jax.random.key(0)
TASK_W2 = np.array([[1, 2], [3, 4], [0, 1], [2, 2]], np.int32)
INPUT_M2 = np.array([[1, 2], [0, 4], [2, 2], [3, 0], [4, 1]], np.int32)
DATA = {"modulus": 5, "shots": 3, "batch": 16}
ADAMW = make_optimizer(OptimizerConfig(lr=0.01, warmup_steps=2, schedule_steps=20))
SGD = optax.sgd(1.0)  # its step is the gradient, so a gradient 8 times too large shows

step_once = jax.jit(
    train_step, static_argnames=("cfg", "tx", "micro_batches", "ema_decay", "axis_name")
)
draw = jax.jit(functools.partial(sequences.sample_sequences, **DATA))


def start(tx, ema=False, cfg=CFG):
    """A state with parameters of size .3, so that no gradient is near rounding error."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: init_params(key, cfg), KEY)
    params = jax.tree.map(lambda x: jnp.array(rng.normal(0, 0.3, x.shape), x.dtype), shapes)
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.int32(0), params, tx.init(params), average)


def batch_at(step):
    return draw(jax.random.fold_in(KEY, step), TASK_W2, INPUT_M2)


def chunk(state, num_steps, *, tx=ADAMW, cfg=CFG, **options):
    return train_chunk(
        state, KEY, TASK_W2, INPUT_M2, cfg=cfg, tx=tx, num_steps=num_steps, **DATA, **options
    )


def types(tree):
    return jax.tree.map(jax.typeof, tree)


# Schedule


def test_loss_and_accuracy_against_numpy():
    arrays = reference_forward.random_state_dict(0, vocab=6, width=8, heads=2, layers=1)
    cfg, params = interop.from_state_dict(arrays)
    tokens_BT = np.asarray(batch_at(0))
    logits_BSV = reference_forward.forward(arrays, tokens_BT[:, :-1])[:, 1::3]
    z_BS = tokens_BT[:, 2::3]
    log_probs = logits_BSV - np.log(np.exp(logits_BSV).sum(-1, keepdims=True))
    wanted_BS = -np.take_along_axis(log_probs, z_BS[..., None], -1)[..., 0]
    loss, (loss_BS, correct_BS) = jax.jit(answer_loss, static_argnums=2)(params, tokens_BT, cfg)
    np.testing.assert_allclose(loss_BS, wanted_BS, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(loss, wanted_BS.mean(), rtol=1e-5)
    np.testing.assert_array_equal(correct_BS, logits_BSV.argmax(-1) == z_BS)
    assert 0 < correct_BS.mean() < 1


def test_step_is_the_gradient_of_the_batch():
    state, tokens_BT = start(SGD, ema=True), batch_at(0)
    loss_and_grads = jax.jit(jax.value_and_grad(answer_loss, has_aux=True), static_argnums=2)
    (loss, (_, correct_BS)), grads = loss_and_grads(state.params, tokens_BT, CFG)
    after, metrics = step_once(state, tokens_BT, cfg=CFG, tx=SGD, ema_decay=0.75)
    assert after.step == 1
    wanted = jax.tree.map(lambda w, g: w - g, state.params, grads)
    assert_trees_close(after.params, wanted)
    assert_trees_close(
        after.ema, jax.tree.map(lambda e, w: 0.75 * e + 0.25 * w, state.params, wanted)
    )
    norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(metrics, (loss, correct_BS.mean(), norm), rtol=1e-5)


def test_micro_batches_change_no_number():
    state, tokens_BT = start(SGD, ema=True), batch_at(0)
    whole, metrics = step_once(state, tokens_BT, cfg=CFG, tx=SGD, ema_decay=0.75)
    parts, part_metrics = step_once(
        state, tokens_BT, cfg=CFG, tx=SGD, ema_decay=0.75, micro_batches=4
    )
    assert_trees_close(parts, whole, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(part_metrics, metrics, rtol=1e-5)


def test_micro_batches_stay_spread_over_devices():
    """Each device does its share of every part: half the rows at a time, not twice the work."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    everywhere, rows = (NamedSharding(mesh, PartitionSpec(*a)) for a in ((), ("data",)))
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), start(SGD)
    )
    flops = []
    for parts, num_rows in ((1, 8), (4, 32)):
        tokens_BT = jax.ShapeDtypeStruct((num_rows, 9), jnp.int32, sharding=rows)
        compiled = step_once.lower(
            placed, tokens_BT, cfg=CFG, tx=SGD, micro_batches=parts
        ).compile()
        flops.append(compiled.cost_analysis()["flops"])
    one_row, four_times_one_row = flops  # the loop over parts 2 to 4 is counted once
    assert four_times_one_row < 3 * one_row


@pytest.mark.parametrize("parts", [0, -1, 3, 32])
def test_micro_batches_must_divide_the_rows(parts):
    with pytest.raises(ValueError, match=f"micro_batches={parts} does not divide the 16 rows"):
        train_step(start(SGD), batch_at(0), cfg=CFG, tx=SGD, micro_batches=parts)


@pytest.mark.parametrize(("ema", "decay"), [(True, None), (False, 0.9)])
def test_average_must_be_asked_for_twice(ema, decay):
    with pytest.raises(ValueError, match=f"ema_decay={decay}, but the state has ema={ema}"):
        train_step(start(SGD, ema=ema), batch_at(0), cfg=CFG, tx=SGD, ema_decay=decay)


def test_the_average_is_tested_if_there_is_one():
    plain, averaged = start(SGD), start(SGD, ema=True)
    assert plain.tested is plain.params
    assert averaged.tested is averaged.ema


# Chunks


def test_chunk_is_repeated_steps_on_its_own_batches():
    state, wanted = start(SGD, ema=True), []
    for step in range(3):
        state, metrics = step_once(state, batch_at(step), cfg=CFG, tx=SGD, ema_decay=0.75)
        wanted.append(metrics)
    after, metrics = on_one_device()
    assert after.step == 3
    assert_trees_close(after.params, state.params, rtol=1e-4, atol=1e-5)
    assert_trees_close(metrics, jax.tree.map(lambda *m: jnp.stack(m), *wanted), rtol=1e-4)


def test_cut_chunks_equal_one_chunk_bit_for_bit():
    whole, metrics = chunk(start(ADAMW, ema=True), 4, ema_decay=0.9)
    middle, first = chunk(start(ADAMW, ema=True), 2, ema_decay=0.9)
    parts, second = chunk(middle, 2, ema_decay=0.9)
    assert_trees_equal(parts, whole)
    assert_trees_equal(jax.tree.map(lambda *m: jnp.concatenate(m), first, second), metrics)


def test_state_keeps_its_type_and_one_trace_serves_all_chunks():
    state = start(ADAMW, ema=True)
    before = train_chunk._cache_size()
    for _ in range(3):
        after, _ = chunk(state, 4, ema_decay=0.9)
        assert types(after) == types(state)
        state = after
    equal = Config(vocab=6, width=8, heads=2, layers=1)
    chunk(state, 4, cfg=equal, ema_decay=0.9)
    assert train_chunk._cache_size() - before <= 1


def test_a_caller_can_donate_the_state():
    """As the docstring says; every leaf of the new state is written over one of the old."""
    state, options = start(ADAMW), {"cfg": CFG, "tx": ADAMW, "num_steps": 2, **DATA}
    donating = jax.jit(functools.partial(train_chunk, **options), donate_argnums=0)
    compiled = donating.lower(state, KEY, TASK_W2, INPUT_M2).compile()
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes == size


LEARNER = Config(vocab=3, width=32, heads=2, layers=1)


@functools.cache
def drawn_state():
    return jax.jit(init_state, static_argnames=("cfg", "tx", "ema"))(KEY, LEARNER, SGD, ema=True)


def test_initial_state():
    state = drawn_state()
    assert state.step == 0
    assert state.step.dtype == jnp.int32
    assert_trees_equal(state.ema, state.params)
    assert types(state.params) == types(start(SGD, cfg=LEARNER).params)
    assert jax.eval_shape(lambda key: init_state(key, LEARNER, SGD), KEY).ema is None


@pytest.mark.parametrize(("name", "lr"), [("adamw", 0.01), ("muon", 0.02)])
def test_it_learns(name, lr):
    """A task set that one rule solves: z = x."""
    tx = make_optimizer(
        OptimizerConfig(
            name=name, lr=lr, weight_decay=0.1, embedding_lr=0.02, embedding_decay=0.1,
            warmup_steps=10, schedule_steps=100,
        )
    )  # fmt: skip
    input_M2 = np.array([(x, y) for x in range(3) for y in range(3)], np.int32)
    params = drawn_state().params
    _, metrics = train_chunk(
        TrainState(jnp.int32(0), params, tx.init(params), None), KEY, np.array([[1, 0]]), input_M2,
        cfg=LEARNER, tx=tx, num_steps=100, batch=32, shots=4, modulus=3,
    )  # fmt: skip
    assert metrics.loss[0] == pytest.approx(np.log(3), abs=0.1)
    assert metrics.loss[-10:].mean() < 0.7
    assert metrics.accuracy[-10:].mean() > 0.65


# Many devices


def on_devices(mode, mesh, **options):
    """A chunk of 3 steps of plain gradient descent, wrapped as a caller would."""
    body = functools.partial(train_chunk, cfg=CFG, tx=SGD, num_steps=3, **DATA, **options)
    args = (start(SGD), KEY, TASK_W2, INPUT_M2)
    if mode == "jit":
        rows = NamedSharding(mesh, PartitionSpec("data"))
        args = jax.device_put(args, NamedSharding(mesh, PartitionSpec()))
        return body(*args, batch_sharding=rows)
    body = functools.partial(body, axis_name="data")
    if mode == "pmap":
        spread = jax.pmap(
            lambda _, *args: body(*args), axis_name="data", in_axes=(0, *[None] * 4), out_axes=None
        )
        return spread(np.arange(mesh.size), *args)
    everywhere = PartitionSpec()
    checked = mode == "shard_map"
    return jax.jit(
        jax.shard_map(body, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=checked)
    )(*args)


@functools.cache
def on_one_device():
    return jax.device_get(chunk(start(SGD), 3, tx=SGD))


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("jit", {}),
        ("pmap", {}),
        ("shard_map", {"micro_batches": 2}),
        ("shard_map without check", {}),
    ],
)
def test_eight_devices_equal_one(mode, options):
    """A gradient summed where it should be averaged would be 8 times as large, and so the step."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    assert mesh.size == 8
    state, metrics = on_devices(mode, mesh, **options)
    wanted, wanted_metrics = on_one_device()
    for ours, one in zip(metrics, wanted_metrics, strict=True):
        np.testing.assert_allclose(ours, one, rtol=1e-5)
    assert_trees_close(state, wanted, rtol=1e-5, atol=1e-5)
    if mode == "jit":
        assert len(metrics.loss.sharding.device_set) == 8


def test_eight_devices_with_scanned_blocks():
    cfg = Config(vocab=6, width=8, heads=2, layers=7)
    state, tokens_BT = start(SGD, cfg=cfg), batch_at(0)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    step = functools.partial(train_step, cfg=cfg, tx=SGD)
    spread = jax.shard_map(
        functools.partial(step, axis_name="data"),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec(),
    )
    after, metrics = jax.jit(spread)(state, tokens_BT)
    wanted, wanted_metrics = jax.jit(step)(state, tokens_BT)
    np.testing.assert_allclose(metrics, wanted_metrics, rtol=1e-5)
    assert_trees_close(after, wanted, rtol=1e-5, atol=1e-5)


def test_rows_must_divide_over_devices():
    mesh = Mesh(np.array(jax.devices()[:3]), ("data",))
    with pytest.raises(ValueError, match="batch=16 does not divide over 3 devices"):
        on_devices("shard_map", mesh)

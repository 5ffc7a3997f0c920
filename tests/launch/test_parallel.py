"""Tests of launch/parallel.py. Several processes are tested with a program: test_modgrok_train."""

import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asserts import assert_trees_close

import modgrok
from launch import UsageError, hoststate, parallel

MODES = ("jit", "pmap", "shard_map")


def train(mode, num_devices, lengths=(3, 3), batch=48):
    """Losses and final state of a small model, from chunks of these lengths."""
    model = modgrok.Config(vocab=5, width=16, heads=2, layers=1)
    tx = modgrok.make_optimizer(
        modgrok.OptimizerConfig(lr=1e-3, weight_decay=0.1, warmup_steps=2, schedule_steps=20)
    )
    tasks = modgrok.sample_tasks(jax.random.key(1), modulus=5, num_random=6)
    inputs = modgrok.split_inputs(jax.random.key(2), modulus=5, fraction=0.8)
    mesh = parallel.make_mesh(num_devices)

    def chunk(state, *data, **options):
        return modgrok.train_chunk.__wrapped__(
            state, *data, cfg=model, tx=tx, batch=batch, shots=4, modulus=5, **options
        )

    run = parallel.wrap(chunk, mesh, mode)
    init = jax.jit(lambda key: modgrok.init_state(key, model, tx))(jax.random.key(0))
    state, key = parallel.replicate((init, jax.random.key(3)), mesh)
    data = parallel.replicate((tasks.train_W2, inputs.train_M2), mesh)
    losses = []
    for length in lengths:
        state, metrics = run(state, key, *data, num_steps=length)
        jax.block_until_ready(metrics)
        losses.extend(parallel.on_host(metrics).loss)
    return np.array(losses), parallel.on_host(state)


@pytest.fixture(scope="module")
def one_device():
    return train("jit", 1)


@pytest.mark.parametrize("mode", MODES)
def test_eight_devices_train_as_one_does(mode, one_device):
    losses, state = train(mode, 8)
    assert len(losses) == 6
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-5)
    assert_trees_close(state.params, one_device[1].params, rtol=1e-5, atol=1e-6)
    assert state.step == 6


def test_the_batch_is_spread_over_the_devices():
    mesh = parallel.make_mesh(8)
    seen = {}

    def chunk(state, *, num_steps, axis_name=None, batch_sharding=None):
        seen["axis"], seen["sharding"] = axis_name, batch_sharding
        size = jax.lax.axis_size(axis_name) if axis_name else 0
        return state + size, state * num_steps

    for mode, size in (("jit", 0), ("pmap", 8), ("shard_map", 8)):
        run = parallel.wrap(chunk, mesh, mode)
        state, metrics = run(parallel.replicate(jnp.ones(()), mesh), num_steps=3)
        assert (float(state), float(metrics)) == (1 + size, 3)
        assert state.sharding.device_set == set(jax.devices())
        assert (seen["axis"] is None) == (mode == "jit")
        assert (seen["sharding"] is None) == (mode != "jit")


def test_rows_split_the_leading_axis():
    mesh = parallel.make_mesh(4)
    x = jax.device_put(np.arange(8.0), parallel.rows(mesh))
    assert [len(shard.data) for shard in x.addressable_shards] == [2] * 4


@pytest.mark.parametrize("mode", MODES)
def test_the_state_is_donated(mode):
    mesh = parallel.make_mesh(8)
    run = parallel.wrap(lambda state, *, num_steps, **_: (state + 1, state.sum()), mesh, mode)
    before = parallel.replicate(jnp.zeros(3), mesh)
    run(before, num_steps=1)
    assert before.is_deleted()


def test_replicate_and_on_host_keep_values_and_keys():
    mesh = parallel.make_mesh(8)
    tree = {"a": np.arange(3), "key": jax.random.key(5)}
    there = parallel.replicate(tree, mesh)
    assert there["a"].is_fully_replicated
    assert len(there["a"].sharding.device_set) == 8
    assert hoststate.copy(there)["key"].tolist() == hoststate.copy(tree)["key"].tolist()
    assert isinstance(parallel.on_host(there["a"]), np.ndarray)


def test_make_mesh_counts():
    assert parallel.make_mesh().size == 8
    assert parallel.make_mesh(3).size == 3
    with pytest.raises(UsageError, match=r"--devices=9: there are 8 cpu devices; expected 1 to 8"):
        parallel.make_mesh(9)


def test_an_unknown_mode_is_refused():
    with pytest.raises(UsageError, match="--parallel=threads: expected one of jit, pmap"):
        parallel.wrap(lambda state: state, parallel.make_mesh(1), "threads")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coordinator_address": "localhost:1"}, "--num_processes=0 --process_id=-1: give all"),
        ({"num_processes": 2}, "give all three"),
        ({"process_id": 0}, "give all three"),
        (
            {"coordinator_address": "localhost:1", "num_processes": 2, "process_id": 2},
            "--process_id=2: expected 0 to 1",
        ),
        (
            {"coordinator_address": "localhost", "num_processes": 2, "process_id": 0},
            "--coordinator_address=localhost: expected host:port",
        ),
        ({"platform_devices": 3}, "--platform_devices=3: jax runs already, with 8 devices"),
    ],
)
def test_start_refuses(settings, message):
    jax.devices()
    with pytest.raises(UsageError) as error:
        parallel.start(**settings)
    assert message in str(error.value)


def test_start_accepts_what_is_already_so():
    jax.devices()
    parallel.start(platform_devices=8)
    parallel.check_same("anything, alone")


@pytest.mark.slow
def test_400_queued_steps_on_8_devices_do_not_hang():
    """A loop that does not wait deadlocks, and XLA aborts it after a minute."""
    program = textwrap.dedent("""
        from typing import NamedTuple
        import jax, jax.numpy as jnp
        from launch import loop, parallel

        class Metrics(NamedTuple):
            loss: jax.Array

        class Nothing:
            def __getattr__(self, name):
                return lambda *args, **options: None

        def body(w, x, axis_name, sharding):
            if axis_name:
                x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis_name) * 2, 2)
                w = jax.lax.pcast(w, axis_name, to="varying")
            elif sharding is not None:
                x = jax.lax.with_sharding_constraint(x, sharding)
            loss, grad = jax.value_and_grad(lambda w: jnp.mean((x @ w) ** 2))(w)
            return jax.lax.pmean((loss, grad), axis_name) if axis_name else (loss, grad)

        def chunk(w, x, *, num_steps, axis_name=None, batch_sharding=None):
            def step(w, _):
                loss, grad = body(w, x, axis_name, batch_sharding)
                return w - 0.01 * grad, Metrics(loss)
            return jax.lax.scan(step, w, length=num_steps)

        parallel.start(platform_devices=8)
        mesh = parallel.make_mesh()
        x = parallel.replicate(jax.random.normal(jax.random.key(0), (16, 64)), mesh)
        for mode in ("jit", "pmap", "shard_map"):
            run = parallel.wrap(chunk, mesh, mode)
            outcome = loop.run(
                parallel.replicate(jnp.ones((64, 64)), mesh), start=0, best=loop.Best(),
                cadence=loop.Cadence(400, 1, 400, 400),
                chunk=lambda w, num_steps: run(w, x, num_steps=num_steps),
                evaluate=lambda w: loop.Report({}, 0.0, ""), target=None,
                checkpoints=Nothing(), rundir=Nothing(), quiet=True,
            )
            print(mode, outcome.step)
    """)
    done = subprocess.run(
        [sys.executable, "-c", program], timeout=150, capture_output=True, text=True
    )
    assert done.stdout.split() == ["jit", "400", "pmap", "400", "shard_map", "400"], done.stderr


def test_one_process_is_alone_and_first():
    assert parallel.is_alone()
    assert parallel.is_first()

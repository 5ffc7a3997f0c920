"""Runs of a phase diagram are the runs that each would be alone."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import modgrok
from modgrok import evaluation, phase

P, SHOTS, BATCH, STEPS = 5, 3, 24, 4
CFG = modgrok.Config(P, width=16, heads=2, layers=1)
ADAMW = modgrok.OptimizerConfig(lr=3e-3, warmup_steps=2, schedule_steps=50)
CELLS = ((4, 0.4, 0.3, 0), (12, 0.8, 30.0, 0), (8, 0.6, 1.0, 1), (6, 0.8, 0.3, 2))  # n, alpha, ...
SIZES = (14, 24, 22, 20)  # more than the largest sets need


def make_plan(**changes):
    plan = phase.Plan(
        CFG, ADAMW, modulus=P, shots=SHOTS, batch=BATCH, sequences_per_task=(4, 8), rows=64
    )
    return dataclasses.replace(plan, **changes)


@functools.cache
def problem():
    """Tasks, inputs and keys (parameters, batches, tests) of each cell."""
    tasks, inputs, keys = [], [], []
    for num_tasks, fraction, _, seed in CELLS:
        of_tasks, of_inputs, *others = jax.random.split(jax.random.key(seed), 5)
        tasks.append(
            modgrok.sample_tasks(of_tasks, modulus=P, num_random=num_tasks, exclude_zero=True)
        )
        inputs.append(modgrok.split_inputs(of_inputs, modulus=P, fraction=fraction))
        keys.append(others)
    return tasks, inputs, keys


def stacked(**options):
    tasks, inputs, keys = problem()
    runs = phase.stack_runs(
        tasks,
        inputs,
        weight_decay=[cell[2] for cell in CELLS],
        batch_keys=[key[1] for key in keys],
        test_keys=[key[2] for key in keys],
        **options,
    )
    return jnp.stack([key[0] for key in keys]), runs


def train(plan, *, calls=2, steps=STEPS, count=None, **options):
    keys_G, runs = jax.tree.map(lambda x: x[:count], stacked(sizes=SIZES))
    state, records = phase.init(keys_G, plan=plan), []
    for _ in range(calls):
        state, record = phase.advance(state, runs, plan=plan, num_steps=steps // calls, **options)
        records.append(record)
    return state, records


def assert_like_alone(plan, state, records, cells, *, steps=STEPS, atol=1e-6):
    """`train_chunk` and `evaluate` on a run's own arrays, which have its own sizes.

    Parameters, loss and accuracies agree to `atol`.
    """
    tasks, inputs, keys = problem()
    ema = plan.ema_decay is not None
    tx = modgrok.make_optimizer(plan.optimizer)
    start = jax.jit(functools.partial(modgrok.init_state, cfg=plan.cfg, tx=tx, ema=ema))
    for g in cells:
        tx = modgrok.make_optimizer(dataclasses.replace(plan.optimizer, weight_decay=CELLS[g][2]))
        alone, metrics = modgrok.train_chunk(
            start(keys[g][0]),
            keys[g][1],
            tasks[g].train_W2,
            inputs[g].train_M2,
            cfg=plan.cfg,
            tx=tx,
            num_steps=steps,
            batch=BATCH,
            shots=SHOTS,
            modulus=P,
            ema_decay=plan.ema_decay,
        )
        own = jax.tree.map(lambda x, g=g: x[g], state)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=atol, rtol=0), own, alone)
        loss = np.mean([record.loss_G[g] for record in records])
        np.testing.assert_allclose(loss, metrics.loss.mean(), rtol=atol)
    # The test of the last one.
    scores = modgrok.evaluate(
        alone.ema if ema else alone.params,
        keys[g][2],
        tasks[g],
        inputs[g],
        cfg=plan.cfg,
        modulus=P,
        shots=SHOTS,
        sequences_per_task=plan.sequences_per_task,
    )
    deciding, reported = (
        [evaluation.take_tasks(x, at).last_shot for x in scores[2:]]
        for at in (evaluation.DECIDING, evaluation.REPORTED)
    )
    seen = [x.last_shot for x in scores[:2]]
    np.testing.assert_allclose(records[-1].accuracy_G4[g], seen + reported, atol=atol)
    np.testing.assert_allclose(records[-1].deciding_G2[g], deciding, atol=atol)


@pytest.fixture(scope="module")
def one_by_one():
    return train(make_plan(ema_decay=0.9), together=1)


def test_a_run_is_what_it_is_alone(one_by_one):
    assert_like_alone(make_plan(ema_decay=0.9), *one_by_one, cells=(0, 1))


@pytest.mark.slow
def test_in_turns_it_has_the_same_bits_alone_and_among_others():
    """As XLA compiles by default, in a process of its own: with the suite's flags one differs."""
    environment = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"}
    subprocess.run(
        [sys.executable, "-c", "from tests.modgrok import test_phase as t; t.compare_first_runs()"],
        env=environment | {"JAX_NUM_CPU_DEVICES": "1"},
        cwd=Path(__file__).parents[2],
        check=True,
    )


def compare_first_runs():
    """After steps enough for Muon to make .01 of a last bit that differs."""
    optimizer = modgrok.OptimizerConfig("muon", lr=0.03, warmup_steps=2, schedule_steps=200)
    plan = dataclasses.replace(make_plan(), optimizer=optimizer)
    found = [train(plan, steps=60, calls=1, together=1, count=count) for count in (1, 4)]
    alone, among = ((state.params, records) for state, records in found)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[0], y[0]), alone, among)


@pytest.mark.slow
def test_after_many_steps_it_is_near_what_it_is_alone():
    """Parameters were 1e-7 apart, and accuracies equal; a flipped answer is .02 to .06 of one."""
    plan = make_plan()
    assert_like_alone(plan, *train(plan, steps=60, together=4), cells=(0, 1), steps=60, atol=0.03)


@pytest.mark.slow
def test_muon_too():
    optimizer = modgrok.OptimizerConfig("muon", lr=0.01, warmup_steps=2, schedule_steps=50)
    plan = dataclasses.replace(make_plan(), optimizer=optimizer)
    assert_like_alone(plan, *train(plan, calls=1), cells=(2,))


@pytest.mark.slow
def test_together_and_spread_over_devices_they_are_equal(one_by_one):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    other = train(make_plan(ema_decay=0.9), together=2, mesh=mesh)  # pairs, on two devices
    close = functools.partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-6)
    jax.tree.map(close, other, one_by_one)


def test_state_keeps_its_type(one_by_one):
    keys_G, _ = stacked()
    like = jax.eval_shape(functools.partial(phase.init, plan=make_plan(ema_decay=0.9)), keys_G)
    got = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), one_by_one[0])
    assert jax.tree.map(str, got) == jax.tree.map(str, like)


def test_counts_are_data_and_give_the_batches_of_the_cut_sets():
    """One program for all counts; balanced; equal to the draw from arrays of that size."""
    key, traced = jax.random.key(3), 0
    _, runs = stacked()
    draw = functools.partial(modgrok.sample_sequences, modulus=P, shots=SHOTS, batch=BATCH)

    @jax.jit
    def padded(task_W2, input_M2, num_tasks, num_inputs):
        nonlocal traced
        traced += 1
        return draw(key, task_W2, input_M2, num_tasks=num_tasks, num_inputs=num_inputs)

    tasks, inputs, _ = problem()
    for g, (num_tasks, _, _, _) in enumerate(CELLS):
        got = padded(
            runs.tasks.train_W2[g],
            runs.inputs.train_M2[g],
            runs.num_tasks.train_W2[g],
            runs.num_inputs.train_M2[g],
        )
        wanted = draw(key, tasks[g].train_W2, inputs[g].train_M2)
        np.testing.assert_array_equal(got, wanted)
        lists = np.asarray(got).reshape(num_tasks, -1, SHOTS, 3)[..., :2]
        assert (lists == lists[:1]).all()  # paired: every task has the same lists of inputs
    assert traced == 1
    with pytest.raises(ValueError, match="needs paired=True"):
        draw(key, tasks[0].train_W2, inputs[0].train_M2, num_tasks=2, paired=False)


def memory_over_xlas(plan, together, **changes):
    """Of four runs: the estimate over what XLA counts, the state being donated."""
    keys_G, runs = stacked()
    runs = runs._replace(**changes)
    state = jax.eval_shape(functools.partial(phase.init, plan=plan), keys_G)
    static = ("plan", "num_steps", "together")
    advance = jax.jit(phase.advance.__wrapped__, static_argnames=static, donate_argnums=0)
    lowered = advance.lower(state, runs, plan=plan, num_steps=2, together=together)
    found = lowered.compile().memory_analysis()
    count = found.temp_size_in_bytes + found.argument_size_in_bytes
    count += found.output_size_in_bytes - found.alias_size_in_bytes
    sizes = runs.tasks.train_W2.shape[1], runs.tasks.unseen_U2.shape[1]
    return phase.memory_bytes(plan, runs=4, together=together, num_tasks=sizes) / count


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("together", "batch", "changes"),
    [
        (1, 24, {"width": 96}),  # states, in turns: three of them for each run in work
        pytest.param(2, 24, {"width": 96}, marks=slow),
        pytest.param(4, 24, {"width": 96}, marks=slow),
        pytest.param(1, 960, {"width": 32}, marks=slow),  # what the backward pass reads
        pytest.param(1, 480, {"width": 32, "layers": 3, "dtype": "bfloat16"}, marks=slow),
        pytest.param(1, 480, {"width": 32, "layers": 3, "remat": True}, marks=slow),
        pytest.param(1, 480, {"width": 32, "layers": 8, "remat": True}, marks=slow),
    ],
)
def test_memory_is_about_what_xla_takes(together, batch, changes):
    plan = make_plan(cfg=dataclasses.replace(CFG, **changes), batch=batch)
    # From jax 0.12 on XLA keeps what remat saves without a loop over blocks too: 1.64 with three.
    most = 1.75 if plan.cfg.remat and jax.__version_info__ >= (0, 12) else 1.5
    assert 0.8 < memory_over_xlas(plan, together) < most


@slow
def test_memory_of_a_test_counts_the_rows_that_there_are():
    for each in (2, 400):
        plan = make_plan(sequences_per_task=(each, each), rows=4096)
        assert 0.8 < memory_over_xlas(plan, 1) < 3, each


@slow
def test_memory_of_the_inputs_of_a_large_modulus():
    """Where they are most of what there is."""
    rows = {"train_M2": 800_000, "heldout_O2": 997**2 - 800_000}
    inputs = modgrok.InputSplit(
        **{name: jax.ShapeDtypeStruct((4, n, 2), jnp.int32) for name, n in rows.items()}
    )
    assert 0.8 < memory_over_xlas(make_plan(modulus=997), 1, inputs=inputs) < 1.5


def test_memory_by_platform():
    """Elsewhere bfloat16 and remat save what they promise; on a CPU remat does in deep models."""

    def need(platform, **changes):
        plan = make_plan(cfg=dataclasses.replace(CFG, **changes), batch=4800)
        return phase.memory_bytes(plan, runs=1, together=1, num_tasks=(4, 4), platform=platform)

    assert need("cpu", dtype="bfloat16") == need("cpu")
    assert need("gpu", dtype="bfloat16") < 0.7 * need("gpu")
    assert need("cpu", layers=6, remat=True) == need("cpu", layers=6)
    assert need("cpu", layers=8, remat=True) < 0.5 * need("cpu", layers=8)
    assert need("gpu", layers=6, remat=True) < 0.3 * need("gpu", layers=6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: train(make_plan(), together=0), "together=0"),
        (lambda: stacked(sizes=(3, 24, 25, 25)), "W=3 is less than the 12 rows"),
        (lambda: phase.check_batch(make_plan(batch=20), stacked()[1]), "batch=20 is not a mult"),
        (lambda: phase.stack_runs([], [], weight_decay=[], batch_keys=[], test_keys=[]), "at lea"),
        (lambda: phase.summarise(np.arange(2), None, None, by="seen_train"), "by='seen_train'"),
        (lambda: make_plan(sequences_per_task=(4, 0)), r"sequences_per_task=\(4, 0\), expected a"),
        (lambda: make_plan(sequences_per_task=4), "sequences_per_task=4, expected a pair"),
        (lambda: train(make_plan(), steps=0), "num_steps=0, expected at least 1"),
        (
            lambda: train(make_plan(), mesh=jax.make_mesh((1,), ("data",)), axis="x"),
            "axis='x', expected one of data",
        ),
    ],
)
def test_bad_requests(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_devices_divide_the_runs():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match="4 runs do not divide over 8 devices"):
        train(make_plan(), mesh=mesh)


def test_summary_takes_the_step_that_the_deciding_tasks_choose():
    nan = np.nan
    accuracy_GC4 = np.zeros((3, 3, 4))
    accuracy_GC4[0, :, 2] = 0.2, 0.8, 0.5
    deciding_GC2 = np.zeros((3, 3, 2))
    deciding_GC2[0] = [[0.3, 0.9], [0.7, 0.1], [0.7, 0.2]]
    deciding_GC2[1] = [[0.3, 0.1], [nan, nan], [nan, nan]]  # diverged after the first test
    deciding_GC2[2] = nan
    got = phase.summarise(np.array([10, 20, 30]), accuracy_GC4, deciding_GC2, by="unseen_train")
    assert got.best_step_G.tolist() == [20, 10, -1]
    assert got.best_G4[0, 2] == 0.8
    assert got.last_G4[0, 2] == 0.5
    assert np.isnan(got.best_G4[2]).all()
    by_heldout = phase.summarise([10, 20, 30], accuracy_GC4, deciding_GC2, by="unseen_heldout")
    assert by_heldout.best_step_G[0] == 10


def test_phases():
    named = {
        (0.2, 0.1, 0.1, 0.1): "not learned",
        (1.0, 0.1, 0.1, 0.1): "memorisation",
        (1.0, 0.9, 0.1, 0.1): "i.d. generalisation",
        (1.0, 0.2, 0.9, 0.1): "o.o.d. memorisation",
        (1.0, 0.9, 0.9, 0.6): "o.o.d. generalisation",
        (np.nan, np.nan, np.nan, np.nan): "not learned",
    }
    got = phase.phases(np.array(list(named)))
    assert [phase.PHASES[i] for i in got] == list(named.values())


def test_transitions_lie_between_cells():
    nan = np.nan
    accuracy_AN = np.array([[0.1, 0.2, 0.9], [0.1, 0.8, nan]])
    assert sorted(phase.transitions(accuracy_AN)) == [
        ((0.5, 0.5), (0.5, 1.5)),  # in the upper row, before its second cell
        ((0.5, 0.5), (1.5, 0.5)),  # below that cell
        ((1.5, -0.5), (1.5, 0.5)),  # in the lower row, before its third cell
    ]
    assert phase.transitions(np.full((2, 2), nan)) == []


def test_on_a_cpu_runs_take_turns():
    assert phase.default_together("cpu") == 1
    assert phase.default_together("gpu") > 1000

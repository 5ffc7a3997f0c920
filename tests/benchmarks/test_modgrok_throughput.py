"""The benchmark runs, counts flops correctly, and compares equal work."""

import json
import math

import jax
import numpy as np
import optax
import pytest

import modgrok
from benchmarks import modgrok_throughput as bench
from benchmarks import timing
from modgrok import interop, training

TINY = bench.Size(5, 16, layers=2, batch=20, shots=4, tasks=10, chunk=2)
CFG = modgrok.Config(TINY.vocab, width=16, heads=bench.HEADS, layers=2)


def make_trainer(**options):
    pytest.importorskip("torch", reason="torch, the peer, is not installed")
    from benchmarks.torch_peer import Trainer

    return Trainer(
        *bench.problem(TINY),
        modulus=TINY.modulus,
        vocab=TINY.vocab,
        width=TINY.width,
        heads=bench.HEADS,
        layers=TINY.layers,
        shots=TINY.shots,
        batch=TINY.batch,
        **options,
    )


def make_params():
    """Random, layer norms included, and large enough that every part matters."""
    params = modgrok.init_params(jax.random.key(0), CFG)
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, noisy)


def make_tokens(key):
    task_W2, input_M2 = map(jax.numpy.asarray, bench.problem(TINY))
    return modgrok.sample_sequences(
        jax.random.key(key),
        task_W2,
        input_M2,
        modulus=TINY.modulus,
        shots=TINY.shots,
        batch=TINY.batch,
    )


def as_torch(x, dtype="int64"):
    import torch

    return torch.tensor(np.asarray(x, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("complex_numbers", [True, False])  # eager's form and the compiler's
def test_peer_has_our_loss_and_accuracy(complex_numbers):
    trainer, params, tokens_BT = make_trainer(), make_params(), make_tokens(2)
    trainer.load(interop.to_state_dict(params, CFG))
    trainer.turn = trainer.model.turn(3 * TINY.shots - 1, complex_numbers=complex_numbers)
    loss, accuracy = trainer.answer_loss(as_torch(tokens_BT))
    logits_BSV, z_BS = modgrok.apply(params, tokens_BT, CFG), modgrok.answers(tokens_BT)
    wanted = -jax.nn.log_softmax(logits_BSV)[(*np.indices(z_BS.shape), z_BS)].mean()
    assert wanted > 2.0  # far from trivial
    np.testing.assert_allclose(loss.item(), wanted, rtol=1e-5)
    np.testing.assert_allclose(accuracy.item(), (logits_BSV.argmax(-1) == z_BS).mean(), rtol=1e-6)


def test_peer_makes_our_updates(monkeypatch):
    """Gradients; then decay mask, schedule and AdamW, of gradients that are the same to the bit:
    where they are almost 0, AdamW makes whole steps of what rounding left.
    """
    settings = {"lr": 1e-2, "weight_decay": 2.0, "warmup_steps": 3, "schedule_steps": 8}
    tx = modgrok.make_optimizer(modgrok.OptimizerConfig(**settings))
    params = make_params()
    opt_state = tx.init(params)
    trainer = make_trainer(**settings)
    trainer.load(interop.to_state_dict(params, CFG))
    gradient = jax.jit(jax.grad(lambda params, x: training.answer_loss(params, x, CFG)[0]))
    weights = dict(trainer.model.named_parameters())
    for number in range(6):
        tokens_BT = make_tokens(number)
        grads = gradient(params, tokens_BT)
        ours = interop.to_state_dict(grads, CFG)
        trainer.optimizer.zero_grad()
        trainer.answer_loss(as_torch(tokens_BT))[0].backward()
        for name, weight in weights.items():
            np.testing.assert_allclose(weight.grad, ours[name], atol=1e-5, err_msg=name)
        slopes = [(weight, as_torch(ours[name], "float32")) for name, weight in weights.items()]
        loss = sum((weight * slope).sum() for weight, slope in slopes)
        monkeypatch.setattr(trainer, "score", lambda _, loss=loss: (loss, None))
        trainer.step(as_torch(tokens_BT))
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    for name, x in interop.to_state_dict(params, CFG).items():
        if name in weights:
            np.testing.assert_allclose(weights[name].detach(), x, atol=1e-6, err_msg=name)


def test_peer_draws_our_kind_of_batch():
    """Task-major rows, the same inputs for every task, z = a x + b y mod p."""
    task_W2, input_M2 = bench.problem(TINY)
    xyz = make_trainer().sample().numpy().reshape(TINY.tasks, -1, TINY.shots, 3)
    assert xyz.shape[1] == TINY.batch // TINY.tasks
    assert (xyz[..., :2] == xyz[:1, ..., :2]).all()
    assert {tuple(pair) for pair in xyz[..., :2].reshape(-1, 2)} <= set(map(tuple, input_M2))
    want_WRS = np.einsum("wi,wrsi->wrs", task_W2, xyz[..., :2]) % TINY.modulus
    np.testing.assert_array_equal(xyz[..., 2], want_WRS)


def test_flops_are_those_of_each_product_summed():
    """Position by position, for both counts."""
    size, length = TINY, 3 * TINY.shots - 1
    for needed in (False, True):
        total = 0
        for position in range(length):
            answer = position % 3 == 1
            for layer in range(size.layers):
                here = answer or not needed or layer < size.layers - 1
                if not needed or layer > 0:
                    total += 2 * (2 + here) * size.width**2
                total += here * 2 * 2 * size.width * (position + 1)
                total += here * 2 * size.width * (size.width + 8 * size.width)
            total += (answer or not needed) * 2 * size.width * size.vocab
        total *= size.batch
        if needed:  # the first block's projections, once for each token id
            total += 2 * size.vocab * size.width * 3 * size.width
        assert bench.step_flops(size, needed=needed) == 3 * total


def test_flops_of_the_papers_run():
    """.74e18 for 200,000 steps at depth 2 by 6 N a token; attention adds 3 %, half of it causal."""
    size = bench.Size(29, 512, layers=2, batch=1024, shots=32, tasks=512, chunk=1)
    np.testing.assert_allclose(200_000 * bench.step_flops(size, needed=False), 0.75e18, rtol=0.02)


def assert_speed_rows(rows, rates):
    """Every number of a table of speeds and of its products is finite and positive."""
    assert rows[0]["ours_over_this"] == 1.0
    for row in rows:
        numbers = [value for value in row.values() if isinstance(value, float)]
        numbers += [*row["repetition_seconds"], *rates.values()]
        assert len(numbers) > 8
        assert all(x > 0 and math.isfinite(x) for x in numbers)
        assert bench.SPEED_COLUMNS.keys() <= row.keys()


@pytest.mark.slow
def test_a_peer_stands_beside_ours(monkeypatch):
    pytest.importorskip("torch", reason="torch, the peer, is not installed")
    monkeypatch.setattr(timing, "cores", lambda: 1)  # two spinning threads crawl on a busy machine
    rows, rates = bench.measure_speed("tiny", TINY, ("eager",), repetitions=2, matmul_size=64)
    assert [row["implementation"] for row in rows] == ["ours", "eager"]
    assert len(rates) == 2
    assert_speed_rows(rows, rates)
    assert timing.table(rows, bench.SPEED_COLUMNS).count("\n") == 3


@pytest.mark.slow
def test_start_up_is_measured_in_fresh_processes():
    row = bench.measure_start("tiny", "ours", TINY)
    assert bench.START_COLUMNS.keys() == row.keys()
    assert row["cold_seconds"] > row["compile_seconds"] > 0
    assert row["warm_seconds"] > 0
    assert 50 < row["warm_peak_mib"] < 2000
    assert 50 < row["cold_peak_mib"] < 4000


def test_both_train_from_where_they_stopped():
    """Two calls of two steps: four different batches, not two of them twice."""
    run = bench.build("ours", TINY)
    assert len({*run(2).tolist(), *run(2).tolist()}) == 4


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--repetitions=0"], "--repetitions=0: must be at least 1"),
        (["--sizes", "p7"], "invalid choice: 'p7'"),
    ],
)
def test_wrong_flags_end_with_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as ending:
        bench.main(argv)
    assert ending.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_main_writes_its_table_and_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "SIZES", {"tiny": TINY})
    monkeypatch.setattr(bench, "PEERS", ())
    monkeypatch.setattr(bench, "measure_start", lambda name, peer, size: {"size": name})
    bench.main(["--quick", "--sizes", "tiny", f"--json={tmp_path / 'r.json'}"])
    record = json.loads((tmp_path / "r.json").read_text())
    (row,), rates = record["speed"], record["matmul_gflop_per_second"]["tiny"]
    assert (row["implementation"], rates.keys()) == ("ours", {"jax matmul"})
    assert_speed_rows([row], rates)
    assert record["sizes"]["tiny"]["chunk"] == 2
    assert record["start"] == [{"size": "tiny"}]
    assert "| tiny | ours" in capsys.readouterr().out

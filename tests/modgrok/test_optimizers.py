"""Schedule and optimisers against plain numpy, AdamW and Muon step by step."""

import functools

import jax
import numpy as np
import optax
import pytest

from modgrok.model import Config, init_params
from modgrok.training import (
    OptimizerConfig,
    make_optimizer,
)

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 1.5e-6), (5000, 7.575e-5), (10_000, 1.5e-4), (105_000, 8.25e-5), (199_999, 1.5e-5)],
)
def test_schedule_of_the_paper(step, rate):
    config = OptimizerConfig()
    assert config.lr * float(config.factor(step)) == pytest.approx(rate, rel=1e-5)


def test_schedule_formula_and_after_its_end():
    config = OptimizerConfig(warmup_steps=10, schedule_steps=50)
    s = np.arange(80)
    cosine = 0.1 + 0.9 * (1 + np.cos(np.pi * np.minimum(s - 10, 40) / 40)) / 2
    wanted = np.where(s <= 10, 0.01 + 0.99 * s / 10, cosine)
    np.testing.assert_allclose(jax.vmap(config.factor)(s), wanted, rtol=1e-5)
    assert OptimizerConfig(warmup_steps=0, schedule_steps=5).factor(0) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "sgd"}, "name='sgd', expected 'adamw' or 'muon'"),
        ({"warmup_steps": 9, "schedule_steps": 9}, "warmup_steps=9, expected.*less than.*=9"),
        ({"warmup_steps": -1}, "warmup_steps=-1, expected at least 0"),
        ({"lr": -1.0}, "lr=-1.0, expected finite and at least 0"),
        ({"lr": float("nan")}, "lr=nan, expected finite"),
        ({"weight_decay": float("inf")}, "weight_decay=inf, expected finite"),
        ({"embedding_lr": -0.1}, "embedding_lr=-0.1"),
        ({"embedding_decay": -0.1}, "embedding_decay=-0.1"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**settings)


# Optimisers, on given gradients


def run_optimizer(config, num_steps=3):
    """Parameters after each step on random gradients, ours and the gradients for a twin."""
    cfg = Config(vocab=5, width=8, heads=2, layers=2, mlp_ratio=3)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: init_params(key, cfg), KEY)
    random = functools.partial(jax.tree.map, lambda x: rng.normal(size=x.shape).astype(np.float32))
    start, grads = random(shapes), [random(shapes) for _ in range(num_steps)]
    tx = make_optimizer(config)

    @jax.jit
    def step(params, opt_state, grads):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state, path = start, tx.init(start), []
    for g in grads:
        params, opt_state = step(params, opt_state, g)
        path.append(params)
    return start, grads, path


def adamw_twin(w, grads, rates, *, b1, b2, decay):
    w, m, v = np.asarray(w, np.float64), 0.0, 0.0
    for s, (g, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        g = np.asarray(g, np.float64)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        adam = m / (1 - b1**s) / (np.sqrt(v / (1 - b2**s)) + 1e-8)
        w = w - rate * (adam + decay * w)
        yield w


def newton_schulz(m_IO):
    """Pushes the singular values of one matrix towards 1, in five steps."""
    x = m_IO / np.linalg.norm(m_IO)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def muon_twin(w_IO, grads, rates, *, decay, beta=0.95):
    """Nesterov momentum, its bias corrected one step ahead."""
    w_IO, m_IO = np.asarray(w_IO, np.float64), 0.0
    scale = np.sqrt(max(1, w_IO.shape[1] / w_IO.shape[0]))
    for s, (g_IO, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        g_IO = np.asarray(g_IO, np.float64)
        m_IO = beta * m_IO + (1 - beta) * g_IO
        ahead = beta * m_IO / (1 - beta ** (s + 1)) + (1 - beta) * g_IO / (1 - beta**s)
        w_IO = w_IO - rate * (scale * newton_schulz(ahead) + decay * w_IO)
        yield w_IO


def rates_of(config, peak, num_steps=3):
    return [peak * (0.01 + 0.99 * s / config.warmup_steps) for s in range(num_steps)]


def leaves(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_adamw_decays_matrices_and_embedding_only():
    config = OptimizerConfig(lr=0.05, weight_decay=2.0, warmup_steps=4, schedule_steps=9, b2=0.97)
    start, grads, path = run_optimizer(config)
    flat, steps = leaves(start), [leaves(p) for p in path]
    for name, w in flat.items():
        decay = 0.0 if "ln_" in name else 2.0
        twin = adamw_twin(
            w,
            [leaves(g)[name] for g in grads],
            rates_of(config, 0.05),
            b1=0.9,
            b2=0.97,
            decay=decay,
        )
        for ours, wanted in zip(steps, twin, strict=True):
            np.testing.assert_allclose(ours[name], wanted, rtol=1e-5, atol=1e-5, err_msg=name)


def test_muon_on_each_matrix_and_adamw_on_the_rest():
    config = OptimizerConfig(
        name="muon", lr=0.03, weight_decay=0.3, embedding_lr=0.02, embedding_decay=1.5,
        warmup_steps=4, schedule_steps=9,
    )  # fmt: skip
    start, grads, path = run_optimizer(config)
    flat, flat_grads, steps = leaves(start), [leaves(g) for g in grads], [leaves(p) for p in path]
    rates = rates_of(config, 0.03)

    def matrices(name, x):
        """Each (in, out) matrix that is orthogonalised for itself: of a layer, of q, k and v."""
        for x_of_layer in np.asarray(x):
            if name == "blocks/qkv":
                yield from (x_of_layer[:, i].reshape(8, 8) for i in range(3))
            else:
                yield x_of_layer.reshape({"out": 8, "fc": 8, "proj": 24}[name.split("/")[1]], -1)

    for name, w in flat.items():
        if name.split("/")[-1] in ("qkv", "out", "fc", "proj"):
            trees = [flat, *flat_grads, *steps]
            parts = list(zip(*(matrices(name, tree[name]) for tree in trees), strict=True))
            assert len(parts) == (6 if name == "blocks/qkv" else 2)
            for w_IO, *rest in parts:
                twin = muon_twin(w_IO, rest[:3], rates, decay=0.3)
                for ours, wanted in zip(rest[3:], twin, strict=True):
                    np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5, err_msg=name)
        else:
            decay = 0.0 if "ln_" in name else 1.5
            twin = adamw_twin(
                w, [g[name] for g in flat_grads], rates_of(config, 0.02), b1=0.9, b2=0.98,
                decay=decay,
            )  # fmt: skip
            for ours, wanted in zip(steps, twin, strict=True):
                np.testing.assert_allclose(ours[name], wanted, rtol=1e-5, atol=1e-5, err_msg=name)


# Loss and one step

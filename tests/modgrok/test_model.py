"""The decoder: exact savings, causality, what it captures, initial scales, settings.

That it is the reference's function is tested in test_interop, against plain numpy.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asserts import assert_trees_close

from modgrok.layers import lookup
from modgrok.model import Config, Patch, Transformer, apply, init_params, unembed
from tests.modgrok import reference_forward

CFG = Config(vocab=12, width=16, heads=2, layers=2)
POST = dataclasses.replace(CFG, norm="post")
TOKENS_BT = np.random.default_rng(0).integers(0, 12, (2, 12)).astype(np.int32)

logits_of = jax.jit(apply, static_argnames=("cfg", "positions", "capture"))


def random_params(cfg, seed=0):
    """Large enough that attention is uneven, and layer norms matter."""
    rng = np.random.default_rng(seed)

    def draw(path, x):
        centre = float(path[-1].key == "scale")

        return jnp.array(rng.normal(centre, 0.3, x.shape), x.dtype)

    shapes = jax.eval_shape(lambda key: init_params(key, cfg), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.parametrize("layers", [1, 2, 3, 7])
def test_answers_alone_equal_all_positions(layers):
    """Logits, and gradients of every parameter for a random cotangent of the answers."""
    cfg = dataclasses.replace(CFG, layers=layers)
    params = random_params(cfg)
    weight_BSV = np.random.default_rng(1).normal(size=(2, 4, 12)).astype(np.float32)

    @jax.jit
    def values_and_grads(params):
        return value_and_grad(params, "answers"), value_and_grad(params, "all")

    def value_and_grad(params, positions):
        def weighted(params):
            logits = apply(params, TOKENS_BT, cfg, positions=positions)
            logits_BSV = logits if positions == "answers" else logits[:, 1::3]
            return (weight_BSV * logits_BSV).sum(), logits_BSV

        return jax.grad(weighted, has_aux=True)(params)

    (grads, logits), (all_grads, all_logits) = values_and_grads(params)
    assert logits.shape == (2, 4, 12)
    scale = np.abs(all_logits).max()
    np.testing.assert_allclose(logits / scale, all_logits / scale, rtol=0, atol=1e-6)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(all_grads))
    assert_trees_close(
        *(jax.tree.map(lambda g: g / scale, g) for g in (grads, all_grads)), rtol=0, atol=1e-6
    )


def test_answers_alone_save_the_arithmetic_of_the_rest():
    """Two of three tokens need no query, no MLP and no logits in the last block."""
    cfg = Config(vocab=47, width=128, heads=4, layers=2)
    batch, shots = 2, 16
    read, spared = 3 * shots - 1, 2 * shots - 1
    shapes = jax.eval_shape(lambda key: init_params(key, cfg), jax.random.key(0))
    tokens_BT = jax.ShapeDtypeStruct((batch, 3 * shots), jnp.int32)
    flops = {
        positions: jax.jit(functools.partial(apply, cfg=cfg, positions=positions))
        .lower(shapes, tokens_BT)
        .compile()
        .cost_analysis()["flops"]
        for positions in ("answers", "all")
    }
    dense = (2 + 2 * cfg.mlp_ratio) * cfg.width**2 + cfg.vocab * cfg.width
    attention = 2 * read * cfg.width
    saving = 2 * batch * spared * (dense + attention)
    assert flops["all"] - flops["answers"] == pytest.approx(saving, rel=0.05)
    assert flops["answers"] < 0.72 * flops["all"]


def test_lookup_is_indexing():
    rng = np.random.default_rng(0)
    table_VXX = rng.normal(size=(5, 2, 3)).astype(np.float32)
    tokens_BT = np.array([[0, 3, 3], [4, 0, 3]])  # repeated ids add up, 1 and 2 get nothing
    out = rng.normal(size=(2, 3, 2, 3)).astype(np.float32)
    value, pullback = jax.vjp(lambda table: lookup(table, tokens_BT), table_VXX)
    np.testing.assert_array_equal(value, table_VXX[tokens_BT])
    wanted = np.zeros_like(table_VXX)
    np.add.at(wanted, tokens_BT, out)
    np.testing.assert_allclose(pullback(out)[0], wanted, rtol=1e-6, atol=1e-6)
    tangent = rng.normal(size=table_VXX.shape).astype(np.float32)
    _, pushed = jax.jvp(lambda table: lookup(table, tokens_BT), (table_VXX,), (tangent,))
    np.testing.assert_allclose(pushed, tangent[tokens_BT], rtol=1e-6)
    assert "scatter" not in str(jax.make_jaxpr(pullback)(out))


@pytest.mark.parametrize("positions", ["answers", "all"])
def test_logits_depend_on_earlier_tokens_only(positions):
    """By gradient: token t is id t, so row t of the embedding is what position t reads."""
    cfg, last = CFG, 11
    tokens_BT = jnp.arange(12, dtype=jnp.int32)[None]
    params = random_params(cfg)

    @jax.jit
    @jax.jacrev
    def gradient(embedding_VD):
        # The logit of an id that is not read: the tied output adds to that row alone.
        return apply({**params, "embedding": embedding_VD}, tokens_BT, cfg, positions=positions)[
            0, :, last
        ]

    size_SV = np.abs(gradient(params["embedding"])).max(-1)
    at_S = np.arange(1, 11, 3) if positions == "answers" else np.arange(11)
    for size_V, at in zip(size_SV, at_S, strict=True):
        assert (size_V[: at + 1] > 1e-5).all(), "every token so far matters"
        assert (size_V[at + 1 : last] == 0).all(), "no later token does"


def test_last_token_is_not_read():
    params = random_params(CFG)
    changed_BT = TOKENS_BT.copy()
    changed_BT[:, -1] = (changed_BT[:, -1] + 1) % 12
    before, after = (logits_of(params, tokens, cfg=CFG) for tokens in (TOKENS_BT, changed_BT))
    np.testing.assert_array_equal(before, after)
    changed_BT[:, -3] = (changed_BT[:, -3] + 1) % 12
    assert (logits_of(params, changed_BT, cfg=CFG)[:, -1] != before[:, -1]).any()


@pytest.mark.parametrize(
    ("layers", "length", "norm_at"),
    [(4, 12, "pre"), (7, 6, "pre"), (2, 69, "pre"), (3, 12, "post")],
)
def test_captured_activations_rebuild_the_network(layers, length, norm_at):
    cfg = dataclasses.replace(CFG, layers=layers, norm=norm_at)
    params = random_params(cfg)
    tokens_BT = np.random.default_rng(0).integers(0, 12, (2, length)).astype(np.int32)
    logits_BTV, seen = logits_of(params, tokens_BT, cfg=cfg, positions="all", capture=True)
    params, seen = jax.tree.map(lambda x: np.asarray(x, np.float64), (params, seen))
    blocks = params["blocks"]

    def norm(name, tree, h_BTD):
        return reference_forward.layer_norm(h_BTD, tree[name]["scale"], tree[name]["bias"])

    def pre(name, tree, h_BTD):
        return norm(name, tree, h_BTD) if norm_at == "pre" else h_BTD

    def post(name, tree, h_BTD):
        return norm(name, tree, h_BTD) if norm_at == "post" else h_BTD

    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(seen.attention_LBHTT.sum(-1), 1, atol=1e-6)
    assert (seen.attention_LBHTT == np.tril(seen.attention_LBHTT)).all()
    assert (seen.attention_LBHTT[..., 1:, 0] < 1).all()
    h_BTD = params["embedding"][tokens_BT[:, :-1]]
    np.testing.assert_array_equal(seen.embedding_BTD, h_BTD)
    for layer in range(cfg.layers):
        block = jax.tree.map(lambda w: w[layer], blocks)  # noqa: B023
        v_BTHK = np.einsum("btd,dhk->bthk", pre("ln_1", block, h_BTD), block["qkv"][:, 2])
        head_BTHK = np.einsum("bhts,bshk->bthk", seen.attention_LBHTT[layer], v_BTHK)
        close(seen.head_LBTHK[layer], head_BTHK)
        h_BTD = h_BTD + np.einsum("bthk,hkd->btd", head_BTHK, block["out"])
        h_BTD = post("ln_1", block, h_BTD)
        hidden_BTF = np.maximum(pre("ln_2", block, h_BTD) @ block["fc"], 0)
        close(seen.hidden_LBTF[layer], hidden_BTF)
        h_BTD = post("ln_2", block, h_BTD + hidden_BTF @ block["proj"])
        close(seen.residual_LBTD[layer], h_BTD)
        h_BTD = seen.residual_LBTD[layer]
    close(logits_BTV, norm("ln_f", params, h_BTD) @ params["embedding"].T)
    plain_BTV = logits_of(params, tokens_BT, cfg=cfg, positions="all")
    np.testing.assert_allclose(logits_BTV, plain_BTV, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", ["answers", "all"])
def test_gates_scale_what_a_block_adds(positions):
    """1 changes nothing, 0 makes a block the identity; each row may have its own."""
    cfg = dataclasses.replace(CFG, layers=4)
    params = random_params(cfg)
    gated = functools.partial(logits_of, tokens_BT=TOKENS_BT, positions=positions)
    plain = gated(params, cfg=cfg)
    np.testing.assert_allclose(gated(params, cfg=cfg, gate=jnp.ones(4)), plain, rtol=1e-6)

    fewer = dataclasses.replace(cfg, layers=2)
    kept = {**params, "blocks": jax.tree.map(lambda w: w[jnp.array([0, 2])], params["blocks"])}
    on_L = jnp.array([1.0, 0.0, 1.0, 0.0])
    alone = gated(kept, cfg=fewer)
    np.testing.assert_allclose(gated(params, cfg=cfg, gate=on_L), alone, rtol=1e-5, atol=1e-6)
    assert np.abs(plain - alone).max() > 0.1

    on_LB = jnp.stack([on_L, jnp.ones(4)], axis=1)
    rows = gated(params, cfg=cfg, gate=on_LB)
    np.testing.assert_allclose(rows, [alone[0], plain[1]], rtol=1e-5, atol=1e-6)


def test_a_gate_scales_both_branches():
    cfg = dataclasses.replace(CFG, layers=1)
    params = random_params(cfg)
    options = {"cfg": cfg, "positions": "all", "capture": True, "gate": jnp.array([0.3])}
    _, seen = logits_of(params, TOKENS_BT, **options)
    block = jax.tree.map(lambda w: w[0], params["blocks"])
    h_BTD = seen.embedding_BTD + 0.3 * np.einsum("bthk,hkd->btd", seen.head_LBTHK[0], block["out"])
    h_BTD += 0.3 * seen.hidden_LBTF[0] @ block["proj"]
    np.testing.assert_allclose(seen.residual_LBTD[0], h_BTD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["head", "hidden", "residual"])
def test_patched_activations_are_those_given(name):
    """A layer whose activations come from other tokens passes those on; earlier ones stay."""
    cfg = dataclasses.replace(CFG, layers=3)
    params = random_params(cfg)
    options = {"cfg": cfg, "positions": "all", "capture": True}
    other_BT = np.random.default_rng(9).integers(0, 12, TOKENS_BT.shape).astype(np.int32)
    logits, seen = logits_of(params, TOKENS_BT, **options)
    other_logits, other = logits_of(params, other_BT, **options)
    field = {"head": "head_LBTHK", "hidden": "hidden_LBTF", "residual": "residual_LBTD"}[name]
    value = getattr(other, field)
    mask = jnp.zeros((3, *[1] * (value.ndim - 1)), bool).at[1].set(True)
    patch = Patch(**{name: (mask, value)})
    patched_logits, patched = logits_of(params, TOKENS_BT, patch=patch, **options)
    np.testing.assert_array_equal(getattr(patched, field)[1], value[1])
    np.testing.assert_allclose(patched.residual_LBTD[0], seen.residual_LBTD[0], rtol=1e-5)
    assert np.abs(patched_logits - logits).max() > 0.01
    if name == "residual":
        np.testing.assert_allclose(patched_logits, other_logits, rtol=1e-4, atol=1e-5)


def test_logit_lens_of_the_last_block_is_the_model():
    params = random_params(CFG)
    logits, seen = logits_of(params, TOKENS_BT, cfg=CFG, positions="all", capture=True)
    found = unembed(params, seen.residual_LBTD[-1], CFG)
    np.testing.assert_allclose(found, logits, rtol=1e-5, atol=1e-6)
    assert unembed(params, seen.residual_LBTD, CFG).shape == (2, *logits.shape)


def test_bfloat16_rounds_products_only():
    cfg = dataclasses.replace(CFG, dtype="bfloat16")
    params = random_params(cfg)
    wanted, _ = logits_of(params, TOKENS_BT, cfg=CFG, positions="all", capture=True)
    logits, seen = logits_of(params, TOKENS_BT, cfg=cfg, positions="all", capture=True)
    assert logits.dtype == seen.residual_LBTD.dtype == seen.attention_LBHTT.dtype == jnp.float32
    assert seen.head_LBTHK.dtype == seen.hidden_LBTF.dtype == jnp.bfloat16
    error = np.abs(logits - wanted).max() / np.abs(wanted).max()
    assert 1e-4 < error < 0.03  # bfloat16 resolves 2^-8 = .004
    same = (np.asarray(seen.embedding_BTD) == params["embedding"][TOKENS_BT[:, :-1]]).all()
    assert same, "the residual stream starts in float32"
    drawn = jax.eval_shape(lambda key: init_params(key, cfg), jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(drawn)} == {jnp.dtype("float32")}


def test_remat_recomputes_and_changes_no_number():
    cfg = dataclasses.replace(CFG, layers=3)
    params, grads, flops = random_params(cfg), [], []
    for remat in (False, True):
        one = dataclasses.replace(cfg, remat=remat)
        compiled = jax.jit(jax.grad(squares), static_argnums=1).lower(params, one).compile()
        grads.append(compiled(params))
        flops.append(compiled.cost_analysis()["flops"])
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads[0]))
    assert_trees_close(*(jax.tree.map(lambda g: g / scale, g) for g in grads))
    assert flops[1] > 1.2 * flops[0]


@pytest.mark.parametrize(("layers", "calls"), [(1, 1), (2, 2), (3, 3), (6, 3)])
def test_remat_holds_for_every_block(layers, calls):
    """The blocks between the first and the last are one scan, so one call."""
    cfg = dataclasses.replace(CFG, layers=layers, remat=True)
    shapes = jax.eval_shape(lambda key: init_params(key, cfg), jax.random.key(0))
    program = str(jax.make_jaxpr(squares, static_argnums=1)(shapes, cfg))
    assert len(re.findall(r"\b(?:remat\d*|checkpoint)\[", program)) == calls


def squares(params, cfg):
    return (apply(params, TOKENS_BT, cfg) ** 2).mean()


@pytest.mark.parametrize(
    ("cfg", "count"),
    [
        (Config(vocab=47), 6_320_640),
        (Config(vocab=47, layers=4), 12_616_192),
        (Config(vocab=7, width=24, heads=3, layers=3, mlp_ratio=2), None),
    ],
)
def test_number_of_parameters(cfg, count):
    shapes = jax.eval_shape(lambda key: init_params(key, cfg), jax.random.key(0))
    there = sum(x.size for x in jax.tree.leaves(shapes))
    assert there == cfg.num_params
    assert count in (None, there)


def test_layout_and_initial_scales():
    cfg = Config(vocab=40, width=96, heads=3, layers=3, mlp_ratio=2)
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), cfg)
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    }
    layers, d, heads, size, f = 3, 96, 3, 32, 192
    wanted = {
        "embedding": ((40, d), 0.02),
        "blocks/qkv": ((layers, d, 3, heads, size), 0.02),
        "blocks/out": ((layers, heads, size, d), 0.02),  # not scaled down, as in the reference
        "blocks/fc": ((layers, d, f), 0.02),
        "blocks/proj": ((layers, f, d), 0.02 / np.sqrt(2 * layers)),
        **{f"blocks/{norm}/{leaf}": ((layers, d), 0) for norm in ("ln_1", "ln_2")
           for leaf in ("scale", "bias")},
        "ln_f/scale": ((d,), 0),
        "ln_f/bias": ((d,), 0),
    }  # fmt: skip
    assert {name: x.shape for name, x in flat.items()} == {k: v[0] for k, v in wanted.items()}
    for name, (_, std) in wanted.items():
        x = flat[name]
        if std:
            margin = 5 * std / np.sqrt(2 * x.size)  # 5 standard errors of a standard deviation
            assert abs(x.std() - std) < margin, name
            assert abs(x.mean()) < 5 * std / np.sqrt(x.size), name
        else:
            assert (x == float(name.endswith("scale"))).all(), name
    for name in ("qkv", "out", "fc", "proj"):
        one, two = flat[f"blocks/{name}"][:2].reshape(2, -1)
        assert abs(np.corrcoef(one, two)[0, 1]) < 0.05, "layers are drawn independently"


def test_equal_configs_are_one_program():
    traces = []

    @functools.partial(jax.jit, static_argnums=1)
    def run(params, cfg):
        traces.append(cfg)
        return params["embedding"].sum() * cfg.layers

    params = {"embedding": jnp.ones(2)}
    run(params, Config(vocab=5))
    run(params, Config(vocab=5, layers=2))
    assert len(traces) == 1
    run(params, Config(vocab=5, layers=3))
    assert len(traces) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab": 0}, "vocab=0, expected at least 1"),
        ({"layers": 0}, "layers=0, expected at least 1"),
        ({"heads": 0}, "heads=0, expected at least 1"),
        ({"width": -4}, "width=-4, expected at least 1"),
        ({"mlp_ratio": 0}, "mlp_ratio=0, expected at least 1"),
        ({"width": 10, "heads": 4}, "width=10 is not a multiple of heads=4"),
        (
            {"width": 12, "heads": 4},
            "width=12 over heads=4 gives heads of 3 .*expected an even",
        ),
        ({"norm": "both"}, "norm='both', expected 'pre' or 'post'"),
        ({"dtype": "float16"}, "dtype='float16', expected 'float32' or 'bfloat16'"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**{"vocab": 5, **settings})


@pytest.mark.parametrize(
    ("length", "options", "message"),
    [
        (11, {}, "tokens_BT has 11 tokens a row, expected a multiple of 3"),
        (0, {}, "tokens_BT has 0 tokens a row"),
        (12, {"positions": "last"}, "positions='last', expected 'answers' or 'all'"),
        (12, {"capture": True}, "positions='answers', expected 'all' with capture or patch"),
        (12, {"patch": Patch(head=(True, np.zeros(2)))}, "expected 'all' with capture or patch"),
        (12, {"gate": np.ones(3)}, r"gate has shape \(3,\), expected \(2,\) or \(2, 2\)"),
        (12, {"gate": np.ones(2), "cfg": POST}, "norm='post', expected 'pre' with gates"),
    ],
)
def test_impossible_requests(length, options, message):
    options = {"cfg": CFG, **options}
    params = jax.eval_shape(lambda key: init_params(key, options["cfg"]), jax.random.key(0))
    tokens_BT = jax.ShapeDtypeStruct((2, length), jnp.int32)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(apply, **options), params, tokens_BT)


def test_apply_is_the_module():
    params = random_params(CFG)
    wanted = jax.jit(Transformer(CFG).apply)({"params": params}, TOKENS_BT)
    np.testing.assert_array_equal(logits_of(params, TOKENS_BT, cfg=CFG), wanted)

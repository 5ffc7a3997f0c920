"""Interventions against what is done by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from modgrok import interpret, interventions, prompts, sequences
from modgrok.model import Config, Patch, apply, init_params

P, SHOTS, MATCH = 5, 6, 2
EVERY = np.stack(np.divmod(np.arange(P**2), P), axis=1).astype(np.int32)
TOKENS_BT = sequences.sample_sequences(
    jax.random.key(0), EVERY[1:], EVERY, modulus=P, shots=SHOTS, batch=48, paired=False
)
CFG = Config(vocab=P, width=16, heads=2, layers=2)
KEY = jax.random.key(5)
# Large enough for every head to matter.
PARAMS = jax.tree.map(lambda x: 12 * x if x.ndim > 2 else x, init_params(jax.random.key(1), CFG))
FEW = prompts.matched_prompts(KEY, EVERY[1:], EVERY, modulus=P, shots=SHOTS, match=MATCH, batch=8)
forward = jax.jit(apply, static_argnames=("cfg", "positions", "capture"))
everything = functools.partial(forward, cfg=CFG, positions="all", capture=True)


@pytest.mark.parametrize("kind", interventions.KINDS)
@pytest.mark.parametrize("site", ["head", "hidden"])
def test_ablation_equals_a_patch_by_hand(site, kind):
    size = CFG.heads if site == "head" else CFG.mlp_ratio * CFG.width
    mask_GLX = np.zeros((3, 2, size), bool)
    mask_GLX[1, 0, 1] = mask_GLX[2, 1, :] = True
    found = interventions.ablate(
        PARAMS, TOKENS_BT, jnp.asarray(mask_GLX), KEY, cfg=CFG, site=site, kind=kind, chunk=2
    )
    plain_BTV, seen = everything(PARAMS, TOKENS_BT)
    value = np.asarray(seen.head_LBTHK if site == "head" else seen.hidden_LBTF)
    if kind == "zero":
        value = 0 * value
    elif kind == "mean":
        value = np.broadcast_to(value.mean(1, keepdims=True), value.shape)
    else:
        offset = int(jax.random.randint(KEY, (), 1, 48))
        value = value[:, (np.arange(48) - offset) % 48]
    losses = []
    for mask_LX in mask_GLX:
        mask = mask_LX.reshape(2, 1, 1, size, *((1,) if site == "head" else ()))
        logits, _ = everything(PARAMS, TOKENS_BT, patch=Patch(**{site: (mask, value)}))
        losses.append(interventions.answer_scores(logits[:, 1::3], TOKENS_BT).loss_S)
    np.testing.assert_allclose(found.loss_S, losses, rtol=1e-4, atol=1e-5)
    untouched = interventions.answer_scores(plain_BTV[:, 1::3], TOKENS_BT)
    np.testing.assert_allclose(found.accuracy_S[0], untouched.accuracy_S, atol=1e-6)
    assert np.abs(found.loss_S[1:] - found.loss_S[0]).max(1).min() > 1e-4


def test_answer_scores_are_means_of_hits_and_of_nats():
    logits_BSV = np.random.default_rng(0).normal(size=(48, SHOTS, P)).astype(np.float32)
    found = interventions.answer_scores(jnp.asarray(logits_BSV), TOKENS_BT)
    z_BS = np.asarray(TOKENS_BT)[:, 2::3]
    np.testing.assert_allclose(found.accuracy_S, (logits_BSV.argmax(-1) == z_BS).mean(0), rtol=1e-6)
    log_BSV = np.log(np.exp(logits_BSV) / np.exp(logits_BSV).sum(-1, keepdims=True))
    nats_BS = -np.take_along_axis(log_BSV, z_BS[..., None], -1)[..., 0]
    np.testing.assert_allclose(found.loss_S, nats_BS.mean(0), rtol=1e-5)


@pytest.mark.slow
def test_chunks_and_devices_change_no_number():
    mask_GLX = interventions.one_at_a_time(2, 2)
    run = functools.partial(interventions.ablate, cfg=CFG, kind="mean")
    wanted = run(PARAMS, TOKENS_BT, mask_GLX, KEY, chunk=8)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec("data"))
    params, tokens_BT, prompts = jax.device_put((PARAMS, TOKENS_BT, FEW), everywhere)
    spread = run(params, tokens_BT, mask_GLX, KEY, chunk=3, row_sharding=rows)
    np.testing.assert_allclose(spread.loss_S, wanted.loss_S, rtol=1e-5)
    patch = functools.partial(interventions.patch_activations, cfg=CFG, site="head")
    found = patch(params, prompts, chunk=3, row_sharding=rows).patched
    np.testing.assert_allclose(found, patch(PARAMS, FEW).patched, rtol=1e-4, atol=1e-5)


def test_patching_equals_a_patch_by_hand():
    found = interventions.patch_activations(PARAMS, FEW, cfg=CFG, start=8)
    logits, seen = everything(PARAMS, FEW.clean_BT)

    def difference(logits_BTV):
        last_BV, row_B = np.asarray(logits_BTV)[:, -1], np.arange(8)
        return (last_BV[row_B, FEW.clean_B] - last_BV[row_B, FEW.corrupt_B]).mean()

    np.testing.assert_allclose(found.clean, difference(logits), rtol=1e-4, atol=1e-5)
    corrupt = difference(everything(PARAMS, FEW.corrupt_BT)[0])
    np.testing.assert_allclose(found.corrupt, corrupt, rtol=1e-4, atol=1e-5)
    for layer, position in ((0, 8), (1, 16), (0, 12)):
        mask = np.zeros((2, 1, 17, 1), bool)
        mask[layer, 0, position] = True
        patch = Patch(residual=(mask, seen.residual_LBTD))
        wanted = difference(everything(PARAMS, FEW.corrupt_BT, patch=patch)[0])
        np.testing.assert_allclose(found.patched[layer, position], wanted, rtol=1e-4, atol=1e-5)
    # The last stream at the last position is the clean answer; where nothing differs, nothing.
    np.testing.assert_allclose(found.share[-1, -1], 1, rtol=1e-3)
    np.testing.assert_array_equal(found.share[:, :8], 0)
    np.testing.assert_allclose(found.share[-1, :-1], 0, atol=1e-3)
    heads = interventions.patch_activations(PARAMS, FEW, cfg=CFG, site="head").patched
    mask = np.zeros((2, 1, 1, 2, 1), bool)
    mask[0, ..., 1, :] = True
    patched = everything(PARAMS, FEW.corrupt_BT, patch=Patch(head=(mask, seen.head_LBTHK)))[0]
    np.testing.assert_allclose(heads[0, 1], difference(patched), rtol=1e-4, atol=1e-5)


def test_logit_lens_ends_with_the_network():
    found = interventions.logit_lens(PARAMS, TOKENS_BT, cfg=CFG)
    logits, _ = everything(PARAMS, TOKENS_BT)
    own = interventions.answer_scores(logits[:, 1::3], TOKENS_BT)
    assert found.loss_S.shape == (3, SHOTS)
    np.testing.assert_allclose(found.loss_S[-1], own.loss_S, rtol=1e-5)
    assert np.abs(found.loss_S[0] - own.loss_S).max() > 1e-2


def test_gates_reach_every_intervention():
    """With the first gate at 0, silencing the first block's heads changes nothing."""
    gate = jnp.array([0.0, 1.0])
    mask_GLX = interventions.one_at_a_time(2, 2)
    loss_GS = interventions.ablate(PARAMS, TOKENS_BT, mask_GLX, KEY, cfg=CFG, gate=gate).loss_S
    lens = interventions.logit_lens(PARAMS, TOKENS_BT, cfg=CFG, gate=gate).loss_S
    np.testing.assert_allclose(loss_GS[0], lens[-1], rtol=1e-5)
    np.testing.assert_allclose(lens[0], lens[1], rtol=1e-5)
    assert np.abs(loss_GS[2] - lens[-1]).max() > 1e-3
    subject = interpret.network(PARAMS, CFG, gate)
    loss_S = interventions.answer_scores(subject.predict(TOKENS_BT), TOKENS_BT).loss_S
    np.testing.assert_allclose(loss_S, lens[-1], rtol=1e-4)


ABLATE = functools.partial(interventions.ablate, PARAMS, TOKENS_BT, key=KEY, cfg=CFG)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: ABLATE(mask_GLX=np.zeros((1, 2, 3), bool)),
            r"\(1, 2, 3\), expected \(groups, 2, 2\)",
        ),
        (lambda: ABLATE(mask_GLX=np.zeros((1, 2, 2), bool), kind="median"), "kind='median'"),
        (
            lambda: interventions.ablate(
                PARAMS, TOKENS_BT[:1], np.zeros((1, 2, 2), bool), KEY, cfg=CFG, kind="resample"
            ),
            "expected two rows or more",
        ),
        (
            lambda: interventions.patch_activations(PARAMS, FEW, cfg=CFG, site="hidden"),
            "site='hidden', expected 'residual' or 'head'",
        ),
        (
            lambda: interventions.patch_activations(PARAMS, FEW, cfg=CFG, start=17),
            "start=17, expected a position from 0 to 16",
        ),
        (
            lambda: interventions.patch_activations(PARAMS, FEW, cfg=CFG, start=-1),
            "start=-1, expected a position from 0 to 16",
        ),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call()

"""What is seen inside a subject of modgrok_inspect: attention, features, neurons, embedding."""

import functools

import jax
import jax.numpy as jnp

from launch.modgrok_instruments_common import Arrays, Look, make_keys, stack, waiting
from modgrok import fourier, interpret, sequences


def attention(what: interpret.Subject, look: Look, tokens_RBT: jax.Array) -> Arrays:
    """What its heads look at; the weights themselves of one sequence."""
    options = {"modulus": look.problem.modulus, "sharding": look.sharding}
    score = waiting(_attention_scores, what, **options)
    results = [score(tokens_BT) for tokens_BT in tokens_RBT]
    arrays = {"attention_LHTT": results[0][2]}
    for name in interpret.AttentionScores._fields:
        short = name.rpartition("_")[0]
        values = jnp.stack([getattr(scores, name) for scores, _, _ in results])
        if short == "offset":
            arrays["attention_offset_LH3T"] = values.mean(0)
            continue
        arrays[f"attention_{short}_RLH"] = values
        uniform = jnp.stack([getattr(scores, name)[0, 0] for _, scores, _ in results])
        arrays[f"attention_{short}_uniform_R"] = uniform
    return arrays


@functools.partial(jax.jit, static_argnames=("modulus", "sharding"))
def _attention_scores(what, tokens_BT, *, modulus, sharding):
    tokens_BT = sequences.spread(tokens_BT, sharding)
    seen = what.capture(tokens_BT)
    weight_LBHTT = seen.attention_LBHTT
    uniform = interpret.uniform_attention(tokens_BT.shape[0], weight_LBHTT.shape[-1])
    return (
        interpret.attention_scores(weight_LBHTT, tokens_BT, modulus=modulus),
        interpret.attention_scores(uniform, tokens_BT, modulus=modulus),
        weight_LBHTT[:, 0],
    )


def features(
    what: interpret.Subject, look: Look, context_RT: jax.Array, task_R2: jax.Array
) -> Arrays:
    """Features of all inputs at one shot; shuffles and large arrays: the first repetition's."""
    problem, num = look.problem, look.size.shuffles
    static = {"p": problem.modulus, "num": num}
    options = {"shot": problem.feature_shot, "rows": look.rows, "sharding": look.sharding, **static}
    one = waiting(_one_context, what, **options)
    keys = make_keys(look, 5)
    numbers, large = [], []
    for context_T, task_2, key in zip(context_RT, task_R2, keys, strict=True):
        row, kept = one(context_T, task_2, key)
        numbers.append(row)
        large = large or [kept]
    component_LHCpp, hidden_LFpp, similar = large[0]
    layers, heads = component_LHCpp.shape[:2]
    component_LHN2 = component_LHCpp[:, :, :2].reshape(layers, heads, 2, -1).swapaxes(-1, -2)
    return {
        **stack(numbers),
        **_shuffles(component_LHCpp, hidden_LFpp, keys[0], **static),
        **{f"similarity_{place}_LNN": x for place, x in similar.items()},
        **_embedding(
            what.embedding_VD[: problem.modulus], jax.random.fold_in(look.key, 6), **static
        ),
        "component_LHN2": component_LHN2,
        "neuron_deviation_LF": hidden_LFpp.std((-2, -1)),
        "feature_context_T": context_RT[0],
        "feature_task_2": task_R2[0],
    }


@functools.partial(jax.jit, static_argnames=("shot", "rows", "sharding", "p", "num"))
def _one_context(what, context_T, task_2, key, *, shot, rows, sharding, p, num):
    """(numbers of one repetition, what is kept of the first)."""
    grid_NT = interpret.input_grid(context_T, task_2, modulus=p, shot=shot)
    seen = interpret.grid_features(what, grid_NT, shot=shot, rows=rows, row_sharding=sharding)
    layers, heads, inputs, _, width = seen.head_LHN3D.shape
    pairs_GND = seen.head_LHN3D[..., :2, :].reshape(layers * heads, inputs, 2 * width)
    parts = interpret.principal_components(pairs_GND, components=min(4, *pairs_GND.shape[1:]))
    component_LHCpp = jnp.moveaxis(parts.score_GNC, 1, 2).reshape(layers, heads, -1, p, p)
    hidden_LFpp = jnp.moveaxis(seen.hidden_LN3F[:, :, 1], 1, 2).reshape(layers, -1, p, p)
    row = {"explained_RLHC": parts.explained_GC.reshape(layers, heads, -1)}
    for kind in fourier.KINDS:
        share_LHCM = fourier.pair_shares(component_LHCpp, modulus=p, kind=kind)
        row[f"circle_{kind}_RLHC"], row[f"circle_{kind}_frequency_RLHC2"] = fourier.circles(
            share_LHCM, p
        )
        share_LFM = fourier.pair_shares(hidden_LFpp, modulus=p, kind=kind)
        row[f"neuron_{kind}_RLF"] = fourier.best(share_LFM).share_G
    similar = {}
    for place, at, shuffles in (("y", 1, num), ("z", 2, 0)):
        maps = jax.lax.map(interpret.similarity, seen.residual_LN3D[:, :, at])
        similar[place] = maps.astype(jnp.float16)
        sides = (seen.head_LHN3D[:, :, :, at], seen.residual_LN3D[:, None, :, at])
        scores = [
            interpret.ratio_similarity(
                side.reshape(-1, *side.shape[2:]), key, modulus=p, num=shuffles
            )
            for side in sides
        ]
        for name in interpret.RatioScores._fields:
            if name.startswith("null") and not shuffles:  # a x + b y is read there: it has no null
                continue
            values = [getattr(one, name) for one in scores]
            joined = [x.reshape(*x.shape[:-1], layers, -1) for x in values]
            axes = "RZLX" if name.startswith("null") else "RLX"
            short = name.rpartition("_")[0]
            row[f"ratio_{short}_{place}_{axes}"] = jnp.concatenate(joined, axis=-1)
    return row, (component_LHCpp, hidden_LFpp, similar)


@functools.partial(jax.jit, static_argnames=("p", "num"))
def _shuffles(component_LHCpp, hidden_LFpp, key, *, p, num):
    """Best fits after tokens exchanged their names; and the best modes of the neurons."""
    arrays = {}
    for kind in fourier.KINDS:
        options = {"modulus": p, "kind": kind, "pairs": True, "num": num}
        arrays[f"circle_{kind}_null_ZLHC"] = fourier.shuffled(key, component_LHCpp, **options)[1]
        arrays[f"neuron_{kind}_null_ZLF"] = fourier.shuffled(key, hidden_LFpp, **options)[0]
        best = fourier.best(fourier.pair_shares(hidden_LFpp, modulus=p, kind=kind))
        modes_M2 = jnp.asarray(fourier.pair_frequencies(p, kind))
        arrays[f"neuron_{kind}_mode_LF2"] = modes_M2[best.mode_G]
    return arrays


@functools.partial(jax.jit, static_argnames=("p", "num"))
def _embedding(table_pD, key, *, p, num):
    """Shares of the variance of all channels together, and the components of figure 1e."""
    table_pD = jnp.asarray(table_pD, jnp.float32)
    variance_D = table_pD.var(0)
    weight_D = variance_D / jnp.maximum(variance_D.sum(), 1e-30)
    parts = interpret.principal_components(table_pD[None], components=min(3, *table_pD.shape))
    orders = jax.vmap(lambda k: jax.random.permutation(k, p))(jax.random.split(key, num))
    arrays = {
        "embedding_component_pC": parts.score_GNC[0],
        "embedding_explained_C": parts.explained_GC[0],
    }
    for kind in fourier.KINDS:

        def shares(order_p, kind=kind):
            share_DQ = fourier.token_shares(table_pD.T[:, order_p], modulus=p, kind=kind)
            return jnp.einsum("dq,d->q", share_DQ, weight_D)

        arrays[f"embedding_{kind}_Q"] = shares(jnp.arange(p))
        arrays[f"embedding_{kind}_null_Z"] = jax.lax.map(shares, orders).max(-1)
        parts_CQ = fourier.token_shares(parts.score_GNC[0].T, modulus=p, kind=kind)
        arrays[f"embedding_component_{kind}_CQ"] = parts_CQ
    return arrays

"""What a network of modgrok_inspect needs: heads and neurons silenced, activations put back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.modgrok_instruments_common import (
    FITS,
    UNSEEN,
    Arrays,
    Look,
    make_keys,
    match_of,
    sample_prompts,
    stack,
    waiting,
)
from modgrok import fourier, interventions

GROUPS = (*FITS, "random", "all")  # of the neurons of a layer
TENTH = 0.1


def intervene(
    network: tuple[Any, ...], look: Look, tokens_R4BT: jax.Array, measured: Arrays
) -> Arrays:
    """Of (params, model), of which the features have been `measured`."""
    params, model = network
    common = {"cfg": model, "row_sharding": look.sharding}
    ablate = waiting(interventions.ablate, params, chunk=look.chunk, **common)
    layers, heads, neurons = model.layers, model.heads, model.mlp_ratio * model.width
    nothing_1LH = jnp.zeros((1, layers, heads), bool)
    together = look.problem.together
    together_GLH = np.zeros((len(together), layers, heads), bool)
    for number, group in enumerate(together):
        together_GLH[number][tuple(np.transpose(group))] = True
    head_mask = jnp.concatenate(
        [nothing_1LH, interventions.one_at_a_time(layers, heads), together_GLH]
    )
    neuron_mask_R, single_G2 = _neuron_masks(look, measured, layers, neurons)
    keys = make_keys(look, 7)
    arrays: Arrays = {"single_G2": single_G2, "together_GLH": together_GLH}
    for kind in interventions.KINDS:
        heads_R4, neurons_R = [], []
        for key, four, neuron_mask in zip(keys, tokens_R4BT, neuron_mask_R, strict=True):
            heads_R4.append(
                stack([ablate(x, head_mask, key, site="head", kind=kind) for x in four])
            )
            neurons_R.append(ablate(four[UNSEEN], neuron_mask, key, site="hidden", kind=kind))
        for field in interventions.Scores._fields:
            name = field.removesuffix("_S")
            arrays[f"head_{kind}_{name}_R4GS"] = getattr(stack(heads_R4), field)
            arrays[f"hidden_{kind}_{name}_RGS"] = getattr(stack(neurons_R), field)

    look_through = waiting(interventions.logit_lens, params, **common)
    lens = stack([look_through(four[UNSEEN]) for four in tokens_R4BT])
    arrays |= {"lens_accuracy_RLS": lens.accuracy_S, "lens_loss_RLS": lens.loss_S}
    prompts_R = sample_prompts(look)
    patch = waiting(interventions.patch_activations, chunk=look.chunk, **common)
    start = 3 * match_of(look.problem.shots) + 2  # the token that differs
    for site, axes in (("residual", "RLT"), ("head", "RLH")):
        rows = stack([patch(params, prompts, site=site, start=start) for prompts in prompts_R])
        arrays[f"patched_{site}_{axes}"] = rows.patched
        arrays |= {"patched_clean_R": rows.clean, "patched_corrupt_R": rows.corrupt}
    return arrays


def _neuron_masks(
    look: Look, measured: Arrays, layers: int, neurons: int
) -> tuple[jax.Array, np.ndarray]:
    """What is silenced together in each repetition, mask_RGLF, and (layer, neuron) of the singles.

    First nothing, then GROUPS in each layer, then single neurons. Groups: the tenth of a layer's
    neurons with the best fit in a basis, a tenth at random (another one in each repetition), all
    of them. Singles are those that vary most.
    """
    tenth = max(1, round(TENTH * neurons))
    fits = {kind: np.asarray(measured[f"neuron_{kind}_RLF"])[0] for kind in fourier.KINDS}
    deviation_LF = np.asarray(measured["neuron_deviation_LF"])
    mask = np.zeros((look.size.repetitions, 1 + layers * len(GROUPS), layers, neurons), bool)
    for layer in range(layers):
        for number, group in enumerate(GROUPS):
            at = 1 + layer * len(GROUPS) + number
            for repetition in range(look.size.repetitions):
                if group == "random":
                    rng = np.random.default_rng([layer, repetition])
                    chosen = rng.choice(neurons, tenth, replace=False)
                elif group == "all":
                    chosen = np.arange(neurons)
                else:
                    chosen = np.argsort(-fits[group][layer], kind="stable")[:tenth]
                mask[repetition, at, layer, chosen] = True
    count = min(look.size.neurons, neurons)
    single_G2 = np.array(
        [
            (layer, neuron)
            for layer in range(layers)
            for neuron in np.argsort(-deviation_LF[layer], kind="stable")[:count]
        ]
    )
    single = np.zeros((len(single_G2), layers, neurons), bool)
    single[np.arange(len(single_G2)), single_G2[:, 0], single_G2[:, 1]] = True
    singles = np.broadcast_to(single, (len(mask), *single.shape))
    return jnp.asarray(np.concatenate([mask, singles], axis=1)), single_G2

"""The figures of modgrok_inspect, from its arrays alone."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from launch.modgrok_inspect_page import TITLES
from launch.modgrok_inspect_scores import Arrays, changes, head_names, layer_numbers, patching
from launch.modgrok_instruments_common import FITS, UNSEEN, match_of
from modgrok import interpret_figures, interventions, latent_figures, statistics


def draw(all_arrays: Mapping[str, Arrays]) -> dict[str, Any]:
    """Every figure of the page."""
    own, make = all_arrays["network"], interpret_figures
    modulus = own["grid_right_KCpp"].shape[-1]
    titles = {name: TITLES[name] for name in TITLES if name in all_arrays}
    shot_K = own["grid_shot_K"]
    grid = {TITLES[name]: all_arrays[name]["grid_right_KCpp"][:, 0] for name in titles}
    grid |= {
        "known to RM": own["grid_ratio_KCpp"][:, 0],
        "known to regression": own["grid_regression_KCpp"][:, 0],
    }
    layer_L = layer_numbers(own)
    layer, head = own["drawn_head"]
    at = layer_L.index(layer)
    fit = {kind: own[f"circle_{kind}_RLHC"][0, at, head, :2].mean() for kind in FITS}
    null = {kind: np.quantile(own[f"embedding_{kind}_null_Z"], 0.95) for kind in FITS}
    figures = {
        "grids": make.shot_grids(grid, shot_K),
        "shots": make.curves(
            *_bands({x: all_arrays[name]["accuracy_R4S"][:, UNSEEN] for name, x in titles.items()}),
            xlabel="examples (unseen tasks, train inputs)",
            ylabel="accuracy",
        ),
        "corruption": make.corruption_maps(
            {TITLES[name]: all_arrays[name]["corruption_accuracy_SS"].mean(0) for name in titles}
        ),
        "several": make.curves(
            *_bands({x: all_arrays[name]["several_RS"] for name, x in titles.items()}),
            xlabel=f"wrong labels among {own['several_RS'].shape[-1] - 1} examples",
            ylabel="accuracy",
        ),
        "attention": make.attention_maps(own["attention_LHTT"][..., :48, :48], layer_L),
        "heads": make.head_scores(
            {
                "previous token": own["attention_previous_RLH"].mean(0),
                "own x": own["attention_own_x_RLH"].mean(0),
                "first token": own["attention_first_RLH"].mean(0),
                "same ratio": own["attention_ratio_RLH"].mean(0),
                "ratio choice": own["attention_ratio_choice_RLH"].mean(0),
            },
            layer_L,
        ),
        "offsets": make.attention_by_offset(own["attention_offset_LH3T"], layer_L),
        "circle": make.circle_of_circles(
            own["component_LHN2"][at, head],
            modulus=modulus,
            title=f"head {layer}.{head}: R² {fit['log']:.2f} log, {fit['additive']:.2f} additive "
            "(first repetition)",
        ),
        "similarity": make.similarity_maps(
            {
                f"after block {number}, at {place}": own[f"similarity_{place}_LNN"][i]
                for place in "yz"
                for i, number in enumerate(layer_L)
            }
        ),
        "spectrum": make.token_spectrum(
            own["embedding_log_Q"],
            own["embedding_additive_Q"],
            zero=1 - own["embedding_log_Q"].sum(),
            limit=null,
        ),
        "neurons": make.neuron_fits(
            {kind: own[f"neuron_{kind}_RLF"][0] for kind in FITS},
            {kind: own[f"neuron_{kind}_null_ZLF"] for kind in FITS},
            layer_L=layer_L,
        ),
    }
    if own["embedding_component_pC"].shape[1] == 3:
        figures["embedding"] = make.embedding_components(
            own["embedding_component_pC"], modulus=modulus
        )
    if "head_zero_accuracy_R4GS" in own:
        figures |= _intervention_figures(own)
    if "posterior_inclusion_GL" in own:
        figures["posterior"] = latent_figures.posterior_map(own["posterior_inclusion_GL"])
    return figures


def _intervention_figures(own: Arrays) -> dict[str, Any]:
    make = interpret_figures
    layer_L = layer_numbers(own)
    layers, heads = own["attention_LHTT"].shape[:2]
    shots = own["accuracy_R4S"].shape[-1]
    single = slice(layers * heads)  # the rest are groups
    bars = {
        kind: statistics.interval(changes(own, f"head_{kind}_accuracy_R4GS")[:, UNSEEN, single])
        for kind in interventions.KINDS
    }
    accuracy_RGS = own["head_mean_accuracy_R4GS"][:, UNSEEN]
    heads_alone = list(head_names(layer_L, heads))
    groups = [
        "+".join(f"{layer_L[i]}.{j}" for i, j in np.argwhere(mask)) for mask in own["together_GLH"]
    ]
    names = ["untouched", *(f"without {name}" for name in (*heads_alone, *groups))]
    figures = {
        "ablation": make.effects_of_heads(bars, layer_L, heads),
        "ablation_shots": make.curves(
            dict(zip(names, accuracy_RGS.mean(0), strict=True)),
            xlabel="examples (unseen tasks, train inputs; mean in place of a head)",
            ylabel="accuracy",
        ),
        "lens": make.curves(
            *_bands(
                {
                    "embedding" if i == 0 else f"after block {layer_L[i - 1]}": value_RS
                    for i, value_RS in enumerate(np.moveaxis(own["lens_accuracy_RLS"], 1, 0))
                }
            ),
            xlabel="examples (unseen tasks, train inputs)",
            ylabel="accuracy",
        ),
    }
    patched = patching(own)
    if patched["effect_beyond_zero"]:
        share_LT = patched["share_residual"]
        figures["patching"] = make.patching_map(share_LT, match=match_of(shots), layer_L=layer_L)
    return figures


def _bands(value: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Means over repetitions, and the ends of their intervals, of name -> value_RS."""
    found = {name: statistics.interval(value_RS) for name, value_RS in value.items()}
    return {k: x.mean for k, x in found.items()}, {k: (x.low, x.high) for k, x in found.items()}

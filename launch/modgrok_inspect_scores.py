"""From the arrays of modgrok_inspect to its scores.

Scores are plain numbers of five digits. One with repetitions is a list [mean, low, high] with a
95 % interval of Student's t; of a table of numbers the ends have names of their own, NAME_low and
NAME_high. The best head or neuron is chosen by its mean, which favours all subjects alike.
P-values, and all that is said of neurons, are of the first repetition alone, which is the one that
is shuffled.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.modgrok_instruments_common import FITS, UNSEEN
from launch.modgrok_instruments_interventions import GROUPS
from launch.rundir import plain
from modgrok import evaluation, grids, interventions, statistics

Arrays = Mapping[str, np.ndarray]
ATTENTION = ("previous", "own_x", "first", "ratio", "ratio_choice")


def layer_numbers(arrays: Arrays) -> Sequence[int]:
    """What its blocks are called: of a network with gates, its open ones keep their numbers."""
    if "open_layer_L" in arrays:
        return arrays["open_layer_L"].tolist()
    return range(len(arrays["attention_LHTT"]))


def head_names(layer_L: Sequence[int], heads: int) -> dict[str, tuple[int, int]]:
    """layer.head, and where it is in arrays."""
    return {f"{layer}.{j}": (i, j) for i, layer in enumerate(layer_L) for j in range(heads)}


def scores(arrays: Arrays) -> dict[str, Any]:
    """Every score of one subject, nested; from the arrays alone."""
    result = {
        "accuracy_last_shot": {
            name: _spread(arrays["accuracy_R4S"][:, i, -1])
            for i, name in enumerate(evaluation.SETS)
        },
        "accuracy_by_shot": {
            name: arrays["accuracy_R4S"][:, i].mean(0) for i, name in enumerate(evaluation.SETS)
        },
        "follows_example_on_the_line": {
            "clean": _spread(arrays["follows_clean_R"]),
            "corrupt": _spread(arrays["follows_corrupt_R"]),
        },
        "label_corruption": {
            "change_on_the_line": _spread(arrays["corruption_matched"]),
            "change_elsewhere": _spread(arrays["corruption_unmatched"]),
            **_named("accuracy_with_wrong_labels", statistics.interval(arrays["several_RS"])),
        },
        "grids": _grids(arrays),
        "attention": _attention(arrays),
        "head_features": _head_features(arrays),
        "embedding": _embedding(arrays),
        "neurons": _neurons(arrays),
        "ratio_similarity": {place: _ratio(arrays, place) for place in "yz"},
    }
    if "head_zero_accuracy_R4GS" in arrays:
        result["ablation"] = _ablation(arrays)
        result["patching"] = patching(arrays)
        result["logit_lens"] = {
            key: value
            for name in ("accuracy", "loss")
            for key, value in _named(
                f"{name}_by_layer", statistics.interval(arrays[f"lens_{name}_RLS"][..., -1])
            ).items()
        }
    if "open_layer_L" in arrays:
        result["open_layers"] = arrays["open_layer_L"]
    if "posterior_inclusion_GL" in arrays:
        prefix = "posterior_"
        result["latent_depth"] = {
            name.removeprefix(prefix): value
            for name, value in arrays.items()
            if name.startswith(prefix)
        }
    return plain(result, digits=5)


def _spread(value_R: np.ndarray) -> list[float]:
    return list(statistics.interval(value_R))


def _named(name: str, found: statistics.Interval) -> dict[str, Any]:
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}


def ratio_interval(part_RX: np.ndarray, whole_RX: np.ndarray) -> statistics.Interval:
    """Ratio of two means over the first axis; NaN where the second is 0.

    The interval is that of the mean of part - ratio x whole, over the mean of the whole: a ratio of
    single repetitions would be of any size where the whole happens to be small.
    """
    part_RX, whole_RX = np.broadcast_arrays(part_RX, whole_RX)
    whole_X = whole_RX.mean(0)
    scale_X = np.where(whole_X == 0, np.nan, whole_X)
    ratio_X = part_RX.mean(0) / scale_X
    rest = statistics.interval(part_RX - ratio_X * whole_RX)
    half_X = (rest.high - rest.mean) / np.abs(scale_X)
    return statistics.Interval(ratio_X, ratio_X - half_X, ratio_X + half_X)


def _spreads(
    value_RLX: np.ndarray, layer_L: Sequence[int], *, streams: bool = False
) -> dict[str, Any]:
    """Of each head, and which is the best; with `streams` the last column is the stream's."""
    mean, low, high = statistics.interval(value_RLX)
    if np.isnan(mean).all():
        return {"mean": mean, "low": low, "high": high, "best": None, "best_head": None}
    at = np.unravel_index(np.nanargmax(mean), mean.shape)
    name = f"{layer_L[at[0]]}.{at[1]}"
    if streams and at[1] == mean.shape[1] - 1:
        name = f"stream after block {layer_L[at[0]]}"
    best = {"best": [mean[at], low[at], high[at]], "best_head": name}
    return {"mean": mean, "low": low, "high": high, **best}


def _grids(arrays: Arrays) -> dict[str, Any]:
    """By k: overlap with the masks, and accuracy on what only one of the algorithms knows."""
    right, ratio, regression = (
        arrays[f"grid_{name}_KCpp"].astype(float) for name in ("right", "ratio", "regression")
    )
    result: dict[str, Any] = {"shots": arrays["grid_shot_K"]}
    for name, mask in (("ratio_matching", ratio), ("regression", regression)):
        # The queries of all contexts together; where the mask is everything nothing is outside.
        found = grids.overlap(*(x.reshape(len(x), 1, -1, 1) for x in (right, mask)))
        for part in ("precision", "recall", "outside"):
            result[f"{name}_{part}"] = np.asarray(getattr(found, f"{part}_KC")[:, 0], float)
    parts = {"known_to_both": ratio, "known_to_regression_only": regression * (1 - ratio)}
    parts["known_to_none"] = 1 - regression
    for name, mask in parts.items():
        hits_CK, total_CK = ((x * mask).sum((2, 3)).T for x in (right, 1))
        result |= _named(f"accuracy_{name}", ratio_interval(hits_CK, total_CK))
        result[f"queries_{name}"] = total_CK.mean(0)
    return result


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return known.mean() if len(known) else np.nan


def _attention(arrays: Arrays) -> dict[str, Any]:
    return {
        name: {
            "uniform": _mean(arrays[f"attention_{name}_uniform_R"]),
            **_spreads(arrays[f"attention_{name}_RLH"], layer_numbers(arrays)),
        }
        for name in ATTENTION
    }


def _head_features(arrays: Arrays) -> dict[str, Any]:
    """Circle of circles: R^2 of the first two components, beside 95 % of shuffled tokens.

    Then of each component alone, with the frequencies of x and of y that fit it best: of a circle
    its two components have them in common.
    """
    result: dict[str, Any] = {"explained": arrays["explained_RLHC"].mean(0)}
    for kind in FITS:
        fit = _spreads(arrays[f"circle_{kind}_RLHC"][..., :2].mean(-1), layer_numbers(arrays))
        null_ZLH = arrays[f"circle_{kind}_null_ZLHC"][..., :2].mean(-1)
        fit["shuffled_95"] = np.quantile(null_ZLH, 0.95, axis=0)
        first_LHC, null_ZLHC = arrays[f"circle_{kind}_RLHC"][0], arrays[f"circle_{kind}_null_ZLHC"]
        fit["p_value"] = _p_values(first_LHC[..., :2].mean(-1), null_ZLH)
        fit["components"] = arrays[f"circle_{kind}_RLHC"].mean(0)
        fit["components_shuffled_95"] = np.quantile(null_ZLHC, 0.95, axis=0)
        fit["components_p_value"] = _p_values(first_LHC, null_ZLHC)
        fit["components_frequencies"] = arrays[f"circle_{kind}_frequency_RLHC2"][0]
        result[kind] = fit
    result["degrees_of_freedom"] = 5
    result["inputs"] = arrays["component_LHN2"].shape[2]
    return result


def _p_values(found: np.ndarray, null: np.ndarray) -> np.ndarray:
    # A little slack: what equals the null up to rounding is not above it.
    return (1 + (null >= found - 1e-6).sum(0)) / (1 + len(null))


def _embedding(arrays: Arrays) -> dict[str, Any]:
    result: dict[str, Any] = {"explained": arrays["embedding_explained_C"]}
    for kind in FITS:
        share_Q, null_Z = arrays[f"embedding_{kind}_Q"], arrays[f"embedding_{kind}_null_Z"]
        result[kind] = {
            "share_by_frequency": share_Q,
            "best": share_Q.max(),
            "best_frequency": 1 + share_Q.argmax(),
            "shuffled_95": np.quantile(null_Z, 0.95),
            "p_value": _p_values(share_Q.max(), null_Z),
            "components": arrays[f"embedding_component_{kind}_CQ"].max(-1),
        }
    result["zero_token"] = 1 - arrays["embedding_log_Q"].sum()
    return result


def _neurons(arrays: Arrays) -> dict[str, Any]:
    """Share of a layer's live neurons whose best R^2 has p <= .05 among their own shuffles.

    Where p = 5 it says nothing: 1 of 6 renamings (in the log basis of 15) leaves every fit as it
    is, so that no neuron's p-value is that small but by luck of the draw.
    """
    live_LF = arrays["neuron_deviation_LF"] > 1e-6
    result: dict[str, Any] = {"live": live_LF.mean(1), "number": live_LF.shape[1]}
    for kind in FITS:
        fit_LF = arrays[f"neuron_{kind}_RLF"][0]
        p_LF = _p_values(fit_LF, arrays[f"neuron_{kind}_null_ZLF"])
        beyond_LF = (p_LF <= 0.05) & live_LF
        mode_LF2 = arrays[f"neuron_{kind}_mode_LF2"]
        best_L = np.where(live_LF, fit_LF, -1).argmax(1)
        layers = np.arange(len(best_L))
        result[kind] = {
            "beyond_shuffled": beyond_LF.sum(1) / np.maximum(live_LF.sum(1), 1),
            "mean_r2": [_mean(f[on]) for f, on in zip(fit_LF, live_LF, strict=True)],
            "mean_r2_shuffled": [
                _mean(null[..., on].ravel())
                for null, on in zip(
                    np.moveaxis(arrays[f"neuron_{kind}_null_ZLF"], 1, 0), live_LF, strict=True
                )
            ],
            "best_r2": np.where(live_LF, fit_LF, np.nan)[layers, best_L],
            "best_mode": mode_LF2[layers, best_L],
        }
    return result


def _ratio(arrays: Arrays, place: str) -> dict[str, Any]:
    """At z, where the token a x + b y is read, no renaming of x and y makes a null."""
    within, between = (arrays[f"ratio_{x}_{place}_RLX"] for x in ("within", "between"))
    result = _spreads(within - between, layer_numbers(arrays), streams=True)
    if place == "y":
        null_ZLX = arrays["ratio_null_y_RZLX"][0]
        result["p_value"] = _p_values((within - between)[0], null_ZLX)
        result["shuffled_95"] = np.quantile(null_ZLX, 0.95, axis=0)
    return result


def _ablation(arrays: Arrays) -> dict[str, Any]:
    """Changes at the last shot: accuracy on the four sets, loss on unseen tasks, train inputs."""
    result: dict[str, Any] = {"heads": {}, "heads_together": {}, "neuron_groups": {}}
    layer_L = layer_numbers(arrays)
    names = list(head_names(layer_L, arrays["attention_LHTT"].shape[1]))
    together = ["+".join(np.array(names)[mask.ravel()]) for mask in arrays["together_GLH"]]
    groups = [f"{layer}.{group}" for layer in layer_L for group in GROUPS]
    for kind in interventions.KINDS:
        change_R4G, loss_R4G = (
            changes(arrays, f"head_{kind}_{x}_R4GS") for x in ("accuracy", "loss")
        )
        every = {
            name: {
                **{x: _spread(change_R4G[:, i, at]) for i, x in enumerate(evaluation.SETS)},
                "loss_unseen_train": _spread(loss_R4G[:, UNSEEN, at]),
            }
            for at, name in enumerate([*names, *together])
        }
        result["heads"][kind] = {name: every[name] for name in names}
        result["heads_together"][kind] = {name: every[name] for name in together}
        change_RG, loss_RG = (
            changes(arrays, f"hidden_{kind}_{x}_RGS") for x in ("accuracy", "loss")
        )
        result["neuron_groups"][kind] = {
            name: {
                "unseen_train": _spread(change_RG[:, at]),
                "loss_unseen_train": _spread(loss_RG[:, at]),
            }
            for at, name in enumerate(groups)
        }
    loss_RG = changes(arrays, "hidden_mean_loss_RGS")[:, len(groups) :]
    singles = [f"{layer_L[layer]}.{neuron}" for layer, neuron in arrays["single_G2"]]
    result["single_neurons"] = [
        {"neuron": singles[i], "loss": _spread(loss_RG[:, i])}
        for i in np.argsort(-loss_RG.mean(0))[:10]
    ]
    return result


def changes(arrays: Arrays, name: str) -> np.ndarray:
    """At the last shot, against the untouched network, which is the first group."""
    last = arrays[name][..., -1]
    return last[..., 1:] - last[..., :1]


def patching(arrays: Arrays) -> dict[str, Any]:
    """Shares are of mean differences, so that a small one in one repetition does no harm."""
    effect_R = arrays["patched_clean_R"] - arrays["patched_corrupt_R"]
    effect = _spread(effect_R)
    there = bool(effect[1] > 0 or effect[2] < 0)
    result: dict[str, Any] = {"effect_logits": effect, "effect_beyond_zero": there}
    for site, axes in (("residual", "RLT"), ("head", "RLH")):
        gained = arrays[f"patched_{site}_{axes}"] - arrays["patched_corrupt_R"][:, None, None]
        result |= _named(f"gained_logits_{site}", statistics.interval(gained))
        whole = effect_R if there else np.zeros_like(effect_R)  # no effect has no shares
        result |= _named(f"share_{site}", ratio_interval(gained, whole[:, None, None]))
    return result


def headline(score: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of the last line of stdout, and of the table at the top of the page."""
    features, attention = score["head_features"], score["attention"]
    found = {
        **{f"accuracy_{k}": v[0] for k, v in score["accuracy_last_shot"].items()},
        "follows_corrupt_example": score["follows_example_on_the_line"]["corrupt"][0],
        "accuracy_known_to_both": score["grids"]["accuracy_known_to_both"][-1],
        "accuracy_known_to_regression_only": _last(
            score["grids"]["accuracy_known_to_regression_only"]
        ),
        "corruption_on_the_line": score["label_corruption"]["change_on_the_line"][0],
        "corruption_elsewhere": score["label_corruption"]["change_elsewhere"][0],
        **{f"best_{name}": (attention[name]["best"] or [None])[0] for name in ATTENTION},
        "ratio_uniform": attention["ratio"]["uniform"],
        "ratio_choice_uniform": attention["ratio_choice"]["uniform"],
        **{f"best_circle_{kind}": features[kind]["best"][0] for kind in FITS},
        **{f"embedding_{kind}": score["embedding"][kind]["best"] for kind in FITS},
        **{f"neurons_{kind}": max(score["neurons"][kind]["beyond_shuffled"]) for kind in FITS},
        "ratio_similarity_y": score["ratio_similarity"]["y"]["best"][0],
        "ratio_similarity_z": score["ratio_similarity"]["z"]["best"][0],
    }
    if "patching" in score:
        found["patching_effect"] = score["patching"]["effect_logits"][0]
        mean = score["ablation"]["heads"]["mean"]
        worst = min(mean, key=lambda name: mean[name]["unseen_train"][0])
        found["most_needed_head"] = worst
        found["without_most_needed_head"] = mean[worst]["unseen_train"][0]
    return found


def _last(values: Sequence[float | None]) -> float | None:
    """The last that there is: after many examples Ratio Matching may know everything."""
    return next((value for value in reversed(values) if value is not None), None)

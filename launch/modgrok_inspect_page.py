"""The page of modgrok_inspect: what each score says of every subject, then by head and layer."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from launch.modgrok_inspect_scores import ATTENTION, head_names, headline
from launch.modgrok_instruments_common import FITS, match_of
from launch.rundir import table
from modgrok import interventions

TITLES = {
    "network": "this network",
    "random": "random network",
    "ratio_matching": "Ratio Matching",
    "bayes": "Bayes",
}


class About(NamedTuple):
    """What the page says of itself."""

    command: str
    source: str
    modulus: int
    shots: int
    feature_shot: int
    size: str
    repetitions: int
    sequences: int
    figures: bool


def page(all_scores: Mapping[str, dict[str, Any]], about: About) -> str:
    """Markdown: what each score says of every subject, then each instrument by head and layer."""
    names = list(all_scores)
    own = all_scores["network"]
    heads = {name: headline(score) for name, score in all_scores.items()}
    chance = 1 / about.modulus
    last = about.shots - 1
    rows = [
        ["accuracy, seen tasks, train inputs", "accuracy_seen_train"],
        ["accuracy, seen tasks, held-out inputs", "accuracy_seen_heldout"],
        ["accuracy, unseen tasks, train inputs", "accuracy_unseen_train"],
        ["accuracy, unseen tasks, held-out inputs", "accuracy_unseen_heldout"],
        [f"grids, k = {last}: right where both algorithms know", "accuracy_known_to_both"],
        ["grids: right where only regression knows", "accuracy_known_to_regression_only"],
        ["answers what a corrupted example on the line asks for", "follows_corrupt_example"],
        ["change by a corrupted label on the query's line", "corruption_on_the_line"],
        ["change by a corrupted label elsewhere", "corruption_elsewhere"],
        ["best head: previous token", "best_previous"],
        ["best head: own x, seen from y", "best_own_x"],
        ["best head: first token", "best_first"],
        [f"best head: same ratio (uniform {_n(heads['network']['ratio_uniform'])})", "best_ratio"],
        [
            "best head: same ratio among earlier answers (uniform "
            f"{_n(heads['network']['ratio_choice_uniform'])})",
            "best_ratio_choice",
        ],
        ["best head: circle of circles, log basis, R²", "best_circle_log"],
        ["best head: circle of circles, additive basis, R²", "best_circle_additive"],
        ["embedding: best frequency, log basis, R²", "embedding_log"],
        ["embedding: best frequency, additive basis, R²", "embedding_additive"],
        [f"neurons beyond shuffled tokens ({_by_chance(about)}), log basis", "neurons_log"],
        ["neurons beyond shuffled tokens, additive basis", "neurons_additive"],
        ["x / y decides similarity at y: within minus between", "ratio_similarity_y"],
        ["x / y decides similarity at z", "ratio_similarity_z"],
    ]
    parts = [
        "# What was learned",
        f"`{about.command}`",
        f"{about.source} Chance is {chance:.3f}. Size {about.size}: {about.repetitions} "
        f"repetitions of {about.sequences} sequences a set; [low, high] are 95 % intervals of "
        "Student's t over repetitions. Shots, layers, heads and tokens count from 0; 0.1 is head 1 "
        "of layer 0. Definitions are in the docstrings of `modgrok/interpret.py`, `fourier.py`, "
        "`grids.py`, `interventions.py` and `corruption.py`." + _controls(names[1:]),
        table(
            ["", *(TITLES[name] for name in names)],
            [[label, *(_n(heads[name].get(key)) for name in names)] for label, key in rows],
        ),
        *_behaviour_page(all_scores, about),
        *_heads_page(own, about),
        *_embedding_page(own, about),
        *_neurons_page(own, about),
        *(_interventions_page(own, about) if "ablation" in own else ()),
        *(_depth_page(own, about) if "latent_depth" in own else ()),
    ]
    return "\n\n".join(parts) + "\n"


def _controls(names: Sequence[str]) -> str:
    rules = " and ".join(TITLES[name] for name in names if name != "random")
    controls = [f"{rules} in the clothes of a network (`modgrok/controls.py`)"] if rules else []
    if "random" in names:
        controls.append("a network of the same shape with random weights")
    found = ", and ".join(controls)
    return f" The same instruments looked at controls: {found}." if controls else ""


def _behaviour_page(all_scores: Mapping[str, dict[str, Any]], about: About) -> list[str]:
    own, names = all_scores["network"], list(all_scores)
    grid = own["grids"]
    lines = [
        [
            str(k),
            *(
                f"{_at(grid, f'accuracy_{part}', i)} ({grid[f'queries_{part}'][i]:.0f})"
                for part in ("known_to_both", "known_to_regression_only", "known_to_none")
            ),
            *(
                _n(grid[f"{mask}_{part}"][i])
                for mask in ("ratio_matching", "regression")
                for part in ("precision", "recall")
            ),
        ]
        for i, k in enumerate(grid["shots"])
    ]
    follows = []
    for name in names:
        told = all_scores[name]["follows_example_on_the_line"]
        change = all_scores[name]["label_corruption"]
        cells = (told["clean"], told["corrupt"])
        cells += (change["change_on_the_line"], change["change_elsewhere"])
        follows.append([TITLES[name], *map(_i, cells)])
    return [
        "## Which queries it answers",
        "Every query (x, y) after k examples, unseen tasks with a != b on train inputs; over all "
        "contexts, for the three accuracies with 95 % intervals. "
        "Ratio Matching knows queries on the line of an example through the origin, modular "
        "regression those in the span of the examples. Accuracy by who knows, with the number of "
        f"such queries of {about.modulus**2}; then precision and recall of the right answers "
        "against both masks.",
        table(
            [
                "k",
                "both know",
                "only regression",
                "none",
                "RM precision",
                "RM recall",
                "regression precision",
                "regression recall",
            ],
            lines,
        ),
        *_figure("Grids of one context", "grids", about),
        *_figure("Accuracy by number of examples", "shots", about),
        "## Which examples it uses",
        "Pairs of prompts with one example on the query's line differ in the label of that example "
        f"(shot {match_of(about.shots)}); how often the answer is the one that this label asks "
        "for. Then the mean change of accuracy at later shots by a corrupted label, where it is on "
        "the query's line and where it is not.",
        table(
            ["", "follows clean", "follows corrupt", "change, on the line", "change, elsewhere"],
            follows,
        ),
        *_figure("Accuracy after one corrupted label", "corruption", about),
        *_figure("Accuracy after several corrupted labels", "several", about),
    ]


def _heads_page(own: dict[str, Any], about: About) -> list[str]:
    attention, features, ratio = own["attention"], own["head_features"], own["ratio_similarity"]
    layer_L = _layers(own)
    names = head_names(layer_L, np.shape(attention["previous"]["mean"])[1])
    lines = [
        [
            name,
            *(_n(attention[score]["mean"][i][j]) for score in ATTENTION),
            *(_n(features["explained"][i][j][c]) for c in range(2)),
            *(
                f"{_n(features[kind]['mean'][i][j])} ({_n(features[kind]['shuffled_95'][i][j])})"
                for kind in FITS
            ),
            *_ratio_cells(ratio, i, j),
        ]
        for name, (i, j) in names.items()
    ]
    baseline = ["uniform", *(_n(attention[score]["uniform"]) for score in ATTENTION), *[""] * 6]
    streams = [
        [f"stream after block {layer}", *[""] * 9, *_ratio_cells(ratio, i, -1)]
        for i, layer in enumerate(layer_L)
    ]
    frequency_LHC2 = features["log"]["components_frequencies"]
    circles = ", ".join(
        " ".join([name, *(f"({x}, {y})" for x, y in frequency_LHC2[i][j][:2])])
        for name, (i, j) in names.items()
    )
    return [
        "## Heads",
        "Attention scores, of uniform attention in the first row; shares of the variance in the "
        "first two components of a head's output at x and y of shot "
        f"{about.feature_shot} over all {features['inputs']} inputs; R² of their circle of circles "
        f"({features['degrees_of_freedom']} degrees of freedom), with 95 % of shuffled tokens in "
        "brackets; cosine similarity within ratios minus between. Scores are means over "
        "repetitions, shuffles and p-values of the first alone; those of x/y rename x and y alike "
        "(at z, which depends on both, that is no test)"
        + (
            ". At p = 5 they part the ratios in 3 ways, and so many keep the fits of circles and "
            "embedding, that none of it is a test."
            if about.modulus == 5
            else ", to other ratios than the true ones."
        ),
        table(
            [
                "head",
                "previous",
                "own x",
                "first",
                "same ratio",
                "ratio choice",
                "component 1",
                "2",
                "circle, log",
                "circle, additive",
                "x/y at y",
                "x/y at z",
            ],
            [baseline, *lines, *streams],
        ),
        "Frequencies of x and of y that fit components 1 and 2 best, in the log basis (of a circle "
        f"both components have the same): {circles}.",
        *_figure("Attention on one sequence", "attention", about),
        *_figure("Attention scores", "heads", about),
        *_figure("Attention by offset", "offsets", about),
        *_figure("Circle of circles", "circle", about),
        *_figure("Cosine similarity of all inputs", "similarity", about),
    ]


def _ratio_cells(ratio: dict[str, Any], layer: int, column: int) -> list[str]:
    at_y, at_z = (_n(ratio[place]["mean"][layer][column]) for place in "yz")
    return [f"{at_y} (p = {_n(ratio['y']['p_value'][layer][column])})", at_z]


def _embedding_page(own: dict[str, Any], about: About) -> list[str]:
    embedding = own["embedding"]
    rows = [
        [
            kind,
            " ".join(_n(x) for x in embedding[kind]["share_by_frequency"]),
            _n(embedding[kind]["shuffled_95"]),
            _n(embedding[kind]["p_value"]),
            " ".join(_n(x) for x in embedding[kind]["components"]),
        ]
        for kind in FITS
    ]
    return [
        "## Embedding",
        f"Share of the variance by frequency 1, 2, ...; the zero token has "
        f"{_n(embedding['zero_token'])} in the log basis. The first components explain "
        + ", ".join(_n(x) for x in embedding["explained"])
        + ".",
        table(["basis", "shares", "shuffled, 95 %", "p", "best share of components 1, 2, 3"], rows),
        *_figure("Components of the embedding", "embedding", about),
        *_figure("Spectrum of the embedding", "spectrum", about),
    ]


def _neurons_page(own: dict[str, Any], about: About) -> list[str]:
    neurons = own["neurons"]
    rows = [
        [
            str(layer),
            _n(neurons["live"][i]),
            *(
                _n(neurons[kind][part][i])
                for kind in FITS
                for part in ("mean_r2", "mean_r2_shuffled", "beyond_shuffled", "best_r2")
            ),
            *("(" + ", ".join(map(str, neurons[k]["best_mode"][i])) + ")" for k in FITS),
        ]
        for i, layer in enumerate(_layers(own))
    ]
    return [
        "## Neurons",
        f"Of {neurons['number']} neurons in each layer at y of shot {about.feature_shot}: the best "
        "mode (t, u) of x and y has R² (of the first repetition); shuffled tokens; share of live "
        f"neurons beyond their own shuffles, p at most .05 ({_by_chance(about)}"
        + (
            ", where 1 of 6 renamings, or of 15 in the log basis, keeps all fits)."
            if about.modulus == 5
            else ")."
        ),
        table(
            [
                "layer",
                "live",
                *(
                    f"{kind}: {part}"
                    for kind in FITS
                    for part in ("mean R²", "shuffled", "beyond", "best")
                ),
                *(f"{kind}: best mode" for kind in FITS),
            ],
            rows,
        ),
        *_figure("Best fits of the neurons", "neurons", about),
    ]


def _interventions_page(own: dict[str, Any], about: About) -> list[str]:
    ablation, patching, lens = own["ablation"], own["patching"], own["logit_lens"]
    heads = ablation["heads"]
    lines = [
        [
            name,
            *(_i(part[kind][name]["unseen_train"]) for kind in interventions.KINDS),
            *(_i(part["mean"][name][x]) for x in ("seen_train", "seen_heldout")),
            _i(part["mean"][name]["unseen_heldout"]),
        ]
        for part in (heads, ablation["heads_together"])
        for name in part["zero"]
    ]
    groups = ablation["neuron_groups"]
    group_lines = [
        [name, *(_i(groups[kind][name]["unseen_train"]) for kind in interventions.KINDS)]
        for name in groups["zero"]
    ]
    if patching["effect_beyond_zero"]:
        at = 3 * match_of(about.shots) + 2
        stream = [
            [str(layer), *(_at(patching, "share_residual", i, x) for x in (at, -1))]
            for i, layer in enumerate(_layers(own))
        ]
        names = head_names(_layers(own), len(patching["share_head"][0]))
        patched = [
            "Put back into the corrupt run, the clean stream at the z of that example, or at the "
            "last position, recovers this share of it:",
            table(["after block", "at z of the example", "at the query's y"], stream),
            "and the clean output of a head (all positions): "
            + ", ".join(f"{name} {_at(patching, 'share_head', *x)}" for name, x in names.items())
            + ".",
            *_figure("Share of the effect recovered", "patching", about),
        ]
    else:
        patched = ["Its interval contains 0: there is nothing to recover."]
    singles = ", ".join(
        f"{row['neuron']} {_i(row['loss'])}" for row in ablation["single_neurons"][:5]
    )
    return [
        "## What it needs",
        "Change of accuracy at the last shot with one head silenced, or several (+): on unseen "
        "tasks, train inputs, by zero, mean and resample; then by mean on the other sets.",
        table(
            [
                "head",
                *interventions.KINDS,
                "seen, train (mean)",
                "seen, held-out (mean)",
                "unseen, held-out (mean)",
            ],
            lines,
        ),
        *_figure("Heads silenced", "ablation", about),
        *_figure("Heads silenced, by number of examples", "ablation_shots", about),
        "Groups of neurons, unseen tasks, train inputs: the tenth of a layer with the best fit in "
        "each basis, a tenth at random, all.",
        table(["layer.group", *interventions.KINDS], group_lines),
        f"Single neurons whose mean in their place costs most loss (nats): {singles}.",
        "## Where the answer is",
        "Prompts that differ in the label of the one example on the query's line: the logit of the "
        "clean answer minus that of the corrupt one differs by "
        f"{_i(patching['effect_logits'])} between the two.",
        *patched,
        "Read by the final norm and unembedding before the first block and after each (unseen "
        "tasks, train inputs, last shot): accuracy "
        + "; loss ".join(
            ", ".join(_at(lens, name, i) for i in range(len(lens[name])))
            for name in ("accuracy_by_layer", "loss_by_layer")
        )
        + " nats.",
        *_figure("Logit lens", "lens", about),
    ]


def _depth_page(own: dict[str, Any], about: About) -> list[str]:
    depth = own["latent_depth"]
    lines = [
        [str(g), _n(depth["expected_depth_G"][g]), str(depth["kept_G"][g])]
        for g in range(len(depth["kept_G"]))
    ]
    return [
        "## Latent depth",
        "Everything above is with the rounded gates of a task in no group. Blocks that each group "
        "expects and keeps:",
        table(["group", "expected depth", "kept"], lines),
        *_figure("Inclusion by group and layer", "posterior", about),
    ]


def _by_chance(about: About) -> str:
    """Share of neurons whose p-value is at most .05."""
    return "no test at p = 5" if about.modulus == 5 else ".05 by chance"


def _layers(own: Mapping[str, Any]) -> Sequence[int]:
    return own.get("open_layers", range(len(own["neurons"]["live"])))


def _n(value: float | str | None) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "-"
    # Adding 0 makes the -0.0 that rounding leaves a plain 0.
    return value if isinstance(value, str) else f"{round(float(value), 2) + 0.0:.2f}"


def _i(values: Sequence[float | None]) -> str:
    mean, low, high = values
    return _n(mean) if _n(low) == "-" else f"{_n(mean)} [{_n(low)}, {_n(high)}]"


def _at(scores: Mapping[str, Any], name: str, *index: int) -> str:
    """One number of a table with its interval."""
    keys = (name, f"{name}_low", f"{name}_high")
    return _i([np.array(scores[key], float)[index] for key in keys])


def _figure(title: str, name: str, about: About) -> list[str]:
    return [f"![{title}](figures/{name}.png)"] if about.figures else []

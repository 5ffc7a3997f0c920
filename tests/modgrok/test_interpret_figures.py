"""Figures of what was learned: what is drawn is what was given."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from modgrok import fourier
from modgrok import interpret_figures as figures

P = 5
RNG = np.random.default_rng(0)


def images(figure):
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]


def test_maps_of_heads_are_in_the_order_of_layers():
    weight_LHTT = RNG.uniform(size=(2, 3, 4, 4))
    found = images(figures.attention_maps(weight_LHTT))
    np.testing.assert_array_equal(found[:6], weight_LHTT.reshape(6, 4, 4))
    score = {"previous": RNG.uniform(size=(2, 3)), "own x": RNG.uniform(size=(2, 3))}
    figure = figures.head_scores(score)
    np.testing.assert_array_equal(images(figure)[:2], list(score.values()))
    assert [text.get_text() for text in figure.axes[0].texts][:2] == [
        f"{x:.2f}" for x in score["previous"][0, :2]
    ]


def test_layers_have_the_numbers_that_are_given():
    per_head = figures.attention_maps(np.ones((2, 1, 4, 4)), [3, 6])
    offsets = figures.attention_by_offset(np.ones((2, 1, 3, 5)), [3, 6])
    for figure in (per_head, offsets):
        assert [axes.get_title() for axes in figure.axes[:2]] == [
            "layer 3, head 0",
            "layer 6, head 0",
        ]
    share = {"log": np.ones((2, 30))}
    neurons = figures.neuron_fits(share, share, layer_L=[3, 6])
    assert [axes.get_title() for axes in neurons.axes] == [f"log basis, layer {i}" for i in (3, 6)]
    tables = figures.head_scores({"own x": np.ones((2, 1))}, [3, 6])
    patched = figures.patching_map(np.ones((2, 8)), match=1, layer_L=[3, 6])
    for figure in (tables, patched):
        assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["3", "6"]


def test_offsets_have_a_line_for_each_kind_of_query():
    offset_LH3T = RNG.uniform(size=(1, 2, 3, 5))
    figure = figures.attention_by_offset(offset_LH3T)
    for head in range(2):
        for phase, line in enumerate(figure.axes[head].lines):
            np.testing.assert_array_equal(line.get_ydata(), offset_LH3T[0, head, phase])
            assert line.get_label() == "xyz"[phase]


def test_circle_of_circles_colours_logarithms_and_marks_zero():
    score_N2 = RNG.normal(size=(P**2, 2))
    figure = figures.circle_of_circles(score_N2, modulus=P, title="head 1.0")
    log_p = fourier.discrete_log(P)
    for axes, token_N in zip(figure.axes[:2], np.divmod(np.arange(P**2), P), strict=True):
        dots, zeros = axes.collections
        np.testing.assert_array_equal(dots.get_offsets(), score_N2[token_N > 0])
        np.testing.assert_array_equal(dots.get_array(), log_p[token_N[token_N > 0]])
        np.testing.assert_array_equal(zeros.get_offsets(), score_N2[token_N == 0])
    with pytest.raises(ValueError, match=r"shape \(4, 2\), expected \(25, 2\)"):
        figures.circle_of_circles(score_N2[:4], modulus=P)


def test_embedding_names_tokens():
    figure = figures.embedding_components(RNG.normal(size=(P, 3)), modulus=P)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts[:3] == ["0", "1 (log 0)", f"2 (log {fourier.discrete_log(P)[2]})"]


def test_spectrum_and_neurons():
    figure = figures.token_spectrum(
        [0.2, 0.5], [0.1, 0.9], zero=0.3, limit={"log": 0.6, "additive": 0.7}
    )
    heights = [[bar.get_height() for bar in axes.patches] for axes in figure.axes]
    assert heights == [[0.2, 0.5, 0.3], [0.1, 0.9]]
    assert figure.axes[1].lines[0].get_ydata()[0] == 0.7
    share = {"log": RNG.uniform(size=(2, 30)), "additive": RNG.uniform(size=(2, 30))}
    null = {name: RNG.uniform(size=(4, 2, 30)) for name in share}
    assert len(figures.neuron_fits(share, null).axes) == 4


def test_grids_have_x_to_the_right():
    grid_Kpp = np.zeros((2, P, P))
    grid_Kpp[0, 3, 1] = 1
    figure = figures.shot_grids({"network": grid_Kpp, "mask": grid_Kpp > 0}, [1, 4])
    assert images(figure)[0][1, 3] == 1
    assert [axes.get_title() for axes in figure.axes[:2]] == ["k = 1", "k = 4"]
    assert figure.axes[2].get_ylabel() == "mask"


def test_effects_draw_means_and_intervals():
    effect = {
        "zero": ([-0.1, 0.2], [-0.2, 0.1], [0.0, 0.3]),
        "mean": ([0, 0], [np.nan] * 2, [np.nan] * 2),
    }
    figure = figures.effects_of_heads(effect, [3], 2)
    axes = figure.axes[0]
    assert [bar.get_height() for bar in axes.patches] == [-0.1, 0.2, 0, 0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["3.0", "3.1"]


def test_other_maps_and_curves():
    share_LT = RNG.uniform(size=(2, 8))
    np.testing.assert_array_equal(images(figures.patching_map(share_LT, match=1))[0], share_LT)
    maps = {"network": RNG.uniform(size=(3, 3)), "Bayes": RNG.uniform(size=(3, 3))}
    for draw in (figures.corruption_maps, figures.similarity_maps):
        np.testing.assert_allclose(images(draw(maps))[:2], list(maps.values()), rtol=1e-6)
    figure = figures.curves({"a": [1, 2], "b": [3, 4]}, xlabel="x", ylabel="y")
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == [[1, 2], [3, 4]]
    assert not figure.axes[0].collections
    figure = figures.curves(
        {"a": [1, 2], "b": [3, 4]}, {"b": ([2.5, 3.5], [3.5, 5])}, xlabel="x", ylabel="y"
    )
    (band,) = figure.axes[0].collections
    corners = {(0, 2.5), (1, 3.5), (1, 5), (0, 3.5)}
    assert set(map(tuple, band.get_paths()[0].vertices)) == corners


def test_importing_and_drawing_leave_pyplot_alone(tmp_path):
    script = """
import sys
from modgrok import interpret_figures as figures
assert "matplotlib" not in sys.modules
figures.curves({"a": [1, 2]}, xlabel="x", ylabel="y").savefig("a.png")
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
        check=True,
    )
    assert (tmp_path / "a.png").stat().st_size > 5000

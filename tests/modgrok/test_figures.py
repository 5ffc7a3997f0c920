"""What is drawn is what was given."""

import os
import pathlib
import subprocess
import sys

import matplotlib.colors
import numpy as np
import pytest

from modgrok import figures

P = 5


def lines(axes):
    """Label -> (x, y) of every line."""
    return {line.get_label(): np.array(line.get_data(), float) for line in axes.lines}


def curves(length=4):
    return {
        name: np.linspace(0.1 * i, 0.2 + 0.2 * i, length)
        for i, name in enumerate(figures.SET_NAMES)
    }


def test_training_curves_draw_what_was_recorded_and_skip_gaps():
    nan = np.nan
    history = {
        "step": [10, 20, 30, 40],
        "loss": [1.6, 1.2, nan, 0.4],
        "seen_train": [nan, 0.5, nan, 0.9],
        "seen_heldout": [nan, 0.3, nan, 0.4],
        "unseen_train": [nan, 0.2, nan, 0.8],
        "unseen_heldout": [nan, 0.25, nan, 0.35],
    }
    figure = figures.training_curves(history, modulus=P, best_step=40)
    top, bottom = figure.axes
    np.testing.assert_array_equal(lines(top)["training loss"], [[10, 20, 40], [1.6, 1.2, 0.4]])
    np.testing.assert_allclose(lines(top)["chance (ln p = 1.61)"][1], np.log(P))
    drawn = lines(bottom)
    for label, accuracy in {
        "seen tasks, train inputs": [0.5, 0.9],
        "seen tasks, held-out inputs": [0.3, 0.4],
        "unseen tasks, train inputs": [0.2, 0.8],
        "unseen tasks, held-out inputs": [0.25, 0.35],
    }.items():
        np.testing.assert_array_equal(drawn[label], [[20, 40], accuracy])
    np.testing.assert_allclose(drawn["chance (1/p = 0.200)"][1], 1 / P)
    for axes in figure.axes:
        np.testing.assert_array_equal(lines(axes)["best step (40)"][0], 40)
    assert "nats" in top.get_ylabel()
    assert "steps" in bottom.get_xlabel()


def test_training_curves_without_best_step_or_sets():
    figure = figures.training_curves({"step": [1, 2], "loss": [3.0, 2.0]}, modulus=P)
    top, bottom = figure.axes
    assert len(top.lines) == 2  # loss and chance
    assert list(lines(bottom)) == ["chance (1/p = 0.200)"]


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ({"loss": [1.0]}, "lacks the column step"),
        ({"step": [1], "accuracy": [1.0]}, "unknown name 'accuracy', expected one of step, loss"),
        ({"step": [1, 2], "loss": [1.0]}, r"history\['loss'\] has shape \(1,\), expected \(2,\)"),
    ],
)
def test_training_curves_refuse(history, message):
    with pytest.raises(ValueError, match=message):
        figures.training_curves(history, modulus=P)


def test_accuracy_by_shots_draws_sets_and_oracles():
    accuracy, bayes_S, ratio_S = (
        curves(),
        np.array([0.2, 0.4, 0.9, 1]),
        np.array([0.2, 0.3, 0.4, 0.5]),
    )
    (axes,) = figures.accuracy_by_shots(
        accuracy, modulus=P, bayes_S=bayes_S, ratio_matching_S=ratio_S
    ).axes
    drawn = lines(axes)
    wanted = {
        "seen tasks, train inputs": accuracy["seen_train"],
        "seen tasks, held-out inputs": accuracy["seen_heldout"],
        "unseen tasks, train inputs": accuracy["unseen_train"],
        "unseen tasks, held-out inputs": accuracy["unseen_heldout"],
        "Bayes-optimal": bayes_S,
        "Ratio Matching": ratio_S,
    }
    for label, curve_S in wanted.items():
        np.testing.assert_array_equal(drawn[label], [[0, 1, 2, 3], curve_S])  # from no example on
    assert set(drawn) - set(wanted) == {"chance (1/p = 0.200)"}
    assert all(tick == int(tick) for tick in axes.get_xticks())


@pytest.mark.parametrize("missing", figures.SET_NAMES)
def test_accuracy_by_shots_with_a_set_missing(missing):
    accuracy = curves()
    del accuracy[missing]
    (axes,) = figures.accuracy_by_shots(accuracy, modulus=P).axes
    assert len(axes.lines) == 4  # three sets and chance


def test_accuracy_by_shots_refuses_unknown_set():
    with pytest.raises(ValueError, match="unknown name 'train', expected one of seen_train"):
        figures.accuracy_by_shots({"train": [1.0]}, modulus=P)


def test_curves_differ_without_colour():
    (axes,) = figures.accuracy_by_shots(
        curves(), modulus=P, bayes_S=np.ones(4), ratio_matching_S=np.ones(4)
    ).axes
    looks = set()
    for line in axes.lines:
        grey = matplotlib.colors.to_rgb(line.get_color()) @ np.array([0.299, 0.587, 0.114])
        looks.add((round(float(grey), 1), line.get_linestyle(), line.get_marker()))
    assert len(looks) == len(axes.lines)


def test_task_map_places_tasks_and_marks_unseen():
    seen_W2, unseen_U2 = np.array([[0, 1], [4, 2], [3, 3]]), np.array([[1, 0], [2, 4]])
    figure = figures.task_map(seen_W2, [0.1, 0.2, 0.3], unseen_U2, [0.4, 0.5], modulus=P)
    axes, bar = figure.axes
    wanted = np.full((P, P), np.nan)  # row b, column a, b upwards
    wanted[1, 0], wanted[2, 4], wanted[3, 3], wanted[0, 1], wanted[4, 2] = 0.1, 0.2, 0.3, 0.4, 0.5
    (image,) = axes.images
    np.testing.assert_array_equal(image.get_array().filled(np.nan), wanted)
    assert image.get_clim() == (0, 1)
    assert image.origin == "lower"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("a", "b")
    assert "accuracy" in bar.get_ylabel()
    np.testing.assert_array_equal(axes.collections[0].get_offsets(), unseen_U2)
    assert "not evaluated" in axes.get_legend_handles_labels()[1]


def test_task_map_with_all_tasks_seen():
    task_W2 = np.array([(a, b) for a in range(P) for b in range(P)])
    axes, _ = figures.task_map(task_W2, np.ones(P * P), [], [], modulus=P).axes
    assert not axes.collections
    assert axes.get_legend_handles_labels()[1] == []


@pytest.mark.parametrize(
    ("unseen", "accuracy", "message"),
    [
        ([[1, 1]], [0.5, 0.5], r"unseen accuracy has shape \(2,\), expected \(1,\)"),
        ([[1, 5]], [0.5], "unseen tasks reach outside, expected from 0 to 4"),
        ([[-1, 0]], [0.5], "unseen tasks reach outside, expected from 0 to 4"),
    ],
)
def test_task_map_refuses(unseen, accuracy, message):
    with pytest.raises(ValueError, match=message):
        figures.task_map([[0, 0]], [1.0], unseen, accuracy, modulus=P)


def test_figures_can_be_saved_and_leave_pyplot_alone(tmp_path):
    script = """
import sys
from modgrok import figures
assert "matplotlib" not in sys.modules
sets = dict.fromkeys(figures.SET_NAMES, [0.1, 0.9])
figures.training_curves({"step": [1, 2], "loss": [2, 1], **sets}, modulus=5).savefig("a.png")
figures.accuracy_by_shots(sets, modulus=5).savefig("b.png")
figures.task_map([[0, 1]], [1.0], [[1, 0]], [0.5], modulus=5).savefig("c.png")
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
        check=True,
    )
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in "abc")

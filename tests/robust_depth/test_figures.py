"""What is drawn is what was given."""

import os
import pathlib
import subprocess
import sys

import matplotlib.colors
import numpy as np
import pytest

from robust_depth import figures

NAN, INF = np.nan, np.inf


def line(axes, label):
    """(x, y) of the line with this label."""
    (found,) = [line for line in axes.lines if line.get_label() == label]
    return np.array(found.get_data(), float)


def curves(axes, num_points):
    """(x, y) of the lines that hold this many points, in order."""
    drawn = [np.array(line.get_data(), float) for line in axes.lines]
    return [data for data in drawn if data.shape[1] == num_points]


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def colour(artist):
    return matplotlib.colors.to_hex(artist.get_color())


def edges(shade):
    """(x, low or high) corners of a shaded band."""
    return {(x, y) for path in shade.get_paths() for x, y in path.vertices}


def test_error_curves_draw_medians_with_quartiles():
    step_R = [0, 10, 20]
    error_T = np.array([0.9, 0.1, 0.7, 0.3, 0.5])  # out of order: quartiles .3, .5, .7
    error_TSR = error_T[:, None, None] * np.array([[1, 0.5, 0.25], [1, 1, 2]])
    (axes,) = figures.error_curves(
        step_R, error_TSR, ["N = 1", "N = 3"], title="both", threshold=0.05
    ).axes
    first, second = curves(axes, 3)
    np.testing.assert_allclose(first, [step_R, [0.5, 0.25, 0.125]])
    np.testing.assert_allclose(second, [step_R, [0.5, 0.5, 1]])
    shade, _ = axes.collections
    for x, scale in zip(step_R, [1, 0.5, 0.25], strict=True):
        heights = sorted({round(y, 6) for at, y in edges(shade) if at == x})
        assert heights == pytest.approx([0.3 * scale, 0.7 * scale])
    assert axes.get_yscale() == "log"
    assert axes.get_xscale() == "linear"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("steps", "relative error")
    assert axes.get_title() == "both"
    assert legend(axes) == ["N = 1", "N = 3", "success, 0.05"]
    np.testing.assert_allclose(line(axes, "success, 0.05")[1], 0.05)


def test_error_curves_have_the_colour_of_their_label():
    labels = ["a", "b", "c"]
    (axes,) = figures.error_curves([1, 2], np.ones((1, 3, 2)), labels, ylabel="loss").axes
    drawn = [line for line in axes.lines if len(line.get_xdata()) == 2]
    named = [line for line in axes.lines if line.get_label() in labels]
    assert [colour(line) for line in drawn] == [colour(line) for line in named]
    assert len({colour(line) for line in drawn}) == 3
    assert axes.get_ylabel() == "loss"
    assert legend(axes) == labels  # and no threshold


def test_trials_that_diverged_count_as_the_worst():
    """With 2 of 5 the median is the worst of the others; with 3 of 5 there is no line."""
    error_TSR = np.array([[0.1, 0.1], [0.2, 0.2], [0.3, INF], [NAN, NAN], [INF, NAN]])[:, None]
    (axes,) = figures.error_curves([0, 5], error_TSR, ["N = 2"]).axes
    (drawn,) = curves(axes, 2)
    np.testing.assert_array_equal(drawn, [[0, 5], [0.3, NAN]])
    for _, height in edges(axes.collections[0]):  # the upper quartile is infinite at both
        assert np.isfinite(height)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 2), r"error_TSR has shape \(4, 2\), expected \(trials, 1, 2\)"),
        ((4, 2, 2), r"shape \(4, 2, 2\), expected \(trials, 1, 2\): one curve for each label"),
        ((4, 1, 3), r"shape \(4, 1, 3\), expected \(trials, 1, 2\)"),
    ],
)
def test_error_curves_refuse(shape, message):
    with pytest.raises(ValueError, match=message):
        figures.error_curves([0, 1], np.ones(shape), ["one"])


def test_success_map_draws_the_rates_and_writes_them():
    rate_SF = np.array([[0, 0.25, 1], [0.5, 0.125, 0.75]])
    axes, bar = figures.success_map(rate_SF, [1, 3], [0.0, 0.1, 0.25]).axes
    (image,) = axes.images
    np.testing.assert_array_equal(image.get_array(), rate_SF)
    assert image.get_clim() == (0, 1)
    assert image.origin == "lower"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "0.1", "0.25"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["1", "3"]
    np.testing.assert_array_equal(axes.get_xticks(), [0, 1, 2])
    written = {text.get_position(): (text.get_text(), text.get_color()) for text in axes.texts}
    assert written == {
        (0, 0): ("0.00", "white"),
        (1, 0): ("0.25", "white"),
        (2, 0): ("1.00", "black"),
        (0, 1): ("0.50", "black"),
        (1, 1): ("0.12", "white"),
        (2, 1): ("0.75", "black"),
    }
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("outlier fraction", "depth N")
    assert axes.get_title() == "Share of trials that succeed"
    assert bar.get_ylabel() == "share"


def test_success_map_refuses():
    with pytest.raises(ValueError, match=r"rate_SF has shape \(3, 2\), expected \(2, 3\)"):
        figures.success_map(np.ones((3, 2)), [1, 3], [0.0, 0.1, 0.2], title="mine")


def test_drop_curves_draw_what_a_log_axis_can_show():
    radius_G = np.array([0.01, 0.1, 1])
    drops = {"balanced": [0, 1e-4, 0.3], "unbalanced": [1e-3, -1e-9, NAN]}
    (axes,) = figures.drop_curves(radius_G, drops, {"balanced": 2.988}).axes
    found = line(axes, "balanced, slope 2.99")
    np.testing.assert_array_equal(found, [radius_G, [NAN, 1e-4, 0.3]])
    np.testing.assert_array_equal(line(axes, "unbalanced"), [radius_G, [1e-3, NAN, NAN]])
    assert legend(axes) == ["balanced, slope 2.99", "unbalanced"]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("radius gamma", "drop")
    assert "l_inf ball" in axes.get_title()
    assert figures.drop_curves(radius_G, drops, {}, title="mine").axes[0].get_title() == "mine"


def test_entry_times_are_points_around_the_line_of_equality():
    predicted = {"N = 2": [100, 200], "N = 3": [50, 400]}
    measured = {"N = 3": [60, INF], "N = 2": [110, 300]}  # infinite: it never entered
    (axes,) = figures.entry_times(predicted, measured).axes
    np.testing.assert_array_equal(line(axes, "N = 2"), [[100, 200], [110, 300]])
    np.testing.assert_array_equal(line(axes, "N = 3"), [[50, 400], [60, INF]])
    for point in axes.lines[:2]:
        assert (point.get_linestyle(), point.get_marker() != "None") == ("None", True)
    np.testing.assert_array_equal(line(axes, "equal"), [[50, 400], [50, 400]])
    factors = [line.get_ydata() / line.get_xdata() for line in axes.lines[3:]]
    np.testing.assert_allclose(factors, [[0.75, 0.75], [1.25, 1.25]])
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "measured")
    assert legend(axes) == ["N = 2", "N = 3", "equal"]


def test_entry_times_of_runs_that_never_entered():
    (axes,) = figures.entry_times({"N = 1": [INF, NAN]}, {"N = 1": [INF, INF]}).axes
    assert legend(axes) == ["N = 1"]  # without a line of equality, which has no ends


def test_curves_differ_without_colour():
    names = [f"N = {depth}" for depth in range(1, 8)]
    (axes,) = figures.drop_curves([1, 2], dict.fromkeys(names, (1, 2)), {}).axes
    assert len({line.get_marker() for line in axes.lines}) == 7
    assert len({colour(line) for line in axes.lines}) == 7


def test_figures_can_be_saved_and_leave_pyplot_alone(tmp_path):
    script = """
import sys
from robust_depth import figures
assert "matplotlib" not in sys.modules
pair = {"one": [1, 2]}
figures.error_curves([0, 1], [[[1.0, 0.5]]], ["one"], threshold=0.1).savefig("a.png")
figures.success_map([[0.2, 0.8]], [1], [0.1, 0.2]).savefig("b.png")
figures.drop_curves([1, 2], pair, {"one": 2.0}).savefig("c.png")
figures.entry_times(pair, pair).savefig("d.png")
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
        check=True,
    )
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in "abcd")

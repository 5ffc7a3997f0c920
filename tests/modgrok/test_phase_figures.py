"""Maps hold the right runs, and figures what was asked for."""

import numpy as np
import pytest

from modgrok import phase_figures


def test_maps_average_seeds_and_leave_gaps():
    n_N, alpha_A, maps_4AN = phase_figures.grid_maps(
        [8, 4, 4], [0.8, 0.4, 0.4], [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]
    )
    assert n_N.tolist() == [4, 8]
    assert alpha_A.tolist() == [0.4, 0.8]
    np.testing.assert_array_equal(maps_4AN[0], [[0.5, np.nan], [np.nan, 1]])
    np.testing.assert_array_equal(maps_4AN[3], [[0.5, np.nan], [np.nan, 0]])


def test_maps_leave_diverged_runs_out():
    nan = np.nan
    _, _, maps_4AN = phase_figures.grid_maps(
        [4, 4, 8], [0.4] * 3, [[0.2, 0, 0, 0], [nan] * 4, [nan] * 4]
    )
    np.testing.assert_array_equal(maps_4AN[0], [[0.2, nan]])


@pytest.mark.parametrize("decays", [(0.3,), (0.3, 1.0)])
def test_figures_of_each_depth_and_decay(decays):
    grid = [(d, n, a, w) for d in (2, 3) for w in decays for a in (0.4, 0.8) for n in (4, 8, 12)]
    layers, num_tasks, fraction, decay = map(np.array, zip(*grid, strict=True))
    high_G4 = np.repeat((num_tasks > 4)[:, None], 4, axis=1).astype(float)
    drawn = phase_figures.all_figures(
        {
            "layers_G": layers,
            "num_tasks_G": num_tasks,
            "input_fraction_G": fraction,
            "weight_decay_G": decay,
            "best_step_G": np.full(len(grid), 20),
            "best_G4": high_G4,
            "last_G4": np.full((len(grid), 4), np.nan),  # diverged, which is drawn as nothing
            "modulus": 5,
            "threshold": 0.5,
            "select": "unseen_train",
        }
    )
    assert len(drawn) == 3 * 2 * len(decays)
    figure = drawn["phase_L2_best" if len(decays) == 1 else "phase_L2_w1.0_best"]
    panels = figure.axes[:4]
    assert [len(axes.texts) for axes in panels] == [6] * 4
    for axes in panels:  # one line, from the bottom to the top, after the first column
        sides = axes.collections[0].get_segments()
        assert [side[:, 0].tolist() for side in sides] == [[0.5, 0.5]] * 2
    last = drawn["phase_L3_last" if len(decays) == 1 else "phase_L3_w0.3_last"]
    assert not last.axes[0].texts
    for figure in drawn.values():
        figure.canvas.draw()

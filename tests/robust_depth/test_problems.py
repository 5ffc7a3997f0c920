"""Problems: what is corrupted, by what, and that nothing else is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_depth import problems
from robust_depth.problems import sample_matrix_sensing, sample_regression, sample_relu_teacher

KEY = jax.random.key(3)
SIZES = {"num_rows": 40, "dim": 30, "sparsity": 4}


def excess(problem):
    """y - X theta in float64."""
    x_MD, y_M, theta_D = (np.asarray(part, "float64") for part in problem)
    return y_M - x_MD @ theta_D


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.3, 0.99])
@pytest.mark.parametrize("kind", problems.OUTLIERS)
def test_as_many_rows_are_corrupted_as_asked(kind, fraction):
    problem = sample_regression(KEY, **SIZES, outlier_fraction=fraction, outlier_kind=kind)
    assert (np.abs(excess(problem)) > 1e-4).sum() == round(fraction * 40)


def test_gaussian_outliers_have_their_size():
    problem = sample_regression(
        KEY, num_rows=20_000, dim=3, sparsity=1, outlier_fraction=0.5, outlier_scale=7.0
    )
    bad_M = excess(problem)
    bad_M = bad_M[np.abs(bad_M) > 1e-3]
    assert bad_M.std() == pytest.approx(7, rel=0.03)
    assert abs(bad_M.mean()) < 0.3


def test_flipped_signs_are_against_the_measurement():
    problem = sample_regression(KEY, **SIZES, outlier_fraction=0.2, outlier_kind="sign_flip")
    off_M, clean_M = excess(problem), np.asarray(problem.x_MD @ problem.theta_D)
    bad_M = np.abs(off_M) > 1e-3
    np.testing.assert_allclose(off_M[bad_M], -10 * np.sign(clean_M[bad_M]), rtol=1e-5)


@pytest.mark.parametrize("sparsity", [4, 20])
def test_adversarial_rows_agree_on_another_sparse_vector(sparsity):
    sizes = SIZES | {"sparsity": sparsity, "num_rows": 200}
    problem = sample_regression(KEY, **sizes, outlier_fraction=0.4, outlier_kind="adversarial")
    off_M = excess(problem)
    bad_M = np.abs(off_M) > 1e-3
    other_D, _, _, _ = np.linalg.lstsq(np.asarray(problem.x_MD)[bad_M], off_M[bad_M], rcond=None)
    np.testing.assert_allclose(np.asarray(problem.x_MD)[bad_M] @ other_D, off_M[bad_M], atol=1e-3)
    assert np.linalg.norm(other_D) == pytest.approx(10, rel=1e-4)
    support = np.abs(other_D) > 1e-3
    assert support.sum() == sparsity
    if 2 * sparsity <= 30:
        assert not (support & (np.asarray(problem.theta_D) != 0)).any()


@pytest.mark.parametrize("truth", problems.TRUTHS)
def test_the_truth_is_sparse_with_sizes_in_the_range(truth):
    keys = jax.random.split(KEY, 50)
    sample = lambda key: sample_regression(key, **SIZES, truth=truth, magnitude=(0.5, 2.0))  # noqa: E731
    theta_TD = np.asarray(jax.jit(jax.vmap(lambda key: sample(key).theta_D))(keys))
    assert ((theta_TD != 0).sum(1) == 4).all()
    sizes = np.abs(theta_TD[theta_TD != 0])
    assert 0.5 <= sizes.min() < 0.6
    assert 1.9 < sizes.max() <= 2
    share = (theta_TD[theta_TD != 0] > 0).mean()
    assert share == 1 if truth == "nonnegative" else 0.3 < share < 0.7
    assert len(np.unique(np.nonzero(theta_TD)[1])) == 30  # no coordinate is left out


def test_fractions_share_everything_else_and_their_rows_are_nested():
    """So a sweep over fractions changes the corruption alone."""
    fractions = jnp.array([0.1, 0.3])
    sample = lambda fraction: sample_regression(KEY, **SIZES, outlier_fraction=fraction)  # noqa: E731
    many = jax.tree.map(np.asarray, jax.jit(jax.vmap(sample))(fractions))
    few, more = (jax.tree.map(lambda x, i=i: x[i], many) for i in (0, 1))
    np.testing.assert_array_equal(few.x_MD, more.x_MD)
    bad_few_M, bad_more_M = (np.abs(excess(p)) > 1e-4 for p in (few, more))
    assert (bad_few_M <= bad_more_M).all()
    assert (bad_few_M.sum(), bad_more_M.sum()) == (4, 12)


def test_noise_is_on_every_row():
    problem = sample_regression(KEY, **SIZES, outlier_fraction=0.0, noise_scale=0.1)
    off_M = excess(problem)
    assert (off_M != 0).all()
    assert 0.05 < off_M.std() < 0.2


@pytest.mark.parametrize("positive", [False, True])
def test_matrix_sensing(positive):
    problem = sample_matrix_sensing(
        KEY, num_rows=50, dim=6, rank=2, outlier_fraction=0.2, positive=positive
    )
    truth = np.asarray(problem.theta_D).reshape(6, 6)
    s_K = np.linalg.svd(truth, compute_uv=False)
    assert s_K[1] > 0.05
    assert s_K[2] < 1e-6
    assert np.linalg.norm(truth) == pytest.approx(1, rel=1e-5)
    if positive:
        np.testing.assert_allclose(truth, truth.T, atol=1e-6)
        assert np.linalg.eigvalsh(truth).min() > -1e-6
    assert (np.abs(excess(problem)) > 1e-4).sum() == 10


def test_relu_teacher_has_clean_test_labels_of_variance_near_one():
    sizes = {"num_rows": 500, "dim": 8, "width": 50, "num_test": 300}
    clean = sample_relu_teacher(KEY, **sizes, outlier_fraction=0.0)
    dirty = sample_relu_teacher(KEY, **sizes, outlier_fraction=0.2)
    np.testing.assert_array_equal(clean.test_y_M, dirty.test_y_M)
    assert (np.abs(np.asarray(clean.y_M - dirty.y_M)) > 1e-5).sum() == 100
    keys = jax.random.split(KEY, 40)
    sample = jax.jit(jax.vmap(lambda key: sample_relu_teacher(key, **sizes).test_y_M))
    assert 0.5 < np.square(sample(keys)).mean() < 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_rows": 0}, "num_rows=0, expected a whole number, at least 1"),
        ({"dim": 2.5}, "dim=2.5, expected a whole number"),
        ({"sparsity": 31}, "sparsity=31, expected 1 to dim=30"),
        ({"outlier_fraction": 1.0}, "outlier_fraction=1.0, expected from 0 to less than 1"),
        ({"outlier_fraction": -0.1}, "outlier_fraction=-0.1, expected"),
        ({"outlier_kind": "loud"}, "outlier_kind='loud', expected one of gaussian, sign_flip"),
        ({"truth": "positive"}, "truth='positive', expected one of nonnegative, signed"),
    ],
)
def test_wrong_requests(changes, words):
    with pytest.raises(ValueError, match=words):
        sample_regression(KEY, **SIZES | changes)


def test_a_rank_beyond_the_dimension():
    with pytest.raises(ValueError, match="rank=4, expected 1 to dim=3"):
        sample_matrix_sensing(KEY, num_rows=9, dim=3, rank=4)


def test_what_is_not_finite_is_found():
    problem = sample_regression(KEY, **SIZES)
    problems.check_finite(problem)
    broken = problem._replace(x_MD=problem.x_MD.at[2, 5].set(jnp.nan))
    with pytest.raises(ValueError, match=r"x_MD\[2, 5\] is nan, expected finite"):
        problems.check_finite(broken)
    jax.jit(problems.check_finite)(broken)  # a trace does not know

"""Against scikit-learn's own estimators with their exact solvers."""

import jax
import numpy as np
import pytest
import scipy.sparse

sklearn = pytest.importorskip("sklearn")

from sklearn.decomposition import PCA as DensePCA  # noqa: E402
from sklearn.decomposition import TruncatedSVD as ArpackSVD  # noqa: E402
from sklearn.utils.estimator_checks import check_estimator  # noqa: E402

from isvd import operators, spmm  # noqa: E402
from isvd.estimators import PCA, TruncatedSVD  # noqa: E402


@pytest.fixture(scope="module")
def counts():
    """A sparse matrix with columns of unlike means, so that centring matters."""
    rng = np.random.default_rng(0)
    a_MN = rng.poisson(rng.uniform(0, 1, size=12), size=(40, 12)) * rng.uniform(1, 3, size=12)
    return scipy.sparse.csr_array(a_MN)


def forms(counts):
    return {
        "array": counts.toarray(),
        "csr": counts,
        "csc matrix": scipy.sparse.csc_matrix(counts),
        "operator": spmm.sparse(counts),
    }


@pytest.mark.parametrize("form", ["array", "csr", "csc matrix", "operator"])
def test_principal_components(counts, form):
    with jax.enable_x64(True):
        given = forms(counts)[form]
        ours = PCA(3, random_state=0)
        scores = ours.fit_transform(given)
        wanted = DensePCA(3, svd_solver="full").fit(counts.toarray())
        turn = np.sign((ours.components_ * wanted.components_).sum(1))
        np.testing.assert_allclose(ours.components_ * turn[:, None], wanted.components_, atol=1e-9)
        np.testing.assert_allclose(ours.mean_, wanted.mean_)
        np.testing.assert_allclose(ours.singular_values_, wanted.singular_values_)
        np.testing.assert_allclose(ours.explained_variance_, wanted.explained_variance_)
        ratio = ours.explained_variance_ratio_
        # The total variance of an operator is estimated, by 256 samples.
        loose = 0.15 if form == "operator" else 1e-9
        np.testing.assert_allclose(ratio, wanted.explained_variance_ratio_, rtol=loose)
        np.testing.assert_allclose(scores * turn, wanted.transform(counts.toarray()), atol=1e-8)
        np.testing.assert_allclose(ours.transform(given), scores, atol=1e-8)
        back = ours.inverse_transform(scores)
        np.testing.assert_allclose(
            back, wanted.inverse_transform(wanted.transform(counts.toarray())), atol=1e-8
        )
        assert ours.residuals_.max() < 1e-8
        assert list(ours.get_feature_names_out()) == ["pca0", "pca1", "pca2"]


def test_truncated_svd(counts):
    with jax.enable_x64(True):
        ours = TruncatedSVD(3, random_state=np.random.RandomState(0)).fit(counts)
        wanted = ArpackSVD(3, algorithm="arpack", random_state=0).fit(counts)
        np.testing.assert_allclose(ours.singular_values_, wanted.singular_values_)
        np.testing.assert_allclose(
            ours.explained_variance_ratio_, wanted.explained_variance_ratio_, rtol=1e-7
        )
        turn = np.sign((ours.components_ * wanted.components_).sum(1))
        np.testing.assert_allclose(
            ours.transform(counts) * turn, wanted.transform(counts), atol=1e-7
        )


def standing_far_off(form):
    """Data whose means are far larger than its deviations, or (coo) with entries stored twice."""
    x_MN = np.random.default_rng(0).normal(size=(100, 8)) * np.linspace(1, 3, 8)
    if form == "array":
        return x_MN + 2000.0
    if form == "csr":
        return scipy.sparse.csr_array((x_MN + 1e4) * (np.arange(8) != 3))
    entry = np.nonzero(x_MN)
    return scipy.sparse.coo_array((np.tile(x_MN[entry], 2), np.tile(entry, 2)), x_MN.shape)


@pytest.mark.parametrize("form", ["array", "csr", "coo"])
@pytest.mark.parametrize("centers", [True, False])
def test_shares_of_the_variance_in_float32(form, centers):
    """The total is a sum of squares in float64, whatever the type of the products."""
    given = standing_far_off(form)
    whole = given if form == "array" else given.toarray()
    ours = (PCA if centers else TruncatedSVD)(3, random_state=0)
    before = given.copy()
    got = ours.fit(given).explained_variance_ratio_
    if centers:
        wanted = DensePCA(3, svd_solver="full").fit(whole).explained_variance_ratio_
    else:
        wanted = ArpackSVD(3, algorithm="arpack").fit(whole).explained_variance_ratio_
    np.testing.assert_allclose(got, wanted, rtol=2e-3)
    assert ours.mean_.dtype == "float32"
    if form != "array":
        assert given.nnz == before.nnz


def test_constant_features_explain_no_more_than_all():
    """What is left is rounding, of another size in the components than in the total."""
    for estimator in (PCA, TruncatedSVD):
        fitted = estimator(1, random_state=0).fit(np.full((1000, 3), 0.1))
        assert 0 <= fitted.explained_variance_ratio_[0] <= 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("estimator", [TruncatedSVD, PCA])
def test_conventions_of_scikit_learn(estimator):
    with jax.enable_x64(True):
        results = check_estimator(estimator(1, random_state=0), on_fail=None)
    failed = {r["check_name"]: r["exception"] for r in results if r["status"] == "failed"}
    assert not failed
    assert sum(r["status"] == "passed" for r in results) > 40


def test_wrong_requests(counts):
    with pytest.raises(ValueError, match="n_components=13, expected a whole number from 1 to 12"):
        PCA(13).fit(counts)
    with pytest.raises(ValueError, match="n_samples=1, expected at least 2: one has no spread"):
        PCA(1).fit(operators.ones(1, 4))
    fitted = TruncatedSVD(2).fit(counts)
    with pytest.raises(ValueError, match="X has 11 features, but TruncatedSVD is expecting 12"):
        fitted.transform(operators.ones(3, 11))
    with pytest.raises(ValueError, match=r"X has shape \(3, 5\), expected \(M, 2\)"):
        fitted.inverse_transform(np.ones((3, 5)))
    with pytest.raises(ValueError, match="X has dtype complex64, expected a real floating type"):
        PCA(1).fit(operators.ones(5, 4, "complex64"))
    broken = counts.copy()
    broken.data[0] = np.nan
    with pytest.raises(ValueError, match="contains NaN"):
        PCA(1).fit(broken)
    for state in (np.random.default_rng(0), "a", 1.5):
        with pytest.raises(ValueError, match="cannot be used to seed"):
            PCA(1, random_state=state).fit(counts)

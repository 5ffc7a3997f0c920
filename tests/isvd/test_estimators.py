"""Against scikit-learn's own estimators with their exact solvers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from jax.experimental import sparse as jax_sparse

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


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_large_mean_takes_no_digits_from_the_components(dtype):
    """Of 1e4 float32 holds thousandths, of the deviations from it ten millionths."""
    rng = np.random.default_rng(3)
    x_MN = (1e4 + rng.normal(size=(60, 30)) * np.linspace(0.5, 3, 30)).astype(dtype)
    other_MN = (1e4 + rng.normal(size=(7, 30))).astype(dtype)
    wanted = DensePCA(3, svd_solver="full").fit(x_MN.astype("float64"))
    ours = PCA(3, random_state=0)
    scores_MK = ours.fit_transform(x_MN)
    assert scores_MK.dtype == ours.mean_.dtype == "float32"
    np.testing.assert_allclose(ours.explained_variance_, wanted.explained_variance_, rtol=3e-6)
    turn_K = np.sign((ours.components_ * wanted.components_).sum(1))
    for got_MK, given_MN in (
        (scores_MK, x_MN),
        (ours.transform(x_MN), x_MN),
        (ours.transform(other_MN), other_MN),
    ):
        np.testing.assert_allclose(got_MK * turn_K, wanted.transform(given_MN), atol=1e-4)


@pytest.mark.parametrize("scale", [1e25, 1e-25])
@pytest.mark.parametrize("form", ["array", "csr", "operator"])
@pytest.mark.parametrize("estimator", [PCA, TruncatedSVD])
def test_shares_of_the_variance_at_scales_without_squares_in_float32(
    counts, estimator, form, scale
):
    scaled = counts * scale
    given = {"array": scaled.toarray(), "csr": scaled, "operator": spmm.sparse(scaled)}[form]
    plain = {"array": counts.toarray(), "csr": counts, "operator": spmm.sparse(counts)}[form]
    got, wanted = (estimator(3, random_state=0).fit(x) for x in (given, plain))
    share_K = got.explained_variance_ratio_
    assert share_K.dtype == got.explained_variance_.dtype == "float32"
    np.testing.assert_allclose(share_K, wanted.explained_variance_ratio_, rtol=1e-4)
    np.testing.assert_allclose(got.singular_values_, wanted.singular_values_ * scale, rtol=1e-4)


def test_sparse_matrices_of_jax(counts):
    bcoo = jax_sparse.BCOO.from_scipy_sparse(counts)
    wanted = PCA(3, random_state=0).fit(spmm.sparse(counts))
    for given in (bcoo, jax_sparse.BCSR.from_bcoo(bcoo)):
        got = PCA(3, random_state=0).fit(given)
        np.testing.assert_allclose(got.components_, wanted.components_, atol=1e-5)
        np.testing.assert_allclose(got.transform(given), wanted.transform(counts), atol=1e-4)
    with pytest.raises(ValueError, match="expected a scipy sparse matrix, a BCOO or a BCSR, not"):
        PCA(1).fit(jax_sparse.COO.fromdense(jnp.eye(3)))


@pytest.mark.parametrize("centers", [True, False])
def test_components_given_as_a_sparse_matrix(counts, centers):
    fitted = (PCA if centers else TruncatedSVD)(3, random_state=0).fit(counts)
    scores_MK = np.array([[1.0, 0, 2], [0, 0, 3], [0, -1, 0]])
    wanted = scores_MK @ fitted.components_ + fitted.mean_
    for layout in (np.asarray, scipy.sparse.csr_array, scipy.sparse.coo_matrix, jnp.asarray):
        got = fitted.inverse_transform(layout(scores_MK))
        assert isinstance(got, np.ndarray)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


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
    with pytest.raises(
        ValueError, match="n_components=13, expected from 1 to 12, the lesser of n_s"
    ):
        PCA(13).fit(counts)
    with pytest.raises(ValueError, match="n_samples=1, expected at least 2: one has no spread"):
        PCA(1).fit(operators.ones(1, 4))
    fitted = TruncatedSVD(2).fit(counts)
    with pytest.raises(ValueError, match="X has 11 features, but TruncatedSVD is expecting 12"):
        fitted.transform(operators.ones(3, 11))
    with pytest.raises(ValueError, match=r"X has shape \(3, 5\), expected \(M, 2\)"):
        fitted.inverse_transform(np.ones((3, 5)))
    with pytest.raises(ValueError, match=r"could not convert string|convert array of"):
        fitted.inverse_transform([["a", "b"]])
    with pytest.raises(ValueError, match="X has dtype complex64, expected a real floating type"):
        PCA(1).fit(operators.ones(5, 4, "complex64"))
    with pytest.raises(ValueError, match=r"X has dtype uint8, .*: make the operator of float32"):
        PCA(1).fit(operators.ones(5, 4, "uint8"))
    broken = counts.copy()
    broken.data[0] = np.nan
    with pytest.raises(ValueError, match="contains NaN"):
        PCA(1).fit(broken)
    for state in (np.random.default_rng(0), "a", 1.5):
        with pytest.raises(ValueError, match="cannot be used to seed"):
            PCA(1, random_state=state).fit(counts)
    for state in (2**70, 2**32, -1):
        with pytest.raises(
            ValueError, match=f"random_state={state}, expected from 0 to 4294967295"
        ):
            PCA(1, random_state=state).fit(counts)
    PCA(1, random_state=2**32 - 1).fit(counts)

"""Link prediction with the factors of a graph: scores, choice of rank and weight, fine-tuning.

Axes: N nodes, E edges, P pairs or positives, Q negatives, K rank, R ranks, W weights, S steps or
      splits.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse
import scipy.sparse.csgraph

from isvd.arguments import check_integer
from isvd.design import link_operator
from isvd.factorize import SVD, svd
from isvd.metrics import roc_auc
from isvd.readers import adjacency
from isvd.spmm import sparse

RANKS = (4, 8, 16, 32, 64, 128, 256)
WEIGHTS = (0.00125, 0.0025, 0.005, 0.01, 0.02, 0.04)  # of pairs that are no edges


# Scores ------------------------------------------------------------------------------------------


def embeddings(factors: SVD) -> tuple[jax.Array, jax.Array]:
    """(left_NK, right_NK) = (U sqrt(s), V sqrt(s)), whose product left right^T is M to rank K."""
    root_K = jnp.sqrt(factors.s_K)
    return factors.u_MK * root_K, factors.v_NK * root_K


def scores(factors: SVD, pairs_P2: Any, *, symmetric: bool = True) -> jax.Array:
    """score_P of each pair (i, j): entry (i, j) of U diag(s) V^T.

    Args:
        pairs_P2: integers from 0 to N - 1; others, which cannot be refused under jit, give NaN.
        symmetric: the mean of entries (i, j) and (j, i), for graphs without directions. M itself
            is not symmetric, and the mean predicts better (PPI: AUC .893 against .887).
    Raises:
        ValueError: if `pairs_P2` is no array of integers (P, 2).
    Source: section on network embedding; the reference's `score_sym`.
    """
    pairs_P2 = _checked_pairs(pairs_P2)
    if isinstance(pairs_P2, np.ndarray):  # whose 64 bits JAX would cut to 32
        pairs_P2 = pairs_P2.astype(np.int64)
        pairs_P2 = np.where((pairs_P2 >= 0) & (pairs_P2 < 2**31), pairs_P2, -1)
    return _pair_scores(factors.u_MK, factors.s_K, factors.v_NK, pairs_P2, symmetric)


def _pair_scores(
    u_NK: jax.Array, s_K: jax.Array, v_NK: jax.Array, pairs_P2: jax.Array, symmetric: bool
) -> jax.Array:
    def pick(x_NK: jax.Array, index_P: jax.Array) -> jax.Array:
        return x_NK.at[index_P].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)

    one_P, other_P = pairs_P2.T
    left_NK = u_NK * s_K
    score_P = jnp.sum(pick(left_NK, one_P) * pick(v_NK, other_P), axis=1)
    if not symmetric:
        return score_P
    return (score_P + jnp.sum(pick(left_NK, other_P) * pick(v_NK, one_P), axis=1)) / 2


def _checked_pairs(pairs_P2: Any, num_nodes: int | None = None, name: str = "pairs_P2") -> Any:
    pairs_P2 = pairs_P2 if isinstance(pairs_P2, jax.Array) else np.asarray(pairs_P2)
    integers = jnp.issubdtype(pairs_P2.dtype, jnp.integer)
    if pairs_P2.ndim != 2 or pairs_P2.shape[1] != 2 or not integers:
        raise ValueError(
            f"{name} has shape {pairs_P2.shape} and dtype {pairs_P2.dtype}, "
            f"expected integers ({name[-2]}, 2)"
        )
    if num_nodes is not None:
        if not len(pairs_P2):
            raise ValueError(f"{name} is empty")
        low, high = int(pairs_P2.min()), int(pairs_P2.max())
        if low < 0 or high >= num_nodes:
            bad = low if low < 0 else high
            raise ValueError(f"{name} has node {bad}, expected 0 to {num_nodes - 1}")
    return pairs_P2


# Choice of the rank and the weight ---------------------------------------------------------------


class RankChoice(NamedTuple):
    """What held-out edges say: the best rank, and the AUC of each (R,), in the order of `ranks`."""

    rank: int
    ranks: tuple[int, ...]
    auc_R: np.ndarray


def ranks_for(num_nodes: int) -> tuple[int, ...]:
    """Those of `RANKS` that a graph of so many nodes has, or 1."""
    return tuple(rank for rank in RANKS if rank <= num_nodes) or (1,)


def choose_rank(
    edges_E2: Any,
    num_nodes: int,
    key: jax.Array,
    *,
    ranks: Sequence[int] | None = None,
    splits: int = 5,
    fraction: float = 0.15,
    negatives_per_edge: int = 5,
    tol: float | None = None,
    **link_options: Any,
) -> RankChoice:
    """The rank with the best AUC on held-out training edges; ties go to the smaller.

    An edge goes wholly to one side, with its reverse and its repetitions. Loops and the edges of a
    random spanning forest are never held out, so that what is connected stays so: the data sets cut
    their training and test edges in this way. Held-out edges are compared with random pairs of two
    nodes that no training edge joins. One decomposition, of the largest rank, serves all: the
    factors of a lower rank are its first columns.

    Args:
        edges_E2: training edges, each in one direction or both.
        ranks: those to try; by default `ranks_for(num_nodes)`.
        splits: of the edges, over which the AUC is averaged.
        fraction: of the distinct edges that is held out, between 0 and 1; fewer, where the forest
            leaves fewer.
        negatives_per_edge: random pairs for each held-out edge.
        tol: of `svd`.   link_options: of `design.link_operator`.
    Raises:
        ValueError: for nodes or settings outside their range, if almost all pairs are joined, if no
            edge can be held out, or if no rank has finite scores.
    Differs from the reference's rule, which is `choose_rank_leaky`.
    """
    ranks = ranks_for(num_nodes) if ranks is None else ranks
    held = edges_E2, num_nodes, key, splits, fraction, negatives_per_edge
    return _choice(ranks, _heldout_auc(*held, ranks, tol, [link_options])[0], ties=-1)


class WeightChoice(NamedTuple):
    """What held-out edges say: the best weight and rank, and the AUC of each pair, (W, R)."""

    negative_weight: float
    rank: int
    weights: tuple[float, ...]
    ranks: tuple[int, ...]
    auc_WR: np.ndarray


def choose_weight(
    edges_E2: Any,
    num_nodes: int,
    key: jax.Array,
    *,
    ranks: Sequence[int],
    weights: Sequence[float] = WEIGHTS,
    splits: int = 5,
    fraction: float = 0.15,
    negatives_per_edge: int = 5,
    tol: float | None = None,
    **link_options: Any,
) -> WeightChoice:
    """The weight of pairs that are no edges, and the rank, that are best on held-out edges.

    As `choose_rank`, with the same splits for each weight. Of equals the smaller rank is taken, and
    then the smaller weight.

    Args:
        ranks, weights: those to try; one rank if it is given.
        splits, fraction, negatives_per_edge, tol, link_options: as in `choose_rank`.
    Raises:
        ValueError: as `choose_rank`, and for no weights.
    """
    if np.ndim(weights) != 1 or not len(weights):
        raise ValueError(f"weights={weights!r}, expected some")
    held = edges_E2, num_nodes, key, splits, fraction, negatives_per_edge
    options = [{**link_options, "negative_weight": weight} for weight in weights]
    auc_WR = _heldout_auc(*held, ranks, tol, options)
    best_W = [_choice(ranks, auc_R, ties=-1) for auc_R in auc_WR]
    top = max(range(len(weights)), key=lambda i: (np.nanmax(auc_WR[i]), -weights[i]))
    return WeightChoice(float(weights[top]), best_W[top].rank, tuple(weights), tuple(ranks), auc_WR)


def choose_rank_leaky(
    edges_E2: Any,
    num_nodes: int,
    key: jax.Array,
    *,
    ranks: Sequence[int] | None = None,
    fraction: float = 0.6,
    negatives_per_edge: int = 5,
    tol: float | None = None,
    **link_options: Any,
) -> RankChoice:
    """The reference's rule ("iSVD 256"), kept for comparison: it leaks, use `choose_rank`.

    It splits arcs: the reverse of a held-out arc is fitted with probability 1 - fraction, so the
    AUC is too high, by up to .1, and favours ranks that are too large (PPI: 32, where 8 is best on
    the test pairs). Negatives are uniform pairs, whether joined or not; ties go to the larger rank.

    Raises:
        ValueError: for nodes or settings outside their range, or if no rank has finite scores.
    """
    edges_E2 = np.asarray(_checked_pairs(edges_E2, num_nodes, "edges_E2"))
    check_integer("negatives_per_edge", negatives_per_edge, 1)
    ranks = ranks_for(num_nodes) if ranks is None else ranks
    key_split, key_negative, key_svd = jax.random.split(key, 3)
    arcs_P2 = np.concatenate([edges_E2, edges_E2[:, ::-1]])
    arcs_P2 = arcs_P2[np.asarray(jax.random.permutation(key_split, len(arcs_P2)))]
    num_fit = round((1 - fraction) * len(arcs_P2))
    if not 0 < num_fit < len(arcs_P2):
        raise ValueError(f"fraction={fraction} of {len(arcs_P2)} arcs leaves one side empty")
    held_P2 = arcs_P2[num_fit:]
    shape = (negatives_per_edge * len(held_P2), 2)
    negative_Q2 = np.asarray(jax.random.randint(key_negative, shape, 0, num_nodes))
    graph = adjacency(arcs_P2[:num_fit], num_nodes)
    auc_R = _auc_by_rank(graph, held_P2, negative_Q2, ranks, key_svd, tol, link_options)
    return _choice(ranks, auc_R, ties=1)


def _heldout_auc(
    edges_E2: Any,
    num_nodes: int,
    key: jax.Array,
    splits: int,
    fraction: float,
    negatives_per_edge: int,
    ranks: Sequence[int],
    tol: float | None,
    options_W: Sequence[dict[str, Any]],
) -> np.ndarray:
    """auc_WR: means over splits of the AUC by options of `link_operator` and rank."""
    edges_E2 = np.asarray(_checked_pairs(edges_E2, num_nodes, "edges_E2"))
    if not 0 < fraction < 1:
        raise ValueError(f"fraction={fraction}, expected between 0 and 1")
    check_integer("negatives_per_edge", negatives_per_edge, 1)
    check_integer("splits", splits, 1)
    distinct_E2 = np.unique(np.sort(edges_E2, axis=1), axis=0)
    # Splits have their entries elsewhere, and share a compiled program as compressed rows.
    leaf = functools.partial(sparse, layout="csr")
    auc_SWR = []
    for key_S in jax.random.split(key, splits):
        key_split, key_negative, key_svd = jax.random.split(key_S, 3)
        held_E = _held_out(distinct_E2, num_nodes, key_split, fraction)
        count = negatives_per_edge * held_E.sum()
        negative_Q2 = _absent_pairs(distinct_E2, num_nodes, count, key_negative)
        parts = adjacency(distinct_E2[~held_E], num_nodes), distinct_E2[held_E], negative_Q2
        auc_SWR.append(
            [
                _auc_by_rank(*parts, ranks, key_svd, tol, {"leaf": leaf, **options})
                for options in options_W
            ]
        )
    return np.mean(auc_SWR, axis=0)


def _held_out(edges_E2: np.ndarray, num_nodes: int, key: jax.Array, fraction: float) -> np.ndarray:
    """bool_E: a share of the distinct edges, none of them a loop or of a random spanning forest."""
    key_forest, key_held = jax.random.split(key)
    # Distinct weights, by which an edge of the forest is known.
    weight_E = 1.0 + np.asarray(jax.random.permutation(key_forest, len(edges_E2)))
    graph = scipy.sparse.csr_array((weight_E, tuple(edges_E2.T)), shape=(num_nodes, num_nodes))
    forest = scipy.sparse.csgraph.minimum_spanning_tree(graph).data
    free_E = ~np.isin(weight_E, forest) & (edges_E2[:, 0] != edges_E2[:, 1])
    num_held = min(round(fraction * len(edges_E2)), int(free_E.sum()))
    if not num_held:
        raise ValueError(
            f"fraction={fraction} of {len(edges_E2)} distinct edges holds none out: the others are "
            "those that keep connected what is connected"
        )
    order_F = np.asarray(jax.random.permutation(key_held, np.flatnonzero(free_E)))
    held_E = np.zeros(len(edges_E2), bool)
    held_E[order_F[:num_held]] = True
    return held_E


def _auc_by_rank(
    graph: scipy.sparse.csr_array,
    positive_P2: np.ndarray,
    negative_Q2: np.ndarray,
    ranks: Sequence[int],
    key: jax.Array,
    tol: float | None,
    link_options: dict[str, Any],
) -> np.ndarray:
    if np.ndim(ranks) != 1 or not len(ranks) or min(ranks) < 1:
        raise ValueError(f"ranks={ranks!r}, expected some, at least 1")
    factors = svd(link_operator(graph, **link_options), key, rank=max(ranks), tol=tol)
    auc = []
    for rank in ranks:
        part = factors.leading(rank)
        both = (np.asarray(scores(part, pairs)) for pairs in (positive_P2, negative_Q2))
        auc.append(roc_auc(*both))
    return np.array(auc)


def _choice(ranks: Sequence[int], auc_R: np.ndarray, ties: int) -> RankChoice:
    """The rank with the best AUC: of equals the larger with ties = 1, the smaller with -1."""
    if np.isnan(auc_R).all():
        raise ValueError(
            f"the AUC is NaN for each of ranks={tuple(ranks)}, expected finite scores: check "
            "negative_weight and window"
        )
    best = max(range(len(ranks)), key=lambda i: (np.nan_to_num(auc_R[i], nan=-1), ties * ranks[i]))
    return RankChoice(int(ranks[best]), tuple(ranks), auc_R)


def _absent_pairs(edges_E2: np.ndarray, num_nodes: int, count: int, key: jax.Array) -> np.ndarray:
    """`count` pairs i < j, drawn evenly from those that are not among `edges_E2` (i <= j)."""
    known = edges_E2[:, 0].astype(np.int64) * num_nodes + edges_E2[:, 1]
    found, missing = [], count
    for attempt in range(100):
        shape = (2 * missing + 16, 2)
        pairs = jax.random.randint(jax.random.fold_in(key, attempt), shape, 0, num_nodes)
        pairs = np.sort(np.asarray(pairs, np.int64), axis=1)
        absent = ~np.isin(pairs[:, 0] * num_nodes + pairs[:, 1], known)
        pairs = pairs[absent & (pairs[:, 0] < pairs[:, 1])][:missing]
        found.append(pairs)
        missing -= len(pairs)
        if not missing:
            return np.concatenate(found)
    raise ValueError(
        f"found {count - missing} of {count} pairs without an edge: almost all {num_nodes} nodes "
        "are joined with each other"
    )


# Fine-tuning of the spectrum ---------------------------------------------------------------------


class Spectrum(NamedTuple):
    """What `finetune_spectrum` learned: use it as `factors._replace(s_K=spectrum.s_K)`.

    `loss_S` holds the cross-entropy of each step's batch, in nats per pair, before its update.
    """

    s_K: jax.Array
    mu: jax.Array
    tau: jax.Array
    loss_S: jax.Array


def spectral_kernel(s_K: Any, mu: Any, tau: Any) -> jax.Array:
    """E[s^x] for x normal with mean mu and variance exp(-tau) / 2, on a grid of [1/2, 2].

    The weights are softmax(-(mu - x)^2 exp(tau)) over x = .5, .505, ..., 2. At mu = 1 and large
    tau it is s itself. Values that are 0 stay 0.

    Source: the spectral fine-tuning of section 4.
    """
    s_K = jnp.asarray(s_K)
    grid_G = jnp.linspace(0.5, 2.0, 301, dtype=s_K.dtype)
    log_weight_G = jax.nn.log_softmax(-((mu - grid_G) ** 2) * jnp.exp(tau)).astype(s_K.dtype)
    positive_K = s_K > 0
    log_K = jnp.log(jnp.where(positive_K, s_K, 1))  # so that no gradient meets log 0
    # By logarithms: of a large value s^2 may overflow, where its weight makes it nothing.
    log_mean_K = jax.nn.logsumexp(log_weight_G + log_K[:, None] * grid_G, axis=1)
    return jnp.where(positive_K, jnp.exp(log_mean_K), 0)


def finetune_spectrum(
    factors: SVD,
    edges_E2: Any,
    key: jax.Array,
    *,
    steps: int,
    batch: int = 1000,
    negatives: int = 10,
    learning_rate: float = 1e-2,
    symmetric: bool = True,
) -> Spectrum:
    """Learn the exponent mu and the sharpness tau of `spectral_kernel`; U and V stay.

    Each step takes `batch` edges, without repetition until all have been used (what is left of a
    pass is skipped), and `negatives` uniform pairs for each, and lowers the sigmoid cross-entropy
    of the scores by Adam. From mu = 1, tau = 5; kept to .51 <= mu <= 1.99 and 0 <= tau <= 20.
    One pass, as in the reference, is `steps=len(edges) // batch`. Made for dense graphs: the loss
    is not the AUC, and on sparse ones both fall (PPI, rank 32, five passes: AUC .893 to .876), so
    compare on held-out edges.

    Args:
        edges_E2: positives. With symmetric scores one direction of each is enough.
    Raises:
        ValueError: for nodes outside the graph, or settings outside their range.
    Source: the spectral fine-tuning of section 4 (ogbl-ddi).
    """
    num_nodes = factors.u_MK.shape[0]
    edges_E2 = jnp.asarray(_checked_pairs(edges_E2, num_nodes, "edges_E2"), jnp.int32)
    for name, value in (("steps", steps), ("batch", batch), ("negatives", negatives)):
        check_integer(name, value, 1)
    if batch > len(edges_E2):
        raise ValueError(f"batch={batch} is more than the {len(edges_E2)} edges")
    sizes = (int(steps), int(batch), int(negatives), bool(symmetric))
    return _finetune_spectrum(sizes, factors, edges_E2, key, jnp.asarray(learning_rate))


@functools.partial(jax.jit, static_argnums=0)
def _finetune_spectrum(
    sizes: tuple[int, int, int, bool],
    factors: SVD,
    edges_E2: jax.Array,
    key: jax.Array,
    learning_rate: jax.Array,
) -> Spectrum:
    steps, batch, negatives, symmetric = sizes
    dtype = factors.s_K.dtype
    num_nodes = factors.u_MK.shape[0]
    key_order, key_negative = jax.random.split(key)
    tx = optax.adam(learning_rate.astype(dtype))
    per_pass = edges_E2.shape[0] // batch
    orders = jax.vmap(lambda k: jax.random.permutation(k, edges_E2.shape[0]))(
        jax.random.split(key_order, -(-steps // per_pass))
    )
    index_SB = orders[:, : per_pass * batch].reshape(-1, batch)[:steps]

    def loss_fn(params: tuple, positive_P2: jax.Array, negative_Q2: jax.Array) -> jax.Array:
        s_K = spectral_kernel(factors.s_K, *params)
        pairs = jnp.concatenate([positive_P2, negative_Q2])
        score_P = _pair_scores(factors.u_MK, s_K, factors.v_NK, pairs, symmetric)
        label_P = (jnp.arange(pairs.shape[0]) < batch).astype(dtype)
        return optax.sigmoid_binary_cross_entropy(score_P, label_P).mean()

    def step(state: tuple, inputs: tuple) -> tuple[tuple, jax.Array]:
        params, opt_state = state
        index_B, step_key = inputs
        negative_Q2 = jax.random.randint(step_key, (batch * negatives, 2), 0, num_nodes, jnp.int32)
        loss, grads = jax.value_and_grad(loss_fn)(params, edges_E2[index_B], negative_Q2)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes types
            updates, opt_state = tx.update(grads, opt_state)
        mu, tau = optax.apply_updates(params, updates)
        return ((jnp.clip(mu, 0.51, 1.99), jnp.clip(tau, 0, 20)), opt_state), loss

    params = (jnp.asarray(1, dtype), jnp.asarray(5, dtype))
    keys_S = jax.random.split(key_negative, steps)
    (params, _), loss_S = jax.lax.scan(step, (params, tx.init(params)), (index_SB, keys_S))
    return Spectrum(spectral_kernel(factors.s_K, *params), *params, loss_S)

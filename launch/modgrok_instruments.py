"""What modgrok_inspect measures of one subject: every instrument of modgrok, as numpy arrays.

All subjects get the same sequences, contexts and shuffles, so that their numbers can be compared.

Axes: R repetitions (each with sequences and tasks of its own)  4 the sets, in the order of
      `evaluation.SETS`  L layers  H heads  X heads, and the residual stream as the last  S shots
      T tokens  p residues  N = p^2 inputs  Z shuffles  K numbers of examples  C contexts  F neurons
      G groups of neurons, or single ones
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import modgrok
from launch import parallel
from modgrok import controls, evaluation, fourier, grids, interpret, interventions, sequences

Arrays = dict[str, np.ndarray]
UNSEEN = evaluation.SETS.index("unseen_train")  # where a rule, and no list of tasks, is at work
GROUPS = ("log", "additive", "random", "all")  # of the neurons of a layer
TENTH = 0.1


class Size(NamedTuple):
    repetitions: int
    sequences: int  # of each set and repetition
    contexts: int  # of the grids
    shuffles: int
    neurons: int  # silenced one by one in each layer


SIZES = {
    "quick": Size(repetitions=5, sequences=48, contexts=4, shuffles=40, neurons=4),
    "full": Size(repetitions=8, sequences=256, contexts=16, shuffles=200, neurons=24),
}


class Problem(NamedTuple):
    """A network, and the tasks and inputs that it was trained on and tested with."""

    params: Any  # of open blocks alone
    model: modgrok.Config
    open_layers: tuple[int, ...] | None  # numbers of these in the trained network; None: no gates
    posterior: Any  # of latent depth; None without
    tasks: modgrok.TaskSplit
    inputs: modgrok.InputSplit
    modulus: int
    shots: int
    feature_shot: int
    together: tuple[tuple[tuple[int, int], ...], ...]  # groups of heads (layer, head) to silence
    source: str  # what it is, in words


class Look(NamedTuple):
    """What is the same for all subjects of a page."""

    problem: Problem
    size: Size
    key: jax.Array
    rows: int  # sequences in one forward pass
    mesh: jax.sharding.Mesh
    say: Callable[..., None]

    @property
    def chunk(self) -> int:
        return max(1, self.rows // self.size.sequences)

    @property
    def sharding(self) -> jax.sharding.NamedSharding | None:
        return parallel.rows(self.mesh) if self.mesh.size > 1 else None

    def everywhere(self, tree: Any) -> Any:
        """`tree` on every device that takes part."""
        return tree if self.sharding is None else parallel.replicate(tree, self.mesh)

    def shots(self) -> np.ndarray:
        """Numbers of examples for the grids: 0, 1, 2, 3, 5, 8, 13, 31 and the most there can be."""
        last = self.problem.shots - 1
        return np.array([k for k in (0, 1, 2, 3, 5, 8, 13, 31) if k < last] + [last])


def subject(name: str, look: Look) -> tuple[interpret.Subject, tuple[Any, ...] | None]:
    """The network, or a control by its name, and (params, model) if it is a network."""
    problem = look.problem
    if name in ("ratio_matching", "bayes"):
        return getattr(controls, name)(problem.modulus), None
    params = problem.params
    if name == "random":
        params = modgrok.init_params(jax.random.fold_in(look.key, 99), problem.model)
    params = look.everywhere(params)
    return interpret.network(params, problem.model), (params, problem.model)


def measure(name: str, look: Look) -> Arrays:
    """Everything about one subject; what needs weights only if it has any."""
    what, inside = subject(name, look)
    tokens_R4BT, task_R4B2 = _tokens(look)
    arrays = _behaviour(what, look, tokens_R4BT)
    look.say(f"{name}: attention and features")
    arrays |= _attention(what, look, tokens_R4BT[:, UNSEEN])
    arrays |= _features(what, look, tokens_R4BT[:, UNSEEN, 0], task_R4B2[:, UNSEEN, 0])
    if inside is not None:
        look.say(f"{name}: interventions")
        arrays |= _interventions(inside, look, tokens_R4BT, arrays)
        if look.problem.open_layers is not None:
            arrays["open_layer_L"] = np.array(look.problem.open_layers)
    return {key: np.asarray(value) for key, value in arrays.items()}


def _tokens(look: Look) -> tuple[jax.Array, jax.Array]:
    """Sequences of every set, each with its own task and inputs; and the tasks, (R, 4, B, 2)."""
    problem, count = look.problem, look.size.sequences

    @jax.jit
    def draw(key, task_W2, input_M2):
        which, inputs = jax.random.split(key)
        index_B = jax.random.randint(which, (count,), 0, task_W2.shape[0])
        task_B2 = jnp.asarray(task_W2)[index_B]
        tokens_BT = sequences.sample_sequences(
            inputs,
            task_B2,
            input_M2,
            modulus=problem.modulus,
            shots=problem.shots,
            batch=count,
            paired=False,
        )
        return tokens_BT, task_B2

    sets = [(tasks, inputs) for tasks in problem.tasks for inputs in problem.inputs]
    drawn = [
        [draw(k, *pair) for k, pair in zip(jax.random.split(key, 4), sets, strict=True)]
        for key in _keys(look, 0)
    ]
    stacked = (jnp.stack([jnp.stack([x[i] for x in four]) for four in drawn]) for i in range(2))
    return look.everywhere(tuple(stacked))


def _keys(look: Look, purpose: int) -> list[jax.Array]:
    return list(jax.random.split(jax.random.fold_in(look.key, purpose), look.size.repetitions))


@functools.partial(jax.jit, static_argnames="sharding")
def _accuracy(what, tokens_BT, sharding):
    scores_BSV = what.predict(interventions.spread(tokens_BT, sharding))
    return modgrok.oracles.expected_accuracy(scores_BSV, sequences.answers(tokens_BT)).mean(0)


@functools.partial(jax.jit, static_argnames="sharding")
def _followed(what, prompts, sharding):
    """Share of the answers that the example on the query's line asks for, clean and corrupt."""
    pairs = ((prompts.clean_BT, prompts.clean_B), (prompts.corrupt_BT, prompts.corrupt_B))

    def share(tokens_BT, z_B):
        scores_BSV = what.predict(interventions.spread(tokens_BT, sharding))
        return modgrok.oracles.expected_accuracy(scores_BSV[:, -1:], z_B[:, None]).mean()

    return [share(*pair) for pair in pairs]


def _prompts(look: Look) -> list[interventions.Prompts]:
    problem = look.problem
    prompts_R = [
        interventions.matched_prompts(
            key,
            problem.tasks.unseen_U2,
            problem.inputs.train_M2,
            modulus=problem.modulus,
            shots=problem.shots,
            match=match_of(problem.shots),
            batch=look.size.sequences,
        )
        for key in _keys(look, 1)
    ]
    return look.everywhere(prompts_R)


def match_of(shots: int) -> int:
    """The shot whose label is corrupted in the pairs of prompts: in the middle."""
    return (shots - 1) // 2


def _lopsided(task_U2: np.ndarray) -> np.ndarray:
    """The tasks with a != b, if there are some: of others (y, x) tells the answer for (x, y)."""
    lopsided_U = task_U2[:, 0] != task_U2[:, 1]
    return task_U2[lopsided_U] if lopsided_U.any() else task_U2


def _behaviour(what: interpret.Subject, look: Look, tokens_R4BT: jax.Array) -> Arrays:
    problem, size = look.problem, look.size
    modulus, last = problem.modulus, problem.shots - 1
    common = {"modulus": modulus, "row_sharding": look.sharding}
    accuracy = _waiting(functools.partial(_accuracy, what, sharding=look.sharding))
    accuracy_R4S = [[accuracy(tokens_BT) for tokens_BT in four] for four in tokens_R4BT]
    follow = _waiting(functools.partial(_followed, what, sharding=look.sharding))
    followed = [follow(prompts) for prompts in _prompts(look)]

    key, which = jax.random.split(jax.random.fold_in(look.key, 2))
    task_C2 = _lopsided(problem.tasks.unseen_U2)
    task_C2 = jnp.asarray(task_C2)[jax.random.randint(which, (size.contexts,), 0, len(task_C2))]
    context_CT = sequences.sample_sequences(
        key,
        task_C2,
        problem.inputs.train_M2,
        modulus=modulus,
        shots=problem.shots,
        batch=size.contexts,
        paired=False,
    )
    shot_K = look.shots()
    ask = _waiting(functools.partial(grids.shot_grids, what.predict, rows=look.rows, **common))
    seen = ask(context_CT, task_C2, shot_K)
    corrupt = functools.partial(interventions.label_corruption, what.predict, **common)
    corrupt = _waiting(corrupt)
    unseen_RBT = tokens_R4BT[:, UNSEEN]
    maps = [corrupt(tokens, key) for tokens, key in zip(unseen_RBT, _keys(look, 3), strict=True)]
    count_N2 = np.array([(last, j) for j in range(last + 1)])
    several = functools.partial(interventions.corrupt_several, what.predict, **common)
    several = _waiting(several)
    several_RN = [
        several(tokens_BT, key, count_N2)
        for tokens_BT, key in zip(unseen_RBT, _keys(look, 4), strict=True)
    ]
    return {
        "accuracy_R4S": jnp.array(accuracy_R4S),
        "follows_clean_R": jnp.array([clean for clean, _ in followed]),
        "follows_corrupt_R": jnp.array([corrupt for _, corrupt in followed]),
        "grid_shot_K": shot_K,
        "grid_task_C2": task_C2,
        "grid_context_CT": context_CT,
        **{f"grid_{name}": value for name, value in seen._asdict().items()},
        **{
            f"corruption_{name}": jnp.stack([getattr(one, name) for one in maps])
            for name in interventions.Corruption._fields
        },
        "several_RS": jnp.stack(several_RN),
    }


@functools.partial(jax.jit, static_argnames=("modulus", "sharding"))
def _attention_scores(what, tokens_BT, *, modulus, sharding):
    tokens_BT = interventions.spread(tokens_BT, sharding)
    seen = what.capture(tokens_BT)
    weight_LBHTT = seen.attention_LBHTT
    uniform = interpret.uniform_attention(tokens_BT.shape[0], weight_LBHTT.shape[-1])
    return (
        interpret.attention_scores(weight_LBHTT, tokens_BT, modulus=modulus),
        interpret.attention_scores(uniform, tokens_BT, modulus=modulus),
        weight_LBHTT[:, 0],
    )


def _attention(what: interpret.Subject, look: Look, tokens_RBT: jax.Array) -> Arrays:
    options = {"modulus": look.problem.modulus, "sharding": look.sharding}
    score = _waiting(functools.partial(_attention_scores, what, **options))
    results = [score(tokens_BT) for tokens_BT in tokens_RBT]
    arrays = {"attention_LHTT": results[0][2]}
    for name in interpret.AttentionScores._fields:
        short = name.rpartition("_")[0]
        values = jnp.stack([getattr(scores, name) for scores, _, _ in results])
        if short == "offset":
            arrays["attention_offset_LH3T"] = values.mean(0)
            continue
        arrays[f"attention_{short}_RLH"] = values
        uniform = jnp.stack([getattr(scores, name)[0, 0] for _, scores, _ in results])
        arrays[f"attention_{short}_uniform_R"] = uniform
    return arrays


def _features(
    what: interpret.Subject, look: Look, context_RT: jax.Array, task_R2: jax.Array
) -> Arrays:
    """Features of all inputs at one shot; shuffles and large arrays: the first repetition's."""
    problem, num = look.problem, look.size.shuffles
    static = {"p": problem.modulus, "num": num}
    options = {"shot": problem.feature_shot, "rows": look.rows, "sharding": look.sharding, **static}
    one = _waiting(functools.partial(_one_context, what, **options))
    keys = _keys(look, 5)
    numbers, large = [], []
    for context_T, task_2, key in zip(context_RT, task_R2, keys, strict=True):
        row, kept = one(context_T, task_2, key)
        numbers.append(row)
        large = large or [kept]
    component_LHCpp, hidden_LFpp, similar = large[0]
    layers, heads = component_LHCpp.shape[:2]
    component_LHN2 = component_LHCpp[:, :, :2].reshape(layers, heads, 2, -1).swapaxes(-1, -2)
    return {
        **_stack(numbers),
        **_shuffles(component_LHCpp, hidden_LFpp, keys[0], **static),
        **{f"similarity_{place}_LNN": x for place, x in similar.items()},
        **_embedding(
            what.embedding_VD[: problem.modulus], jax.random.fold_in(look.key, 6), **static
        ),
        "component_LHN2": component_LHN2,
        "neuron_deviation_LF": hidden_LFpp.std((-2, -1)),
        "feature_context_T": context_RT[0],
        "feature_task_2": task_R2[0],
    }


@functools.partial(jax.jit, static_argnames=("shot", "rows", "sharding", "p", "num"))
def _one_context(what, context_T, task_2, key, *, shot, rows, sharding, p, num):
    """(numbers of one repetition, what is kept of the first)."""
    grid_NT = interpret.input_grid(context_T, task_2, modulus=p, shot=shot)
    seen = interpret.grid_features(what, grid_NT, shot=shot, rows=rows, row_sharding=sharding)
    layers, heads, inputs, _, width = seen.head_LHN3D.shape
    pairs_GND = seen.head_LHN3D[..., :2, :].reshape(layers * heads, inputs, 2 * width)
    parts = interpret.principal_components(pairs_GND, components=min(4, *pairs_GND.shape[1:]))
    component_LHCpp = jnp.moveaxis(parts.score_GNC, 1, 2).reshape(layers, heads, -1, p, p)
    hidden_LFpp = jnp.moveaxis(seen.hidden_LN3F[:, :, 1], 1, 2).reshape(layers, -1, p, p)
    row = {"explained_RLHC": parts.explained_GC.reshape(layers, heads, -1)}
    for kind in fourier.KINDS:
        share_LHCM = fourier.pair_shares(component_LHCpp, modulus=p, kind=kind)
        row[f"circle_{kind}_RLHC"] = fourier.circles(share_LHCM, p)
        share_LFM = fourier.pair_shares(hidden_LFpp, modulus=p, kind=kind)
        row[f"neuron_{kind}_RLF"] = fourier.best(share_LFM).share_G
    similar = {}
    for place, at in (("y", 1), ("z", 2)):
        maps = jax.lax.map(interpret.similarity, seen.residual_LN3D[:, :, at])
        similar[place] = maps.astype(jnp.float16)
        sides = (seen.head_LHN3D[:, :, :, at], seen.residual_LN3D[:, None, :, at])
        scores = [
            interpret.ratio_similarity(side.reshape(-1, *side.shape[2:]), key, modulus=p, num=num)
            for side in sides
        ]
        for name in interpret.RatioScores._fields:
            values = [getattr(one, name) for one in scores]
            joined = [x.reshape(*x.shape[:-1], layers, -1) for x in values]
            axes = "RZLX" if name.startswith("null") else "RLX"
            short = name.rpartition("_")[0]
            row[f"ratio_{short}_{place}_{axes}"] = jnp.concatenate(joined, axis=-1)
    return row, (component_LHCpp, hidden_LFpp, similar)


@functools.partial(jax.jit, static_argnames=("p", "num"))
def _shuffles(component_LHCpp, hidden_LFpp, key, *, p, num):
    """Best fits after tokens exchanged their names; and the best modes of the neurons."""
    arrays = {}
    for kind in fourier.KINDS:
        options = {"modulus": p, "kind": kind, "pairs": True, "num": num}
        arrays[f"circle_{kind}_null_ZLHC"] = fourier.shuffled(key, component_LHCpp, **options)[1]
        arrays[f"neuron_{kind}_null_ZLF"] = fourier.shuffled(key, hidden_LFpp, **options)[0]
        best = fourier.best(fourier.pair_shares(hidden_LFpp, modulus=p, kind=kind))
        modes_M2 = jnp.asarray(fourier.pair_frequencies(p, kind))
        arrays[f"neuron_{kind}_mode_LF2"] = modes_M2[best.mode_G]
    return arrays


@functools.partial(jax.jit, static_argnames=("p", "num"))
def _embedding(table_pD, key, *, p, num):
    """Shares of the variance of all channels together, and the components of figure 1e."""
    table_pD = jnp.asarray(table_pD, jnp.float32)
    variance_D = table_pD.var(0)
    weight_D = variance_D / jnp.maximum(variance_D.sum(), 1e-30)
    parts = interpret.principal_components(table_pD[None], components=min(3, *table_pD.shape))
    orders = jax.vmap(lambda k: jax.random.permutation(k, p))(jax.random.split(key, num))
    arrays = {
        "embedding_component_pC": parts.score_GNC[0],
        "embedding_explained_C": parts.explained_GC[0],
    }
    for kind in fourier.KINDS:

        def shares(order_p, kind=kind):
            share_DQ = fourier.token_shares(table_pD.T[:, order_p], modulus=p, kind=kind)
            return jnp.einsum("dq,d->q", share_DQ, weight_D)

        arrays[f"embedding_{kind}_Q"] = shares(jnp.arange(p))
        arrays[f"embedding_{kind}_null_Z"] = jax.lax.map(shares, orders).max(-1)
        parts_CQ = fourier.token_shares(parts.score_GNC[0].T, modulus=p, kind=kind)
        arrays[f"embedding_component_{kind}_CQ"] = parts_CQ
    return arrays


def _interventions(
    inside: tuple[Any, ...], look: Look, tokens_R4BT: jax.Array, measured: Arrays
) -> Arrays:
    params, model = inside
    common = {"cfg": model, "row_sharding": look.sharding}
    ablate = _waiting(functools.partial(interventions.ablate, params, chunk=look.chunk, **common))
    layers, heads, neurons = model.layers, model.heads, model.mlp_ratio * model.width
    nothing_1LH = jnp.zeros((1, layers, heads), bool)
    together = look.problem.together
    together_GLH = np.zeros((len(together), layers, heads), bool)
    for number, group in enumerate(together):
        together_GLH[number][tuple(np.transpose(group))] = True
    head_mask = jnp.concatenate(
        [nothing_1LH, interventions.one_at_a_time(layers, heads), together_GLH]
    )
    neuron_mask_R, single_G2 = _neuron_masks(look, measured, layers, neurons)
    keys = _keys(look, 7)
    arrays: Arrays = {"single_G2": single_G2, "together_GLH": together_GLH}
    for kind in interventions.KINDS:
        heads_R4, neurons_R = [], []
        for key, four, neuron_mask in zip(keys, tokens_R4BT, neuron_mask_R, strict=True):
            heads_R4.append(
                _stack([ablate(x, head_mask, key, site="head", kind=kind) for x in four])
            )
            neurons_R.append(ablate(four[UNSEEN], neuron_mask, key, site="hidden", kind=kind))
        for field in interventions.Scores._fields:
            name = field.removesuffix("_S")
            arrays[f"head_{kind}_{name}_R4GS"] = getattr(_stack(heads_R4), field)
            arrays[f"hidden_{kind}_{name}_RGS"] = getattr(_stack(neurons_R), field)

    look_through = _waiting(functools.partial(interventions.logit_lens, params, **common))
    lens = _stack([look_through(four[UNSEEN]) for four in tokens_R4BT])
    arrays |= {"lens_accuracy_RLS": lens.accuracy_S, "lens_loss_RLS": lens.loss_S}
    prompts_R = _prompts(look)
    patch = functools.partial(interventions.patch_activations, chunk=look.chunk, **common)
    patch = _waiting(patch)
    start = 3 * match_of(look.problem.shots) + 2  # the token that differs
    for site, axes in (("residual", "RLT"), ("head", "RLH")):
        rows = _stack([patch(params, prompts, site=site, start=start) for prompts in prompts_R])
        arrays[f"patched_{site}_{axes}"] = rows.patched
        arrays |= {"patched_clean_R": rows.clean, "patched_corrupt_R": rows.corrupt}
    return arrays


def _waiting(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose result is there at return.

    Many calls in the queue that all communicate can starve each other on simulated devices, until
    XLA gives up and ends the process.
    """
    return lambda *args, **options: jax.block_until_ready(function(*args, **options))


def _stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def _neuron_masks(
    look: Look, measured: Arrays, layers: int, neurons: int
) -> tuple[jax.Array, np.ndarray]:
    """What is silenced together in each repetition, mask_RGLF, and (layer, neuron) of the singles.

    First nothing, then GROUPS in each layer, then single neurons. Groups: the tenth of a layer's
    neurons with the best fit in a basis, a tenth at random (another one in each repetition), all
    of them. Singles are those that vary most.
    """
    tenth = max(1, round(TENTH * neurons))
    fits = {kind: np.asarray(measured[f"neuron_{kind}_RLF"])[0] for kind in fourier.KINDS}
    deviation_LF = np.asarray(measured["neuron_deviation_LF"])
    mask = np.zeros((look.size.repetitions, 1 + layers * len(GROUPS), layers, neurons), bool)
    for layer in range(layers):
        for number, group in enumerate(GROUPS):
            at = 1 + layer * len(GROUPS) + number
            for repetition in range(look.size.repetitions):
                if group == "random":
                    rng = np.random.default_rng([layer, repetition])
                    chosen = rng.choice(neurons, tenth, replace=False)
                elif group == "all":
                    chosen = np.arange(neurons)
                else:
                    chosen = np.argsort(-fits[group][layer], kind="stable")[:tenth]
                mask[repetition, at, layer, chosen] = True
    count = min(look.size.neurons, neurons)
    single_G2 = np.array(
        [
            (layer, neuron)
            for layer in range(layers)
            for neuron in np.argsort(-deviation_LF[layer], kind="stable")[:count]
        ]
    )
    single = np.zeros((len(single_G2), layers, neurons), bool)
    single[np.arange(len(single_G2)), single_G2[:, 0], single_G2[:, 1]] = True
    singles = np.broadcast_to(single, (len(mask), *single.shape))
    return jnp.asarray(np.concatenate([mask, singles], axis=1)), single_G2

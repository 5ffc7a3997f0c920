"""What a subject of modgrok_inspect answers: by set, by query, after labels are corrupted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import modgrok
from launch.modgrok_instruments_common import (
    UNSEEN,
    Arrays,
    Look,
    make_keys,
    sample_prompts,
    waiting,
)
from modgrok import corruption, grids, interpret, sequences


def behaviour(what: interpret.Subject, look: Look, tokens_R4BT: jax.Array) -> Arrays:
    """Accuracy, grids, and what corrupted labels change."""
    problem, size = look.problem, look.size
    modulus, last = problem.modulus, problem.shots - 1
    common = {"modulus": modulus, "row_sharding": look.sharding}
    accuracy = waiting(_accuracy, what, sharding=look.sharding)
    accuracy_R4S = [[accuracy(tokens_BT) for tokens_BT in four] for four in tokens_R4BT]
    follow = waiting(_share_followed, what, sharding=look.sharding)
    followed = [follow(prompts) for prompts in sample_prompts(look)]

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
    ask = waiting(grids.shot_grids, what.predict, rows=look.rows, **common)
    seen = ask(context_CT, task_C2, shot_K)
    corrupt = waiting(corruption.label_corruption, what.predict, **common)
    unseen_RBT = tokens_R4BT[:, UNSEEN]
    maps = [
        corrupt(tokens, key) for tokens, key in zip(unseen_RBT, make_keys(look, 3), strict=True)
    ]
    count_N2 = np.array([(last, j) for j in range(last + 1)])
    several = waiting(corruption.corrupt_several, what.predict, **common)
    several_RN = [
        several(tokens_BT, key, count_N2)
        for tokens_BT, key in zip(unseen_RBT, make_keys(look, 4), strict=True)
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
            for name in corruption.Corruption._fields
        },
        "several_RS": jnp.stack(several_RN),
    }


@functools.partial(jax.jit, static_argnames="sharding")
def _accuracy(what, tokens_BT, sharding):
    scores_BSV = what.predict(sequences.spread(tokens_BT, sharding))
    return modgrok.oracles.expected_accuracy(scores_BSV, sequences.answers(tokens_BT)).mean(0)


@functools.partial(jax.jit, static_argnames="sharding")
def _share_followed(what, prompts, sharding):
    """Share of the answers that the example on the query's line asks for, clean and corrupt."""
    pairs = ((prompts.clean_BT, prompts.clean_B), (prompts.corrupt_BT, prompts.corrupt_B))

    def share(tokens_BT, z_B):
        scores_BSV = what.predict(sequences.spread(tokens_BT, sharding))
        return modgrok.oracles.expected_accuracy(scores_BSV[:, -1:], z_B[:, None]).mean()

    return [share(*pair) for pair in pairs]


def _lopsided(task_U2: np.ndarray) -> np.ndarray:
    """The tasks with a != b, if there are some: of others (y, x) tells the answer for (x, y)."""
    lopsided_U = task_U2[:, 0] != task_U2[:, 1]
    return task_U2[lopsided_U] if lopsided_U.any() else task_U2

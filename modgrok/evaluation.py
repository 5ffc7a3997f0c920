"""The four sets: seen and unseen tasks, on train and on held-out inputs.

Axes: W tasks, R sequences of a task, S shots, T tokens.
"""

import functools
from collections.abc import Sequence
from numbers import Integral
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from modgrok import sequences
from modgrok.model import Config, Params
from modgrok.tasks import InputSplit, TaskSplit
from modgrok.training import answer_loss

SETS = ("seen_train", "seen_heldout", "unseen_train", "unseen_heldout")


class SetScores(NamedTuple):
    """Means over the sequences of each task. Shot k is the answer after k examples."""

    accuracy_WS: jax.Array  # fraction right, argmax over the whole vocabulary
    loss_WS: jax.Array  # nats
    num_sequences: jax.Array  # R, int32

    @property
    def last_shot(self) -> jax.Array:
        """Accuracy after the most examples, mean over tasks: the paper's headline."""
        return self.accuracy_WS[:, -1].mean()


class Evaluation(NamedTuple):
    """Tasks x inputs. Sequences of a held-out set have held-out inputs as examples too."""

    seen_train: SetScores
    seen_heldout: SetScores
    unseen_train: SetScores
    unseen_heldout: SetScores


@functools.partial(
    jax.jit, static_argnames=("cfg", "modulus", "shots", "num_sequences", "rows", "row_sharding")
)
def score_tasks(
    params: Params,
    key: jax.Array,
    task_W2: jax.Array,
    input_M2: jax.Array,
    *,
    cfg: Config,
    modulus: int,
    shots: int,
    num_sequences: int,
    rows: int = 1024,
    row_sharding: jax.sharding.Sharding | None = None,
    num_inputs: jax.Array | int | None = None,
    gate: jax.Array | None = None,
) -> SetScores:
    """Scores on `num_sequences` sequences of each task, paired across tasks.

    Args:
        rows: sequences in one forward pass, which bounds memory; they are spread over devices by
            `row_sharding`, if given. Changes no score.
        num_inputs: as in `sample_sequences`.
        gate: of zeros and ones, (L,) for all tasks or (W, L): the blocks that a task uses. Those
            that none of a pass uses are not computed.
    Raises:
        ValueError: if `num_sequences` or `rows` is less than 1, or `gate` has another shape.
    """
    for name, count in (("num_sequences", num_sequences), ("rows", rows)):
        if count < 1:
            raise ValueError(f"{name}={count}, expected at least 1")
    num_tasks = task_W2.shape[0]
    if gate is not None and gate.shape not in ((cfg.layers,), (num_tasks, cfg.layers)):
        raise ValueError(
            f"gate has shape {gate.shape}, expected ({cfg.layers},) or {(num_tasks, cfg.layers)}"
        )
    total = num_tasks * num_sequences
    tokens_BT = sequences.sample_sequences(
        key,
        task_W2,
        input_M2,
        modulus=modulus,
        shots=shots,
        batch=total,
        num_inputs=num_inputs,
    )

    def forward(part):
        part = sequences.spread(part, row_sharding)
        if gate is None:
            return answer_loss(params, part, cfg)[1]
        tokens_BT, gate_BL = (part, None) if gate.ndim == 1 else part
        own = gate if gate_BL is None else gate_BL.T
        return answer_loss(params, tokens_BT, cfg, gate=own, skip=True)[1]

    per_row = tokens_BT
    if gate is not None and gate.ndim == 2:
        per_row = (tokens_BT, jnp.repeat(gate, num_sequences, axis=0))
    scores = jax.lax.map(forward, sequences.in_batches(per_row, rows, row_sharding))
    loss_WS, accuracy_WS = (
        x.reshape(-1, shots)[:total].reshape(-1, num_sequences, shots).mean(1) for x in scores
    )
    return SetScores(accuracy_WS, loss_WS, jnp.int32(num_sequences))


def evaluate(
    params: Params,
    key: jax.Array,
    tasks: TaskSplit,
    inputs: InputSplit,
    *,
    cfg: Config,
    modulus: int,
    shots: int,
    sequences_per_task: int | Sequence[int] = 16,
    rows: int = 1024,
    row_sharding: jax.sharding.Sharding | None = None,
    gates: tuple[jax.Array | None, jax.Array | None] = (None, None),
) -> Evaluation:
    """Scores on all four sets. `key` is spent; the same key gives the same sequences.

    Args:
        sequences_per_task: for all tasks, or (for seen ones, for unseen ones).
        rows, row_sharding: as in `score_tasks`.
        gates: `gate` of it for seen tasks and for unseen ones, as `latent_depth.task_gates` makes.
    """
    if isinstance(sequences_per_task, Integral):
        sequences_per_task = (sequences_per_task, sequences_per_task)
    keys = jax.random.split(key, 4)
    scores = [
        score_tasks(
            params,
            keys[2 * t + i],
            task_W2,
            input_M2,
            cfg=cfg,
            modulus=modulus,
            shots=shots,
            num_sequences=sequences_per_task[t],
            rows=rows,
            row_sharding=row_sharding,
            gate=gates[t],
        )
        for t, task_W2 in enumerate(tasks)
        for i, input_M2 in enumerate(inputs)
    ]
    return Evaluation(*scores)


def take_tasks(scores: SetScores, index: slice) -> SetScores:
    """The same scores for some of the tasks."""
    return scores._replace(accuracy_WS=scores.accuracy_WS[index], loss_WS=scores.loss_WS[index])


# Choosing a checkpoint by the tasks that are then reported would be optimistic. Unseen tasks come
# in random order, so the even ones decide and the odd ones are reported.
DECIDING, REPORTED = slice(0, None, 2), slice(1, None, 2)


class Transience(NamedTuple):
    """How far accuracy on unseen tasks fell after its best (He et al., 2024, section 4)."""

    best: float
    best_step: int
    last: float
    drop: float  # best - last


def transience(
    step_C: Sequence[int], accuracy_C: Sequence[float], deciding_C: Sequence[float] | None = None
) -> Transience:
    """Accuracy at its best step (the earliest of equal ones) and at the last one.

    Args:
        deciding_C: accuracy of other tasks, by which the best step is chosen; by `accuracy_C`
            itself if None, which flatters the best: it is then the greatest of noisy numbers.
    Returns:
        `Transience`: best, best_step, last, and drop = best - last.
    """
    accuracy_C = np.asarray(accuracy_C, float)
    at = int(np.argmax(accuracy_C if deciding_C is None else deciding_C))
    best, last = float(accuracy_C[at]), float(accuracy_C[-1])
    return Transience(best, int(step_C[at]), last, best - last)

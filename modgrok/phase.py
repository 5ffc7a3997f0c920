"""Many training runs in one program: the phase diagram of tasks x inputs x depth.

A diagram has one run for each number of tasks n, share alpha of the inputs, weight decay, seed and
depth. Runs of one depth share a compiled program: what differs between them is data, not shape.
Their tasks and inputs are padded to common sizes and come with counts, their batches are drawn with
these counts, their decay is an argument. Each run sees the batches, and gives the numbers, that it
would alone (`training.train_step` and `evaluation.score_tasks` are what runs here too).

Axes: G runs, W tasks trained on, U unseen tasks, M train inputs, O held-out inputs, C tests on the
way, 4 the sets of `evaluation.SETS`, B batch, T tokens, S shots.
Source: He et al. (2024), figure 1b, and its diagrams by depth, at the best and at the last step.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from modgrok import evaluation, sequences
from modgrok.model import _UNROLLED, Config
from modgrok.tasks import InputSplit, TaskSplit
from modgrok.training import OptimizerConfig, TrainState, init_state, make_optimizer, train_step

PHASES = (
    "not learned",
    "memorisation",
    "i.d. generalisation",
    "o.o.d. memorisation",
    "o.o.d. generalisation",
)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Plan:
    """What the runs of one depth have in common. Static under jit: equal plans are one program.

    Attributes:
        cfg: the decoder.   optimizer: its weight decay gives way to each run's own.
        modulus: p.   shots: S.   batch: B, a multiple of every run's number of tasks.
        ema_decay: weight of the old average; averaged weights are then tested.
        sequences_per_task: in a test, of each seen and of each unseen task.
        rows: sequences in one forward pass of a test.
    """

    cfg: Config
    optimizer: OptimizerConfig
    modulus: int
    shots: int
    batch: int
    ema_decay: float | None = None
    sequences_per_task: tuple[int, int] = (16, 16)
    rows: int = 1024

    def __post_init__(self) -> None:
        numbers = self.sequences_per_task
        if not isinstance(numbers, tuple) or len(numbers) != 2 or min(numbers) < 1:
            raise ValueError(f"sequences_per_task={numbers}, expected a pair of at least 1 each")


class Runs(NamedTuple):
    """What differs between runs; every array has a leading axis of G runs. See `stack_runs`."""

    tasks: TaskSplit  # (G, W, 2) and (G, U, 2), padded
    inputs: InputSplit  # (G, M, 2) and (G, O, 2), padded
    num_tasks: TaskSplit  # (G,): how many rows of each count
    num_inputs: InputSplit
    weight_decay_G: jax.Array
    batch_key_G: jax.Array
    test_key_G: jax.Array


class Record(NamedTuple):
    """One test of every run. Accuracy is at the last shot, mean over tasks; NaN once diverged.

    Of the unseen tasks, the even ones choose a step and the odd ones are reported (see
    `evaluation.DECIDING`).
    """

    loss_G: jax.Array  # of training, nats an answer, mean over the steps since the test before
    accuracy_G4: jax.Array  # reported tasks
    deciding_G2: jax.Array  # deciding tasks: unseen_train, unseen_heldout


def stack_runs(
    tasks: Sequence[TaskSplit],
    inputs: Sequence[InputSplit],
    *,
    weight_decay: Sequence[float],
    batch_keys: Sequence[jax.Array],
    test_keys: Sequence[jax.Array],
    sizes: tuple[int, int, int, int] | None = None,
) -> Runs:
    """Runs side by side, their sets padded with copies of their first rows.

    Args:
        batch_keys, test_keys: each run's own, as `train_chunk` and `evaluate` get them.
        sizes: W, U, M, O to pad to, so that several stacks share one program; None: the largest.
    Raises:
        ValueError: if the arguments differ in length, a set is empty, or `sizes` is too small.
    """
    lengths = {len(x) for x in (tasks, inputs, weight_decay, batch_keys, test_keys)}
    if len(lengths) != 1 or not tasks:
        raise ValueError(f"expected as many of everything, at least one, got {sorted(lengths)}")
    sets = [[(*t, *i)[at] for t, i in zip(tasks, inputs, strict=True)] for at in range(4)]
    most = tuple(max(len(x) for x in column) for column in sets)
    for name, column, size, there in zip("WUMO", sets, sizes or most, most, strict=True):
        if not all(len(x) for x in column):
            raise ValueError(f"a run has an empty set {name}; each needs one row at least")
        if size < there:
            raise ValueError(f"sizes: {name}={size} is less than the {there} rows that there are")

    def pad(column: list[np.ndarray], size: int) -> np.ndarray:
        rows = [np.concatenate([x, np.repeat(x[:1], size - len(x), axis=0)]) for x in column]
        return np.stack(rows).astype(np.int32)

    padded = [pad(column, size) for column, size in zip(sets, sizes or most, strict=True)]
    counts = [np.array([len(x) for x in column], np.int32) for column in sets]
    return Runs(
        TaskSplit(*padded[:2]),
        InputSplit(*padded[2:]),
        TaskSplit(*counts[:2]),
        InputSplit(*counts[2:]),
        jnp.asarray(weight_decay, jnp.float32),
        jnp.stack(list(batch_keys)),
        jnp.stack(list(test_keys)),
    )


def check_batch(plan: Plan, runs: Runs) -> None:
    """Raises ValueError unless the batch is a multiple of every run's tasks (on the host)."""
    for num_tasks in np.unique(np.asarray(runs.num_tasks.train_W2)).tolist():
        sequences.check_batch(plan.batch, num_tasks)


@functools.partial(jax.jit, static_argnames="plan")
def init(keys_G: jax.Array, *, plan: Plan) -> TrainState:
    """The state of G runs before the first step; each key is spent on a run's parameters."""
    tx = make_optimizer(plan.optimizer)
    ema = plan.ema_decay is not None
    return jax.lax.map(lambda key: init_state(key, plan.cfg, tx, ema=ema), keys_G)


@functools.partial(jax.jit, static_argnames=["plan", "num_steps", "together", "mesh", "axis"])
def advance(
    state: TrainState,
    runs: Runs,
    *,
    plan: Plan,
    num_steps: int,
    together: int | None = None,
    mesh: Mesh | None = None,
    axis: str = "data",
) -> tuple[TrainState, Record]:
    """`num_steps` updates of every run, then a test of every run, in one program.

    The state is not donated; to donate it, jit again as `training.train_chunk` says.

    Args:
        state: of G runs, as `init` makes it. `check_batch` tells whether `plan` fits `runs`.
        together: runs in one batch of operations on a device, `default_together()` if None.
            Changes numbers by rounding at most; with 1, a run on a CPU has the same bits
            whichever others are beside it.
        mesh, axis: spread the runs over the devices along this axis, which divide them.
    Raises:
        ValueError: if the devices do not divide the runs, the mesh has no such axis, or `together`
            or `num_steps` is below 1.
    """
    if together is None:
        together = default_together()
    if together < 1:
        raise ValueError(f"together={together}, expected at least 1")
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}, expected at least 1")
    if mesh is not None and axis not in mesh.shape:
        raise ValueError(f"axis={axis!r}, expected one of {', '.join(mesh.shape)}")
    inner = functools.partial(_advance_all, plan=plan, num_steps=num_steps, together=together)
    if mesh is None:
        return inner(state, runs)
    devices, num_runs = mesh.shape[axis], state.step.shape[0]
    if num_runs % devices:
        raise ValueError(f"{num_runs} runs do not divide over {devices} devices")
    spread = PartitionSpec(axis)
    return jax.shard_map(
        inner, mesh=mesh, in_specs=(spread, spread), out_specs=spread, check_vma=False
    )(state, runs)


def default_together(platform: str | None = None) -> int:
    """How many runs share the operations of a device: 1 on a CPU, as many as there are elsewhere.

    A core is busy with the products of one run already, and side by side the runs need more cache:
    at width 64 all at once took 1.1 to 2.6 times as long as in turns (benchmarks/modgrok_phase.py).
    An accelerator is not filled by one small run.
    """
    return 1 if (platform or jax.default_backend()) == "cpu" else 2**30


def _advance_all(state, runs, *, plan, num_steps, together):
    one = functools.partial(_advance_one, plan=plan, num_steps=num_steps)
    num_runs = state.step.shape[0]
    if _side_by_side(together, num_runs):
        return jax.vmap(one)(state, runs)
    batch_size = None if together == 1 else together
    return jax.lax.map(lambda pair: one(*pair), (state, runs), batch_size=batch_size)


def _side_by_side(together: int, num_runs: int) -> bool:
    """In turns also a run that is alone: so compiled, it has the bits that it has among others."""
    return together > 1 and num_runs <= together


def _advance_one(
    state: TrainState, run: Runs, *, plan: Plan, num_steps: int
) -> tuple[TrainState, Record]:
    tx = make_optimizer(plan.optimizer, weight_decay=run.weight_decay_G)

    def body(state, _):
        tokens_BT = sequences.sample_sequences(
            jax.random.fold_in(run.batch_key_G, state.step),
            run.tasks.train_W2,
            run.inputs.train_M2,
            modulus=plan.modulus,
            shots=plan.shots,
            batch=plan.batch,
            num_tasks=run.num_tasks.train_W2,
            num_inputs=run.num_inputs.train_M2,
        )
        state, metrics = train_step(state, tokens_BT, cfg=plan.cfg, tx=tx, ema_decay=plan.ema_decay)
        return state, metrics.loss

    state, loss_X = jax.lax.scan(body, state, length=num_steps)
    return state, Record(loss_X.mean(), *_test(state, run, plan))


def _test(state: TrainState, run: Runs, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """accuracy_4 of the reported and deciding_2 of the deciding tasks, as `evaluate` has them.

    NaN where the loss is not finite: of NaN logits argmax would be a right answer now and then.
    """
    keys = jax.random.split(run.test_key_G, 4)
    reported, deciding = [], []
    for t, (task_W2, num_tasks) in enumerate(zip(run.tasks, run.num_tasks, strict=True)):
        at_W = jnp.arange(task_W2.shape[0])
        even_W, there_W = at_W % 2 == 0, at_W < num_tasks
        for i, (input_M2, num_inputs) in enumerate(zip(run.inputs, run.num_inputs, strict=True)):
            scores = evaluation.score_tasks(
                state.tested,
                keys[2 * t + i],
                task_W2,
                input_M2,
                cfg=plan.cfg,
                modulus=plan.modulus,
                shots=plan.shots,
                num_sequences=plan.sequences_per_task[t],
                rows=plan.rows,
                num_inputs=num_inputs,
            )
            finite_W = jnp.isfinite(scores.loss_WS[:, -1])
            accuracy_W = jnp.where(finite_W, scores.accuracy_WS[:, -1], jnp.nan)
            seen = t == 0
            reported.append(jnp.mean(accuracy_W, where=there_W & (seen | ~even_W)))
            if not seen:
                deciding.append(jnp.mean(accuracy_W, where=there_W & even_W))
    return jnp.stack(reported), jnp.stack(deciding)


# How much it needs -------------------------------------------------------------------------------


def memory_bytes(
    plan: Plan,
    *,
    runs: int,
    together: int,
    num_tasks: tuple[int, int],
    platform: str | None = None,
) -> int:
    """Bytes, about, that `advance` needs on one device for `runs` runs, `together` at a time.

    Every run keeps its state; in turns the loop has them going in and coming out, beside those in
    work. These also have gradients and what the backward pass reads: for each token 18 vectors of D
    a block (with mlp_ratio 4) and three tables of scores, half of that in the last block, which
    goes on at the answers alone. A test, without a backward pass, has one block's MLP and scores.

    Its tasks and inputs, 8 bytes a row, matter only where p is in the hundreds.

    Of XLA's own count on a CPU it is .9 to 1.4 where states or training take the most (depths 1 to
    24, in turns, in pairs and together, bfloat16, remat; jax 0.12 takes less with remat in three
    blocks, 1.64) and two to three times that where a test does. On an NVIDIA GPU, five float32
    plans of width 32 to 512: 1.05 to 1.41.

    Args:
        num_tasks: W and U, whose test sequences are drawn at once (4 bytes a token).
        platform: of the device, the default one if None.
    """
    cfg, on_cpu = plan.cfg, (platform or jax.default_backend()) == "cpu"
    like = jax.eval_shape(functools.partial(init, plan=plan), jax.random.split(jax.random.key(0)))
    state = sum(math.prod(x.shape[1:]) * x.dtype.itemsize for x in jax.tree.leaves(like))
    states = runs if _side_by_side(together, runs) else 2 * runs + together
    length = 3 * plan.shots - 1
    vectors = cfg.width * (10 + 2 * cfg.mlp_ratio) * length
    scores = 3 * cfg.heads * length**2
    # XLA on a CPU multiplies bfloat16 as float32, and undoes remat outside a loop over blocks.
    item = 4 if on_cpu else jnp.dtype(cfg.dtype).itemsize
    block = item * vectors + 4 * scores
    blocks = cfg.layers - 0.5
    if cfg.remat and not on_cpu:
        blocks = 1
    elif cfg.remat and cfg.layers - 2 > _UNROLLED:
        blocks = 2.5  # the first, the last, and one of the loop
    train = plan.batch * (blocks * block + 4 * cfg.layers * cfg.width * length)
    tests = [n * each for n, each in zip(num_tasks, plan.sequences_per_task, strict=True)]
    test = item * cfg.width * (4 + cfg.mlp_ratio) * length + 4 * scores
    test = min(plan.rows, max(tests)) * test + 24 * plan.shots * sum(tests)
    work = 4 * cfg.num_params + max(int(train), test)
    data = 8 * (sum(num_tasks) + plan.modulus**2)
    return states * state + runs * data + min(runs, together) * work


# Reading the records -----------------------------------------------------------------------------


class Summary(NamedTuple):
    """Of each run: the step that the deciding tasks choose, and the reported ones there and last.

    NaN (and step -1) where a run diverged from the start.
    """

    best_step_G: np.ndarray
    best_G4: np.ndarray
    last_G4: np.ndarray


def summarise(
    step_C: np.ndarray, accuracy_GC4: np.ndarray, deciding_GC2: np.ndarray, *, by: str
) -> Summary:
    """Best and last accuracy of each run; transience is their difference.

    Args:
        by: "unseen_train" or "unseen_heldout", the set whose deciding tasks choose the step. The
            earliest of equal ones is taken.
    """
    names = evaluation.SETS[2:]
    if by not in names:
        raise ValueError(f"by={by!r}, expected one of {', '.join(names)}")
    accuracy_GC4 = np.asarray(accuracy_GC4)
    score_GC = np.nan_to_num(np.asarray(deciding_GC2)[..., names.index(by)], nan=-1.0)
    at_G = score_GC.argmax(1)
    known_G = score_GC.max(1) >= 0
    best_G4 = np.take_along_axis(accuracy_GC4, at_G[:, None, None], axis=1)[:, 0]
    best_step_G = np.where(known_G, np.asarray(step_C)[at_G], -1)
    return Summary(best_step_G, np.where(known_G[:, None], best_G4, np.nan), accuracy_GC4[:, -1])


def phases(accuracy_X4: np.ndarray, *, threshold: float = 0.5) -> np.ndarray:
    """Index into `PHASES` by which of the four sets reach the threshold.

    Memorisation: seen tasks on train inputs alone. I.d. generalisation: seen tasks, both inputs.
    O.o.d. memorisation: also unseen tasks, on train inputs. O.o.d. generalisation: all four.
    """
    high_X4 = np.asarray(accuracy_X4) >= threshold
    seen, heldout, unseen, both = np.moveaxis(high_X4, -1, 0)
    phase = np.where(heldout, 2, 1)
    phase = np.where(unseen, np.where(both & heldout, 4, 3), phase)
    return np.where(seen, phase, 0)


def transitions(accuracy_AN: np.ndarray, *, threshold: float = 0.5) -> list[tuple]:
    """Sides between neighbouring cells of which one reaches the threshold and the other does not.

    Args:
        accuracy_AN: a map, rows of one alpha and columns of one n; NaN where there is no run, which
            makes no line.
    Returns:
        ((column, row), (column, row)) of the two ends of each side, cell (0, 0) being centred on 0.
    """
    accuracy_AN = np.asarray(accuracy_AN)
    known_AN, high_AN = np.isfinite(accuracy_AN), accuracy_AN >= threshold
    across = (high_AN[:, 1:] != high_AN[:, :-1]) & known_AN[:, 1:] & known_AN[:, :-1]
    along = (high_AN[1:] != high_AN[:-1]) & known_AN[1:] & known_AN[:-1]
    sides = [((n + 0.5, a - 0.5), (n + 0.5, a + 0.5)) for a, n in np.argwhere(across).tolist()]
    return sides + [
        ((n - 0.5, a + 0.5), (n + 0.5, a + 0.5)) for a, n in np.argwhere(along).tolist()
    ]

"""What the instruments of modgrok_inspect share: the network, sizes, sequences, how they wait."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import modgrok
from launch import parallel
from modgrok import controls, evaluation, interpret, prompts, sequences

Arrays = dict[str, np.ndarray]
FITS = ("log", "additive")  # the bases, in the order of the tables
UNSEEN = evaluation.SETS.index("unseen_train")  # where a rule, and no list of tasks, is at work


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
    interventions: bool  # of networks
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


def sample_tokens(look: Look) -> tuple[jax.Array, jax.Array]:
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
        for key in make_keys(look, 0)
    ]
    stacked = (jnp.stack([jnp.stack([x[i] for x in four]) for four in drawn]) for i in range(2))
    return look.everywhere(tuple(stacked))


def make_keys(look: Look, purpose: int) -> list[jax.Array]:
    """One key for each repetition."""
    return list(jax.random.split(jax.random.fold_in(look.key, purpose), look.size.repetitions))


def sample_prompts(look: Look) -> list[prompts.Prompts]:
    """Pairs of prompts of every repetition."""
    problem = look.problem
    prompts_R = [
        prompts.matched_prompts(
            key,
            problem.tasks.unseen_U2,
            problem.inputs.train_M2,
            modulus=problem.modulus,
            shots=problem.shots,
            match=match_of(problem.shots),
            batch=look.size.sequences,
        )
        for key in make_keys(look, 1)
    ]
    return look.everywhere(prompts_R)


def match_of(shots: int) -> int:
    """The shot whose label is corrupted in the pairs of prompts: in the middle."""
    return (shots - 1) // 2


def waiting(function: Callable[..., Any], *args: Any, **options: Any) -> Callable[..., Any]:
    """`function` with some of its arguments, whose result is there at return.

    Many calls in the queue that all communicate can starve each other on simulated devices, until
    XLA gives up and ends the process.
    """
    bound = functools.partial(function, *args, **options)
    return lambda *args, **options: jax.block_until_ready(bound(*args, **options))


def stack(trees: list[Any]) -> Any:
    """Their leaves with a new leading axis."""
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)

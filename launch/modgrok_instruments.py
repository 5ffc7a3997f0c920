"""What modgrok_inspect measures of one subject: every instrument of modgrok, as numpy arrays.

All subjects get the same sequences, contexts and shuffles, so that their numbers can be compared.

Axes: R repetitions (each with sequences and tasks of its own)  4 the sets, in the order of
      `evaluation.SETS`  L layers  H heads  X heads, and the residual stream as the last  S shots
      T tokens  p residues  N = p^2 inputs  Z shuffles  K numbers of examples  C contexts  F neurons
      G groups of neurons, or single ones
"""

from collections.abc import Callable

import numpy as np

from launch import modgrok_instruments_inside as inside
from launch import modgrok_instruments_interventions as interventions
from launch import modgrok_instruments_outside as outside
from launch.modgrok_instruments_common import UNSEEN, Arrays, Look, sample_tokens, subject

STAGES = "stages"  # of an array: how many of the stages are done


def measure(name: str, look: Look, kept: Arrays, keep: Callable[..., None]) -> Arrays:
    """Everything about one subject; what needs weights only if it has any.

    After each stage `keep` gets the arrays so far; the next call goes on from those as `kept`.
    """
    what, network = subject(name, look)
    tokens_R4BT, task_R4B2 = sample_tokens(look)

    def inner(_: Arrays) -> Arrays:
        tokens_RBT, task_RB2 = tokens_R4BT[:, UNSEEN], task_R4B2[:, UNSEEN]
        seen = inside.attention(what, look, tokens_RBT)
        return seen | inside.features(what, look, tokens_RBT[:, 0], task_RB2[:, 0])

    stages: dict[str, Callable[[Arrays], Arrays]] = {
        "answers": lambda _: outside.behaviour(what, look, tokens_R4BT),
        "attention and features": inner,
    }
    if network is not None and look.interventions:
        stages["interventions"] = lambda known: interventions.intervene(
            network, look, tokens_R4BT, known
        )
    arrays = dict(kept)
    for number, (words, stage) in enumerate(stages.items()):
        if number < arrays.get(STAGES, 0):
            continue
        look.say(f"{name}: {words}")
        arrays |= {key: np.asarray(value) for key, value in stage(arrays).items()}
        arrays[STAGES] = np.array(number + 1)
        keep(**arrays)
    if network is not None and look.problem.open_layers is not None:
        arrays["open_layer_L"] = np.array(look.problem.open_layers)
    return arrays

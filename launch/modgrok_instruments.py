"""What modgrok_inspect measures of one subject: every instrument of modgrok, as numpy arrays.

All subjects get the same sequences, contexts and shuffles, so that their numbers can be compared.

Axes: R repetitions (each with sequences and tasks of its own)  4 the sets, in the order of
      `evaluation.SETS`  L layers  H heads  X heads, and the residual stream as the last  S shots
      T tokens  p residues  N = p^2 inputs  Z shuffles  K numbers of examples  C contexts  F neurons
      G groups of neurons, or single ones
"""

import numpy as np

from launch import modgrok_instruments_inside as inside
from launch import modgrok_instruments_interventions as interventions
from launch import modgrok_instruments_outside as outside
from launch.modgrok_instruments_common import UNSEEN, Arrays, Look, sample_tokens, subject


def measure(name: str, look: Look) -> Arrays:
    """Everything about one subject; what needs weights only if it has any."""
    what, network = subject(name, look)
    tokens_R4BT, task_R4B2 = sample_tokens(look)
    arrays = outside.behaviour(what, look, tokens_R4BT)
    look.say(f"{name}: attention and features")
    arrays |= inside.attention(what, look, tokens_R4BT[:, UNSEEN])
    arrays |= inside.features(what, look, tokens_R4BT[:, UNSEEN, 0], task_R4B2[:, UNSEEN, 0])
    if network is not None and look.interventions:
        look.say(f"{name}: interventions")
        arrays |= interventions.intervene(network, look, tokens_R4BT, arrays)
    if network is not None and look.problem.open_layers is not None:
        arrays["open_layer_L"] = np.array(look.problem.open_layers)
    return {key: np.asarray(value) for key, value in arrays.items()}

"""A transformer that learns modular arithmetic in context, and what it takes to generalise.

Tasks z = a x + b y mod p are shown by examples only; some (a, b) are trained on, others are not.
Source: He, Doshi, Das, Gromov, "Learning to grok" (NeurIPS 2024, arXiv 2406.02550).
"""

from modgrok.evaluation import Evaluation, SetScores, evaluate, transience
from modgrok.latent_depth import LatentConfig
from modgrok.model import Activations, Config, Transformer, apply, init_params
from modgrok.sequences import answers, sample_sequences
from modgrok.tasks import (
    InputSplit,
    TaskSplit,
    reference_inputs,
    reference_tasks,
    sample_tasks,
    split_inputs,
)
from modgrok.training import (
    GatedMetrics,
    Metrics,
    OptimizerConfig,
    TrainState,
    init_state,
    make_optimizer,
    train_chunk,
    train_step,
)

__all__ = [
    "Activations",
    "Config",
    "Evaluation",
    "GatedMetrics",
    "InputSplit",
    "LatentConfig",
    "Metrics",
    "OptimizerConfig",
    "SetScores",
    "TaskSplit",
    "TrainState",
    "Transformer",
    "answers",
    "apply",
    "evaluate",
    "init_params",
    "init_state",
    "make_optimizer",
    "reference_inputs",
    "reference_tasks",
    "sample_sequences",
    "sample_tasks",
    "split_inputs",
    "train_chunk",
    "train_step",
    "transience",
]

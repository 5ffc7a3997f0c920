"""A small gated network with gates that differ, and tasks and tokens for it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from modgrok import sequences
from modgrok.model import Config, init_params

CFG = Config(vocab=5, width=8, heads=2, layers=3)
KEY = jax.random.key(0)
TASK_W2 = np.array([[1, 2], [3, 4], [0, 1], [2, 2]], np.int32)
INPUT_M2 = np.array([[1, 2], [0, 4], [2, 2], [3, 0], [4, 1]], np.int32)
GROUP_W = np.array([0, 1, 1, 0], np.int32)
DATA = {"modulus": 5, "shots": 2, "batch": 16}
LOGITS_GL = jnp.array([[-3.0, 0.5, 2.0], [1.0, -0.5, 4.0]])


@functools.cache
def params_of(groups=1, layers=3):
    """Parameters of size .3 with gates that differ."""
    cfg = dataclasses.replace(CFG, layers=layers)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: init_params(key, cfg), KEY)
    params = jax.tree.map(lambda x: jnp.array(rng.normal(0, 0.3, x.shape), x.dtype), shapes)
    logits_GL = jnp.array(rng.normal(0, 1.5, (groups, layers)), jnp.float32)
    return {**params, "gates": {"logits_GL": logits_GL}}


def batch_at(step):
    key = jax.random.fold_in(KEY, step)
    return sequences.sample_sequences(key, TASK_W2, INPUT_M2, **DATA)

"""The settings of modgrok's programs, and what they build."""

import subprocess
import sys

import pytest

import modgrok
from launch import UsageError, modgrok_setup
from launch.modgrok_config import TrainConfig
from launch.modgrok_phase_config import PhaseConfig, make_plan

MODEL = {"width": 32, "heads": 2, "mlp_ratio": 2, "dtype": "bfloat16", "remat": True}
OPTIMIZER = {"lr": 0.2, "embedding_lr": 0.1, "embedding_decay": 0.5}
SCHEDULE = {"warmup_steps": 3, "schedule_steps": 70}


def test_settings_and_programs_are_imported_without_jax():
    names = ("config", "phase_config", "train", "phase", "export", "inspect")
    code = "".join(f"import launch.modgrok_{name}\n" for name in names)
    code += "import sys; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_model_and_its_optimiser_have_the_values_of_their_flags():
    cfg = TrainConfig(p=5, extra_tokens=3, layers=4, norm="post", **MODEL, **OPTIMIZER, **SCHEDULE)
    model = modgrok.Config(vocab=8, layers=4, norm="post", **MODEL)
    assert modgrok_setup.make_parts(cfg)[::2] == (model, None)
    optimizer = modgrok.OptimizerConfig(name="muon", weight_decay=0.3, **OPTIMIZER, **SCHEDULE)
    assert modgrok_setup.optimizer_config(cfg) == optimizer


def test_gates_have_the_values_of_their_flags():
    gates = {"prior": "beta", "beta": (2.0, 3.0), "kl_weight": 0.1, "depth_weight": 0.2}
    gates |= {"share_weight": 0.3, "entropy_weight": 0.4, "soft_steps": 5, "anneal_steps": 6}
    gates |= {"tau": 0.7, "init": 0.8, "lr": 0.9, "loop": "groups"}
    flags = {f"gate_{name}": value for name, value in gates.items()}
    cfg = TrainConfig(latent_depth=True, target_depth=1.5, **flags)
    latent = modgrok.LatentConfig(groups=3, target_depth=1.5, **gates)
    assert modgrok_setup.make_parts(cfg, [0, 2, 1, 0]).latent == latent


def test_the_plan_of_a_depth_is_that_of_its_runs():
    shared = {"p": 5, "shots": 6, "batch": 24, **MODEL, **OPTIMIZER, **SCHEDULE}
    cfg = PhaseConfig(layers=(1, 3), num_tasks=(4, 12), weight_decay=(0.1,), ema=0.0, **shared)
    plan = make_plan(cfg, 3)
    assert plan.cfg == modgrok.Config(vocab=5, layers=3, **MODEL)
    optimizer = modgrok.OptimizerConfig(name="muon", weight_decay=0.1, **OPTIMIZER, **SCHEDULE)
    assert plan.optimizer == optimizer
    assert (plan.modulus, plan.shots, plan.batch, plan.ema_decay) == (5, 6, 24, None)


def test_a_missing_checkpoint_is_said_with_the_flag_that_named_its_folder(tmp_path):
    for which, words in (("best", "; .* or --which=latest"), ("latest", "")):
        message = rf"--checkpoint={tmp_path}: holds no {which} checkpoint yet{words}"
        with pytest.raises(UsageError, match=message):
            modgrok_setup.restore(TrainConfig(width=16), tmp_path, which, flag="--checkpoint")

"""Short runs of launch/modgrok_train.py, and what they leave in their folder."""

import json
from pathlib import Path

from absl import flags as absl_flags

from launch import flags, hoststate, modgrok_config, modgrok_setup

# A second or two, once compiled. The schedule's end is fixed, so that runs may be extended. The
# last test has as many sequences as those on the way, so that one program is compiled for both.
TINY = (
    *("--preset=small", "--width=16", "--layers=1", "--optimizer=adamw", "--ema=0.9", "--lr=1e-3"),
    *("--weight_decay=0.1", "--warmup_steps=2", "--steps=8", "--schedule_steps=200"),
    *("--log_every=2", "--eval_every=4", "--checkpoint_every=2", "--nofigures"),
    "--final_sequences=8",
)
LONG = (*TINY, "--steps=200", "--log_every=4", "--eval_every=40", "--checkpoint_every=20")


def settings(*args):
    flag_values = absl_flags.FlagValues()
    flags.define(
        modgrok_config.TrainConfig, presets=modgrok_config.PRESETS, flag_values=flag_values
    )
    argv = ["modgrok_train", *args]
    return flags.parse(modgrok_config.TrainConfig, modgrok_config.PRESETS, argv, flag_values)


def final_state(workdir, which="latest", args=TINY):
    """Step and arrays by name of the newest checkpoint: optimiser and random key included."""
    restored, _ = modgrok_setup.restore(settings(*args), workdir, which, flag="--workdir")
    return restored.step, hoststate.copy(restored.state)


def assert_same_run(workdir, wanted, args=TINY):
    """The same last checkpoints, bit for bit, and the same reports, each step once."""
    for which in ("latest", "best"):
        step, arrays = final_state(workdir, which, args)
        wanted_step, wanted_arrays = final_state(wanted, which, args)
        assert step == wanted_step
        assert arrays.keys() == wanted_arrays.keys()
        assert hoststate.digest("", arrays) == hoststate.digest("", wanted_arrays)
    assert reports(workdir) == reports(wanted)


def reports(workdir):
    return (Path(workdir) / "metrics.jsonl").read_text().splitlines()


def losses(workdir):
    rows = map(json.loads, reports(workdir))
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def assert_refused(answer, *texts):
    """Status 2, one sentence on stderr, nothing on stdout."""
    status, out, err = answer
    assert (status, out) == (2, "")
    assert err.startswith("modgrok_train: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    for text in texts:
        assert text in err

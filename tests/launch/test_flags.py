"""Tests of launch/flags.py: what a command line means, and what it says when it means nothing."""

import dataclasses
import subprocess
import sys
from typing import Literal, Optional

import pytest
from absl import flags as absl_flags
from hypothesis import given
from hypothesis import strategies as st

from launch import UsageError, flags


@dataclasses.dataclass(frozen=True)
class Config:
    p: int = flags.field(29, "modulus, an odd number", min=3, max=101, group="Task")
    rule: Literal["rectangular", "random"] = flags.field("random", "how tasks are drawn")
    lr: float = flags.field(1e-3, "peak learning rate", unit="per step", min=0, group="Training")
    ema: bool = flags.field(False, "average the weights")
    depths: tuple[int, ...] = flags.field((1, 2), "depths to compare", unit="layers", min=1)
    heads: int = flags.field(4, "attention heads", choices=(1, 2, 4))
    seed: Optional[int] = flags.field(0, "random seed; none draws one")  # noqa: UP045
    workdir: str | None = flags.field(None, "folder of the run")

    def __post_init__(self):
        if self.p % 2 == 0:
            raise ValueError(f"--p={self.p}: expected an odd number")

    def validate(self):
        if self.ema and self.lr == 0:
            raise ValueError("--ema=true with --lr=0: expected a positive rate to average over")


PRESETS = {"demo": {"p": 7, "ema": True, "depths": [3]}, "large": {"lr": 1}}


def build(*args, cls=Config, presets=PRESETS):
    flag_values = absl_flags.FlagValues()
    flags.define(cls, presets=presets, flag_values=flag_values)
    flag_values(["program", *args])
    return flags.build(cls, presets, flag_values)


def run(capsys, *args, main=lambda cfg: print(cfg), **kwargs):
    """Exit status, stdout and stderr of the program."""
    with pytest.raises(SystemExit) as stop:
        flags.run(main, Config, presets=PRESETS, argv=["dir/train.py", *args], **kwargs)
    return stop.value.code or 0, *capsys.readouterr()


def test_defaults_then_preset_then_flags():
    assert build() == Config()
    assert build("--preset=demo") == Config(p=7, ema=True, depths=(3,))
    assert build("--preset=large").lr == 1.0
    assert isinstance(build("--preset=large").lr, float)
    assert build("--p=5", "--preset=demo", "--noema") == Config(p=5, depths=(3,))
    # A flag wins over the preset even where it repeats the dataclass default.
    assert build("--preset=demo", "--p=29").p == 29


@pytest.mark.parametrize(
    ("arg", "name", "value"),
    [
        ("--ema", "ema", True),
        ("--ema=yes", "ema", True),
        ("--depths=", "depths", ()),
        ("--depths=4, 5", "depths", (4, 5)),
        ("--rule=rectangular", "rule", "rectangular"),
        ("--heads=2", "heads", 2),
        ("--seed=none", "seed", None),
        ("--workdir=a=b c", "workdir", "a=b c"),
        ("--lr=1e-4", "lr", 1e-4),
        ("--p=101", "p", 101),
    ],
)
def test_values(arg, name, value):
    assert getattr(build(arg), name) == value
    assert build(arg) != Config()


def test_flagfile_counts_as_explicit_and_the_last_word_wins(tmp_path):
    file = tmp_path / "a.flags"
    file.write_text("# a comment\n\n--p=9\n--noema\n--workdir=x\n")
    cfg = build(f"--flagfile={file}", "--preset=demo", "--workdir=y")
    assert cfg == Config(p=9, depths=(3,), workdir="y")


configs = st.builds(
    Config,
    p=st.integers(1, 50).map(lambda n: 2 * n + 1),
    rule=st.sampled_from(["rectangular", "random"]),
    lr=st.floats(1e-300, 1e300),
    ema=st.booleans(),
    depths=st.lists(st.integers(1), max_size=3).map(tuple),
    heads=st.sampled_from([1, 2, 4]),
    seed=st.none() | st.integers(),
    workdir=st.none() | st.text(st.characters(codec="ascii", exclude_categories=["Cc", "Z"])),
)


@given(configs.filter(lambda cfg: (cfg.workdir or "").lower() != "none"))
def test_to_flagfile_reproduces_the_configuration(tmp_path_factory, cfg):
    file = tmp_path_factory.mktemp("flags") / "run.flags"
    file.write_text(flags.to_flagfile(cfg))
    flag_values = absl_flags.FlagValues()
    flags.define(Config, flag_values=flag_values)
    flag_values(["program", f"--flagfile={file}"])
    assert flags.build(Config, {}, flag_values) == cfg
    assert flags.to_flagfile(dataclasses.asdict(cfg)) == flags.to_flagfile(cfg)


@pytest.mark.parametrize("text", ["two\nlines", "blank at the end "])
def test_to_flagfile_refuses_what_a_line_cannot_hold(text):
    with pytest.raises(UsageError, match="one line"):
        flags.to_flagfile(Config(workdir=text))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--p=x"], "--p=x: expected an integer at least 3 and at most 101"),
        (["--p=1"], "--p=1: expected an integer at least 3"),
        (["--p=103"], "--p=103: expected an integer at least 3 and at most 101"),
        (["--p=8"], "--p=8: expected an odd number"),
        (["--p=8.0"], "--p=8.0: expected an integer"),
        (["--ema", "--lr=0"], "--ema=true with --lr=0: expected a positive rate"),
        (["--lr=nan"], "--lr=nan: expected a finite number at least 0"),
        (["--lr=inf"], "--lr=inf: expected a finite number at least 0"),
        (["--lr"], "--lr"),
        (["--ema=maybe"], "--ema=maybe: expected true or false"),
        (["--noema=1"], "--noema=1"),
        (["--rule=other"], "--rule=other: expected one of rectangular, random"),
        (["--heads=3"], "--heads=3: expected one of 1, 2, 4"),
        (["--depths=1,x"], "--depths=1,x: expected a comma-separated list, each an integer"),
        (["--depths=0"], "--depths=0: expected a comma-separated list, each an integer at least 1"),
        (["--seed=x"], "--seed=x: expected an integer, or none"),
        (["--preset=huge"], "--preset=huge: expected one of demo, large"),
        (["--dephts=1"], "--dephts: unknown flag; did you mean --depths?"),
        (["--zzz"], "--zzz: unknown flag; (see --help)"),
        (["run", "--p=7"], "'run': unexpected argument"),
        (["--", "--p=7"], "'--p=7': unexpected argument"),
        (["--flagfile=nowhere.flags"], "--flagfile=nowhere.flags: No such file"),
        (["--flagfile=."], "--flagfile=.: Is a directory"),
        (["--flagfile="], "--flagfile=: expected"),
        (["--flagfile"], "--flagfile"),
    ],
)
def test_usage_errors_are_one_sentence_and_status_2(capsys, args, words):
    status, out, err = run(capsys, *args)
    assert (status, out) == (2, "")
    assert err.startswith("train: ")
    assert words in err
    assert err.count("\n") == 1


def test_flagfile_that_is_no_text(capsys, tmp_path):
    (tmp_path / "x").write_bytes(b"\xff\xfe\x00")
    status, out, err = run(capsys, f"--flagfile={tmp_path / 'x'}")
    assert (status, out) == (2, "")
    assert "--flagfile" in err
    (tmp_path / "x").write_text("p=7\n")
    assert "'p=7': unexpected argument" in run(capsys, f"--flagfile={tmp_path / 'x'}")[2]


def test_status_of_main(capsys):
    assert run(capsys, main=lambda cfg: None) == (0, "", "")
    assert run(capsys, main=lambda cfg: 3) == (3, "", "")

    def refuse(cfg):
        raise UsageError(f"--p={cfg.p}:\n  not today")

    assert run(capsys, "--p=9", main=refuse) == (2, "", "train: --p=9: not today\n")
    with pytest.raises(ZeroDivisionError):  # a crash stays a crash
        flags.run(lambda cfg: 1 // 0, Config, argv=["train"])


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_explains_every_flag(capsys, flag):
    status, out, err = run(capsys, "--p=8", flag, doc="Train things.\n\nSlowly.")
    assert (status, err) == (0, "")
    assert out.startswith("usage: train [--preset=NAME]")
    assert "Train things.\n\nSlowly." in out
    for f in dataclasses.fields(Config):
        assert f.metadata["help"].split()[0] in out
    for words in [
        "--preset=demo|large",
        "--flagfile=FILE",
        "--p=INT\n        modulus, an odd number [default 29; at least 3 and at most 101; demo: 7]",
        "--lr=FLOAT\n        peak learning rate [default 0.001 per step; at least 0; large: 1.0]",
        "--[no]ema\n        average the weights [default false; demo: true]",
        "--depths=INT,...\n        depths to compare [default 1,2 layers; at least 1; demo: 3]",
        "--rule=rectangular|random",
        "--heads=1|2|4",
        "random seed; none draws one [default 0; or none]",
        "--workdir=TEXT\n        folder of the run [default none]",
    ]:
        assert words in out
    assert out.index("\nTask\n") < out.index("--p=") < out.index("--rule")
    assert out.index("--rule") < out.index("\nTraining\n") < out.index("--lr=")
    assert run(capsys, "--help")[1].count("Tests of launch/flags.py") == 1  # main's module


def test_mistakes_of_the_programmer_are_no_usage_errors():
    with pytest.raises(ValueError, match="preset bad: Config has no field q"):
        build(presets={"bad": {"q": 1}})
    with pytest.raises(ValueError, match="expected an integer"):
        build(presets={"bad": {"p": 1}})

    @dataclasses.dataclass(frozen=True)
    class Wrong:
        x: dict | None = None

    with pytest.raises(TypeError, match="no flag for"):
        build(cls=Wrong, presets={})


def test_importing_defines_no_flags_and_needs_no_jax():
    code = (
        "import sys; from absl import flags; before = set(flags.FLAGS)\n"
        "import launch.flags, launch.rundir\n"
        "assert 'jax' not in sys.modules and set(flags.FLAGS) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

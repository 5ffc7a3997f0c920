"""The report: its sections on small sizes, its page, and that a killed one goes on."""

import functools
import itertools
import os
import subprocess
import sys

import numpy as np
import programs
import pytest
from programs import fixture_for, summary

from launch import robust_depth_beyond, robust_depth_diagonal, robust_depth_report
from launch import robust_depth_sections as sections

assert_refused = functools.partial(programs.assert_refused, program="robust_depth_report")
program = fixture_for(robust_depth_report)
SECTIONS = robust_depth_diagonal.SECTIONS | robust_depth_beyond.SECTIONS
TINY = sections.Size(trials=2, settings=1, radii=3)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(sections.SIZES, "quick", TINY)
    monkeypatch.setattr(sections, "SETTINGS", ((16, 14, 1, 400), (16, 14, 1, 400)))
    monkeypatch.setattr(robust_depth_diagonal, "STAY_STEPS", 800)
    monkeypatch.setattr(robust_depth_beyond, "COSTS", ((1, 20), (2, 20), (1, 40)))
    monkeypatch.setattr(sections, "DEPTHS", (1, 3))


def test_a_page_with_tables_figures_and_verdicts(program, tiny, tmp_path):
    names = ("b1", "d3", "d4")
    flags = (f"--sections={','.join(names)}", f"--workdir={tmp_path}/run")
    answer = program(*flags)
    said = summary(answer)
    assert tuple(said["verdicts"]) == tuple(said["numbers"]) == names
    page = (tmp_path / "run" / "report.md").read_text()
    for name in names:
        section = SECTIONS[name]
        assert f"## {name}. {section.title}" in page
        assert f"| {name} | {section.claim} | {said['verdicts'][name]} |" in page
        assert f"{name} {said['verdicts'][name]}: " in answer[2]
        figure = tmp_path / "run" / "figures" / f"{name}.png"
        assert (f"![{section.title}](figures/{name}.png)" in page) == figure.exists()
        assert figure.exists() == (section.draw is not None)


def test_a_killed_report_goes_on(program, tiny, tmp_path, monkeypatch):
    """What was finished is not run again; a damaged file is."""
    calls = []

    def fake(name, stop=False):
        def run(size, key):
            if stop:
                raise KeyboardInterrupt
            calls.append(name)
            return {"x": np.arange(3)}

        read = lambda a: sections.Reading("| a |", f"{len(a['x'])} numbers.", "agrees", {})  # noqa: E731
        return sections.Section(name, "A claim.", run, read)

    def patch(name, section):
        module = robust_depth_diagonal if name.startswith("b") else robust_depth_beyond
        monkeypatch.setitem(module.SECTIONS, name, section)

    for name in ("b1", "b2", "d1"):
        patch(name, fake(name, stop=name == "d1"))
    flags = ("--sections=b1,b2,d1", f"--workdir={tmp_path}/run", "--nofigures")
    assert program(*flags)[0] == 130
    assert calls == ["b1", "b2"]
    (tmp_path / "run" / "b2.npz").write_bytes(b"half")
    patch("d1", fake("d1"))
    answer = program(*flags)
    assert summary(answer)["verdicts"] == dict.fromkeys(("b1", "b2", "d1"), "agrees")
    assert calls == ["b1", "b2", "b2", "d1"]
    assert "b1 (1/3): b1; kept" in answer[2]
    page = (tmp_path / "run" / "report.md").read_text()
    assert "Found: 3 numbers. **Agrees.**" in page
    assert "png" not in page


def reading(name, arrays):
    return SECTIONS[name].read({k: np.asarray(v) for k, v in arrays.items()})


def test_verdicts_follow_the_numbers():
    """Each reading can go either way."""
    ratios = {2: 1.1, 3: 0.9, 4: 1.24}
    entry = {f"predicted_{n}": [100.0] * 3 for n in ratios}
    entry |= {f"measured_{n}": [90.0, 100 * r, 1e9] for n, r in ratios.items()}
    assert reading("b3", entry).verdict == "agrees"
    assert reading("b3", entry | {"measured_4": [130.0] * 3}).verdict == "disagrees"

    stay = {
        "step": np.arange(2, dtype=np.int32),
        "depth": [1, 2, 3, 4] * 2,
        "fraction": [0.1] * 4 + [0.3] * 4,
    }
    shorter = np.array([[[9, 5], [9, 4], [9, 2], [9, 0.01]] * 2], np.float32)
    assert reading("b2", stay | {"error": shorter}).verdict == "agrees"
    shorter[0, 6] = 6
    assert reading("b2", stay | {"error": shorter}).verdict == "mixed"

    last = {1: 5.0, 2: 4.0, 3: 0.01, 4: 0.02}
    matrix = {f"error_{n}": [[0.5, e]] for n, e in last.items()}
    matrix |= {f"best_{n}": [e] for n, e in last.items()}
    assert reading("d1", matrix).verdict == "agrees"
    assert reading("d1", matrix | {"error_3": [[0.5, 0.6]]}).verdict == "mixed"

    falls = {1: 0.5, 2: 0.4, 3: 0.3, 4: 0.2}
    relu = {f"error_{n}": [[e, e]] for n, e in falls.items()} | {f"loss_{n}": [1.0] for n in falls}
    assert reading("d2", relu).verdict == "agrees"
    assert reading("d2", relu | {"error_4": [[0.2, 0.9]]}).verdict == "mixed"

    cost = {"trials": [8, 16], "steps": [10, 10], "seconds": [1.0, 2.1]}
    assert reading("d4", cost).verdict == "agrees"
    assert reading("d4", cost | {"seconds": [1.0, 3.5]}).verdict == "mixed"

    radius = np.array([0.01, 0.02])
    flat = {"radius": radius}
    for n in sections.DEPTHS:
        flat |= {f"drop_balanced_{n}": [radius**n], f"drop_unbalanced_{n}": [radius]}
        flat |= {f"gap_{name}_{n}": [1e-9 * radius] for name in robust_depth_diagonal.SOLUTIONS}
    assert reading("b4", flat).verdict == "agrees"
    assert reading("b4", flat | {"drop_balanced_3": [radius**2]}).verdict == "mixed"

    solutions = list(itertools.product(robust_depth_diagonal.SOLUTIONS, sections.DEPTHS))
    fall = {f"drop_{name}_{n}": [1e-3, 0] for name, n in solutions}
    fall |= {f"loss_{name}_{n}": [1, 1] for name, n in solutions}
    assert reading("b5", fall).numbers == {"smallest_share": 0.5}
    assert reading("b5", fall | {"drop_unbalanced_2": [0.0, 0.0]}).verdict == "disagrees"


def test_medians_bear_infinite_and_missing_values():
    assert sections.quantile([1.0, np.nan, 2.0]) == 2
    assert sections.quantile([np.inf, np.nan, 2.0]) == np.inf
    assert sections.spread([1.0, np.inf, np.nan, 2.0]) == "2 (1 - never)"
    assert sections.table(["a", "b"], [[1, float("nan")]]) == "| a | b |\n| --- | --- |\n| 1 | - |"


@pytest.mark.slow
def test_quick_report(program, tmp_path):
    """All but the one on ReLU networks, and cost, which depends on the machine.

    The first two compute for longer than they compile: they run without the suite's XLA_FLAGS.
    """
    flags = ("--size=quick", "--sections=b1,b2", f"--workdir={tmp_path}/there")
    done = subprocess.run(
        [sys.executable, "-m", "launch.robust_depth_report", "--compilation_cache=", *flags],
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
        capture_output=True,
        text=True,
        check=False,
    )
    there = summary((done.returncode, done.stdout, done.stderr))
    assert there["verdicts"] == dict.fromkeys(("b1", "b2"), "agrees")
    flags = ("--size=quick", "--sections=b3,b4,b5,d1,d3", f"--workdir={tmp_path}/here")
    here = summary(program(*flags))
    assert here["verdicts"] == dict.fromkeys(("b3", "b4", "b5", "d1", "d3"), "agrees")
    slopes = here["numbers"]["b4"]["slopes"]
    for depth in sections.DEPTHS:
        assert slopes["balanced"][str(depth)] == pytest.approx(depth, abs=0.1)
        assert slopes["unbalanced"][str(depth)] == pytest.approx(1, abs=0.1)


@pytest.mark.slow
def test_relu_networks_do_not_show_it(program, tiny, tmp_path):
    said = summary(program("--sections=d2", f"--workdir={tmp_path}/run"))
    assert said["verdicts"] == {"d2": "mixed"}
    assert np.isfinite([*said["numbers"]["d2"]["best"].values()]).all()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--size=huge",), "--size=huge: expected one of quick, full"),
        (("--sections=b1,b9",), "--sections=b1,b9: expected"),
        (("--sections=b1,b1",), "--sections=b1,b1: expected one or more of b1, b2"),
        (("--sections=",), "--sections=: expected one or more of"),
    ],
)
def test_bad_flags(flags, words, program, tmp_path):
    assert_refused(program(*flags, f"--workdir={tmp_path}/run"), words)
    assert not (tmp_path / "run").exists()

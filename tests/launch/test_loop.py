"""Tests of launch/loop.py with chunks that are not arrays' business: what happens when."""

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import termios
import textwrap
import time
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from launch import loop


class Metrics(NamedTuple):
    loss: object


class Lazy:
    """Numbers on a device; says when somebody reads them."""

    def __init__(self, values, name, events):
        self._values, self._name, self._events = np.asarray(values), name, events

    def addressable_data(self, _):
        self._events.append(f"read {self._name}")
        return self._values


class World:
    """A chunk, an evaluation, checkpoints and a folder that write down what is done to them."""

    def __init__(self, *, scores=None, losses=None, on_chunk=None, states=None):
        self.events, self.rows, self.metas = [], [], []
        self._step, self._scores = 0, scores or {}
        self._losses, self._on_chunk, self._states = losses or {}, on_chunk, states or {}

    def chunk(self, state, num_steps):
        begin, self._step = int(state["step"]), int(state["step"]) + num_steps
        self.events.append(f"chunk {self._step}")
        if self._on_chunk:
            self._on_chunk(self._step)
        values = [self._losses.get(step + 1, 1.0) for step in range(begin, self._step)]
        weight = self._states.get(self._step, 0.5)
        after = {"step": jnp.int32(self._step), "weight": jnp.float32(weight)}
        return after, Metrics(Lazy(values, self._step, self.events))

    def evaluate(self, state):
        step = int(state["step"])
        self.events.append(f"evaluate {step}")
        score = self._scores.get(step, 0.0)
        return loop.Report({"accuracy": score}, score, f"accuracy {score}")

    def save(self, step, state, meta):
        assert int(state["step"]) == step
        self.events.append(f"save {step}")
        self.metas.append(meta)

    def save_best(self, step, state, meta):
        self.events.append(f"best {step}")

    def wait(self):
        self.events.append("wait")

    def scalars(self, step, values):
        self.rows.append((step, dict(values)))

    def run(self, *, start=0, best=None, cadence=(8, 2, 4, 4), target=None, quiet=True):
        return loop.run(
            {"step": jnp.int32(start), "weight": jnp.float32(0.5)},
            start=start,
            best=best or loop.Best(),
            cadence=loop.Cadence(*cadence),
            chunk=self.chunk,
            evaluate=self.evaluate,
            target=target,
            checkpoints=self,
            rundir=self,
            quiet=quiet,
        )

    def did(self, *kinds):
        return [event for event in self.events if event.split()[0] in kinds]


@pytest.mark.parametrize(
    ("cadence", "boundaries"),
    [
        ((8, 2, 4, 4), [2, 4, 6, 8]),
        ((10, 4, 6, 5), [4, 5, 6, 8, 10]),
        ((7, 100, 100, 100), [7]),
        ((7, 3, 100, 100), [3, 6, 7]),
    ],
)
def test_boundaries(cadence, boundaries):
    plan, step, found = loop.Cadence(*cadence), 0, []
    while step < plan.steps:
        step = plan.next_boundary(step)
        found.append(step)
    assert found == boundaries
    # Whoever resumes at one of them meets the later ones again.
    assert [plan.next_boundary(step) for step in boundaries[:-1]] == boundaries[1:]
    assert plan.due(plan.steps, 100)
    assert not plan.due(1, 2)


def test_the_next_chunk_is_dispatched_before_the_last_numbers_are_read():
    world = World()
    world.run(cadence=(8, 2, 8, 8))
    assert world.did("chunk", "read") == [
        *("chunk 2", "chunk 4", "read 2", "chunk 6", "read 4", "chunk 8", "read 6", "read 8"),
    ]


def test_numbers_are_on_disk_before_the_checkpoint_that_covers_them():
    world = World(scores={4: 0.5})
    world.run()
    at = world.events.index
    assert at("read 4") < at("evaluate 4") < at("best 4") < at("save 4") < at("chunk 6")
    assert [step for step, values in world.rows if "loss" in values] == [2, 4, 6, 8]
    assert [step for step, values in world.rows if "accuracy" in values] == [0, 4, 8]


def test_the_mean_loss_of_a_chunk_is_reported():
    world = World(losses={1: 2.0, 2: 4.0})
    world.run(cadence=(2, 2, 2, 2))
    assert (2, {"loss": 3.0}) in world.rows


def test_the_first_of_equal_scores_is_the_best_and_step_0_is_never():
    world = World(scores={0: 0.9, 4: 0.5, 8: 0.5, 12: 0.6, 16: 0.1})
    outcome = world.run(cadence=(16, 4, 4, 8))
    assert world.did("best") == ["best 4", "best 12"]
    assert outcome.best == loop.Best(12, 0.6)
    assert world.metas[0] == {"best_step": 4, "best_score": 0.5}
    assert world.metas[-1] == {"best_step": 12, "best_score": 0.6}


def test_it_stops_at_the_target_and_saves():
    world = World(scores={4: 0.5, 8: 0.8, 12: 0.9})
    outcome = world.run(cadence=(16, 2, 4, 16), target=0.8)
    assert (outcome.step, outcome.reached_target, outcome.best.step) == (8, True, 8)
    assert world.did("save") == ["save 8"]


def test_a_run_that_had_reached_its_target_does_not_train_on():
    world = World()
    outcome = world.run(start=8, best=loop.Best(8, 0.9), cadence=(16, 2, 4, 4), target=0.8)
    assert world.events == []
    assert (outcome.step, outcome.reached_target) == (8, True)


def test_without_a_target_it_goes_to_the_end():
    world = World(scores={4: 1.0})
    assert world.run().step == 8
    assert world.did("save") == ["save 4", "save 8"]


def test_a_resumed_run_keeps_the_best_so_far():
    world = World(scores={8: 0.4})
    outcome = world.run(start=4, best=loop.Best(4, 0.6))
    assert world.did("best", "evaluate", "chunk") == ["chunk 6", "chunk 8", "evaluate 8"]
    assert outcome.best == loop.Best(4, 0.6)


def test_no_best_yet_is_null_in_the_checkpoint():
    world = World(scores={4: -math.inf, 8: -math.inf})
    world.run()
    assert world.metas[-1] == {"best_step": -1, "best_score": None}


def test_compilation_is_timed_apart():
    def slow_once(step):
        time.sleep(0.3 if step == 2 else 0.0)

    outcome = World(on_chunk=slow_once).run()
    assert outcome.compile_seconds > 0.3 > outcome.train_seconds
    assert outcome.seconds >= outcome.compile_seconds + outcome.train_seconds
    assert outcome.steps_timed == 8


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_run(value):
    world = World(losses={7: value})
    with pytest.raises(loop.NonFiniteError, match=r"step 7 is (nan|inf); .*checkpoint: step 4$"):
        world.run()
    assert world.did("save", "best")[-1] == "save 4"
    assert [step for step, _ in world.rows][-1] == 6


def test_a_loss_that_is_no_number_before_the_first_checkpoint():
    with pytest.raises(loop.NonFiniteError, match="step 1 is nan; last good checkpoint: none"):
        World(losses={1: math.nan}).run()


def test_a_broken_state_is_not_saved_though_its_loss_was_finite():
    world = World(states={8: math.nan}, scores={4: 0.1, 8: 0.9})
    with pytest.raises(loop.NonFiniteError, match=r"after step 8 .* last good checkpoint: step 4"):
        world.run()
    assert world.did("save", "best") == ["best 4", "save 4"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_the_next_boundary(signum, capsys):
    before = signal.getsignal(signum)

    def interrupt(step):
        if step == 2:
            os.kill(os.getpid(), signum)
            time.sleep(0.2)

    world = World(on_chunk=interrupt)
    with pytest.raises(loop.Interrupted, match=f"{signum.name} at step 2; the same") as stopped:
        world.run()
    assert stopped.value.status == 128 + signum
    assert world.events == ["evaluate 0", "chunk 2", "read 2", "save 2", "wait"]
    assert "once more to stop at once" in capsys.readouterr().err
    assert signal.getsignal(signum) is before


def test_one_request_that_arrives_twice_is_one_request():
    def interrupt(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)

    world = World(on_chunk=interrupt)
    with pytest.raises(loop.Interrupted):
        world.run()
    assert "save 2" in world.events


def test_a_second_signal_kills_even_while_something_computes():
    program = textwrap.dedent("""
        import ctypes, threading, os, signal, time
        from launch import loop
        def twice():
            for wait in (0.2, 0.8):
                time.sleep(wait)
                os.kill(os.getpid(), signal.SIGINT)
        with loop.StopRequest():
            threading.Thread(target=twice, daemon=True).start()
            lib = ctypes.CDLL(None)       # without Python, as a compilation is
            for _ in range(3):            # a signal ends a sleep
                lib.sleep(20)
        print("survived")
    """)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program], timeout=100, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert "stopping at the next boundary" in done.stderr
    assert time.monotonic() - began < 18


def shown_on_a_terminal(monkeypatch, *, quiet):
    """What a run writes to stderr when that is a terminal."""
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, 100))
    with open(slave, "w") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        World(scores={4: 0.25}).run(quiet=quiet)
    # A terminal hands over in pieces what was written; the last one comes before its end.
    text = b""
    with open(master, "rb", buffering=0) as terminal, contextlib.suppress(OSError):
        while piece := terminal.read(1 << 16):
            text += piece
    return text.decode()


def test_a_terminal_gets_a_bar(monkeypatch):
    text = shown_on_a_terminal(monkeypatch, quiet=False)
    assert "\r" in text
    assert "8/8" in text
    assert "step/s" in text
    assert "loss 1.000" in text
    assert "accuracy 0.25" in text


def test_quiet_silences_the_bar(monkeypatch):
    assert shown_on_a_terminal(monkeypatch, quiet=True) == ""


def test_elsewhere_plain_lines(capsys):
    World(scores={4: 0.25}).run(quiet=False)
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert "\r" not in captured.err
    assert lines[0] == "step 0/8  accuracy 0.0"
    assert re.fullmatch(
        r"step 4/8  loss 1\.000  accuracy 0\.25  \S+ steps/s, \S+ min left.*", lines[1]
    )
    assert len(lines) == 3


def test_quiet_silences_the_lines(capsys):
    World().run(quiet=True)
    assert capsys.readouterr() == ("", "")

"""The loop of a long run: chunks of compiled steps, reports, checkpoints, and every way to stop.

Knows no package: it is given `chunk(state, num_steps) -> (state, metrics)`, metrics being a
NamedTuple of arrays with a leading axis of steps and a field `loss`, and
`evaluate(state) -> Report`.

Boundaries depend on the configuration alone, checkpoints lie on boundaries, and step s draws with
a key made from s: a run that was killed and resumed computes the same bits as one that was not.
"""

import dataclasses
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from launch.checkpoints import Checkpoints
from launch.rundir import RunDir


class Report(NamedTuple):
    """One evaluation: numbers to write, a score that picks the best state, words to show."""

    scalars: Mapping[str, Any]
    score: float
    text: str


class Best(NamedTuple):
    step: int = -1  # of no evaluation yet
    score: float = -math.inf


class Outcome(NamedTuple):
    state: Any
    step: int
    best: Best
    last: Mapping[str, Any]  # metrics and scalars of the last step, as far as this process saw it
    reached_target: bool
    seconds: float  # of this process, evaluation and checkpoints included
    train_seconds: float  # waiting for or dispatching steps, compilation left out
    compile_seconds: float
    steps_timed: int  # in train_seconds


class NonFiniteError(Exception):
    """The loss is no number any more. Nothing of that chunk was saved."""


class Interrupted(Exception):
    """A signal asked to stop; the state is on disk."""

    def __init__(self, signum: int, where: str) -> None:
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name} {where}; the same command continues from there")
        self.status = 128 + signum  # what shells and schedulers show for a death by this signal


@dataclasses.dataclass(frozen=True)
class Cadence:
    """When to do what, in steps. The last step is a boundary of every kind."""

    steps: int
    log_every: int
    eval_every: int
    checkpoint_every: int

    def next_boundary(self, step: int) -> int:
        every = (self.log_every, self.eval_every, self.checkpoint_every)
        return min(self.steps, *((step // n + 1) * n for n in every))

    def due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.steps


class StopRequest:
    """Ctrl-C and SIGTERM as a flag that is looked at between chunks; a second one kills.

    A thread listens: handlers written in Python wait until a compilation or a chunk has ended.
    With several processes jax's own service listens to SIGTERM and lets them agree on a boundary,
    and a handler of ours would disable it.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)
    # Some launchers (timeout of coreutils is one) deliver one request twice.
    _ONE_REQUEST = 0.5

    def __init__(self) -> None:
        self._signum: int | None = None
        self._polls = 0
        self._shared = jax.process_count() > 1

    def __enter__(self) -> "StopRequest":
        if not self._shared:
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._previous = {s: signal.signal(s, lambda *_: None) for s in self._SIGNALS}
            self._thread = threading.Thread(target=self._listen, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if not self._shared:
            for signum, handler in self._previous.items():
                signal.signal(signum, handler)
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._write)
            self._thread.join()
            os.close(self._read)

    def _listen(self) -> None:
        first = 0.0
        while number := os.read(self._read, 1):
            if number[0] not in self._SIGNALS:
                continue
            if self._signum is None:
                self._signum, first = number[0], time.monotonic()
                text = "\nstopping at the next boundary; once more to stop at once"
                print(text, file=sys.stderr, flush=True)
            elif time.monotonic() - first > self._ONE_REQUEST:
                os._exit(128 + number[0])

    def poll(self) -> int | None:
        """The signal, if one came; every process has to ask equally often."""
        if self._shared:
            self._polls += 1
            if multihost_utils.reached_preemption_sync_point(self._polls):
                return signal.SIGTERM
        return self._signum


class Progress:
    """A bar on a terminal, plain lines elsewhere, nothing when quiet."""

    def __init__(self, *, start: int, steps: int, quiet: bool) -> None:
        self._steps, self._start, self._begin = steps, start, time.monotonic()
        self._quiet = quiet
        terminal = sys.stderr.isatty() and not quiet
        self._bar = (
            tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True) if terminal else None
        )

    def begin(self) -> None:
        """Rate and time left count from here, not from the compilation."""
        self._begin = time.monotonic()
        if self._bar is not None:
            self._bar.unpause()

    def advance(self, step: int, loss: float) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            self._bar.update(step - self._bar.n)

    def line(self, step: int, text: str, loss: float | None = None) -> None:
        if self._quiet:
            return
        words = [f"step {step}/{self._steps}"]
        words += [] if loss is None else [f"loss {loss:.3f}"]
        words.append(text)
        if self._bar is not None:
            self._bar.write("  ".join(words), file=sys.stderr)
            return
        done, spent = step - self._start, time.monotonic() - self._begin
        if done and spent:
            left = (self._steps - step) * spent / done
            words.append(f"{done / spent:.3g} steps/s, {left / 60:.1f} min left at most")
        print("  ".join(words), file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def run(
    state: Any,
    *,
    start: int,
    best: Best,
    cadence: Cadence,
    chunk: Callable[..., tuple[Any, Any]],
    evaluate: Callable[[Any], Report],
    target: float | None,
    checkpoints: Checkpoints,
    rundir: RunDir,
    quiet: bool,
) -> Outcome:
    """Train from step `start` to the end, to `target` (of the score), or until told to stop.

    Raises:
        NonFiniteError: the loss is NaN or infinite.
        Interrupted: a signal came, and the state has been saved.
    """
    loop = _Loop(state, start, best, cadence, chunk, evaluate, checkpoints, rundir)
    progress = Progress(start=start, steps=cadence.steps, quiet=quiet)
    begin = time.monotonic()
    reached = target is not None and best.score >= target
    # A program over several CPU devices deadlocks if the next one is queued before it has ended.
    simulated = jax.default_backend() == "cpu" and jax.device_count() > 1
    try:
        with StopRequest() as stop:
            if start == 0:
                loop.evaluate(progress)
            while loop.step < cadence.steps and not reached:
                loop.dispatch(wait=simulated, progress=progress)
                signum = stop.poll()
                save = cadence.due(loop.step, cadence.checkpoint_every) or signum is not None
                if cadence.due(loop.step, cadence.eval_every):
                    loop.read(progress)
                    loop.evaluate(progress)
                    reached = target is not None and loop.best.score >= target
                if save or reached:
                    loop.read(progress)
                    loop.save()
                if signum is not None:
                    checkpoints.wait()
                    raise Interrupted(signum, f"at step {loop.step}")
        loop.read(progress)
    finally:
        progress.close()
    return Outcome(
        loop.state,
        loop.step,
        loop.best,
        loop.last,
        reached,
        time.monotonic() - begin,
        loop.train_seconds,
        loop.compile_seconds,
        loop.steps_timed,
    )


class _Loop:
    """State of `run`. `unread` is the newest chunk: the device works on it while we go on."""

    def __init__(
        self,
        state: Any,
        step: int,
        best: Best,
        cadence: Cadence,
        chunk: Callable[..., tuple[Any, Any]],
        evaluate: Callable[[Any], Report],
        checkpoints: Checkpoints,
        rundir: RunDir,
    ) -> None:
        self.state, self.step, self.best = state, step, best
        self._cadence, self._chunk, self._evaluate = cadence, chunk, evaluate
        self._checkpoints, self._rundir = checkpoints, rundir
        self._unread: tuple[int, int, Any] | None = None
        self._lengths: set[int] = set()
        self.last: dict[str, Any] = {}
        self._last_saved = step if step else None
        self.train_seconds = self.compile_seconds = 0.0
        self.steps_timed = 0

    def meta(self) -> dict[str, Any]:
        # None for minus infinity, which JSON has no word for.
        score = self.best.score if math.isfinite(self.best.score) else None
        return {"best_step": self.best.step, "best_score": score}

    def save(self) -> None:
        self._check_finite()
        self._checkpoints.save(self.step, self.state, self.meta())
        self._last_saved = self.step

    def dispatch(self, *, wait: bool, progress: Progress) -> None:
        """Start the next chunk, then read the numbers of the one before."""
        length = self._cadence.next_boundary(self.step) - self.step
        fresh, began = length not in self._lengths, time.monotonic()
        previous = self._unread
        self.state, metrics = self._chunk(self.state, num_steps=length)
        if fresh:  # the call returns when it is compiled and dispatched
            self._lengths.add(length)
            self.compile_seconds += time.monotonic() - began
            began = time.monotonic()
        if wait or fresh:
            jax.block_until_ready(metrics)
        if previous:
            self._record(previous, progress)
        self._unread = (self.step, length, metrics)
        self.step += length
        self.train_seconds += time.monotonic() - began
        self.steps_timed += length
        if fresh and len(self._lengths) == 1:
            progress.begin()

    def read(self, progress: Progress) -> None:
        """Wait for the newest chunk and report it."""
        if self._unread:
            began = time.monotonic()
            self._record(self._unread, progress)
            self.train_seconds += time.monotonic() - began
        self._unread = None

    def _record(self, unread: tuple[int, int, Any], progress: Progress) -> None:
        before, length, metrics = unread
        values = {name: np.asarray(x.addressable_data(0)) for name, x in metrics._asdict().items()}
        bad = ~np.isfinite(values["loss"])
        if bad.any():
            at = int(np.argmax(bad))
            raise NonFiniteError(
                f"the loss of step {before + at + 1} is {values['loss'][at]}; {self._good()}"
            )
        means = {name: float(x.mean()) for name, x in values.items()}
        self.last.update(means)
        self._rundir.scalars(before + length, means)
        progress.advance(before + length, means["loss"])

    def evaluate(self, progress: Progress) -> None:
        report = self._evaluate(self.state)
        self.last.update(report.scalars)
        self._rundir.scalars(self.step, report.scalars)
        progress.line(self.step, report.text, self.last.get("loss"))
        if self.step and report.score > self.best.score:
            self.best = Best(self.step, report.score)
            self._check_finite()
            self._checkpoints.save_best(self.step, self.state, self.meta())
            self._last_saved = self.step

    def _check_finite(self) -> None:
        """A loss tells of the state before its update, not of the one to be saved."""
        if not bool(_all_finite(self.state).addressable_data(0)):
            raise NonFiniteError(f"the state after step {self.step} is not finite; {self._good()}")

    def _good(self) -> str:
        saved = "none" if self._last_saved is None else f"step {self._last_saved}"
        return f"last good checkpoint: {saved}"


@jax.jit
def _all_finite(state: Any) -> jax.Array:
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.array([jnp.isfinite(x).all() for x in floats]).all()

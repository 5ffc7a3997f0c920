"""What a competent user of numpy or PyTorch writes for benchmarks.robust_depth.

Memory allocated once, X and its transpose both contiguous, every operation into memory that is
there, products of all layers but one from those before and those behind.

Axes: T trials, S settings (depths in one product), N layers, M rows, D coordinates.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

STEP_SIZE = 0.01
THREADS = 2  # of torch, as ours has devices


class Workload(NamedTuple):
    """What the peers are given: problems, and the start of each depth."""

    x_TMD: np.ndarray
    y_TM: np.ndarray
    starts: tuple[np.ndarray, ...]  # w_ND of each depth, which grow

    def part(self, trials: int) -> "Workload":
        return self._replace(x_TMD=self.x_TMD[:trials], y_TM=self.y_TM[:trials])


def numpy_loop(work: Workload, steps: int) -> np.ndarray:
    losses_TS = np.empty((len(work.x_TMD), len(work.starts)))
    for t, (x_MD, y_M) in enumerate(zip(work.x_TMD, work.y_TM, strict=True)):
        for s, start_ND in enumerate(work.starts):
            theta_D = numpy_steps(x_MD, y_M, start_ND, steps)
            losses_TS[t, s] = np.abs(x_MD @ theta_D - y_M).mean()
    return losses_TS


def batched(work: Workload, steps: int, *, descend: Callable, together: bool) -> np.ndarray:
    """`descend` is one of the two below; `together` pads shallower networks with layers of 1."""
    groups = [work.starts] if together else [(start_ND,) for start_ND in work.starts]
    y_T1M, losses = work.y_TM[:, None], []
    for starts in groups:
        deepest = max(map(len, starts))
        pads = [((0, deepest - len(w_ND)), (0, 0)) for w_ND in starts]
        padded = [np.pad(w, pad, constant_values=1) for w, pad in zip(starts, pads, strict=True)]
        w_NSD = np.stack(padded, axis=1)
        w_NTSD = np.repeat(w_NSD[:, None], len(y_T1M), axis=1)
        moving_NS = np.arange(deepest)[:, None] < [len(w_ND) for w_ND in starts]
        moving_N1S1 = moving_NS[:, None, :, None].astype(w_NTSD.dtype) if together else None
        theta_TSD = descend(work.x_TMD, y_T1M, w_NTSD, steps, moving_N1S1)
        residual_TSM = theta_TSD @ work.x_TMD.swapaxes(1, 2) - y_T1M
        losses.append(np.abs(residual_TSM).mean(2))
    return np.concatenate(losses, axis=1)


def numpy_steps(
    x: np.ndarray, y: np.ndarray, w: np.ndarray, steps: int, moving: np.ndarray | None = None
) -> np.ndarray:
    """theta after the steps; of one trial, x (M, D) and w (N, D), or of all, as `batched` has it.

    Args:
        moving: 1 for layers that move and 0 for padding, to be broadcast against w.
    """
    x, turned = np.ascontiguousarray(x), np.ascontiguousarray(x.swapaxes(-1, -2))
    w, rate = w.copy(), np.float32(STEP_SIZE / x.shape[-2])
    ahead, behind = np.ones((len(w) + 1, *w.shape[1:]), w.dtype), np.ones_like(w)
    slope, push = np.empty_like(w), np.empty_like(w[0])
    r = np.empty((*w.shape[1:-1], x.shape[-2]), w.dtype)
    for _ in range(steps):
        for i in range(len(w)):
            np.multiply(ahead[i], w[i], out=ahead[i + 1])
        for i in range(len(w) - 1, 0, -1):
            np.multiply(behind[i], w[i], out=behind[i - 1])
        np.matmul(ahead[-1], turned, out=r)
        np.subtract(r, y, out=r)
        np.sign(r, out=r)
        np.matmul(r, x, out=push)
        np.multiply(push, rate, out=push)
        np.multiply(ahead[:-1], behind, out=slope)
        np.multiply(slope, push, out=slope)
        if moving is not None:
            np.multiply(slope, moving, out=slope)
        np.subtract(w, slope, out=w)
    return w.prod(0)


def torch_steps(
    x_TMD: np.ndarray,
    y_T1M: np.ndarray,
    w_NTSD: np.ndarray,
    steps: int,
    moving: np.ndarray | None,
    *,
    threads: int = THREADS,
) -> np.ndarray:
    """`numpy_steps` of all trials, operation by operation."""
    import torch

    torch.set_num_threads(threads)
    with torch.no_grad():
        x, y, w = (torch.tensor(part) for part in (x_TMD, y_T1M, w_NTSD))
        turned, rate = x.transpose(1, 2).contiguous(), STEP_SIZE / x.shape[1]
        moving = None if moving is None else torch.tensor(moving)
        ahead, behind = torch.ones((len(w) + 1, *w.shape[1:])), torch.ones_like(w)
        slope, push = torch.empty_like(w), torch.empty_like(w[0])
        r = torch.empty((*w.shape[1:-1], x.shape[1]))
        for _ in range(steps):
            for i in range(len(w)):
                torch.mul(ahead[i], w[i], out=ahead[i + 1])
            for i in range(len(w) - 1, 0, -1):
                torch.mul(behind[i], w[i], out=behind[i - 1])
            torch.bmm(ahead[-1], turned, out=r)
            r.sub_(y).sign_()
            torch.bmm(r, x, out=push)
            push.mul_(rate)
            torch.mul(ahead[:-1], behind, out=slope)
            slope.mul_(push)
            if moving is not None:
                slope.mul_(moving)
            w.sub_(slope)
        return w.prod(0).numpy()


class Peer(NamedTuple):
    """A solver, and the shares of our trials and steps that it is timed on."""

    run: Callable[[Workload, int], np.ndarray]
    fewer_trials: int = 1
    fewer_steps: int = 1


def _batched(descend: Callable, together: bool, fewer_steps: int) -> Peer:
    run = functools.partial(batched, descend=descend, together=together)
    return Peer(run, fewer_steps=fewer_steps)


PEERS = {
    "numpy, trial by trial": Peer(numpy_loop, fewer_trials=20, fewer_steps=2),
    "numpy, batched": _batched(numpy_steps, False, 5),
    "numpy, depths together": _batched(numpy_steps, True, 5),
    "torch, batched": _batched(torch_steps, False, 10),
    "torch, depths together": _batched(torch_steps, True, 10),
    "torch, batched, 1 thread": _batched(
        functools.partial(torch_steps, threads=1), False, fewer_steps=10
    ),
}


def known_peers() -> dict[str, Peer]:
    """Those whose library is here."""
    torch = importlib.util.find_spec("torch") is not None
    return {name: peer for name, peer in PEERS.items() if torch or not name.startswith("torch")}

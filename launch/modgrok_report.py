"""What modgrok_train says of a model: scores on the way, and at the end figures and words."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import modgrok
from launch import loop, parallel
from launch.modgrok_config import TrainConfig
from launch.modgrok_setup import Parts
from launch.rundir import RunDir, can_draw
from modgrok import evaluation, figures, latent_depth, latent_figures, oracles

NEXT = "python -m launch.modgrok_train --flagfile=launch/recipes/memorise.flags"


class Evaluator:
    """Tests parameters (averaged ones, if the run keeps them) on the four sets."""

    def __init__(
        self,
        cfg: TrainConfig,
        parts: Parts,
        tasks: modgrok.TaskSplit,
        inputs: modgrok.InputSplit,
        mesh: jax.sharding.Mesh,
        *,
        group_W: np.ndarray | None = None,
    ) -> None:
        """`group_W` of a run with groups of gates; gates are rounded for the test."""
        self._latent, self._group_W = parts.latent, group_W
        self._cfg, self._tasks, self._inputs, self._mesh = cfg, tasks, inputs, mesh
        self._data = parallel.replicate((tasks, inputs), mesh)

        def evaluate(params: Any, key: jax.Array, data: Any, counts: tuple[int, int]) -> Any:
            return modgrok.evaluate(
                params,
                key,
                *data,
                cfg=parts.model,
                modulus=cfg.p,
                shots=cfg.shots,
                sequences_per_task=counts,
                rows=cfg.eval_rows,
                row_sharding=parallel.rows(mesh),
                gates=(None, None)
                if parts.latent is None
                else latent_depth.task_gates(params, group_W),
            )

        self._evaluate = jax.jit(
            evaluate, static_argnames="counts", out_shardings=parallel.replicated(mesh)
        )

    def scores(
        self, state: modgrok.TrainState, key: jax.Array, counts: tuple[int, int]
    ) -> modgrok.Evaluation:
        """Scores as numpy arrays; every process has to call."""
        key = parallel.replicate(key, self._mesh)
        return parallel.on_host(self._evaluate(state.tested, key, self._data, counts=counts))

    def on_the_way(self, state: modgrok.TrainState, key: jax.Array) -> loop.Report:
        scores = self.scores(state, key, tuple(self._cfg.eval_sequences))
        last = {name: float(getattr(scores, name).last_shot) for name in evaluation.SETS}
        chosen = getattr(scores, self._cfg.select)
        deciding = float(evaluation.take_tasks(chosen, evaluation.DECIDING).last_shot)
        reported = float(evaluation.take_tasks(chosen, evaluation.REPORTED).last_shot)
        numbers = {f"accuracy_{name}": value for name, value in last.items()}
        numbers |= {"accuracy_deciding": deciding, "accuracy_reported": reported}
        text = (
            f"seen tasks {last['seen_train']:.2f} ({last['seen_heldout']:.2f} held-out inputs), "
            f"unseen {last['unseen_train']:.2f} ({last['unseen_heldout']:.2f})"
        )
        if self._latent is None:
            return loop.Report(numbers, deciding, text)
        gates = parallel.on_host(latent_depth.posterior(state.tested))
        numbers |= {
            "tested_expected_depth": gates.expected_depth_G.mean(),
            "tested_kept_layers": gates.kept_G.mean(),
            "tested_gate_variance": gates.variance_G.mean(),
        }
        text += f", depth {gates.expected_depth_G.mean():.1f} ({gates.kept_G.mean():g} kept)"
        # Before the weights are whole the network is deeper than it will be: no candidate.
        whole = int(parallel.on_host(state.step)) >= self._latent.ramp_end
        return loop.Report(numbers, deciding if whole else -math.inf, text)

    def at_the_end(
        self,
        state: modgrok.TrainState,
        outcome: loop.Outcome,
        key: jax.Array,
        folder: RunDir,
        *,
        draw: bool,
        say: Callable[..., None],
    ) -> dict[str, Any]:
        """Test the best state on new sequences; draw figures; return the summary's numbers.

        Of the unseen tasks only those count that had no say in which state is the best.
        """
        cfg = self._cfg
        scores = self.scores(state, key, (cfg.final_sequences, cfg.final_sequences))
        take = functools.partial(evaluation.take_tasks, index=evaluation.REPORTED)
        reported = scores._replace(
            unseen_train=take(scores.unseen_train), unseen_heldout=take(scores.unseen_heldout)
        )
        last_shot = {name: float(getattr(reported, name).last_shot) for name in evaluation.SETS}
        summary: dict[str, Any] = {
            f"accuracy_{name.replace('_', '_task_')}": value for name, value in last_shot.items()
        }
        by_task_W = scores.unseen_train.accuracy_WS[:, -1]
        history = _columns(folder.history())
        summary |= {
            "loss": _last_finite(history.get("loss")),
            "steps_per_second": outcome.steps_timed / outcome.train_seconds
            if outcome.train_seconds
            else None,
            "compile_seconds": outcome.compile_seconds,
            "best_step": outcome.best.step,
            "best_score": outcome.best.score,
            "chance": 1 / cfg.p,
            "unseen_tasks_reported": len(reported.unseen_train.accuracy_WS),
            "unseen_tasks_above_half": int((by_task_W > 0.5).sum()),
            "unseen_tasks": len(by_task_W),
        }
        if outcome.best.step > 0 and "accuracy_reported" in history:
            # Of the steps that compete for the best checkpoint, and chosen as that one is.
            begin = 1 if self._latent is None else self._latent.ramp_end
            known = np.isfinite(history["accuracy_reported"]) & (history["step"] >= begin)
            names = ("step", "accuracy_reported", "accuracy_deciding")
            found = modgrok.transience(*(history[name][known] for name in names))
            summary["transience"] = found._asdict()
        gates = self._gates(state, outcome)
        summary |= gates
        arrays = {} if self._group_W is None else {"task_groups": self._group_W}
        if self._latent is not None:
            arrays["gate_logits"] = parallel.on_host(state.tested["gates"]["logits_GL"])
        folder.save_arrays(
            "evaluation",
            **arrays,
            train_tasks=self._tasks.train_W2,
            unseen_tasks=self._tasks.unseen_U2,
            train_inputs=self._inputs.train_M2,
            heldout_inputs=self._inputs.heldout_O2,
            **{
                f"{name}_{field}": getattr(getattr(scores, name), field)
                for name in evaluation.SETS
                for field in ("accuracy_WS", "loss_WS", "num_sequences")
            },
        )
        drawn = draw and self._draw(scores, reported, history, outcome, folder, say)
        if drawn and self._latent is not None:
            self._draw_gates(arrays["gate_logits"], history, folder)
        if gates:
            several = len(gates["kept_by_group"]) > 1
            say(
                f"\nGates keep {len(gates['kept_layers'])} of {cfg.layers} blocks"
                f"{' for tasks in no group' if several else ''} (expected depth"
                f"{', mean of the groups,' if several else ''} {gates['expected_depth']:.2f}): "
                f"{gates['kept_layers']}"
            )
        self._last_words(last_shot, outcome, folder, drawn, say)
        return summary

    def _gates(self, state: modgrok.TrainState, outcome: loop.Outcome) -> dict[str, Any]:
        """Of the tested state, and (`last_`) of the last; layers as unseen tasks use them."""
        if self._latent is None:
            return {}
        numbers: dict[str, Any] = {}
        for prefix, one in (("", state), ("last_", outcome.state[0])):
            params = one.tested
            gates = parallel.on_host(latent_depth.posterior(params))
            shared_L = parallel.on_host(latent_depth.task_gates(params, self._group_W)[1])
            numbers |= {
                f"{prefix}expected_depth": float(gates.expected_depth_G.mean()),
                f"{prefix}kept_layers": np.flatnonzero(shared_L).tolist(),
                f"{prefix}kept_by_group": gates.kept_G.tolist(),
                f"{prefix}gate_variance": float(gates.variance_G.mean()),
            }
        return numbers

    def _draw_gates(
        self, logits_GL: np.ndarray, history: dict[str, np.ndarray], folder: RunDir
    ) -> None:
        inclusion_GL = 1 / (1 + np.exp(-logits_GL.astype(float)))
        folder.save_figure("posterior", latent_figures.posterior_map(inclusion_GL))
        if "expected_depth" in history:
            folder.save_figure(
                "depth", latent_figures.depth_curves(history, target=self._cfg.target_depth)
            )

    def _draw(
        self,
        scores: modgrok.Evaluation,
        reported: modgrok.Evaluation,
        history: dict[str, np.ndarray],
        outcome: loop.Outcome,
        folder: RunDir,
        say: Callable[..., None],
    ) -> bool:
        if not can_draw(say):
            return False
        cfg = self._cfg
        names = {"step": "step", "loss": "loss"}
        names |= {f"accuracy_{name}": name for name in evaluation.SETS}
        curves = {names[key]: column for key, column in history.items() if key in names}
        best = outcome.best.step if outcome.best.step > 0 else None
        if "step" in curves:
            folder.save_figure(
                "training", figures.training_curves(curves, modulus=cfg.p, best_step=best)
            )
        shots = {name: getattr(reported, name).accuracy_WS.mean(axis=0) for name in evaluation.SETS}
        folder.save_figure(
            "shots",
            figures.accuracy_by_shots(
                shots,
                modulus=cfg.p,
                bayes_S=oracles.bayes_accuracy(cfg.p, cfg.shots),
                ratio_matching_S=oracles.ratio_matching_accuracy(cfg.p, cfg.shots),
            ),
        )
        folder.save_figure(
            "tasks",
            figures.task_map(
                self._tasks.train_W2,
                scores.seen_train.accuracy_WS[:, -1],
                self._tasks.unseen_U2,
                scores.unseen_train.accuracy_WS[:, -1],
                modulus=cfg.p,
            ),
        )
        return True

    def _last_words(
        self,
        last_shot: dict[str, float],
        outcome: loop.Outcome,
        folder: RunDir,
        drawn: bool,
        say: Callable[..., None],
    ) -> None:
        cfg = self._cfg
        ended = "reached the target" if outcome.reached_target else "ended"
        which, chose = f"the best checkpoint is of step {outcome.best.step}", ""
        if outcome.best.step > 0:
            chose = " and that did not choose the checkpoint"
        else:
            which = "no best checkpoint was chosen, and the last state is tested"
        say(
            f"\nTraining {ended} after {outcome.step} steps; {which}. After {cfg.shots - 1} "
            f"examples it answers\n"
            f"  {last_shot['seen_train']:6.1%} on tasks it was trained on,\n"
            f"  {last_shot['unseen_train']:6.1%} on tasks it has never seen{chose},\n"
            f"  {last_shot['unseen_heldout']:6.1%} on such tasks with inputs never seen either "
            f"(chance: {1 / cfg.p:.1%})."
        )
        if drawn:
            say(f"Accuracy by number of examples: {folder.path / 'figures' / 'shots.png'}")
        if cfg.num_tasks > 18 and cfg.p == 7:
            say(f"Next, the other side of the transition, a model that memorises:\n  {NEXT}")
        else:
            say(f"To continue or repeat: the same command with --workdir={folder.path}")


def _last_finite(column: np.ndarray | None) -> float | None:
    """The last number reported; None if there is none (every process but the first)."""
    known = np.array([]) if column is None else column[np.isfinite(column)]
    return float(known[-1]) if len(known) else None


def _columns(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Reports as columns, NaN where a step lacks one; reports of one step are merged."""
    merged: dict[int, dict[str, Any]] = {}
    for row in rows:
        merged.setdefault(row["step"], {}).update(row)
    ordered = [merged[step] for step in sorted(merged)]
    names = dict.fromkeys(name for row in ordered for name in row)
    return {
        name: np.array([np.nan if row.get(name) is None else row[name] for row in ordered], float)
        for name in names
    }

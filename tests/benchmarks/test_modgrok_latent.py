"""The benchmarks of latent depth run, and a run that is on record is not trained again."""

import dataclasses
import json

import pytest

import modgrok
from benchmarks import modgrok_depth, modgrok_latent
from modgrok import latent_figures


def test_every_way_to_skip_blocks_gives_the_same_logits():
    """`measure_forward` compares them before it times them."""
    cfg = modgrok.Config(vocab=7, width=8, heads=2, layers=7)
    rows = modgrok_depth.measure_forward(cfg, kept=[3], batch=2, shots=2, repetitions=1)
    assert [row["way"] for row in rows] == ["every block", "cond", "gathered", "loop", "pruned"]
    assert all(row["milliseconds"] >= 0 for row in rows)
    assert 30 < rows[-1]["flops_percent"] < 50


@pytest.mark.slow
def test_an_experiment_is_recorded_once(tmp_path, monkeypatch, capsys):
    tiny = {"layers": 3, "width": 8, "tasks": 4, "batch": 8, "shots": 3, "target": 2.0}
    tiny |= {"steps": 4, "every": 2, "warmup": 1, "soft": 1, "anneal": 1, "optimizer": "adamw"}
    arguments = ["--experiments", "target", "--seeds", "0", "--output", str(tmp_path), "--set"]
    arguments += [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in tiny.items()]
    modgrok_latent.main(arguments)
    (row,) = map(json.loads, (tmp_path / "target.jsonl").read_text().splitlines())
    assert row["run"] == dataclasses.asdict(modgrok_latent.Run(**tiny))
    assert row["kept"] == 3
    assert row["pruned_difference"] < 1e-6
    assert row["sampled_se"] > 0
    assert len(row["random"]) == 10
    monkeypatch.setattr(modgrok_latent, "train", None)
    modgrok_latent.main(arguments)
    assert "| 0    | L=3 pre K=2.0 |" in capsys.readouterr().out


def test_best_accuracy_on_unseen_tasks_is_chosen_by_others_once_weights_are_whole():
    run = modgrok_latent.Run(soft=10, anneal=10, test_every=20)
    history = {"step": [60], "max_grad_norm": [1.0]}
    history |= {"reported": [0.9, 0.3, 0.2, 0.4], "deciding": [0.9, 0.1, 0.5, 0.4]}
    row = {"run": dataclasses.asdict(run), "history": history}
    shown = modgrok_latent.summary(row)
    assert (shown["best_reported"], shown["last_reported"]) == (0.2, 0.4)


def test_gradients_are_drawn_where_they_are_on_record(tmp_path, monkeypatch):
    drawn = []
    draw = latent_figures.gradient_by_block
    monkeypatch.setattr(
        latent_figures, "gradient_by_block", lambda norms: drawn.append(norms) or draw(norms)
    )
    rows = [
        {"kind": "gated", "norms": {"100": [1, 2], "20": [2, 3]}},
        {"kind": "gated", "norms": {"20": [5, 5]}},  # another seed
        {"kind": "shallow", "norms": {}},
    ]
    modgrok_latent.draw_gradients(rows[2:], tmp_path / "none.png")
    modgrok_latent.draw_gradients(rows, tmp_path / "some.png")
    assert drawn == [{"gated": {"step 20": [2, 3], "step 100": [1, 2]}}]
    assert [path.name for path in tmp_path.iterdir()] == ["some.png"]

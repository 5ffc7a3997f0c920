"""The page of what was learned: of a run and of a file, what it says of controls, bad requests."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from programs import contents, fixture_for, summary
from training_runs import TINY as TINY_RUN
from training_runs import settings

from launch import modgrok_inspect, modgrok_train
from launch import modgrok_instruments as instruments
from modgrok import interop
from modgrok.model import Config, init_params

assert_refused = functools.partial(programs.assert_refused, program="modgrok_inspect")
program = fixture_for(modgrok_inspect, "--devices=1")
TINY = instruments.Size(repetitions=2, sequences=8, contexts=2, shuffles=9, neurons=2)
OF_THE_FILE = ("--p=5", "--shots=4", "--num_tasks=12", "--input_fraction=0.8")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(instruments.SIZES, "quick", TINY)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A checkpoint with the reference's names, of two layers and two heads."""
    cfg = Config(vocab=5, width=16, heads=2, layers=2, mlp_ratio=2)
    path = tmp_path_factory.mktemp("file") / "model.npz"
    interop.save_reference(path, init_params(jax.random.key(0), cfg), cfg)
    return path


@pytest.mark.slow
def test_a_run_becomes_a_page_with_controls(program, finished, tmp_path):
    before = contents(finished)
    flags = (f"--checkpoint={finished}", f"--workdir={tmp_path}/page")
    said = summary(program(*flags))
    folder = tmp_path / "page"
    page = (folder / "report.md").read_text()
    figures = re.findall(r"\]\((figures/\w+\.png)\)", page)
    assert len(figures) >= 15
    assert all((folder / name).stat().st_size > 2000 for name in figures)
    assert "averaged weights" in page
    assert "| head | previous | own x |" in page

    scores = json.loads((folder / "scores.json").read_text(), parse_constant=pytest.fail)
    assert list(scores) == ["network", "random", "ratio_matching", "bayes"]
    assert np.shape(scores["network"]["attention"]["previous"]["mean"]) == (1, 4)
    matching, bayes = scores["ratio_matching"], scores["bayes"]
    assert matching["label_corruption"]["change_elsewhere"][0] == 0
    assert matching["follows_example_on_the_line"]["corrupt"][0] == 1
    assert matching["attention"]["ratio_choice"]["best"][0] == pytest.approx(1)
    assert matching["head_features"]["log"]["best"][0] == pytest.approx(1, abs=1e-4)
    assert matching["neurons"]["log"]["best_r2"][1] == pytest.approx(1, abs=1e-4)
    assert bayes["head_features"]["additive"]["best"][0] == pytest.approx(1, abs=1e-4)
    assert set(bayes["grids"]["accuracy_known_to_regression_only"]) <= {None, 1.0}
    assert "ablation" not in matching
    for name in ("network", "random"):
        assert set(scores[name]["ablation"]["heads"]["zero"]) == {"0.0", "0.1", "0.2", "0.3"}
        assert abs(scores[name]["patching"]["share_residual"][0][-1] or 1) == pytest.approx(1)

    # What the tables say is in the arrays, and a second call says it again.
    arrays = dict(np.load(folder / "network.npz"))
    heads = arrays["head_mean_accuracy_R4GS"]
    change = heads[:, 2, 1:, -1] - heads[:, 2, :1, -1]
    listed = scores["network"]["ablation"]["heads"]["mean"]
    found = [listed[f"0.{head}"]["unseen_train"][0] for head in range(4)]
    np.testing.assert_allclose(found, change.mean(0), atol=1e-4)
    assert said["scores"]["accuracy_unseen_train"] == pytest.approx(
        arrays["accuracy_R4S"][:, 2, -1].mean(), abs=1e-4
    )
    again = summary(program(*flags))
    assert again["scores"] == said["scores"]
    assert contents(finished) == before


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".npz", ".pt"])
def test_a_file_with_the_references_names(program, file, tmp_path, suffix):
    if suffix == ".pt":
        torch = pytest.importorskip("torch", reason=".pt files need torch")
        entries = {name: torch.from_numpy(value) for name, value in np.load(file).items()}
        file = tmp_path / "model.pt"
        torch.save(entries, file)
    flags = (f"--checkpoint={file}", *OF_THE_FILE, "--controls=", "--head=1.1")
    flags += ("--together=0.0+0.1+1.0+1.1,1.1+0.0",)
    said = summary(program(*flags, f"--workdir={tmp_path}/page"))
    page = (tmp_path / "page" / "report.md").read_text()
    assert "The model of a file: p = 5, 12 tasks" in page
    assert "2 blocks of width 16 with 2 heads" in page
    assert not said["controls"]
    assert sorted(x.name for x in (tmp_path / "page").glob("*.npz")) == ["network.npz"]
    arrays = dict(np.load(tmp_path / "page" / "network.npz"))
    np.testing.assert_array_equal(arrays["drawn_head"], [1, 1])
    assert arrays["head_zero_accuracy_R4GS"].shape[2] == 1 + 4 + 2
    np.testing.assert_array_equal(arrays["together_GLH"][1], [[1, 0], [0, 1]])
    ablation = json.loads((tmp_path / "page" / "scores.json").read_text())["network"]["ablation"]
    assert list(ablation["heads"]["zero"]) == ["0.0", "0.1", "1.0", "1.1"]
    assert list(ablation["heads_together"]["mean"]) == ["0.0+0.1+1.0+1.1", "0.0+1.1"]
    assert "| 0.0+1.1 |" in page


@pytest.mark.slow
def test_devices_change_no_number(program, file, tmp_path):
    """Sequences are spread over eight devices."""
    flags = (f"--checkpoint={file}", *OF_THE_FILE, "--controls=", "--nofigures")
    one = summary(program(*flags, f"--workdir={tmp_path}/one"))["scores"]
    eight = summary(program(*flags, "--devices=8", f"--workdir={tmp_path}/eight"))["scores"]
    numbers = [name for name, value in one.items() if isinstance(value, float)]
    np.testing.assert_allclose(
        [eight[name] for name in numbers], [one[name] for name in numbers], rtol=1e-3, atol=1e-4
    )


@pytest.mark.slow
def test_a_run_with_gates_is_looked_at_with_them_rounded(program, cache, tmp_path):
    flags = (*TINY_RUN, "--layers=2", "--latent_depth", "--target_depth=1", "--devices=1")
    cfg = settings(*flags, f"--workdir={tmp_path}/run", f"--compilation_cache={cache}", "--quiet")
    assert modgrok_train.main(cfg) == 0
    summary(
        program(
            f"--checkpoint={tmp_path}/run",
            "--which=latest",
            "--controls=",
            f"--workdir={tmp_path}/page",
        )
    )
    page = (tmp_path / "page" / "report.md").read_text()
    assert "| group | expected depth | kept |" in page
    assert (tmp_path / "page" / "figures" / "posterior.png").exists()
    depth = json.loads((tmp_path / "page" / "scores.json").read_text())["network"]["latent_depth"]
    assert np.shape(depth["inclusion_GL"]) == (1, 2)


def test_rounded_gates_of_a_task_in_no_group():
    logits_GL = jnp.array([[2.0, -1.0, 0.5], [2.0, -1.0, -2.0]])
    gate_L, posterior = modgrok_inspect._latent_depth({"gates": {"logits_GL": logits_GL}})
    np.testing.assert_array_equal(gate_L, [1, 0, 0])
    np.testing.assert_array_equal(posterior.kept_G, [2, 1])
    assert modgrok_inspect._latent_depth({"embedding": 0}) == (None, None)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--checkpoint=",), "--checkpoint=: does not exist; expected the folder"),
        (("--checkpoint=/nonexistent",), "--checkpoint=/nonexistent: does not exist"),
        (("--checkpoint={run}", "--p=7"), "--p=7: the run in"),
        (("--checkpoint={run}", "--shots=9"), "has shots=6; expected that"),
        (("--checkpoint={run}", "--head=3.0"), "--head=3.0: expected 0.0 to 0.3"),
        (("--checkpoint={run}", "--head=first"), "--head=first: expected LAYER.HEAD"),
        (("--checkpoint={run}", "--together=0.0+0.4"), "expected heads 0.0 to 0.3"),
        (("--checkpoint={run}", "--together=0.0+0.0"), "--together=0.0+0.0: expected groups such"),
        (("--checkpoint={run}", "--feature_shot=5"), "--feature_shot=5: expected 0 to 4"),
        (("--checkpoint={run}", "--controls=bayes,bayes"), "--controls=bayes,bayes: expected some"),
        (("--checkpoint={file}",), "--p=none: expected a value"),
        (("--checkpoint={file}", *OF_THE_FILE, "--p=7"), "has 5 tokens; expected --p=5"),
        (("--checkpoint={file}", *OF_THE_FILE, "--heads=3"), "width=16 is not a multiple of heads"),
        (("--checkpoint={file}", *OF_THE_FILE, "--num_tasks=25"), "--num_tasks=25: expected 1 to"),
        (("--checkpoint={file}", *OF_THE_FILE, "--shots=40"), "--shots=40: expected at most 20"),
    ],
)
def test_wrong_requests_write_nothing(flags, words, program, finished, file, tmp_path):
    flags = [flag.format(run=finished, file=file) for flag in flags]
    assert_refused(program(*flags, f"--workdir={tmp_path}/page"), words)
    assert not (tmp_path / "page").exists()


def test_foreign_and_damaged_checkpoints(program, finished, file, tmp_path):
    refused = functools.partial(program, f"--workdir={tmp_path}/page", *OF_THE_FILE)
    (tmp_path / "note.txt").write_text("no model")
    assert_refused(refused(f"--checkpoint={tmp_path}/note.txt"), "expected a folder, or a file")
    assert_refused(
        refused(f"--checkpoint={tmp_path}"), "expected the folder of a modgrok_train run"
    )
    torn = tmp_path / "torn.npz"
    torn.write_bytes(file.read_bytes()[:500])
    assert_refused(refused(f"--checkpoint={torn}"), "not a readable .npz checkpoint")
    arrays = dict(np.load(file))
    arrays["transformer.h.0.mlp.c_fc.weight"][0, 0] = np.nan
    np.savez(tmp_path / "nan.npz", **arrays)
    assert_refused(refused(f"--checkpoint={tmp_path}/nan.npz"), "weights that are not finite")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"program": "isvd_link"}')
    flags = (f"--checkpoint={tmp_path}/other", f"--workdir={tmp_path}/page")
    assert_refused(program(*flags), f"--checkpoint={tmp_path}/other: belongs to isvd_link")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_bytes((finished / "config.json").read_bytes())
    flags = (f"--checkpoint={tmp_path}/empty", f"--workdir={tmp_path}/page")
    assert_refused(program(*flags), "holds no best checkpoint yet")
    assert not (tmp_path / "page").exists()

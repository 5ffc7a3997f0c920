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

from launch import (
    UsageError,
    modgrok_export,
    modgrok_inspect,
    modgrok_inspect_drawings,
    modgrok_setup,
    modgrok_train,
)
from launch import modgrok_instruments_common as instruments
from launch import modgrok_instruments_interventions as instruments_interventions
from launch import modgrok_instruments_outside as outside
from launch.checkpoints import Checkpoints
from modgrok import interop
from modgrok.model import Config, apply, init_params

assert_refused = functools.partial(programs.assert_refused, program="modgrok_inspect")
program = fixture_for(modgrok_inspect, "--devices=1")
SEQUENCES = [size.sequences for size in instruments.SIZES.values()]
TINY = instruments.Size(repetitions=2, sequences=8, contexts=2, shuffles=9, neurons=2)
GATED_RUN = (*TINY_RUN, "--layers=2", "--latent_depth", "--target_depth=1")
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


@pytest.fixture(scope="module")
def gated(tmp_path_factory, cache):
    """gated(logits_L) -> the folder of a run whose last checkpoint has these gates.

    All heads of the first of its two blocks look at the token before, whatever the tokens.
    """
    folder = tmp_path_factory.mktemp("gated")
    flags = ("--devices=1", f"--compilation_cache={cache}", "--quiet", "--steps=2")
    cfg = settings(*GATED_RUN, f"--workdir={folder}/trained", *flags)
    assert modgrok_train.main(cfg) == 0
    like = modgrok_setup.abstract_state(cfg, modgrok_setup.make_parts(cfg))
    with Checkpoints(folder / "trained" / "checkpoints") as store:
        restored = store.restore(like, which="latest")
    state, key = restored.state
    blocks = jax.tree.map(np.array, state.ema["blocks"])
    # One query and one key for all tokens, apart by the turn of one position.
    blocks["ln_1"]["scale"][0], blocks["ln_1"]["bias"][0] = 0, np.eye(16)[0]
    blocks["qkv"][0, 0, :2] = [[1, 0, 1, 0]], [[np.cos(1), np.sin(1), np.cos(0.01), np.sin(0.01)]]
    blocks["qkv"][0, 0, 0] *= 500

    def call(logits_L):
        gates = {"logits_GL": jnp.array([logits_L], jnp.float32)}
        ema = {**state.ema, "blocks": jax.tree.map(jnp.asarray, blocks), "gates": gates}
        new = folder / "_".join(map(str, logits_L))
        new.mkdir()
        (new / "config.json").write_bytes((folder / "trained" / "config.json").read_bytes())
        with Checkpoints(new / "checkpoints") as store:
            store.save(restored.step, (state._replace(ema=ema), key), restored.meta)
        return new, ema

    return call


def test_tasks_of_the_grids_tell_x_from_y():
    tasks = np.array([[1, 1], [1, 2], [3, 3], [2, 1]])
    np.testing.assert_array_equal(outside._lopsided(tasks), [[1, 2], [2, 1]])
    np.testing.assert_array_equal(outside._lopsided(tasks[::2]), tasks[::2])


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
    words = "controls: Ratio Matching and Bayes in the clothes of a network (`modgrok/controls.py`)"
    assert f"{words}, and a network of the same shape with random weights." in page
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
    # The stream is no head: of Ratio Matching it has the query's ratio after its second block.
    assert matching["ratio_similarity"]["y"]["best_head"] == "stream after block 1"
    assert set(matching["ratio_similarity"]["y"]) - set(matching["ratio_similarity"]["z"]) == {
        "p_value",
        "shuffled_95",
    }
    frequency = bayes["head_features"]["additive"]["components_frequencies"][0][0]
    assert all(q in (1, 2) for pair in frequency[:2] for q in pair)
    assert "ablation" not in matching
    for name in ("network", "random"):
        assert set(scores[name]["ablation"]["heads"]["zero"]) == {"0.0", "0.1", "0.2", "0.3"}
        # The clean stream after the last block, at the query, is all that the answer is read from.
        patching = scores[name]["patching"]
        effect = patching["effect_logits"][0]
        assert abs(effect) > 1e-5
        assert patching["gained_logits_residual"][-1][-1] == pytest.approx(effect, rel=0.01)

    # Beside every mean of a table are the ends of its interval: Student's t of one degree of
    # freedom, whose quantile has a closed form.
    own, stored = scores["network"], dict(np.load(folder / "network.npz"))
    gained_RLH = stored["patched_head_RLH"] - stored["patched_corrupt_R"][:, None, None]
    for part, name, value_RX in (
        (own["logit_lens"], "loss_by_layer", stored["lens_loss_RLS"][..., -1]),
        (own["label_corruption"], "accuracy_with_wrong_labels", stored["several_RS"]),
        (own["patching"], "gained_logits_head", gained_RLH),
    ):
        half_X = np.tan(0.475 * np.pi) * np.abs(value_RX[0] - value_RX[1]) / 2
        for end, sign in (("low", -1), ("high", 1)):
            wanted_X = value_RX.mean(0) + sign * half_X
            np.testing.assert_allclose(part[f"{name}_{end}"], wanted_X, rtol=1e-3, atol=1e-4)
    k, right, known = -1, stored["grid_right_KCpp"], stored["grid_ratio_KCpp"]
    hits_C, total_C = ((x * known[k]).sum((1, 2)) for x in (right[k], 1))
    part = own["grids"]["ratio_matching_recall"]
    assert part == own["grids"]["accuracy_known_to_both"]
    assert part[k] == pytest.approx(hits_C.sum() / total_C.sum(), abs=1e-4)
    low, high = (own["grids"][f"accuracy_known_to_both_{end}"][k] for end in ("low", "high"))
    assert low <= part[k] <= high
    assert np.shape(own["patching"]["share_residual_low"]) == np.shape(
        own["patching"]["share_residual"]
    )

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
def test_a_page_without_interventions(program, file, tmp_path):
    flags = (f"--checkpoint={file}", *OF_THE_FILE, "--controls=", "--nointerventions")
    summary(program(*flags, f"--workdir={tmp_path}/page"))
    page = (tmp_path / "page" / "report.md").read_text()
    assert "--interventions=false`" in page
    assert "ilenced" not in page
    assert "controls" not in page.replace("--controls=", "")
    drawn = {f"figures/{path.name}" for path in (tmp_path / "page" / "figures").iterdir()}
    assert drawn == set(re.findall(r"\]\((figures/\w+\.png)\)", page))
    scores = json.loads((tmp_path / "page" / "scores.json").read_text())["network"]
    assert "attention" in scores
    assert not {"ablation", "patching", "logit_lens"} & set(scores)


@pytest.mark.slow
def test_a_killed_page_goes_on_after_the_stages_that_are_done(program, file, tmp_path, monkeypatch):
    """And begins again where the checkpoint, or what measures, is another one since."""
    model = tmp_path / "model.npz"
    model.write_bytes(file.read_bytes())
    flags = (f"--checkpoint={model}", *OF_THE_FILE, "--controls=bayes", "--nofigures")
    call = functools.partial(program, *flags, f"--workdir={tmp_path}/page")
    asked = []

    def told(what, look, tokens_R4BT, behaviour=outside.behaviour):
        asked.append(what)
        return behaviour(what, look, tokens_R4BT)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(outside, "behaviour", told)
    with monkeypatch.context() as patch:
        patch.setattr(instruments_interventions, "intervene", killed)
        assert call()[0] == 130
        assert len(asked) == 1
        assert call()[0] == 130
        assert len(asked) == 1
        assert not (tmp_path / "page" / "scores.json").exists()
        cfg = Config(vocab=5, width=16, heads=2, layers=2, mlp_ratio=2)
        interop.save_reference(model, init_params(jax.random.key(1), cfg), cfg)
        assert call()[0] == 130
        assert len(asked) == 2
        with patch.context() as version:
            version.setattr(modgrok_inspect, "_instruments", lambda: [model])
            assert call()[0] == 130
            assert len(asked) == 3
        assert call()[0] == 130
        assert len(asked) == 4
    summary(call())
    assert len(asked) == 5  # of Bayes
    at_once = tmp_path / "at_once"
    summary(program(*flags, f"--workdir={at_once}"))
    text = (at_once / "scores.json").read_text()
    assert (tmp_path / "page" / "scores.json").read_text() == text


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
def test_closed_blocks_have_no_part_in_the_page(program, gated, tmp_path, monkeypatch):
    """It has the numbers of a file of the open block alone, under the number of that block."""
    drawn, draw = [], modgrok_inspect_drawings.draw
    monkeypatch.setattr(
        modgrok_inspect_drawings, "draw", lambda x: drawn.append(draw(x)) or drawn[-1]
    )
    run, params = gated([-1, 2])
    flags = (f"--checkpoint={run}", "--which=latest", "--controls=")
    assert_refused(program(*flags, "--head=0.0"), "--head=0.0: expected", "in its open blocks 1")
    said = summary(program(*flags, "--together=1.0+1.2", f"--workdir={tmp_path}/page"))
    page = (tmp_path / "page" / "report.md").read_text()
    assert "| group | expected depth | kept |" in page
    assert "2 blocks of width 16" in page
    assert "blocks 1; closed ones are left out" in page
    assert "| 1.0 |" in page
    assert not re.search(r"\| 0\.\d \||block 0|\| 0\.(all|log) ", page)
    assert (tmp_path / "page" / "figures" / "posterior.png").exists()
    network = json.loads((tmp_path / "page" / "scores.json").read_text())["network"]
    assert np.shape(network["latent_depth"]["inclusion_GL"]) == (1, 2)
    assert network["open_layers"] == [1]
    names = ["1.0", "1.1", "1.2", "1.3"]
    assert list(network["ablation"]["heads"]["zero"]) == names
    assert list(network["ablation"]["heads_together"]["zero"]) == ["1.0+1.2"]
    assert {x["neuron"][:2] for x in network["ablation"]["single_neurons"]} == {"1."}
    assert network["attention"]["previous"]["best_head"] in names

    # The page of a file that has the second block alone, cut out by hand.
    cfg = settings(*GATED_RUN)
    small = Config(vocab=cfg.p, width=16, heads=4, layers=1, mlp_ratio=cfg.mlp_ratio)
    rest = {"embedding": params["embedding"], "ln_f": params["ln_f"]}
    part = {**rest, "blocks": jax.tree.map(lambda x: x[1:], params["blocks"])}
    interop.save_reference(tmp_path / "open.npz", part, small)
    known = [f"--{name}={getattr(cfg, name)}".lower() for name in modgrok_inspect.OF_THE_RUN]
    flags = (*known, f"--task_seed={cfg.seed}", "--controls=", "--together=0.0+0.2", "--nofigures")
    flags += (f"--checkpoint={tmp_path}/open.npz", f"--workdir={tmp_path}/plain")
    assert summary(program(*flags))["scores"] == {**said["scores"], "most_needed_head": "0.0"}
    arrays = dict(np.load(tmp_path / "page" / "network.npz"))
    wanted = dict(np.load(tmp_path / "plain" / "network.npz"))
    differ = {"drawn_head", "input"}
    own = {"open_layer_L", *(x for x in arrays if x.startswith("posterior"))}
    assert arrays.keys() - wanted.keys() == own
    for name in arrays.keys() - own - differ:
        np.testing.assert_array_equal(arrays[name], wanted[name], err_msg=name)
    np.testing.assert_array_equal(arrays["drawn_head"], wanted["drawn_head"] + [1, 0])

    (figures,) = drawn
    assert figures["attention"].axes[3].get_title() == "layer 1, head 3"
    assert figures["neurons"].axes[0].get_title() == "log basis, layer 1"
    assert [x.get_text() for x in figures["heads"].axes[0].get_yticklabels()] == ["1"]
    assert [x.get_text() for x in figures["ablation"].axes[0].get_xticklabels()] == names

    # A head of the closed block would be the best one.
    whole = Config(vocab=cfg.p, width=16, heads=4, layers=2, mlp_ratio=cfg.mlp_ratio)
    tokens_BT = arrays["feature_context_T"][None]
    _, seen = apply(
        {**rest, "blocks": params["blocks"]}, tokens_BT, whole, positions="all", capture=True
    )
    assert np.diagonal(seen.attention_LBHTT[0], -1, -2, -1).min() > 0.99
    assert network["attention"]["previous"]["best"][0] < 0.5


@pytest.mark.slow
def test_a_network_without_an_open_block_is_refused(program, gated, tmp_path):
    run, _ = gated([-1, -2])
    flags = (f"--checkpoint={run}", f"--workdir={tmp_path}/page")
    assert_refused(program(*flags), "holds no best checkpoint yet", "or --which=latest")
    words = f"--checkpoint={run}: every gate is closed in its latest checkpoint"
    assert_refused(program(*flags, "--which=latest"), words)
    assert not (tmp_path / "page").exists()


def test_help_says_how_many_sequences_go_together_whatever_rows_is():
    said = modgrok_inspect.InspectConfig.__dataclass_fields__["rows"].metadata["help"]
    assert [int(number) for number in re.findall(r"\d+", said)] == SEQUENCES


def test_devices_share_the_sequences_evenly():
    found = [modgrok_inspect._sharing(devices, 48) for devices in (1, 2, 3, 4, 5, 6, 7, 8, 64)]
    assert found == [1, 2, 3, 4, 4, 6, 6, 8, 48]


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
        (
            ("--checkpoint={run}", "--together=0.0+0.1", "--nointerventions"),
            "--together=0.0+0.1: expected none with --nointerventions",
        ),
        (("--checkpoint={run}", "--feature_shot=5"), "--feature_shot=5: expected 0 to 4"),
        (("--checkpoint={run}", "--controls=bayes,bayes"), "--controls=bayes,bayes: expected some"),
        (("--checkpoint={run}", "--task_seed=1"), "--task_seed=1: expected none with the folder"),
        (("--checkpoint={file}",), "--p=none: expected a value"),
        (("--checkpoint={file}", "--which=latest"), "--which=latest: expected none with a file"),
        (("--checkpoint={file}", *OF_THE_FILE, "--p=7"), "has 5 tokens; expected --p=5\n"),
        (("--checkpoint={file}", *OF_THE_FILE, "--heads=3"), "width=16 is not a multiple of heads"),
        (("--checkpoint={file}", *OF_THE_FILE, "--num_tasks=25"), "--num_tasks=25: expected 1 to"),
        (("--checkpoint={file}", *OF_THE_FILE, "--shots=40"), "--shots=40: expected at most 20"),
        (
            ("--checkpoint={file}", *OF_THE_FILE, "--task_seed=4294967296"),  # that of 0 to jax
            "--task_seed=4294967296: expected an integer at least 0 and at most 2147483647",
        ),
        (
            ("--checkpoint={file}", *OF_THE_FILE, "--extra_tokens=1"),
            "has 5 tokens; expected --extra_tokens=0 if",
        ),
        (("--checkpoint={file}", *OF_THE_FILE, "--p=11", "--extra_tokens=1"), "a smaller --p\n"),
        (
            ("--checkpoint={file}", *OF_THE_FILE, "--shots=3", "--input_fraction=0.12"),
            "--input_fraction=0.12, and none of these 3 inputs has another on its line",
        ),
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
    assert_refused(program(*flags), "holds no best checkpoint yet", "or --which=latest")
    with pytest.raises(UsageError, match=r"holds no best checkpoint yet; .* or --which=latest"):
        modgrok_export.main(
            modgrok_export.ExportConfig(f"{tmp_path}/empty", f"{tmp_path}/model.npz")
        )
    assert not (tmp_path / "page").exists()

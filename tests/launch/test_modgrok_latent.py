"""Latent depth in launch/modgrok_train.py and launch/modgrok_export.py."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asserts import assert_trees_equal
from training_runs import TINY, assert_refused, assert_same_run, final_state, reports, settings

import modgrok
from launch import UsageError, modgrok_config, modgrok_export, modgrok_setup, modgrok_train
from launch.checkpoints import Checkpoints
from launch.modgrok_export import ExportConfig
from modgrok import interop

GATED = (
    *TINY,
    *("--layers=2", "--latent_depth", "--target_depth=1", "--gate_soft_steps=1"),
    *("--gate_anneal_steps=2", "--gate_lr=0.3", "--gate_entropy_weight=0.2"),
)


@pytest.fixture(scope="module")
def gated(tmp_path_factory, cache):
    """The folder of a finished run with gates, not to be altered."""
    workdir = tmp_path_factory.mktemp("gated") / "run"
    flags = (f"--workdir={workdir}", "--devices=1", f"--compilation_cache={cache}", "--quiet")
    assert modgrok_train.main(settings(*GATED, *flags)) == 0
    return workdir


def test_a_run_reports_its_gates_and_is_resumed(program, gated, tmp_path):
    """Stopped after 4 steps, it ends with the same bits: gates fold in the step."""
    workdir = tmp_path / "run"
    status, out, err = program(*GATED, f"--workdir={workdir}", "--steps=4")
    assert status == 0
    assert "The gates' weights are whole from step 5 on, and --steps=4: no checkpoint" in err
    assert json.loads(out)["best_step"] == -1
    status, out, err = program(*GATED, f"--workdir={workdir}", "--figures")
    assert status == 0
    assert "no checkpoint" not in err
    assert "resuming at step 4" in err
    assert "Gates keep" in err
    assert_same_run(workdir, gated, GATED)
    result = json.loads(out)
    assert 0 < result["expected_depth"] < 2
    assert set(result["kept_layers"]) <= {0, 1}
    assert 0 < result["gate_variance"] <= 0.25
    assert result["last_expected_depth"] < 2 * 0.8808  # where it began
    assert {"posterior.png", "depth.png"} <= {path.name for path in (workdir / "figures").iterdir()}
    rows = [json.loads(row) for row in reports(workdir)]
    assert {"expected_depth", "kl", "gate_entropy", "gate_variance"} <= set().union(*rows)
    depth = [row["expected_depth"] for row in rows if "expected_depth" in row]
    assert depth[-1] < depth[0]
    with np.load(workdir / "evaluation.npz") as arrays:
        assert arrays["gate_logits"].shape == (1, 2)
    # Weights rise until step 5, so only the test at step 8 may choose.
    assert result["best_step"] == result["transience"]["best_step"] == 8


@pytest.mark.slow
def test_groups_of_tasks_from_a_file(program, gated, tmp_path):
    cfg = settings(*GATED)
    train_W2 = modgrok_setup.prepare_data(cfg)[0].train_W2
    path = tmp_path / "groups.json"
    path.write_text(json.dumps([train_W2[1:].tolist(), train_W2[:1].tolist()]))
    workdir = tmp_path / "run"
    args = (*GATED, f"--workdir={workdir}", f"--task_groups={path}", "--steps=2", "--quiet")
    status, out, _ = program(*args)
    assert status == 0
    assert len(json.loads(out)["kept_by_group"]) == 2
    with np.load(workdir / "evaluation.npz") as arrays:
        np.testing.assert_array_equal(arrays["task_groups"], [1] + [0] * 15)
        assert arrays["gate_logits"].shape == (2, 2)

    # The run keeps the groups that it was begun with, and refuses others.
    before = path.read_text()
    path.write_text(json.dumps([train_W2[2:].tolist(), train_W2[:2].tolist()]))
    message = f"--task_groups={path}: is not what the run in {workdir} was begun with"
    assert_refused(program(*args), message, f"expected the groups of {workdir}/task_groups.json")
    path.write_text(before.replace(" ", ""))
    own = workdir / "task_groups.json"
    copy = own.read_text()
    own.write_text("[[")
    assert_refused(program(*args), f"--workdir={workdir}: {own} cannot be read")
    own.write_text(copy)
    assert program(*args)[0] == 0
    path.unlink()
    own.write_text("[[")
    assert_refused(program(*args), f"--task_groups={path}: {own}: Expecting value")
    own.write_text(copy)
    assert program(*args)[0] == 0
    output = tmp_path / "small.npz"
    modgrok_export.main(ExportConfig(str(workdir), str(output), which="latest", group="1"))
    assert output.exists()


@pytest.mark.parametrize(
    ("rule", "groups"), [("ratio", None), ("random", 4), ("rectangle", 4), ("none", 1)]
)
def test_rules_for_groups(rule, groups):
    kind = "--task_rule=rectangular" if rule == "rectangle" else "--task_rule=random"
    cfg = settings("--preset=small", "--p=11", kind, "--latent_depth", f"--task_groups={rule}")
    group_W = modgrok_setup.task_groups(cfg, modgrok_setup.prepare_data(cfg)[0])
    latent = modgrok_setup.make_parts(cfg, group_W).latent
    assert latent.groups == (groups or len(set(group_W.tolist())))
    assert (group_W is None) == (rule == "none")


BAD = [
    (["--target_depth=3"], "--target_depth=3: expected above 0 and at most --layers=2"),
    (["--target_depth=0"], "--target_depth=0: expected above 0"),
    (["--target_depth=-1"], "--target_depth=-1: expected a finite number at least 0"),
    (["--nolatent_depth"], "--target_depth=1.0 --task_groups=none: expected --latent_depth"),
    (["--norm=post"], "--norm=post: expected pre with --latent_depth"),
    (["--norm=both"], "--norm=both: expected one of pre, post"),
    (["--task_groups=rectangle"], "--task_groups=rectangle: expected --task_rule=rectangular"),
    (["--task_groups=random", "--gate_groups=5"], "--gate_groups=5: expected a divisor of"),
    (
        ["--task_groups=random", "--gate_groups=1"],
        "--gate_groups=1: expected an integer at least 2",
    ),
    (
        ["--task_groups=ratio", "--num_tasks=1"],
        "--task_groups=ratio: puts all 1 tasks into one group",
    ),
    (["--gate_init=1e39"], "--gate_init=1e39: expected a finite number at least -1000000"),
    (["--gate_prior=beta", "--gate_beta=1e39,2"], "--gate_beta=1e39,2: expected a comma-separated"),
    (["--task_groups=nowhere.json"], "--task_groups=nowhere.json: No such file or directory"),
    (["--gate_beta=1,1"], "--gate_beta=1,1: expected two numbers, not both 1"),
    (["--gate_tau=0"], "--gate_tau=0: expected a finite number at least 0.001"),
    (["--gate_prior=flat"], "--gate_prior=flat: expected one of uniform, aggregated, beta"),
    (["--gate_prior=aggregated"], "--gate_prior=aggregated: expected --task_groups with it"),
]


@pytest.mark.parametrize(("args", "message"), BAD, ids=[" ".join(args) for args, _ in BAD])
def test_bad_input(program, tmp_path, monkeypatch, args, message):
    from launch import loop

    def reached(*_, **__):
        raise AssertionError("it was about to compile")

    monkeypatch.setattr(loop, "run", reached)
    monkeypatch.chdir(tmp_path)
    assert_refused(program(*GATED, "--workdir=run", *args), message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[[0, 0]]]", "which is no training task"),
        ("[", "--task_groups="),
        ('{"a": 1}', "groups are a list of lists of tasks [a, b]"),
    ],
)
def test_groups_that_do_not_partition_the_tasks(program, tmp_path, text, message):
    path = tmp_path / "groups.json"
    path.write_text(text)
    answer = program(*GATED, f"--workdir={tmp_path / 'run'}", f"--task_groups={path}")
    assert_refused(answer, f"--task_groups={path}: ", message if message[0] != "-" else "")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_an_earlier_version_resumes_as_the_run_without_gates_that_it_is(
    program, finished, tmp_path
):
    workdir = tmp_path / "old"
    shutil.copytree(finished, workdir)
    stored = json.loads((workdir / "config.json").read_text())
    old = {name: value for name, value in stored.items() if name not in modgrok_config.LATER}
    assert len(stored) - len(old) == 17
    (workdir / "config.json").write_text(json.dumps(old))
    answer = program(*TINY, f"--workdir={workdir}", "--latent_depth")
    assert_refused(answer, "latent_depth is false there and true here")
    assert_refused(program(*TINY, f"--workdir={workdir}", "--norm=post"), 'norm is "pre" there')
    status, out, _ = program(*TINY, f"--workdir={workdir}", "--quiet")
    assert status == 0
    assert json.loads(out)["resumed_from"] == 8


# Export ------------------------------------------------------------------------------------------


@pytest.fixture
def selected(gated, tmp_path):
    """A copy of the run whose gates keep the last block."""
    workdir = tmp_path / "selected"
    shutil.copytree(gated, workdir)
    cfg = settings(*GATED)
    parts = modgrok_setup.make_parts(cfg)
    logits_GL = np.array([[-3.0, 1.0]], np.float32)
    with Checkpoints(workdir / "checkpoints") as store:
        restored = store.restore(modgrok_setup.abstract_state(cfg, parts))
        state, key = restored.state
        state.params["gates"]["logits_GL"] = state.ema["gates"]["logits_GL"] = logits_GL
        store.save_best(8, (state, key), restored.meta)
        store.save(8, (state, key), restored.meta)
    return workdir, parts.model, state


def test_the_exported_network_is_the_rounded_one(selected, tmp_path, capsys):
    workdir, model, state = selected
    output = tmp_path / "model.npz"
    modgrok_export.main(ExportConfig(str(workdir), str(output)))
    said = json.loads(capsys.readouterr().out)
    assert (said["layers"], said["kept_layers"]) == (1, [1])
    small, params = interop.load_reference(output)
    assert small.layers == 1
    tokens_BT = jnp.asarray(np.random.default_rng(0).integers(0, 5, (4, 18)), jnp.int32)
    gate_L = jnp.array([0.0, 1.0])
    wanted = jax.jit(modgrok.apply)(state.ema, tokens_BT, model, gate=gate_L)
    found = jax.jit(modgrok.apply)(params, tokens_BT, small)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())


def test_the_union_of_groups_comes_with_its_mask(selected, tmp_path, capsys):
    output = tmp_path / "model.npz"
    modgrok_export.main(ExportConfig(str(selected[0]), str(output), group="union"))
    with np.load(json.loads(capsys.readouterr().out)["mask"]) as arrays:
        np.testing.assert_array_equal(arrays["mask_GK"], [[True]])
        np.testing.assert_array_equal(arrays["kept_layers"], [1])


def test_an_existing_mask_stays_unless_told(selected, tmp_path):
    mask = tmp_path / "model.mask.npz"
    mask.write_text("mine")
    cfg = ExportConfig(str(selected[0]), str(tmp_path / "model.npz"), group="union")
    with pytest.raises(ValueError, match=r"model.mask.npz of --group=union exists; --overwrite"):
        cfg.validate()
    forced = dataclasses.replace(cfg, overwrite=True)
    forced.validate()
    modgrok_export.main(forced)
    with np.load(mask) as arrays:
        np.testing.assert_array_equal(arrays["kept_layers"], [1])
    assert {path.name for path in tmp_path.glob("*.*")} == {"model.npz", "model.mask.npz"}


def test_a_pruned_run_has_the_best_score_only_if_it_is_its_own(tmp_path):
    """Which is that of the shared gates, at the best step."""
    cfg = settings(*GATED, "--task_groups=random", "--gate_groups=2")
    workdir = tmp_path / "run"
    workdir.mkdir()
    stored = {"program": "modgrok_train"} | dataclasses.asdict(cfg)
    (workdir / "config.json").write_text(json.dumps(stored))
    make = modgrok_setup.state_maker(cfg, modgrok_setup.make_parts(cfg, np.array([0, 1])))
    state, key = make(modgrok_setup.key_for(cfg, 1), modgrok_setup.key_for(cfg, 2))
    logits_GL = jnp.array([[3.0, -1.0], [3.0, 2.0]])  # shared: both blocks are open
    state.params["gates"]["logits_GL"] = state.ema["gates"]["logits_GL"] = logits_GL
    meta = {"best_step": 4, "best_score": 0.5}
    with Checkpoints(workdir / "checkpoints") as store:
        store.save_best(4, (state, key), meta)
        store.save(6, (state, key), meta)

    def pruned(which, group):
        output = tmp_path / f"{which}_{group}"
        modgrok_export.main(ExportConfig(str(workdir), str(output), which, prune=True, group=group))
        small = modgrok_export.run_settings(str(output))
        like = modgrok_setup.abstract_state(small, modgrok_setup.make_parts(small))
        with Checkpoints(output / "checkpoints") as store:
            metas = [store.restore(like, which=slot).meta for slot in ("best", "latest")]
        assert metas[0] == metas[1]
        return metas[0]

    assert pruned("best", "shared") == pruned("best", "1") == meta
    assert pruned("best", "0") == {"best_step": 4, "best_score": None}
    assert pruned("latest", "shared") == {"best_step": 6, "best_score": None}


def test_a_pruned_run_is_an_ordinary_one_that_goes_on(program, selected, tmp_path, capsys):
    workdir, _, state = selected
    output = tmp_path / "pruned"
    cfg = ExportConfig(str(workdir), str(output), prune=True)
    cfg.validate()
    modgrok_export.main(cfg)
    capsys.readouterr()
    step, _ = final_state(output, "best", TINY)
    assert step == 8
    status, out, _ = program(f"--flagfile={output / 'run.flags'}", "--steps=10", "--quiet")
    result = json.loads(out)
    assert status == 0
    assert (result["resumed_from"], result["steps"]) == (8, 10)
    assert "expected_depth" not in result
    restored = modgrok_export._select(ExportConfig(str(workdir), "x.npz"), settings(*GATED))
    assert_trees_equal(
        jax.tree.map(np.asarray, restored.state.params["blocks"]),
        jax.tree.map(lambda w: np.asarray(w)[[1]], state.params["blocks"]),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group": "all"}, "--group=all: expected shared, union or a number"),
        ({"prune": True, "group": "union"}, "--group=union: a run has no mask"),
        ({"prune": True, "output": ""}, "--output=: expected the folder to write"),
        ({"group": "1"}, "--group=1: expected 0 to 0"),
    ],
)
def test_wrong_requests(gated, tmp_path, changes, message):
    values = {"workdir": str(gated), "output": str(tmp_path / "m.npz"), **changes}
    cfg = ExportConfig(**values)

    def ask():
        cfg.validate()
        modgrok_export.main(cfg)

    with pytest.raises((ValueError, UsageError), match=message):
        ask()


def test_a_run_without_gates_has_nothing_to_prune(finished, tmp_path):
    with pytest.raises(UsageError, match=r"--prune: the run in .* has no gates"):
        modgrok_export.main(ExportConfig(str(finished), str(tmp_path / "p"), prune=True))

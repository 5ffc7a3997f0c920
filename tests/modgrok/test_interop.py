"""State dicts of the reference: the same function, the same entries, and clear refusals."""

import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from asserts import assert_trees_equal

from modgrok import interop
from modgrok.layers import rotary_tables
from modgrok.model import Config, apply, init_params
from tests.modgrok import reference_forward

SIZES = {"vocab": 11, "width": 24, "heads": 3, "layers": 2}
SUFFIXES = [".pt", ".pth", ".safetensors", ".npz"]
BLOCK = "transformer.h.1."


@pytest.fixture
def arrays():
    return reference_forward.random_state_dict(0, **SIZES)


def random_params(cfg):
    """Random leaves in the very structure that the model initialises."""
    rng = np.random.default_rng(3)
    shapes = jax.eval_shape(lambda key: init_params(key, cfg), jax.random.key(0))
    return jax.tree.map(lambda x: jnp.array(rng.normal(size=x.shape), x.dtype), shapes)


def path_with(tmp_path, suffix):
    if suffix in (".pt", ".pth"):
        pytest.importorskip("torch", reason=f"{suffix} files need torch")
    return tmp_path / f"checkpoint{suffix}"


@pytest.mark.parametrize(
    ("sizes", "length"),
    [
        (SIZES, 15),
        (SIZES, 69),  # attention in two halves
        ({**SIZES, "layers": 1, "heads": 2, "mlp_ratio": 3}, 15),
        ({**SIZES, "layers": 4}, 15),
        ({**SIZES, "layers": 7}, 15),  # a loop over blocks
    ],
    ids=lambda x: f"L{x['layers']}H{x['heads']}" if isinstance(x, dict) else f"T{x}",
)
def test_forward_pass_agrees_with_independent_numpy(sizes, length):
    arrays = reference_forward.random_state_dict(1, **sizes)
    cfg, params = interop.from_state_dict(arrays)
    tokens_BT = np.random.default_rng(2).integers(0, sizes["vocab"], (3, length))
    wanted_BTV = reference_forward.forward(arrays, tokens_BT[:, :-1])
    scale = np.abs(wanted_BTV).max()
    for positions, at in (("all", slice(None)), ("answers", slice(1, None, 3))):
        logits = apply(params, jnp.array(tokens_BT), cfg, positions=positions)
        np.testing.assert_allclose(logits / scale, wanted_BTV[:, at] / scale, atol=1e-5)


@pytest.mark.parametrize("name", list(reference_forward.shapes(**SIZES))[:-1])
def test_every_entry_matters_to_the_numpy_forward(name, arrays):
    """Guards the test above: it could not see an entry that the forward pass ignores."""
    tokens_BT = np.random.default_rng(2).integers(0, SIZES["vocab"], (1, 6))
    before = reference_forward.forward(arrays, tokens_BT)
    arrays[name] = arrays[name][..., ::-1]
    assert np.abs(reference_forward.forward(arrays, tokens_BT) - before).max() > 1e-3


def test_rotation_golden_values():
    unit_TK = np.zeros((2, 128))
    unit_TK[:, [0, 2]] = 1
    freqs = 10000.0 ** (-np.arange(64) / 64)
    golden = [0.5403, 0.8415, 0.6479, 0.7617, 0, 0]
    np.testing.assert_allclose(reference_forward.rotate(unit_TK, freqs)[1, :6], golden, atol=5e-5)
    cos_TK, sin_TK = rotary_tables(2, 128)
    ours = np.stack([cos_TK[1, :2], sin_TK[1, :2]], axis=1).ravel()
    np.testing.assert_allclose(ours, golden[:4], atol=5e-5)


@pytest.mark.parametrize(("layers", "count"), [(2, 22), (4, 40)])
def test_entries_in_the_order_of_the_reference(layers, count):
    cfg = Config(vocab=11, width=24, heads=3, layers=layers)
    exported = interop.to_state_dict(random_params(cfg), cfg)
    wanted = reference_forward.shapes(vocab=11, width=24, heads=3, layers=layers)
    assert len(exported) == count
    assert [(k, v.shape) for k, v in exported.items()] == list(wanted.items())
    assert all(v.dtype == np.float32 and v.flags.c_contiguous for v in exported.values())


def test_round_trips_are_exact(arrays):
    cfg, params = interop.from_state_dict(arrays)
    assert cfg == Config(**SIZES)
    assert_trees_equal(interop.to_state_dict(params, cfg), arrays)
    ours = random_params(cfg)
    back_cfg, back = interop.from_state_dict(interop.to_state_dict(ours, cfg))
    assert back_cfg == cfg
    assert_trees_equal(back, ours)


def test_parameters_do_not_alias_the_arrays(arrays):
    _, params = interop.from_state_dict(arrays)
    before = float(params["embedding"][0, 0])
    arrays["transformer.wte.weight"][0, 0] += 1
    assert float(params["embedding"][0, 0]) == before


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_wrapper_prefixes_are_stripped(prefix, arrays):
    wanted = interop.from_state_dict(arrays)
    assert_trees_equal(
        interop.from_state_dict({prefix + name: x for name, x in arrays.items()}), wanted
    )


def test_head_and_rotary_extras_may_come_or_go(arrays):
    wanted = interop.from_state_dict(arrays)
    del arrays["lm_head.weight"], arrays[BLOCK + "attn.rotary_emb.freqs"]
    arrays[BLOCK + "attn.rotary_emb.dummy"] = np.zeros(0, np.float32)
    arrays[BLOCK + "attn.rotary_emb.cached_freqs"] = np.zeros((7, 8), np.int64)
    assert_trees_equal(interop.from_state_dict(arrays), wanted)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_other_float_types_become_float32(dtype, arrays):
    cast = {k: v.astype(dtype) for k, v in arrays.items()}
    _, params = interop.from_state_dict(cast)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    np.testing.assert_array_equal(
        params["embedding"], cast["transformer.wte.weight"].astype(np.float32)
    )


def without_frequencies(arrays):
    return {name: value for name, value in arrays.items() if "rotary_emb" not in name}


def test_heads_are_needed_without_frequencies(arrays):
    wanted = interop.from_state_dict(arrays)
    bare = without_frequencies(arrays)
    with pytest.raises(ValueError, match="number of heads: pass heads="):
        interop.from_state_dict(bare)
    assert_trees_equal(interop.from_state_dict(bare, heads=3), wanted)
    assert interop.from_state_dict(bare, heads=2)[0].heads == 2
    with pytest.raises(ValueError, match="width=24 is not a multiple of heads=5"):
        interop.from_state_dict(bare, heads=5)
    with pytest.raises(ValueError, match="heads=0, expected at least 1"):
        interop.from_state_dict(bare, heads=0)


def test_heads_that_contradict_the_frequencies_are_refused(arrays):
    with pytest.raises(ValueError, match=r"freqs has shape \(4,\), expected shape \(6,\)"):
        interop.from_state_dict(arrays, heads=2)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("transformer.wte.weight", None, r"wte.weight is missing, expected shape \(vocab, width\)"),
        ("transformer.wte.weight", lambda x: x[0], r"wte.weight has shape \(24,\), expected shape"),
        ("transformer.wte.weight", lambda x: x[:, :0], r"has shape \(11, 0\), expected shape"),
        (BLOCK + "ln_2.bias", None, r"1.ln_2.bias is missing, expected shape \(24,\)"),
        ("transformer.ln_f.weight", None, r"ln_f.weight is missing, expected shape \(24,\)"),
        (BLOCK + "attn.to_qkv.weight", np.transpose, r"\(24, 72\), expected shape \(72, 24\)"),
        (BLOCK + "mlp.c_proj.weight", np.transpose, r"\(96, 24\), expected shape \(24, 96\)"),
        ("transformer.h.0.mlp.c_fc.weight", np.transpose, r"\(24, 96\), expected shape \(96, 24\)"),
        (
            "transformer.h.0.mlp.c_fc.weight",
            lambda x: x[:50],
            r"\(50, 24\), expected shape \(a multiple of 24, 24\)",
        ),
        ("transformer.h.0.mlp.c_fc.weight", None, r"0.mlp.c_fc.weight is missing, expected shape"),
        (
            "transformer.h.0.attn.rotary_emb.freqs",
            lambda x: np.ones(5, np.float32),
            r"freqs has shape \(5,\), expected shape \(24 / heads / 2,\)",
        ),
        (BLOCK + "attn.rotary_emb.freqs", lambda x: x[:3], r"\(3,\), expected shape \(4,\)"),
        (
            BLOCK + "attn.rotary_emb.freqs",
            lambda x: x * np.array([1, 1.001, 1, 1], np.float32),
            r"1.attn.rotary_emb.freqs has 0.1001 at 1, expected 0.1: only fixed",
        ),
        (BLOCK + "attn.rotary_emb.freqs", lambda x: x * np.nan, "freqs has nan at 0, expected 1"),
        ("lm_head.weight", lambda x: x + 1e-3, "lm_head.weight .* differs from .*tied"),
        ("lm_head.weight", lambda x: x[:9], r"lm_head.weight has shape \(9, 24\), expected shape"),
        (
            BLOCK + "ln_1.bias",
            lambda x: x.astype(int),
            "ln_1.bias has dtype int64, expected a float",
        ),
        ("transformer.wpe.weight", lambda x: np.ones(3), "transformer.wpe.weight is unknown"),
        ("transformer.h.7.ln_1.bias", lambda x: np.ones(24), "h.7.ln_1.bias is unknown .* 3 la"),
        ("module.lm_head.weight", lambda x: np.ones(3), "entry lm_head.weight is there twice"),
    ],
)
def test_bad_entries_are_named_with_found_and_expected(name, change, message, arrays):
    if change is None:
        del arrays[name]
    else:
        arrays[name] = change(arrays.get(name))
    with pytest.raises(ValueError, match=message) as caught:
        interop.from_state_dict(arrays)
    assert "\n" not in str(caught.value)


def test_a_state_dict_without_blocks_is_refused(arrays):
    outer = {name: value for name, value in arrays.items() if ".h." not in name}
    with pytest.raises(ValueError, match=r"ln_1\.weight is missing"):
        interop.from_state_dict(outer, heads=3)


def test_export_with_another_config_is_refused(arrays):
    cfg, params = interop.from_state_dict(arrays)
    with pytest.raises(ValueError, match="norm='post', expected 'pre' as the reference's"):
        interop.to_state_dict(params, dataclasses.replace(cfg, norm="post"))
    for change in ({"heads": 2}, {"layers": 1}):
        with pytest.raises(ValueError, match=r"blocks/\S+ has shape \(2, .* for Config"):
            interop.to_state_dict(params, Config(**{**SIZES, **change}))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_round_trip_exactly(suffix, tmp_path, arrays):
    path = path_with(tmp_path, suffix)
    cfg, params = interop.from_state_dict(arrays)
    interop.save_reference(path, params, cfg)
    assert_trees_equal(interop.load_reference(path), (cfg, params))
    assert_trees_equal(interop.load_reference(str(path), heads=3), (cfg, params))


def test_saved_pt_is_what_torch_expects(tmp_path, arrays):
    path = path_with(tmp_path, ".pt")
    torch = pytest.importorskip("torch", reason=".pt files need torch")
    interop.save_reference(path, *reversed(interop.from_state_dict(arrays)))
    entries = torch.load(path, weights_only=True)
    assert list(entries) == list(arrays)
    for name, value in arrays.items():
        np.testing.assert_array_equal(entries[name].numpy(), value)


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "model_state_dict"])
def test_pt_files_as_training_scripts_write_them(wrapper, tmp_path, arrays):
    path = path_with(tmp_path, ".pt")
    torch = pytest.importorskip("torch", reason=".pt files need torch")
    entries = {k: torch.nn.Parameter(torch.from_numpy(v)) for k, v in arrays.items()}
    entries["lm_head.weight"] = entries["transformer.wte.weight"]  # tied storage
    torch.save(entries if wrapper is None else {"step": 3, wrapper: entries}, path)
    assert_trees_equal(interop.load_reference(path), interop.from_state_dict(arrays))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_of_half_precision(suffix, dtype, tmp_path, arrays):
    path = path_with(tmp_path, suffix)
    half = {k: v.astype(dtype) for k, v in arrays.items()}
    if suffix == ".pt":
        torch = pytest.importorskip("torch", reason=".pt files need torch")
        name = np.dtype(dtype).name
        torch.save(
            {k: torch.from_numpy(v).to(getattr(torch, name)) for k, v in arrays.items()}, path
        )
    else:
        safetensors.numpy.save_file(half, path)
    assert_trees_equal(interop.load_reference(path), interop.from_state_dict(half))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kept", [0, 7, 1000, -300])
def test_truncated_files_are_refused_in_one_sentence(suffix, kept, tmp_path, arrays):
    path = path_with(tmp_path, suffix)
    interop.save_reference(path, *reversed(interop.from_state_dict(arrays)))
    path.write_bytes(path.read_bytes()[:kept])
    refuses(path, f"not a readable {suffix} checkpoint")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "content", [b"step,loss\n1,2\n" * 50, b"\x80\x04K\x01.", b"PK\x03\x04" * 9]
)
def test_foreign_files_are_refused_in_one_sentence(suffix, content, tmp_path):
    path = path_with(tmp_path, suffix)
    path.write_bytes(content)
    refuses(path, f"not a readable {suffix} checkpoint")


def test_npy_and_pickled_objects_are_refused(tmp_path):
    path = tmp_path / "checkpoint.npz"
    with path.open("wb") as file:
        np.save(file, np.ones(3))
    refuses(path, "not a readable .npz checkpoint")
    np.savez(path, weight=np.array([{"a": 1}], dtype=object))
    refuses(path, "allow_pickle=False")


def test_pt_that_runs_code_is_refused(tmp_path):
    path = path_with(tmp_path, ".pt")
    torch = pytest.importorskip("torch", reason=".pt files need torch")
    torch.save({"model": pathlib.PurePosixPath("x")}, path)
    refuses(path, r"not a readable .pt checkpoint \(ValueError: damaged, or with other objects")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, expected a state dict"),
        ({"step": 3}, "entry step is a int, expected"),
    ],
)
def test_pt_of_something_else_is_refused(content, message, tmp_path):
    path = path_with(tmp_path, ".pt")
    torch = pytest.importorskip("torch", reason=".pt files need torch")
    torch.save(content, path)
    refuses(path, message)


def refuses(path, message):
    with pytest.raises(ValueError, match=message) as caught:
        interop.load_reference(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_bad_entries_in_a_file_name_the_file(tmp_path, arrays):
    del arrays["transformer.ln_f.bias"]
    path = tmp_path / "checkpoint.npz"
    np.savez(path, **arrays)
    refuses(path, "entry transformer.ln_f.bias is missing")


def test_unknown_suffix_and_missing_file(tmp_path, arrays):
    cfg, params = interop.from_state_dict(arrays)
    bad = tmp_path / "weights.bin"
    for use in (interop.load_reference, lambda path: interop.save_reference(path, params, cfg)):
        with pytest.raises(
            ValueError, match=r"suffix '.bin', expected one of .pt, .pth, .safetens"
        ):
            use(bad)
    assert not bad.exists()
    with pytest.raises(FileNotFoundError, match=r"absent\.npz"):
        interop.load_reference(tmp_path / "absent.npz")


def test_pt_without_torch_says_what_to_do(tmp_path, monkeypatch, arrays):
    monkeypatch.setitem(sys.modules, "torch", None)
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(ImportError, match=r"pip install torch, or convert .* \.safetensors"):
        interop.save_reference(path, *reversed(interop.from_state_dict(arrays)))
    assert not path.exists()
    path.write_bytes(b"anything")
    with pytest.raises(ImportError, match=r"pip install torch, or convert .* \.safetensors"):
        interop.load_reference(path)

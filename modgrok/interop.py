"""PyTorch checkpoints of the reference code, to our parameters and back.

The reference keeps one entry a layer and linear weights as (out, in); we stack layers on axis 0 and
split heads off the width. A rewrite of names and axes, no arithmetic: both ways are exact.

Axes: V vocab  L layers  D width  H heads  K head size  F mlp
"""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from modgrok.model import Config, Params

SUFFIXES = (".pt", ".pth", ".safetensors", ".npz")
_PREFIXES = ("module.", "_orig_mod.")  # left by DistributedDataParallel and torch.compile
_WRAPPERS = ("model", "state_dict", "model_state_dict")  # where training scripts put the weights


def from_state_dict(
    arrays: Mapping[str, np.ndarray], *, heads: int | None = None
) -> tuple[Config, Params]:
    """Our configuration and float32 parameters from the reference's entries.

    Sizes come from the shapes, heads from the number of rotary frequencies, K / 2 with K = D / H.
    Every other entry must be there with its shape. `lm_head.weight` and the entries of
    `rotary_emb` may be missing; where present, the first must equal the embedding and `freqs`
    its formula, 10000^(-2i/K), because our model ties the one and computes the other.

    Args:
        arrays: reference names to arrays, possibly under `module.` or `_orig_mod.`.
        heads: number of attention heads; needed only when no rotary frequencies are there.
    Returns:
        (cfg, params), the pair that `modgrok.model.apply` takes.
    Raises:
        ValueError: if an entry is missing, unknown, there twice, or of another shape or type than
            the others ask for; names it, what it has and what was expected.
    """
    arrays = _strip_prefixes(arrays)
    embedding = "transformer.wte.weight"
    if embedding not in arrays or arrays[embedding].ndim != 2 or not arrays[embedding].size:
        raise _misfit(arrays, embedding, "(vocab, width)")
    vocab, width = arrays[embedding].shape
    layers = len({name.split(".")[2] for name in arrays if name.startswith("transformer.h.")})
    if not layers:
        raise _misfit(arrays, "transformer.h.0.ln_1.weight", (width,))
    heads = _infer_heads(arrays, width) if heads is None else heads
    fc = "transformer.h.0.mlp.c_fc.weight"
    right_way_round = fc in arrays and arrays[fc].shape[1:] == (width,)
    hidden = arrays[fc].shape[0] if right_way_round else 4 * width
    if hidden % width:
        raise _misfit(arrays, fc, f"(a multiple of {width}, {width})")
    cfg = Config(vocab=vocab, width=width, heads=heads, layers=layers, mlp_ratio=hidden // width)

    wanted = _shapes(cfg)
    for name in arrays:
        if name not in wanted and ".rotary_emb." not in name:
            raise ValueError(f"entry {name} is unknown for a model of {layers} layers")
    for name, shape in wanted.items():
        if name not in arrays and (name == "lm_head.weight" or ".rotary_emb." in name):
            continue
        if name not in arrays or arrays[name].shape != shape:
            raise _misfit(arrays, name, shape)
        if not jnp.issubdtype(arrays[name].dtype, jnp.floating):
            raise ValueError(
                f"entry {name} has dtype {arrays[name].dtype}, expected a floating one"
            )
    _check_fixed(arrays, cfg)
    return cfg, _to_params(arrays, cfg)


def to_state_dict(params: Params, cfg: Config) -> dict[str, np.ndarray]:
    """The reference's entries, float32, in the order of its own files: 4 + 9 L of them.

    Raises:
        ValueError: if `params` are not of `cfg`, or it is post-norm, which the reference is not.
    """
    if cfg.norm != "pre":
        raise ValueError(f"norm={cfg.norm!r}, expected 'pre' as the reference's models have")
    blocks = flatten_dict(params["blocks"], sep="/")
    arrays = {"transformer.wte.weight": params["embedding"]}
    for layer in range(cfg.layers):
        for name, (path, our_shape, shape) in _block(cfg).items():
            if path is None:
                value = _frequencies(cfg)
            elif blocks[path].shape == (cfg.layers, *our_shape):
                value = np.asarray(blocks[path])[layer].reshape(shape[::-1]).T
            else:
                raise ValueError(
                    f"blocks/{path} has shape {blocks[path].shape}, "
                    f"expected {(cfg.layers, *our_shape)} for {cfg}"
                )
            arrays[f"transformer.h.{layer}.{name}"] = value
    arrays["transformer.ln_f.weight"] = params["ln_f"]["scale"]
    arrays["transformer.ln_f.bias"] = params["ln_f"]["bias"]
    arrays["lm_head.weight"] = params["embedding"]
    # Contiguous copies: files store bytes in C order, and torch asks for writable memory.
    return {name: np.array(value, np.float32, order="C") for name, value in arrays.items()}


def load_reference(path: str | Path, *, heads: int | None = None) -> tuple[Config, Params]:
    """Read a checkpoint with the reference's names: `.pt`, `.pth`, `.safetensors` or `.npz`.

    Nothing in the file is executed: torch reads with `weights_only=True`, numpy without pickle.
    A `.pt` file needs torch; it may hold the state dict itself or a dict with it under "model",
    "state_dict" or "model_state_dict".

    Args:
        path: the file.   heads: as in `from_state_dict`.
    Returns:
        (cfg, params).
    Raises:
        ValueError: if the suffix is another, the file cannot be read, or `from_state_dict` refuses
            what it holds.
        ImportError: if it is a `.pt` or `.pth` file and torch is not installed.
    """
    path = Path(path)
    _check_suffix(path)
    data = path.read_bytes()
    try:
        arrays = _decode(data, path.suffix)
    except ImportError:
        raise
    except Exception as error:  # a damaged file raises nearly anything in these three readers
        reason = next(iter(str(error).splitlines()), "").rstrip(".")
        raise ValueError(
            f"{path}: not a readable {path.suffix} checkpoint ({type(error).__name__}: {reason})"
        ) from error
    try:
        return from_state_dict(arrays, heads=heads)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def save_reference(path: str | Path, params: Params, cfg: Config) -> None:
    """Write the parameters with the reference's names; the suffix of `path` decides the format."""
    path = Path(path)
    _check_suffix(path)
    path.write_bytes(_encode(to_state_dict(params, cfg), path.suffix))


def _block(cfg: Config) -> dict[str, tuple[str | None, tuple[int, ...], tuple[int, ...]]]:
    """Entries of one block in their order: name -> (path under "blocks", our shape, theirs).

    Theirs is ours with axes flattened, then transposed. An entry without a path is computed.
    """
    width, heads, hidden = cfg.width, cfg.heads, cfg.mlp_ratio * cfg.width
    size, vector = width // heads, ((width,), (width,))
    return {
        "ln_1.weight": ("ln_1/scale", *vector),
        "ln_1.bias": ("ln_1/bias", *vector),
        "attn.to_qkv.weight": ("qkv", (width, 3, heads, size), (3 * width, width)),
        "attn.o.weight": ("out", (heads, size, width), (width, width)),
        "attn.rotary_emb.freqs": (None, (size // 2,), (size // 2,)),
        "ln_2.weight": ("ln_2/scale", *vector),
        "ln_2.bias": ("ln_2/bias", *vector),
        "mlp.c_fc.weight": ("fc", (width, hidden), (hidden, width)),
        "mlp.c_proj.weight": ("proj", (hidden, width), (width, hidden)),
    }


def _shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a whole state dict."""
    block = {name: shape for name, (_, _, shape) in _block(cfg).items()}
    return {
        "transformer.wte.weight": (cfg.vocab, cfg.width),
        **{f"transformer.h.{i}.{name}": x for i in range(cfg.layers) for name, x in block.items()},
        "transformer.ln_f.weight": (cfg.width,),
        "transformer.ln_f.bias": (cfg.width,),
        "lm_head.weight": (cfg.vocab, cfg.width),
    }


def _to_params(arrays: Mapping[str, np.ndarray], cfg: Config) -> Params:
    blocks = {}
    for name, (path, our_shape, _) in _block(cfg).items():
        if path is not None:
            layers = [arrays[f"transformer.h.{i}.{name}"].T for i in range(cfg.layers)]
            blocks[path] = np.stack(layers).reshape(cfg.layers, *our_shape)
    params = {
        "embedding": arrays["transformer.wte.weight"],
        "blocks": unflatten_dict(blocks, sep="/"),
        "ln_f": {
            "scale": arrays["transformer.ln_f.weight"],
            "bias": arrays["transformer.ln_f.bias"],
        },
    }
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)


def _strip_prefixes(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    plain = {}
    for name, value in arrays.items():
        short = name
        while short.startswith(_PREFIXES):
            short = short.split(".", 1)[1]
        if short in plain:
            raise ValueError(f"entry {short} is there twice, once as {name}")
        plain[short] = np.asarray(value)
    return plain


def _infer_heads(arrays: Mapping[str, np.ndarray], width: int) -> int:
    for name, value in arrays.items():
        if name.endswith(".rotary_emb.freqs"):
            size = 2 * np.size(value)
            if size == 0 or width % size:
                raise _misfit(arrays, name, f"({width} / heads / 2,)")
            return width // size
    raise ValueError("no entry rotary_emb.freqs tells the number of heads: pass heads=")


def _check_fixed(arrays: Mapping[str, np.ndarray], cfg: Config) -> None:
    """Refuse entries that our model would replace: its own frequencies, its own head."""
    wanted = _frequencies(cfg)
    for layer in range(cfg.layers):
        name = f"transformer.h.{layer}.attn.rotary_emb.freqs"
        freqs = np.asarray(arrays.get(name, wanted))
        close = {"rtol": max(1e-5, float(jnp.finfo(freqs.dtype).eps)), "atol": 0}
        freqs = freqs.astype(np.float32)
        if not np.allclose(freqs, wanted, **close):
            worst = np.argmax(~np.isclose(freqs, wanted, **close))
            raise ValueError(
                f"entry {name} has {freqs[worst]:.6g} at {worst}, expected {wanted[worst]:.6g}: "
                "only fixed frequencies 10000^(-2i/K) are supported"
            )
    embedding = arrays["transformer.wte.weight"]
    if not np.array_equal(arrays.get("lm_head.weight", embedding), embedding):
        raise ValueError(
            f"entry lm_head.weight {embedding.shape} differs from transformer.wte.weight, "
            "expected equal values: only tied embeddings are supported"
        )


def _frequencies(cfg: Config) -> np.ndarray:
    """10000^(-2i/K) for i = 0 .. K/2 - 1."""
    size = cfg.width // cfg.heads
    return (10000.0 ** -(np.arange(0, size, 2) / size)).astype(np.float32)


def _misfit(arrays: Mapping[str, np.ndarray], name: str, wanted: object) -> ValueError:
    found = f"has shape {arrays[name].shape}" if name in arrays else "is missing"
    return ValueError(f"entry {name} {found}, expected shape {wanted}")


def _check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: suffix {path.suffix!r}, expected one of {', '.join(SUFFIXES)}")


def _import_torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "a .pt or .pth checkpoint needs torch: pip install torch, or convert the file to "
            ".safetensors where torch is installed"
        ) from error
    return torch


def _decode(data: bytes, suffix: str) -> Mapping[str, np.ndarray]:
    if suffix == ".npz":
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return dict(archive)
    if suffix == ".safetensors":
        import safetensors

        return {name: _from_bytes(**entry) for name, entry in safetensors.deserialize(data)}
    torch = _import_torch()
    try:
        entries = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # whose own words are how to load it all the same
        raise ValueError("damaged, or with other objects than tensors in it") from error
    if isinstance(entries, dict):
        entries = next((entries[k] for k in _WRAPPERS if isinstance(entries.get(k), dict)), entries)
    if not isinstance(entries, dict):
        raise ValueError(f"holds a {type(entries).__name__}, expected a state dict")
    for name, value in entries.items():
        if not isinstance(name, str) or not torch.is_tensor(value):
            raise ValueError(f"entry {name} is a {type(value).__name__}, expected a tensor")

    def to_numpy(value):
        value = value.detach()
        if value.dtype == torch.bfloat16:  # which numpy alone does not have
            return value.view(torch.int16).numpy().view(jnp.bfloat16)
        return value.numpy()

    return {name: to_numpy(value) for name, value in entries.items()}


def _from_bytes(dtype: str, shape: list[int], data: bytes) -> np.ndarray:
    """An entry of a safetensors file; its own reader for numpy does not know BF16."""
    kind = dtype.rstrip("0123456789")
    kinds = {"BF": "bfloat", "F": "float", "I": "int", "U": "uint", "C": "complex", "BOOL": "bool"}
    return np.frombuffer(data, jnp.dtype(kinds[kind] + dtype[len(kind) :])).reshape(shape)


def _encode(arrays: Mapping[str, np.ndarray], suffix: str) -> bytes:
    if suffix == ".safetensors":
        import safetensors.numpy

        return safetensors.numpy.save(dict(arrays))
    buffer = io.BytesIO()
    if suffix == ".npz":
        np.savez(buffer, allow_pickle=False, **arrays)
    else:
        torch = _import_torch()
        torch.save({name: torch.from_numpy(value) for name, value in arrays.items()}, buffer)
    return buffer.getvalue()

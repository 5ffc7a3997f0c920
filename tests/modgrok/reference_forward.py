"""The reference architecture in plain numpy, one sequence and one head at a time, in float64.

Written from the description of the published PyTorch model and its state dict alone: names and
(out, in) weights as there, nothing shared with `modgrok`. Slow and literal on purpose.
"""

import numpy as np


def shapes(vocab: int, width: int, heads: int, layers: int, mlp_ratio: int = 4) -> dict:
    """Names and shapes of the state dict, in the order of the file."""
    wanted = {"transformer.wte.weight": (vocab, width)}
    for layer in range(layers):
        wanted |= {
            f"transformer.h.{layer}.ln_1.weight": (width,),
            f"transformer.h.{layer}.ln_1.bias": (width,),
            f"transformer.h.{layer}.attn.to_qkv.weight": (3 * width, width),
            f"transformer.h.{layer}.attn.o.weight": (width, width),
            f"transformer.h.{layer}.attn.rotary_emb.freqs": (width // heads // 2,),
            f"transformer.h.{layer}.ln_2.weight": (width,),
            f"transformer.h.{layer}.ln_2.bias": (width,),
            f"transformer.h.{layer}.mlp.c_fc.weight": (mlp_ratio * width, width),
            f"transformer.h.{layer}.mlp.c_proj.weight": (width, mlp_ratio * width),
        }
    return wanted | {
        "transformer.ln_f.weight": (width,),
        "transformer.ln_f.bias": (width,),
        "lm_head.weight": (vocab, width),
    }


def random_state_dict(seed: int, **sizes: int) -> dict[str, np.ndarray]:
    """Float32 entries large enough that attention is far from uniform and every entry matters."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, shape in shapes(**sizes).items():
        if name.endswith("freqs"):
            value = np.array([10000.0 ** (-i / shape[0]) for i in range(shape[0])])
        elif name == "lm_head.weight":
            value = arrays["transformer.wte.weight"].copy()
        elif len(shape) == 1:
            value = rng.normal(float(name.endswith("weight")), 0.3, shape)
        else:
            value = rng.normal(0, 1.5 / np.sqrt(shape[1]), shape)
        arrays[name] = value.astype(np.float32)
    return arrays


def rotate(u_TK: np.ndarray, freqs: np.ndarray) -> np.ndarray:
    """Row t turned by the angle t * freqs[i] in the plane of channels 2i and 2i + 1."""
    turned = np.empty_like(u_TK)
    for t in range(u_TK.shape[0]):
        for i, freq in enumerate(freqs):
            cos, sin = np.cos(t * freq), np.sin(t * freq)
            turned[t, 2 * i] = u_TK[t, 2 * i] * cos - u_TK[t, 2 * i + 1] * sin
            turned[t, 2 * i + 1] = u_TK[t, 2 * i + 1] * cos + u_TK[t, 2 * i] * sin
    return turned


def layer_norm(h_TD: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    centred = h_TD - h_TD.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + 1e-5) * weight + bias


def attend(q_TK: np.ndarray, k_TK: np.ndarray, v_TK: np.ndarray) -> np.ndarray:
    out = np.empty_like(v_TK)
    for t in range(len(q_TK)):
        score = k_TK[: t + 1] @ q_TK[t] / np.sqrt(q_TK.shape[1])
        weight = np.exp(score - score.max())
        out[t] = weight / weight.sum() @ v_TK[: t + 1]
    return out


def forward(arrays: dict[str, np.ndarray], tokens_BT: np.ndarray) -> np.ndarray:
    """Logits (B, T, V) at every position of the tokens given."""
    return np.stack([_forward_one(arrays, tokens_T) for tokens_T in tokens_BT])


def _forward_one(arrays, tokens_T):
    arrays = {name: value.astype(np.float64) for name, value in arrays.items()}
    h_TD = arrays["transformer.wte.weight"][tokens_T]
    layer = 0
    while f"transformer.h.{layer}.ln_1.weight" in arrays:
        at = f"transformer.h.{layer}."
        freqs = arrays[at + "attn.rotary_emb.freqs"]
        size = 2 * len(freqs)
        u_TD = layer_norm(h_TD, arrays[at + "ln_1.weight"], arrays[at + "ln_1.bias"])
        q_TD, k_TD, v_TD = np.split(u_TD @ arrays[at + "attn.to_qkv.weight"].T, 3, axis=1)
        heads = []
        for start in range(0, h_TD.shape[1], size):
            head = slice(start, start + size)
            q_TK, k_TK = rotate(q_TD[:, head], freqs), rotate(k_TD[:, head], freqs)
            heads.append(attend(q_TK, k_TK, v_TD[:, head]))
        h_TD = h_TD + np.concatenate(heads, axis=1) @ arrays[at + "attn.o.weight"].T
        u_TD = layer_norm(h_TD, arrays[at + "ln_2.weight"], arrays[at + "ln_2.bias"])
        hidden_TF = np.maximum(u_TD @ arrays[at + "mlp.c_fc.weight"].T, 0)
        h_TD = h_TD + hidden_TF @ arrays[at + "mlp.c_proj.weight"].T
        layer += 1
    h_TD = layer_norm(h_TD, arrays["transformer.ln_f.weight"], arrays["transformer.ln_f.bias"])
    return h_TD @ arrays["lm_head.weight"].T

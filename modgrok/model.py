"""The decoder: pre-LN blocks with rotary attention and a ReLU MLP, tied embeddings.

Axes: B batch, T tokens read (3 S - 1), S shots, D width, H heads, K head size, F mlp, V vocab,
L layers, X any.

Two savings, both exact (tests compare with the plain network):

- Only the S answer positions are scored, so the last block computes queries, MLP and logits for
  these alone. Its keys and values still come from every token.
- Before the first block a token's vector depends on its id alone, so LN, queries, keys and values
  of that block are computed for the V ids and looked up.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from modgrok.layers import attend, dense, layer_norm, lookup, normal, rotary_tables, rotate

Params = Any
_UNROLLED = 4  # blocks; a loop over more of them is worth its copies of carries and weights


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of the decoder. Static under jit: two equal configs are one program.

    Attributes:
        vocab: V, token ids (p residues, and p + 18 in the paper's code).
        width: D.   heads: H, which divides D; D / H is even.   layers: L.
        mlp_ratio: F / D.
        norm: "pre" normalises what a branch reads (the paper), "post" the sum of stream and branch.
        dtype: type of matrix products; "bfloat16" leaves parameters, the residual stream,
            layer norms, softmax and loss in float32.
        remat: recompute each block in the backward pass instead of keeping its intermediates.
    """

    vocab: int
    width: int = 512
    heads: int = 4
    layers: int = 2
    mlp_ratio: int = 4
    norm: Literal["pre", "post"] = "pre"
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab", "width", "heads", "layers", "mlp_ratio"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}")
        if self.head_size % 2:
            raise ValueError(
                f"width={self.width} over heads={self.heads} gives heads of {self.head_size} "
                "channels, expected an even number for rotary positions"
            )
        if self.norm not in ("pre", "post"):
            raise ValueError(f"norm={self.norm!r}, expected 'pre' or 'post'")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r}, expected 'float32' or 'bfloat16'")

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def num_params(self) -> int:
        """Parameters, the tied embedding counted once."""
        d = self.width
        block = (4 + 2 * self.mlp_ratio) * d**2 + 4 * d
        return self.vocab * d + self.layers * block + 2 * d


class Activations(NamedTuple):
    """What interpretability reads. Positions are the tokens read, layers are stacked."""

    embedding_BTD: jax.Array
    attention_LBHTT: jax.Array  # softmax weights, query before key
    head_LBTHK: jax.Array  # head outputs before the output matrix
    hidden_LBTF: jax.Array  # MLP neurons after the ReLU
    residual_LBTD: jax.Array  # residual stream after each block


Replacement = tuple[jax.Array, jax.Array]  # (mask, value): value where the mask is true


class Patch(NamedTuple):
    """Activations to replace in a forward pass, for interventions.

    Each entry is (mask, value), both broadcast against the activation without its layer axis, which
    they have in full: to silence head 2 of layer 0, a mask of shape (L, 1, 1, H, 1) that is true
    at [0, 0, 0, 2, 0], and zeros of that shape. Vary the mask by vmap to treat every head at once.
    """

    head: Replacement | None = None  # of head_LBTHK
    hidden: Replacement | None = None  # of hidden_LBTF
    residual: Replacement | None = None  # of residual_LBTD


NO_PATCH = Patch()


def _replace(replacement: Replacement | None, x: jax.Array) -> jax.Array:
    if replacement is None:
        return x
    mask, value = replacement
    return jnp.where(mask, value.astype(x.dtype), x)


class Block(nn.Module):
    """h + z attention(LN(h)), then + z MLP(LN(h)); scores, softmax and sums in float32.

    The gate z is 1 if there is none. With norm="post": LN(h + attention(h)), LN(h + MLP(h)).

    Rotary positions turn the interleaved pairs (2i, 2i + 1). The pairs are split on the weights,
    which are small, and not on the activations: queries and keys permuted alike have the same
    products.
    """

    cfg: Config

    @nn.compact
    def __call__(
        self,
        h_BTD: jax.Array,
        *,
        answers_only: bool = False,
        embedded: tuple[jax.Array, jax.Array] | None = None,
        gate: jax.Array | None = None,
        patch: Patch = NO_PATCH,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
        """Returns h (at all positions, or at the answers 1, 4, 7, ...) and the intermediates.

        `embedded` is (embedding_VD, tokens_BT) when h_BTD is its plain lookup (the first block).
        `gate` is z, one number or one for each row of the batch; `patch` is this layer's.
        """
        cfg, (length, width) = self.cfg, h_BTD.shape[1:]
        dtype, (heads, size) = jnp.dtype(cfg.dtype), (cfg.heads, cfg.head_size)
        norm_1, norm_2 = layer_norm("ln_1"), layer_norm("ln_2")
        qkv_D3HK = self.param("qkv", normal(0.02), (width, 3, heads, size)).astype(dtype)
        out_HKD = self.param("out", normal(0.02), (heads, size, width)).astype(dtype)
        fc_DF = self.param("fc", normal(0.02), (width, cfg.mlp_ratio * width)).astype(dtype)
        # The reference scales down what it calls "proj", not the attention output.
        proj_FD = self.param(
            "proj", normal(0.02 / (2 * cfg.layers) ** 0.5), (cfg.mlp_ratio * width, width)
        ).astype(dtype)
        at_answers = (lambda x_BTX: x_BTX[:, 1::3]) if answers_only else (lambda x_BTX: x_BTX)
        pre_norm = cfg.norm == "pre"

        def add(h_BTD, branch_BTD, norm):
            branch_BTD = branch_BTD.astype(jnp.float32)
            if gate is not None:
                branch_BTD = gate[..., None, None] * branch_BTD
            h_BTD = h_BTD + branch_BTD
            return h_BTD if pre_norm else norm(h_BTD)

        split_D2HK = qkv_D3HK[:, :2].reshape(width, 2, heads, size // 2, 2)
        q_weight, k_weight = jnp.unstack(split_D2HK.swapaxes(-1, -2), axis=1)
        v_weight = qkv_D3HK[:, 2]
        # LN and projections act on each row alone: on V rows if the tokens are still just ids.
        rows_XD = embedded[0] if embedded else h_BTD
        u_XD = (norm_1(rows_XD) if pre_norm else rows_XD).astype(dtype)
        if embedded:
            u_query, to_rows = u_XD, functools.partial(lookup, tokens_BT=embedded[1])
        else:
            u_query, to_rows = at_answers(u_XD), lambda x_BTX: x_BTX
        k_BT, v_BT = (to_rows(dense(u_XD, w)) for w in (k_weight, v_weight))
        if embedded:
            q_BT = lookup(dense(u_query, q_weight), at_answers(embedded[1]))
        else:
            q_BT = dense(u_query, q_weight)

        cos_TK, sin_TK = rotary_tables(length, size)
        query_T = np.arange(length)[1::3] if answers_only else np.arange(length)
        q_BHTK = rotate(
            jnp.moveaxis(q_BT, 2, 1).astype(jnp.float32), cos_TK[query_T], sin_TK[query_T]
        )
        k_BHTK = rotate(jnp.moveaxis(k_BT, 2, 1).astype(jnp.float32), cos_TK, sin_TK)
        attention_BHTT, head_BHTK = attend(
            q_BHTK.astype(dtype), k_BHTK.astype(dtype), jnp.moveaxis(v_BT, 2, 1), query_T
        )
        head_BTHK = _replace(patch.head, jnp.moveaxis(head_BHTK, 1, 2))
        h_BTD = add(at_answers(h_BTD), dense(head_BTHK, out_HKD, 2), norm_1)
        u_BTD = (norm_2(h_BTD) if pre_norm else h_BTD).astype(dtype)
        hidden_BTF = _replace(patch.hidden, nn.relu(dense(u_BTD, fc_DF)))
        h_BTD = _replace(patch.residual, add(h_BTD, dense(hidden_BTF, proj_FD), norm_2))
        return h_BTD, (attention_BHTT, head_BTHK, hidden_BTF)


class Transformer(nn.Module):
    """Token ids to logits. Parameters of the blocks are stacked on a leading layer axis.

    The first and the last block are special (see the module docstring). Those between are
    scanned if there are more than a few, so compile time does not grow with depth.

    Source: He et al. (2024), appendix A, and its code: initial scales as there.
    """

    cfg: Config

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        positions: Literal["answers", "all"] = "answers",
        capture: bool = False,
        gate: jax.Array | None = None,
        skip: bool = False,
        patch: Patch = NO_PATCH,
    ) -> Any:
        """Logits at the answer positions, (B, S, V), or at all positions read, (B, 3 S - 1, V).

        Args:
            tokens_BT: whole sequences, T = 3 S, as `sample_sequences` returns them. The last
                token is not read: nothing follows it.
            positions: which positions get logits. "answers" are the y tokens, 1, 4, 7, ...
            capture: also return `Activations`; needs positions="all".
            gate: z, float32, (L,) or (L, B): how much of each block is added (see
                `modgrok.latent_depth`). At 0 a block is the identity; needs norm="pre".
            skip: do not compute blocks whose gate is 0 (on all rows). The same logits in time
                proportional to the blocks that are open; without reverse-mode gradients.
            patch: activations to replace; needs positions="all".
        Raises:
            ValueError: if T is not a positive multiple of 3, an option is unknown, or options do
                not go together.
        """
        cfg = self.cfg
        if gate is not None:
            gate = jnp.asarray(gate, jnp.float32)  # what came from a file may be of any type
        _check_call(cfg, tokens_BT, positions, capture, gate, skip, patch)
        tokens_BT = tokens_BT[:, :-1]
        embedding_VD = self.param("embedding", normal(0.02), (cfg.vocab, cfg.width))
        block = Block(cfg, parent=None)
        stacked = self.param("blocks", functools.partial(_init_blocks, block))

        stacked = (stacked, gate, patch)
        run = jax.checkpoint(_run_block, static_argnums=(0, 4)) if cfg.remat else _run_block
        answers_only = positions == "answers"
        h_BTD = start_BTD = lookup(embedding_VD, tokens_BT)
        captured = []
        if skip:
            h_BTD = _run_open_blocks(block, stacked, h_BTD)
            h_BTD = h_BTD[:, 1::3] if answers_only else h_BTD
        for first, last in () if skip else _segments(cfg.layers):
            ids = (embedding_VD, tokens_BT) if first == 0 else None
            part = jax.tree.map(lambda w: w[first:last], stacked)  # noqa: B023
            at = answers_only and last == cfg.layers
            if last - first == 1:
                one = jax.tree.map(lambda w: w[0], part)
                h_BTD, seen = run(block, one, h_BTD, ids, at)
                seen = jax.tree.map(lambda x: x[None], (*seen, h_BTD))
            else:

                def body(h_BTD, weights):
                    h_BTD, seen = run(block, weights, h_BTD, None, False)
                    return h_BTD, (*seen, h_BTD) if capture else None

                unroll = last - first <= _UNROLLED
                h_BTD, seen = jax.lax.scan(body, h_BTD, part, unroll=unroll)
            captured.append(seen)
        logits = _unembed(layer_norm("ln_f")(h_BTD), embedding_VD, jnp.dtype(cfg.dtype))
        if not capture:
            return logits
        layers = jax.tree.map(lambda *parts: jnp.concatenate(parts), *captured)
        return logits, Activations(start_BTD, *layers)


def _check_call(cfg, tokens_BT, positions, capture, gate, skip, patch):
    rows, length = tokens_BT.shape
    if length < 3 or length % 3:
        raise ValueError(f"tokens_BT has {length} tokens a row, expected a multiple of 3")
    if positions not in ("answers", "all"):
        raise ValueError(f"positions={positions!r}, expected 'answers' or 'all'")
    patched = any(x is not None for x in patch)
    if (capture or patched) and positions != "all":
        raise ValueError(f"positions={positions!r}, expected 'all' with capture or patch")
    if skip and (gate is None or capture or patched):
        raise ValueError("skip=True needs a gate, and neither capture nor patch")
    if gate is not None:
        if cfg.norm != "pre":
            raise ValueError(f"norm={cfg.norm!r}, expected 'pre' with gates")
        if gate.shape not in ((cfg.layers,), (cfg.layers, rows)):
            raise ValueError(
                f"gate has shape {gate.shape}, expected ({cfg.layers},) or {(cfg.layers, rows)}"
            )


def _unembed(h_XD: jax.Array, embedding_VD: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jnp.einsum(
        "...d,vd->...v",
        h_XD.astype(dtype),
        embedding_VD.astype(dtype),
        preferred_element_type=jnp.float32,
    )


def unembed(params: Params, residual_XD: jax.Array, cfg: Config) -> jax.Array:
    """Logits that the final layer norm and the embedding make of any residual stream (logit lens).

    Of the stream after the last block these are the model's own.
    """
    h_XD = layer_norm().apply({"params": params["ln_f"]}, residual_XD)
    return _unembed(h_XD, params["embedding"], jnp.dtype(cfg.dtype))


def _segments(layers: int) -> list[tuple[int, int]]:
    """The first block, those between, and the last one, as (start, stop)."""
    if layers <= 2:
        return [(layer, layer + 1) for layer in range(layers)]
    return [(0, 1), (1, layers - 1), (layers - 1, layers)]


def _run_block(block, layer, h_BTD, embedded, answers_only):
    weights, gate, patch = layer
    return block.apply(
        {"params": weights},
        h_BTD,
        embedded=embedded,
        answers_only=answers_only,
        gate=gate,
        patch=patch,
    )


def _run_open_blocks(block, stacked, h_BTD):
    """The stream after the blocks whose gate is open on some row, as many steps as there are.

    Quicker than a `lax.cond` around each block, which copies the stream in and out of its branches
    (benchmarks/modgrok_depth.py), and it compiles one block. Has no reverse mode.
    """
    stacked = jax.tree.map(jnp.asarray, stacked)  # numpy's cannot be indexed by a traced layer
    gate = stacked[1]
    open_L = (gate != 0).reshape(len(gate), -1).any(1)
    order_L = jnp.argsort(~open_L, stable=True)

    def body(k, h_BTD):
        layer = jax.tree.map(lambda w: w[order_L[k]], stacked)
        return _run_block(block, layer, h_BTD, None, False)[0]

    return jax.lax.fori_loop(0, open_L.sum(dtype=jnp.int32), body, h_BTD)


def _init_blocks(block: Block, key: jax.Array) -> Params:
    h_12D = jnp.zeros((1, 2, block.cfg.width), jnp.float32)
    return jax.vmap(lambda k: block.init(k, h_12D)["params"])(
        jax.random.split(key, block.cfg.layers)
    )


def init_params(key: jax.Array, cfg: Config) -> Params:
    """Random float32 parameters; `key` is spent."""
    return Transformer(cfg).init(key, jnp.zeros((1, 3), jnp.int32))["params"]


def apply(params: Params, tokens_BT: jax.Array, cfg: Config, **options: Any) -> Any:
    """`Transformer(cfg)` on `params`; options as in its call."""
    return Transformer(cfg).apply({"params": params}, tokens_BT, **options)

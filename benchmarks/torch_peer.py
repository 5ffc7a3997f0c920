"""The same model and training loop in plain PyTorch, for comparison of speed.

Written as somebody who knows PyTorch well would write it for this task: one product for queries,
keys and values, the library's fused causal attention and fused AdamW, rotary positions as one
complex product, logits at the answer positions only, batches drawn by a few whole-tensor
operations, metrics kept in a tensor until somebody asks. It runs on a GPU if there is one, with
TF32 allowed. Module names follow the reference's checkpoints, so `modgrok.interop` carries weights
across.

Axes: B batch  T tokens read (3 S - 1)  S shots  D width  H heads  K head size  F mlp
V vocab  W tasks  M inputs  C steps
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch._functorch import config as functorch

# Names of the variants and what they pass to torch.compile; None runs eagerly.
VARIANTS = {"eager": None, "compile": "default", "compile-max": "max-autotune"}


class Attention(nn.Module):
    """Causal self-attention with rotary positions on interleaved channel pairs."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.o = nn.Linear(width, width, bias=False)

    def forward(self, u_BTD: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        batch, length, width = u_BTD.shape
        qkv = self.to_qkv(u_BTD).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q_BHTK, k_BHTK = rotate(qkv[:2], turn)
        out_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, qkv[2], is_causal=True)
        return self.o(out_BHTK.transpose(1, 2).reshape(batch, length, width))


def rotate(x: torch.Tensor, turn_TK: torch.Tensor) -> torch.Tensor:
    """Channel pairs (2i, 2i + 1) of x (..., T, K) as complex numbers, times e^(i angle)."""
    if turn_TK.is_complex():
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn_TK).flatten(-2).type_as(x)
    # The compiler generates no code for complex numbers, and needs none: it fuses this.
    cos_TK, sin_TK = turn_TK
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack((even * cos_TK - odd * sin_TK, odd * cos_TK + even * sin_TK), dim=-1)
    return pairs.flatten(-2).type_as(x)


class Block(nn.Module):
    """Pre-LN block: attention, then a ReLU MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict(
            {
                "c_fc": nn.Linear(width, 4 * width, bias=False),
                "c_proj": nn.Linear(4 * width, width, bias=False),
            }
        )

    def forward(self, h_BTD: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        h_BTD = h_BTD + self.attn(self.ln_1(h_BTD), turn)
        hidden_BTF = F.relu(self.mlp["c_fc"](self.ln_2(h_BTD)), inplace=True)
        return h_BTD + self.mlp["c_proj"](hidden_BTF)


class Decoder(nn.Module):
    """Token ids (B, 3 S) to logits at the answer positions (B, S, V); the embedding is tied."""

    def __init__(self, vocab: int, width: int, heads: int, layers: int):
        super().__init__()
        self.head_size = width // heads
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab, width),
                "h": nn.ModuleList(Block(width, heads) for _ in range(layers)),
                "ln_f": nn.LayerNorm(width),
            }
        )
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                scale = 0.02 / math.sqrt(2 * layers) if "c_proj" in name else 0.02
                nn.init.normal_(weight, std=scale)

    def turn(self, length: int, *, complex_numbers: bool) -> torch.Tensor:
        """e^(i t 10000^(-2 j / K)) for t < length, or its cosines and sines stacked."""
        frequency_K = 10000.0 ** (-torch.arange(0, self.head_size, 2) / self.head_size)
        angle_TK = torch.outer(torch.arange(length), frequency_K)
        if complex_numbers:
            return torch.polar(torch.ones_like(angle_TK), angle_TK)
        return torch.stack((angle_TK.cos(), angle_TK.sin()))

    def forward(self, tokens_BT: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        h_BTD = self.transformer["wte"](tokens_BT[:, :-1])
        for block in self.transformer["h"]:
            h_BTD = block(h_BTD, turn)
        h_BSD = self.transformer["ln_f"](h_BTD[:, 1::3])
        return F.linear(h_BSD, self.transformer["wte"].weight)


class Trainer:
    """Model, optimiser and data; `run(num_steps)` trains.

    Args:
        task_W2, input_M2: integer arrays as `modgrok.sample_tasks` and `split_inputs` give them.
        variant: a key of `VARIANTS`.
        lr, weight_decay, warmup_steps, schedule_steps: as in `modgrok.OptimizerConfig`.
        dtype: of matrix products; "bfloat16" is automatic mixed precision.
    """

    def __init__(
        self,
        task_W2: np.ndarray,
        input_M2: np.ndarray,
        *,
        modulus: int,
        vocab: int,
        width: int,
        heads: int,
        layers: int,
        shots: int,
        batch: int,
        variant: str = "eager",
        lr: float = 1.5e-4,
        weight_decay: float = 2.0,
        warmup_steps: int = 10_000,
        schedule_steps: int = 200_000,
        seed: int = 0,
        dtype: str = "float32",
    ):
        torch.manual_seed(seed)
        torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as JAX has it; else nothing
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = getattr(torch, dtype)
        self.task_W2, self.input_M2 = (
            torch.tensor(np.array(x), dtype=torch.long, device=self.device)
            for x in (task_W2, input_M2)
        )
        self.modulus, self.shots, self.batch = modulus, shots, batch
        self.model = Decoder(vocab, width, heads, layers).to(self.device)
        mode = VARIANTS[variant]
        turn = self.model.turn(3 * shots - 1, complex_numbers=mode is None)
        self.turn = turn.to(self.device)
        self.score = self.answer_loss
        if mode is not None:
            # With its default the compiler stores the ReLU's mask for the backward pass, in a
            # loop that takes a third of the time of all matrix products. The output is there.
            functorch.ban_recompute_materialized_backward = False
            self.score = torch.compile(self.answer_loss, mode=mode, fullgraph=True, dynamic=False)
        matrices = [w for w in self.model.parameters() if w.dim() == 2]
        vectors = [w for w in self.model.parameters() if w.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=lr,
            betas=(0.9, 0.98),
            fused=True,
        )

        def factor(step: int) -> float:
            if step < warmup_steps:
                return 0.01 + 0.99 * step / warmup_steps
            share = (step - warmup_steps) / (schedule_steps - warmup_steps)
            return 0.1 + 0.45 * (1 + math.cos(math.pi * min(share, 1.0)))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        """Takes the weights of a state dict as `modgrok.interop.to_state_dict` makes it."""
        computed_here = ("rotary_emb.freqs", "lm_head.weight")
        weights = {
            name: torch.tensor(x) for name, x in arrays.items() if not name.endswith(computed_here)
        }
        self.model.load_state_dict(weights)

    def sample(self) -> torch.Tensor:
        """tokens_BT: every task sees the same B / W lists of inputs, rows task-major."""
        num_tasks = len(self.task_W2)
        shape = (self.batch // num_tasks, self.shots)
        xy_RS2 = self.input_M2[torch.randint(len(self.input_M2), shape, device=self.device)]
        # Not a product of integer matrices, which GPUs lack.
        z_WRS = (self.task_W2[:, None, None] * xy_RS2).sum(-1) % self.modulus
        xy_WRS2 = xy_RS2.expand(num_tasks, -1, -1, -1)
        return torch.cat((xy_WRS2, z_WRS[..., None]), dim=-1).view(self.batch, -1)

    def answer_loss(self, tokens_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cross-entropy in nats, and accuracy, over all answers."""
        mixed = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=mixed):
            logits_BSV = self.model(tokens_BT, self.turn)
            z_BS = tokens_BT[:, 2::3]
            loss = F.cross_entropy(logits_BSV.flatten(0, 1), z_BS.flatten())
        return loss, (logits_BSV.detach().argmax(-1) == z_BS).float().mean()

    def step(self, tokens_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One update; (loss, accuracy) of the batch before it."""
        loss, accuracy = self.score(tokens_BT)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.detach(), accuracy

    def run(self, num_steps: int) -> np.ndarray:
        """Trains on fresh batches; (loss, accuracy) of each step, shape (C, 2)."""
        metric_C2 = torch.empty(num_steps, 2, device=self.device)
        for metric_2 in metric_C2:
            metric_2[0], metric_2[1] = self.step(self.sample())
        return metric_C2.cpu().numpy()

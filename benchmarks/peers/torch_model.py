"""The trainer's model in idiomatic PyTorch, with the weights of ours.

Query, key and value are one product, and so are gate and up; attention is PyTorch's own kernel, and
AdamW the fused one. Rotary angles are computed once. It needs PyTorch and numpy, but not ravine.
"""

import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional

EPS = 1e-6


def linear(kernel: np.ndarray) -> nn.Linear:
    """A linear layer from a kernel `[in, out]`."""
    module = nn.Linear(*kernel.shape, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(np.ascontiguousarray(kernel.T)))
    return module


def norm(scale: np.ndarray) -> nn.RMSNorm:
    """RMS norm with a learned scale."""
    module = nn.RMSNorm(scale.shape[0], eps=EPS)
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(scale.copy()))
    return module


class Block(nn.Module):
    """Attention and SwiGLU, each with a norm in front and added to the residual stream."""

    def __init__(self, weights: dict[str, np.ndarray], heads: int):
        super().__init__()
        kernels = lambda part, *names: np.concatenate(
            [weights[f"{part}/{name}/kernel"] for name in names], axis=-1
        )
        self.heads = heads
        self.attention_norm = norm(weights["attention_norm/scale"])
        self.attention = linear(kernels("attention", "query", "key", "value"))
        self.output = linear(weights["attention/output/kernel"])
        self.feed_forward_norm = norm(weights["feed_forward_norm/scale"])
        self.up = linear(kernels("feed_forward", "gate", "up"))
        self.down = linear(weights["feed_forward/down/kernel"])

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = self.attention(self.attention_norm(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(
            turned(query, cos, sin), turned(key, cos, sin), value, is_causal=True
        )
        x = x + self.output(mixed.transpose(1, 2).reshape(batch, length, width))
        gate, up = self.up(self.feed_forward_norm(x)).chunk(2, dim=-1)
        return x + self.down(functional.silu(gate) * up)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions, by halves."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Transformer(nn.Module):
    """Tokens in, logits out; without a head, tied to an embedding that is scaled."""

    def __init__(self, weights: dict[str, np.ndarray], heads: int, context: int, base: float):
        super().__init__()
        table = torch.from_numpy(weights["embed/embedding"].copy())
        self.embed = nn.Embedding.from_pretrained(table, freeze=False)
        layers = {
            k.removeprefix("layers/"): v for k, v in weights.items() if k.startswith("layers/")
        }
        count = len(next(iter(layers.values())))
        self.layers = nn.ModuleList(
            Block({k: v[at] for k, v in layers.items()}, heads) for at in range(count)
        )
        self.final_norm = norm(weights["final_norm/scale"])
        self.head = linear(weights["head/kernel"]) if "head/kernel" in weights else None
        width = table.shape[1] // heads
        angle = torch.outer(torch.arange(context), base ** (-torch.arange(0, width, 2) / width))
        self.register_buffer("cos", torch.cos(angle))
        self.register_buffer("sin", torch.sin(angle))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        if self.head is None:
            x = x * x.shape[-1] ** 0.5
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        x = self.final_norm(x)
        return functional.linear(x, self.embed.weight) if self.head is None else self.head(x)


class Training:
    """Steps of the model with clipping and AdamW, which decays only matrices.

    Products are in `dtype`, parameters in float32, as with ours.
    """

    def __init__(
        self,
        file: str,
        compiled: bool,
        model: dict,
        optimizer: dict,
        clip_norm: float,
        device: str = "cpu",
        dtype: str = "float32",
    ):
        with np.load(file) as held:
            arrays = dict(held)
        self._batches = torch.from_numpy(arrays.pop("batches")).long().to(device)
        self._model = Transformer(arrays, **model).to(device)
        self._precision = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
        matrices = [p for p in self._model.parameters() if p.ndim > 1]
        others = [p for p in self._model.parameters() if p.ndim < 2]
        decay = optimizer.pop("weight_decay")
        groups = [
            {"params": matrices, "weight_decay": decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, fused=True, **optimizer)
        self._clip, self._at = clip_norm, 0
        self._forward = torch.compile(self._model) if compiled else self._model

    def step(self) -> torch.Tensor:
        batch = self._batches[self._at % len(self._batches)]
        self._at += 1
        with self._precision:
            logits = self._forward(batch[:, :-1])
            loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
        self._optimizer.step()
        return loss

    def first(self) -> float:
        """The loss of the first step."""
        return self.step().item()

    def mean(self, steps: int) -> float:
        """Seconds per step, over this many steps."""
        started = time.perf_counter()
        for _ in range(steps):
            loss = self.step()
        loss.item()  # a GPU has worked until here
        return (time.perf_counter() - started) / steps

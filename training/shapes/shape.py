"""The shape of a transformer, and all that follows from it by arithmetic.

Parameters as a tree of shapes, their number by part, arithmetic per token, and memory per token of a
cache of keys and values. Nothing is allocated or compiled.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp

from ...core.checks import check_amount
from .parts import PARTS, Activation, Count, Experts, Latent, Part, part_of


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """The dimensions of a transformer: a decoder, or an encoder and a decoder.

    Raises:
      ValueError: for sizes that are not positive, or do not fit each other.

    Example:
      >>> from ravine.training.shapes.shape import ModelShape
      >>> tiny = ModelShape(layers=2, width=64, feed_forward=192, heads=4, head_width=16,
      ...                   kv_heads=2, vocabulary=256, context=128)
      >>> tiny.by_part()
      {'embedding': 16384, 'attention': 24576, 'feed_forward': 73728, 'norms': 320, 'head': 16384}
      >>> tiny.feed_forward_ratio, tiny.head_ratio, tiny.aspect_ratio
      (3.0, 1.0, 32.0)
      >>> tiny.cache_bytes()  # 2 layers, keys and values, 2 heads of 16, 2 bytes
      256
    """

    layers: int
    """Of the decoder."""
    width: int
    feed_forward: int
    heads: int
    head_width: int
    kv_heads: int
    vocabulary: int
    context: int
    """Tokens per sequence, as pre-trained."""
    source: str = ""
    """Where the numbers were published."""
    published: tuple[Count, ...] = ()
    """Numbers of parameters as published."""
    trillions: float = 0.0
    """Tokens of pre-training, in trillions; 0 where they were not published."""
    activation: Activation = "swiglu"
    tied: bool = False
    """The head is the embedding."""
    learned_positions: bool = False
    relative_positions: int = 0
    """Buckets of a learned relative bias, one per head and stack, as in T5."""
    biases: bool = False
    norms: int = 2
    """Normalisations per layer, those of queries and keys aside."""
    qk_norm: Literal["", "head", "all"] = ""
    """Normalised queries and keys: per head, or over all heads together."""
    experts: Experts | None = None
    latent: Latent | None = None
    encoder_layers: int = 0
    window: int = 0
    """Tokens that local attention sees."""
    local_layers: int = 0
    """Layers whose attention is local."""

    def __post_init__(self) -> None:
        names = "layers width feed_forward heads head_width kv_heads vocabulary context"
        check_amount(1, **{name: getattr(self, name) for name in names.split()})
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} must divide heads {self.heads}.")
        if self.local_layers > self.layers or (self.local_layers and not self.window):
            raise ValueError(
                f"{self.local_layers} local layers need a window, and at most {self.layers} layers."
            )
        if self.experts and self.encoder_layers:
            raise ValueError("an encoder with experts is not described; leave out one of them.")
        if self.experts and self.experts.dense_layers >= self.layers:
            raise ValueError(
                f"{self.experts.dense_layers} dense layers leave none of {self.layers} for experts."
            )

    @property
    def gated(self) -> bool:
        """Two matrices into the feed-forward part instead of one."""
        return self.activation in ("swiglu", "geglu")

    @property
    def feed_forward_ratio(self) -> float:
        """Feed-forward width over width; with experts, of all that one token uses."""
        if self.experts is None:
            return self.feed_forward / self.width
        return (self.experts.per_token + self.experts.shared) * self.experts.width / self.width

    @property
    def head_ratio(self) -> float:
        """Heads times head width, over width."""
        return self.heads * self.head_width / self.width

    @property
    def aspect_ratio(self) -> float:
        """Width over layers of the decoder."""
        return self.width / self.layers

    def parameters(self, dtype: jnp.dtype | type = jnp.bfloat16) -> dict[str, jax.ShapeDtypeStruct]:
        """Path to shape, equal layers stacked: `[layers, in, out]`, `[layers, experts, in, out]`.

        An encoder's and a decoder's layers are stacks of their own, as are dense first layers.

        Example:
          >>> from ravine.training.shapes.presets import PRESETS
          >>> PRESETS["llama2-7b"].parameters()["layers/feed_forward/down/kernel"].shape
          (32, 11008, 4096)
          >>> PRESETS["mixtral-8x7b"].parameters()["layers/experts/down/kernel"].shape
          (32, 8, 14336, 4096)
        """
        d = self.width
        shapes: dict[str, tuple[int, ...]] = {"embed/embedding": (self.vocabulary, d)}
        if self.learned_positions:
            shapes["positions/embedding"] = (self.context, d)
        for stack, layers in self._stacks():
            room = stack.removesuffix("layers")
            if self.relative_positions:
                shapes[f"{room}positions/embedding"] = (self.relative_positions, self.heads)
            for name, shape in self._layer(stack):
                shapes[f"{stack}/{name}"] = (layers, *shape)
            if room in ("encoder/", "decoder/", ""):
                shapes[f"{room}final_norm/scale"] = (d,)
                if self.biases:
                    shapes[f"{room}final_norm/bias"] = (d,)
        if not self.tied:
            shapes["head/kernel"] = (d, self.vocabulary)
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}

    def _stacks(self) -> list[tuple[str, int]]:
        if self.encoder_layers:
            return [("encoder/layers", self.encoder_layers), ("decoder/layers", self.layers)]
        dense = self.experts.dense_layers if self.experts else 0
        return [*([("dense/layers", dense)] if dense else []), ("layers", self.layers - dense)]

    def _layer(self, stack: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        d, crossed = self.width, stack.startswith("decoder")
        kernels = {f"attention/{name}": shape for name, shape in self._attention().items()}
        if crossed:
            kernels |= {f"cross_attention/{k}": shape for k, shape in self._attention().items()}
        if self.experts and stack == "layers":
            each = self._feed_forward(self.experts.width)
            kernels["router"] = (d, self.experts.count)
            kernels |= {f"experts/{k}": (self.experts.count, *shape) for k, shape in each.items()}
            if self.experts.shared:
                shared = self._feed_forward(self.experts.shared * self.experts.width)
                kernels |= {f"shared_expert/{k}": shape for k, shape in shared.items()}
            if self.experts.router_bias:
                yield "router/bias", (self.experts.count,)
        else:
            dense = self._feed_forward(self.feed_forward)
            kernels |= {f"feed_forward/{k}": shape for k, shape in dense.items()}
        for name, shape in kernels.items():
            yield f"{name}/kernel", shape
            if self.biases:
                yield f"{name}/bias", shape[-1:]
        for at in range(self.norms + crossed):
            yield f"norm_{at}/scale", (d,)
            if self.biases:
                yield f"norm_{at}/bias", (d,)
        yield from self._inner_norms()

    def _attention(self) -> dict[str, tuple[int, int]]:
        d, inner, keys = self.width, self.heads * self.head_width, self.kv_heads * self.head_width
        if self.latent is None:
            return {"query": (d, inner), "key": (d, keys), "value": (d, keys), "output": (inner, d)}
        rank, rotary = self.latent.key_value_rank, self.latent.rotary_width
        return {
            "query_a": (d, self.latent.query_rank),
            "query_b": (self.latent.query_rank, inner + self.heads * rotary),
            "key_value_a": (d, rank + rotary),
            "key_value_b": (rank, 2 * inner),
            "output": (inner, d),
        }

    def _feed_forward(self, width: int) -> dict[str, tuple[int, int]]:
        gate = {"gate": (self.width, width)} if self.gated else {}
        return {**gate, "up": (self.width, width), "down": (width, self.width)}

    def _inner_norms(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        if self.latent is not None:
            yield "attention/query_norm/scale", (self.latent.query_rank,)
            yield "attention/key_value_norm/scale", (self.latent.key_value_rank,)
        if self.qk_norm:
            heads, kv_heads = (self.heads, self.kv_heads) if self.qk_norm == "all" else (1, 1)
            yield "attention/query_norm/scale", (heads * self.head_width,)
            yield "attention/key_norm/scale", (kv_heads * self.head_width,)

    def by_part(self, *, active: bool = False) -> dict[Part, int]:
        """Parameters by part; those that one token uses, or all."""
        found = dict.fromkeys(PARTS, 0)
        for name, x in self.parameters().items():
            found[part_of(name)] += x.size
        if active and self.experts:
            found["experts"] = found["experts"] // self.experts.count * self.experts.per_token
        return {part: size for part, size in found.items() if size}

    @property
    def count(self) -> int:
        """Parameters, recomputed from the shapes."""
        return sum(self.by_part().values())

    @property
    def active(self) -> int:
        """Parameters that one token uses, both embedding matrices whole: Mixtral's way to count."""
        return sum(self.by_part(active=True).values())

    def recount(self, published: Count) -> int:
        """The count that a published number should equal, from the shapes.

        Example:
          >>> from ravine.training.shapes.presets import PRESETS
          >>> shape = PRESETS["gemma2-9b"]
          >>> for count in shape.published:
          ...     print(count.billions, shape.recount(count) / 1e9)
          9.242164736 9.242164736
          8.324201984 8.324201984
        """
        parts = self.by_part(active=published.active)
        return sum(size for part, size in parts.items() if part not in published.without)

    def flops(self, context: int | None = None) -> float:
        r"""Operations per token of a training step, forward and backward, attention included.

        .. math::
            3 \left[ 2 P + 2 \sum_\ell k_\ell \, h \, (w_{qk} + w_v) \right]

        `P` are the elements of the matrices that one token meets: of all kernels, of its experts, and of
        the head, tied or not; looking up an embedding costs nothing. `k` are the keys that a query sees,
        on average: :math:`(S + 1)/2` of a causal sequence of `S` tokens, fewer in a window. With an
        encoder, it is the mean over as many source as target tokens, each of which passes one stack.
        Norms, activations and the softmax are left out.

        Args:
          context: tokens per sequence, by default those of pre-training.

        Example:
          >>> from ravine.training.shapes.presets import PRESETS
          >>> shape = PRESETS["gpt3-175b"]
          >>> f"{shape.flops() / (6 * shape.count):.3f}"
          '1.014'
        """
        used = self.experts.per_token / self.experts.count if self.experts else 1
        matrices = self.width * self.vocabulary + sum(
            x.size * (used if "/experts/" in name else 1)
            for name, x in self.parameters().items()
            if name.endswith("/kernel") and not name.startswith("head/")
        )
        share = 0.5 if self.encoder_layers else 1.0
        return 6 * share * matrices + self.attention_flops(context)

    def attention_flops(self, context: int | None = None) -> float:
        """The part of `flops` that multiplies queries by keys, and scores by values.

        Args:
          context: tokens per sequence, by default those of pre-training.

        Example:
          >>> from ravine.training.shapes.presets import PRESETS
          >>> shape = PRESETS["gpt3-175b"]  # 96 layers and heads of 128, 2048 tokens
          >>> shape.attention_flops() == 12 * 96 * 96 * 128 * (2048 + 1) / 2
          True
        """
        check_amount(1, context=context)
        length = context or self.context
        causal, local = (length + 1) / 2, _keys_in_window(length, self.window)
        keys = (self.layers - self.local_layers) * causal + self.local_layers * local
        share = 1.0
        if self.encoder_layers:
            keys += (self.encoder_layers + self.layers) * length
            share = 0.5
        rotary = self.latent.rotary_width if self.latent else 0
        return 6 * share * keys * self.heads * (2 * self.head_width + rotary)

    def cache_bytes(self, bytes_per_element: float = 2) -> int:
        """Bytes per token of the keys and values that generating text keeps.

        Of the latent vector and the shared rotary key under `latent`; with an encoder, per target token,
        and as many again per source token. Local layers keep at most a window of tokens.
        """
        per_layer = 2 * self.kv_heads * self.head_width
        if self.latent is not None:
            per_layer = self.latent.key_value_rank + self.latent.rotary_width
        return math.ceil(self.layers * per_layer * bytes_per_element)


def _keys_in_window(length: int, window: int) -> float:
    """Keys that a causal query sees on average, of at most `window`."""
    seen = min(length, window)
    return (seen * (seen + 1) / 2 + (length - seen) * seen) / length

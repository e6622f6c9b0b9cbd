"""Shapes of published language models, and their parameters as trees of shapes.

Counts are recomputed from the shapes and must agree with what was published; see the tests.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """What decides the shapes of a decoder-only transformer."""

    layers: int
    width: int
    feed_forward: int
    heads: int
    head_width: int
    kv_heads: int
    vocabulary: int
    source: str
    """Where the numbers were published."""
    published: float
    """Parameters as published, in billions."""
    context: int
    """Tokens a sequence, as trained."""
    gated: bool = True
    """Two matrices into the feed-forward part instead of one."""
    tied: bool = False
    """The head is the embedding."""
    learned_positions: bool = False
    biases: bool = False
    norms: int = 2
    """Normalisations a layer."""

    def parameters(self, dtype: jnp.dtype | type = jnp.bfloat16) -> dict[str, jax.ShapeDtypeStruct]:
        """Path to shape, the layers stacked: `[layers, in, out]`.

        Example:
          >>> from ravine.training.presets import PRESETS
          >>> PRESETS["llama2-7b"].parameters()["layers/feed_forward/down/kernel"].shape
          (32, 11008, 4096)
        """
        d, f = self.width, self.feed_forward
        inner, keys = self.heads * self.head_width, self.kv_heads * self.head_width
        kernels = {
            "attention/query": (d, inner),
            "attention/key": (d, keys),
            "attention/value": (d, keys),
            "attention/output": (inner, d),
            **({"feed_forward/gate": (d, f)} if self.gated else {}),
            "feed_forward/up": (d, f),
            "feed_forward/down": (f, d),
        }
        shapes: dict[str, tuple[int, ...]] = {"embed/embedding": (self.vocabulary, d)}
        if self.learned_positions:
            shapes["positions/embedding"] = (self.context, d)
        for name, shape in kernels.items():
            shapes[f"layers/{name}/kernel"] = (self.layers, *shape)
            if self.biases:
                shapes[f"layers/{name}/bias"] = (self.layers, shape[1])
        for at in range(self.norms):
            shapes[f"layers/norm_{at}/scale"] = (self.layers, d)
            if self.biases:
                shapes[f"layers/norm_{at}/bias"] = (self.layers, d)
        shapes["final_norm/scale"] = (d,)
        if self.biases:
            shapes["final_norm/bias"] = (d,)
        if not self.tied:
            shapes["head/kernel"] = (d, self.vocabulary)
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}

    @property
    def count(self) -> int:
        """Parameters, recomputed from the shapes."""
        return sum(x.size for x in self.parameters().values())


_LLAMA2 = "Touvron et al., 2023, https://arxiv.org/abs/2307.09288"
_GEMMA2 = "Gemma Team, 2024, https://arxiv.org/abs/2408.00118, table 1"

PRESETS = {
    "gpt3-175b": ModelShape(
        layers=96,
        width=12288,
        feed_forward=49152,
        heads=96,
        head_width=128,
        kv_heads=96,
        vocabulary=50257,
        context=2048,
        gated=False,
        tied=True,
        learned_positions=True,
        biases=True,
        source="Brown et al., 2020, https://arxiv.org/abs/2005.14165, table 2.1",
        published=175.0,
    ),
    "llama2-7b": ModelShape(
        layers=32,
        width=4096,
        feed_forward=11008,
        heads=32,
        head_width=128,
        kv_heads=32,
        vocabulary=32000,
        context=4096,
        source=_LLAMA2,
        published=6.74,
    ),
    "llama2-70b": ModelShape(
        layers=80,
        width=8192,
        feed_forward=28672,
        heads=64,
        head_width=128,
        kv_heads=8,
        vocabulary=32000,
        context=4096,
        source=_LLAMA2,
        published=68.98,
    ),
    "gemma2-9b": ModelShape(
        layers=42,
        width=3584,
        feed_forward=14336,
        heads=16,
        head_width=256,
        kv_heads=8,
        vocabulary=256128,
        context=8192,
        tied=True,
        norms=4,
        source=_GEMMA2,
        published=9.24,
    ),
    "gemma2-27b": ModelShape(
        layers=46,
        width=4608,
        feed_forward=36864,
        heads=32,
        head_width=128,
        kv_heads=16,
        vocabulary=256128,
        context=8192,
        tied=True,
        norms=4,
        source=_GEMMA2,
        published=27.23,
    ),
    "ravine": ModelShape(
        layers=4,
        width=128,
        feed_forward=352,
        heads=4,
        head_width=32,
        kv_heads=4,
        vocabulary=256,
        context=64,
        source="the trainer's own model, `ModelConfig()`",
        published=0.000868,
    ),
}
"""By name: the models that `python -m ravine plan` knows."""

"""The shape and the options of the transformer in :mod:`.model`."""

import dataclasses
import math
from typing import Literal

from ..stability import HeadWeights
from ..stability.soft_cap import CapForm
from .identity import LATER


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and options of the transformer."""

    vocabulary: int = 256
    """Number of tokens. 256, the default, leaves it to the text: 256 for bytes, and for a .bin its
    largest token plus one, rounded up to a multiple of 64."""
    context: int = 64
    """Tokens per sequence."""
    width: int = 128
    """Width of the residual stream."""
    layers: int = 4
    """Number of layers."""
    heads: int = 4
    """Query heads, a divisor of `width`."""
    kv_heads: int = 0
    """Key-value heads, a divisor of `heads`; 0 means as many as heads."""
    feed_forward: int = 0
    """Hidden width of the feed-forward part; 0 means 8/3 (SwiGLU) or 4 (others) times the width."""
    activation: Literal["swiglu", "gelu", "relu2"] = "swiglu"
    """Of the feed-forward part; relu2 is the square of ReLU."""
    biases: bool = dataclasses.field(default=False, metadata=LATER)
    """Add a bias after every matrix, the head too."""
    qk_norm: bool = False
    """RMS-normalise queries and keys per head."""
    qk_gains: bool = dataclasses.field(default=True, metadata=LATER)
    """Learn a scale with these norms."""
    embedding_norm: bool = dataclasses.field(default=False, metadata=LATER)
    """RMS-normalise the embedding of each token."""
    attention_scale: float | None = dataclasses.field(default=None, metadata=LATER)
    """Factor of the attention logits; by default the root of the head width divides them."""
    tied: bool = dataclasses.field(default=False, metadata=LATER)
    """The head is the embedding, whose rows are then looked up times the root of the width (Gemma)."""
    norms: Literal[2, 4] = dataclasses.field(default=2, metadata=LATER)
    """Normalisations per layer: before attention and feed-forward part, and with 4 after them too."""
    attention_soft_cap: float | None = None
    """Cap of the attention logits; Gemma 2 takes 50."""
    final_soft_cap: float | None = None
    """Cap of the output logits; Gemma 2 takes 30."""
    soft_cap_form: CapForm = dataclasses.field(default="tanh", metadata=LATER)
    """Of the cap of output logits, see ravine.stability.soft_cap."""
    rope_base: float = 10_000.0
    """Base of the rotary position embedding, at least 1."""
    rope_share: float = dataclasses.field(default=1.0, metadata=LATER)
    """Share of the pairs of coordinates that it turns."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations; parameters and logits are float32."""
    attention: Literal["plain", "xla", "cudnn"] = dataclasses.field(default="plain", metadata=LATER)
    """Kernel of attention where its largest logits are not needed: our own, or that implementation of
    jax.nn.dot_product_attention; cudnn needs an NVIDIA GPU and bfloat16."""
    unroll: int = 1
    """Layers unrolled in the scan: more compile time, sometimes faster steps."""
    remat: bool = False
    """Recompute whole layers in the backward pass, products too: less memory. Without it products are
    kept, and only what follows from them is recomputed."""
    dropout: float = dataclasses.field(default=0.0, metadata=LATER)
    """Share of elements dropped behind the embedding and every branch, in training only. Models that
    see a token about once take 0."""

    zero_outputs: bool = dataclasses.field(default=False, metadata=LATER)
    """Start with zeros in the last matrix of every branch and in the head."""
    init_scale: float = dataclasses.field(default=1.0, metadata=LATER)
    """Of the initial matrices of layers: their standard deviation times the root of their inputs."""
    init_output: float | None = dataclasses.field(default=None, metadata=LATER)
    """The same of the last matrices of attention; by default GPT-2's share of init_scale."""
    init_up: float | None = dataclasses.field(default=None, metadata=LATER)
    """Of the first matrices of the feed-forward part; by default init_scale."""
    init_down: float | None = dataclasses.field(default=None, metadata=LATER)
    """Of its last matrices; by default GPT-2's share of init_scale."""
    branch_scale: float = dataclasses.field(default=1.0, metadata=LATER)
    """Of every branch before it is added to the stream. Rules for depth ask for the base model's number
    of layers over this one's."""

    def __post_init__(self) -> None:
        for name in ("vocabulary", "context", "width", "layers", "heads", "unroll"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(
                f"width {self.width} must be an even multiple of heads {self.heads} (RoPE turns "
                "pairs of coordinates)."
            )
        if not (math.isfinite(self.branch_scale) and self.branch_scale > 0):
            raise ValueError(f"branch_scale must be positive and finite, got {self.branch_scale}.")
        for name in ("init_scale", "init_output", "init_up", "init_down", "attention_scale"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive and finite, got {value}.")
        if self.tied and (self.biases or self.zero_outputs):
            raise ValueError("biases and zero_outputs need a head of its own; leave tied out.")
        if not self.qk_gains and not self.qk_norm:
            raise ValueError("qk_gains are those of qk_norm, which is off; leave both out.")
        if not 0 < self.rope_share <= 1 or round(self.rope_share * self.head_width / 2) < 1:
            raise ValueError(
                f"rope_share must lie in (0, 1] and turn at least one pair, got {self.rope_share}."
            )
        if self.attention != "plain" and self.attention_soft_cap is not None:
            raise ValueError(
                f"attention {self.attention} has no soft-cap; take plain, or no attention_soft_cap."
            )
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise ValueError("attention cudnn works in bfloat16 only; give --dtype bfloat16.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}.")
        if self.kv_heads < 0 or self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"kv_heads {self.kv_heads} must divide heads {self.heads}.")
        if self.feed_forward < 0:
            raise ValueError(f"feed_forward must not be negative, got {self.feed_forward}.")
        if not (math.isfinite(self.rope_base) and self.rope_base >= 1):
            raise ValueError(f"rope_base must be finite and at least 1, got {self.rope_base}.")
        for name in ("attention_soft_cap", "final_soft_cap"):
            cap = getattr(self, name)
            if cap is not None and not (math.isfinite(cap) and cap > 0):
                raise ValueError(f"{name} must be positive and finite, got {cap}.")

    @property
    def head_width(self) -> int:
        """K."""
        return self.width // self.heads

    @property
    def key_value_heads(self) -> int:
        """G."""
        return self.kv_heads or self.heads

    @property
    def head_weights(self) -> dict[str, HeadWeights]:
        """Where the heads are in the parameters, as `ravine.stability.qk_clip` takes it."""
        return {
            "attention/query/kernel$": HeadWeights("query", self.heads),
            "attention/key/kernel$": HeadWeights("key", self.key_value_heads),
        }

    @property
    def hidden(self) -> int:
        """F; the default for SwiGLU keeps the parameters of a 4x GELU, rounded up to 32."""
        if self.feed_forward:
            return self.feed_forward
        if self.activation != "swiglu":
            return 4 * self.width
        return -(-8 * self.width // (3 * 32)) * 32

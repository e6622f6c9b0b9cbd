"""A decoder-only transformer in Flax NNX, its layers stacked and scanned.

Axes, as suffixes of array names: B batch, T time, D width, H heads, G key-value heads, K head
width, F feed-forward width, V vocabulary, L layers. Every matrix is `[in, out]`, so a stacked one
is `[L, in, out]`, as large JAX trainers have it: an optimizer that goes by `ndim` takes the stacked
norms `[L, D]` for matrices, which is why ours go by role.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from ..stability import attention, soft_cap
from .dropout import dropped
from .layers import RMSNorm, rotate
from .model_config import ModelConfig
from .scanned import recomputed, unrolled
from .sharding import constrained, of_all_positions, one_device

JOINED = 2**16
"""Elements up to which kernels of one input are multiplied as one, see `_project`."""


class Attention(nnx.Module):
    """Causal self-attention with rotary positions and grouped key-value heads."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c, self.config = config, config

        def linear(inner: int, outer: int, scale: float = c.init_scale) -> nnx.Linear:
            return _linear(inner, outer, scale, c, rngs)

        self.query = linear(c.width, c.heads * c.head_width)
        self.key = linear(c.width, c.key_value_heads * c.head_width)
        self.value = linear(c.width, c.key_value_heads * c.head_width)
        self.output = linear(c.heads * c.head_width, c.width, _output_scale(c, c.init_output))
        if c.qk_norm:
            self.query_norm = RMSNorm(c.head_width, gain=c.qk_gains)
            self.key_norm = RMSNorm(c.head_width, gain=c.qk_gains)

    def __call__(
        self, x_BxTxD: jax.Array, measured: bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        """Mixes positions, each with itself and those before it; and the largest logits, `[H]`.

        The latter only if they are to be measured.
        """
        c = self.config
        batch, length, _ = x_BxTxD.shape

        def heads(x: jax.Array) -> jax.Array:
            return x.reshape(batch, length, -1, c.head_width)

        projected = _project(x_BxTxD, self.query, self.key, self.value)
        q_BxTxHxK, k_BxTxGxK, v_BxTxGxK = map(heads, projected)
        if c.qk_norm:
            q_BxTxHxK, k_BxTxGxK = self.query_norm(q_BxTxHxK), self.key_norm(k_BxTxGxK)
        q_BxTxHxK, k_BxTxGxK = (
            rotate(x, c.rope_base, c.rope_share) for x in (q_BxTxHxK, k_BxTxGxK)
        )
        k_BxTxGxK, v_BxTxGxK = of_all_positions(k_BxTxGxK), of_all_positions(v_BxTxGxK)

        if measured or c.attention == "plain":
            mixed_BxTxHxK, highest_H = attention(
                q_BxTxHxK,
                k_BxTxGxK,
                v_BxTxGxK,
                causal=True,
                cap=c.attention_soft_cap,
                scale=c.attention_scale,
            )
            highest_H = highest_H if measured else None
        else:
            mixed_BxTxHxK, highest_H = (
                jax.nn.dot_product_attention(
                    q_BxTxHxK,
                    k_BxTxGxK,
                    v_BxTxGxK,
                    is_causal=True,
                    implementation=c.attention,
                    scale=c.attention_scale,
                ),
                None,
            )
        return self.output(mixed_BxTxHxK.reshape(batch, length, -1)), highest_H


class FeedForward(nnx.Module):
    """SwiGLU, GELU, or the square of ReLU."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.gated = config.activation == "swiglu"
        up = config.init_scale if config.init_up is None else config.init_up
        if self.gated:
            self.gate = _linear(config.width, config.hidden, up, config, rngs)
        self.up = _linear(config.width, config.hidden, up, config, rngs)
        down = _output_scale(config, config.init_down)
        self.down = _linear(config.hidden, config.width, down, config, rngs)
        self.activation = jax.nn.gelu if config.activation == "gelu" else _relu2

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """Transforms each position alone."""
        if self.gated:
            gate_BxTxF, up_BxTxF = _project(x_BxTxD, self.gate, self.up)
            return self.down(jax.nn.silu(gate_BxTxF) * up_BxTxF)
        return self.down(self.activation(self.up(x_BxTxD)))


class Block(nnx.Module):
    """One layer: attention and feed-forward, each normalised before and added to the stream."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.width)
        self.attention = Attention(config, rngs=rngs)
        self.feed_forward_norm = RMSNorm(config.width)
        self.feed_forward = FeedForward(config, rngs=rngs)
        self.rate, self.scale = config.dropout, config.branch_scale
        self.after = config.norms == 4
        if self.after:
            self.attention_out_norm = RMSNorm(config.width)
            self.feed_forward_out_norm = RMSNorm(config.width)

    def __call__(
        self, x_BxTxD: jax.Array, measured: bool = False, keys_2: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """The stream after this layer, dropped out with keys; and the largest attention logits `[H]`."""
        first, second = (None, None) if keys_2 is None else keys_2
        mixed_BxTxD, highest_H = self.attention(self.attention_norm(x_BxTxD), measured)
        if self.after:
            mixed_BxTxD = self.attention_out_norm(mixed_BxTxD)
        x_BxTxD = x_BxTxD + self._branch(mixed_BxTxD, first)
        turned_BxTxD = self.feed_forward(self.feed_forward_norm(x_BxTxD))
        if self.after:
            turned_BxTxD = self.feed_forward_out_norm(turned_BxTxD)
        return x_BxTxD + self._branch(turned_BxTxD, second), highest_H

    def _branch(self, x_BxTxD: jax.Array, key: jax.Array | None) -> jax.Array:
        x_BxTxD = dropped(x_BxTxD, self.rate, key)
        return x_BxTxD if self.scale == 1 else x_BxTxD * jnp.asarray(self.scale, x_BxTxD.dtype)


class Transformer(nnx.Module):
    """Tokens in, float32 logits of the next tokens out.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from ravine.training.model import ModelConfig, Transformer
      >>> model = Transformer(ModelConfig(width=32, layers=2), rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((1, 8), int)).shape
      (1, 8, 256)
      >>> model.layers.attention.query.kernel.shape  # layers are stacked
      (2, 32, 32)
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtype = jnp.dtype(config.dtype)

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs)

        self.embed = nnx.Embed(
            config.vocabulary,
            config.width,
            embedding_init=nnx.initializers.normal(config.width**-0.5 if config.tied else 1.0),
            dtype=dtype,
            rngs=rngs,
        )
        if config.embedding_norm:
            self.embedding_norm = RMSNorm(config.width)
        self.layers = stacked(rngs)
        self.final_norm = RMSNorm(config.width)
        if not config.tied:
            # Small first logits: the loss starts near log V instead of well above it.
            scale = 0.0 if config.zero_outputs else 0.25
            self.head = _linear(config.width, config.vocabulary, scale, config, rngs)

    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        """Logits of the token after each position, float32."""
        return self.logits(self.hidden(tokens_BxT)[0])

    def with_attention_logits(self, tokens_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The same, and the largest attention logits `[L, H]`, as `ravine.stability.qk_clip` takes."""
        hidden_BxTxD, highest_LxH = self.hidden(tokens_BxT, measured=True)
        assert highest_LxH is not None
        return self.logits(hidden_BxTxD), highest_LxH

    def hidden(
        self,
        tokens_BxT: jax.Array,
        *,
        measured: bool = False,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """The last states, normalised, and the largest attention logits `[L, H]` if measured.

        With a key, elements drop out at the rate of the model's `dropout`.
        """
        first, keys_Lx2 = None, None
        if dropout_key is not None and self.config.dropout:
            first, rest = jax.random.split(dropout_key)
            keys_Lx2 = jax.random.split(rest, (self.config.layers, 2))
        x_BxTxD = self.embedded(tokens_BxT, first)
        x_BxTxD, highest_LxH = self.through_layers(x_BxTxD, measured, keys_Lx2)
        return self.final_norm(x_BxTxD), highest_LxH

    def embedded(self, tokens_BxT: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """The stream that enters the first layer."""
        # Whole rows for the lookup: the compiler finds no good way to look up parts of them.
        table_VxD = constrained(self.embed.embedding[...], "tensor", None)
        x_BxTxD = jnp.take(table_VxD.astype(self.config.dtype), tokens_BxT, axis=0)
        if self.config.tied:
            x_BxTxD = x_BxTxD * jnp.asarray(self.config.width**0.5, x_BxTxD.dtype)
        if self.config.embedding_norm:
            x_BxTxD = self.embedding_norm(x_BxTxD)
        x_BxTxD = dropped(x_BxTxD, self.config.dropout, dropout_key)
        return constrained(x_BxTxD, "rows", "context", None)

    def through_layers(
        self, x_BxTxD: jax.Array, measured: bool = False, keys_Lx2: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """The stream behind the last of the layers that are here, and the largest logits `[L, H]`."""

        @nnx.scan(in_axes=(nnx.Carry, 0, 0), out_axes=(nnx.Carry, 0), unroll=unrolled(self.config))
        def through(
            x_BxTxD: jax.Array, layer: Block, keys_2: jax.Array | None
        ) -> tuple[jax.Array, jax.Array | None]:
            call = lambda layer, x_BxTxD, keys_2: layer(x_BxTxD, measured, keys_2)
            x_BxTxD, highest_H = recomputed(call, self.config)(layer, x_BxTxD, keys_2)
            return constrained(x_BxTxD, "rows", "context", None), highest_H

        return through(x_BxTxD, self.layers, keys_Lx2)

    def unembedding(self) -> jax.Array:
        """The head's matrix, `[D, V]`."""
        return self.embed.embedding[...].T if self.config.tied else self.head.kernel[...]

    def before_head(self, hidden_BxTxD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What `hidden` gave and a matrix, the product of which are the logits before their cap.

        A head's bias is a row more, of an input that is one. Seven of zeros keep the size a multiple of
        eight, as matrix units want it.
        """
        kernel_DxV = self.unembedding()
        if not self.config.biases:
            return hidden_BxTxD, kernel_DxV
        bias = self.head.bias
        assert bias is not None
        ones = jnp.broadcast_to(
            jnp.eye(8, dtype=hidden_BxTxD.dtype)[0], (*hidden_BxTxD.shape[:-1], 8)
        )
        rows_8xV = jnp.pad(bias[...][None], ((0, 7), (0, 0)))
        return jnp.concatenate([hidden_BxTxD, ones], -1), jnp.concatenate([kernel_DxV, rows_8xV])

    def logits(self, hidden_BxTxD: jax.Array) -> jax.Array:
        """Logits of the next tokens, float32, of what `hidden` gave."""
        if self.config.tied:
            logits_BxTxV = hidden_BxTxD @ self.unembedding().astype(hidden_BxTxD.dtype)
        else:
            logits_BxTxV = self.head(hidden_BxTxD)
        logits_BxTxV = logits_BxTxV.astype(jnp.float32)
        logits_BxTxV = constrained(logits_BxTxV, "rows", "context", "tensor")
        return soft_cap(logits_BxTxV, self.config.final_soft_cap, self.config.soft_cap_form)


def check_attention(config: ModelConfig) -> None:
    """Refuses a kernel of attention that these devices do not have.

    Raises:
      ValueError: with those that they have.
    """
    if config.attention == "cudnn" and jax.default_backend() != "gpu":
        raise ValueError(
            f"attention cudnn needs an NVIDIA GPU, not {jax.default_backend()}; take xla or plain."
        )


def _output_scale(config: ModelConfig, given: float | None) -> float:
    # GPT-2's: 2L branches add up in the stream, so each is started smaller; a base model's gain where
    # branches are scaled down for their number.
    if given is not None:
        return given
    if config.zero_outputs:
        return 0.0
    return config.init_scale * (2 * config.layers * config.branch_scale) ** -0.5


def _relu2(x: jax.Array) -> jax.Array:
    return jnp.square(jax.nn.relu(x))


def _linear(
    inner: int, outer: int, scale: float, config: ModelConfig, rngs: nnx.Rngs
) -> nnx.Linear:
    init = nnx.initializers.variance_scaling(scale**2 or 1.0, "fan_in", "normal")
    return nnx.Linear(
        inner,
        outer,
        use_bias=config.biases,
        kernel_init=init if scale else nnx.initializers.zeros,
        dtype=jnp.dtype(config.dtype),
        rngs=rngs,
    )


def _project(x: jax.Array, *maps: nnx.Linear) -> list[jax.Array]:
    """The output of each map; on one device, small ones are joined into one product.

    Three products of width 64 take longer than one of width 192 (docs/log.md, 2026-11-28); large ones,
    and those that a mesh cuts, stay apart.
    """
    kernels = [linear.kernel[...] for linear in maps]
    if not one_device() or sum(k.size for k in kernels) > JOINED:
        return [linear(x) for linear in maps]
    joined = jnp.concatenate(kernels, axis=-1).astype(x.dtype)
    ends = [k.shape[-1] for k in kernels[:-1]]
    found = maps[0].dot_general(x, joined, (((x.ndim - 1,), (0,)), ((), ())))
    if biases := [linear.bias[...] for linear in maps if linear.bias is not None]:
        bias = jnp.concatenate(biases, axis=-1).astype(x.dtype)
        found += jnp.broadcast_to(bias, found.shape)
    return jnp.split(found, [sum(ends[: i + 1]) for i in range(len(ends))], axis=-1)

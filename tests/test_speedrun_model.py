"""The options that turn the trainer's model into that of modded-nanogpt's optimizer track."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ravine.stability import soft_cap
from ravine.training.model import ModelConfig, Transformer
from ravine.training.step import loss_of

from .run_rounding import rounding_of
from .tolerances import HALF, furthest

WIDTH, HEADS, TOKENS = 16, 2, 6
PAIRS = WIDTH // HEADS // 4  # pairs that rotate
SPEEDRUN = ModelConfig(
    vocabulary=64,
    context=TOKENS,
    width=WIDTH,
    layers=1,
    heads=HEADS,
    activation="relu2",
    biases=True,
    embedding_norm=True,
    qk_norm=True,
    qk_gains=False,
    attention_scale=0.12,
    rope_share=0.5,
    rope_base=1024 ** (PAIRS / (PAIRS - 1)),
    final_soft_cap=15.0,
    soft_cap_form="root",
)


def noisy(config: ModelConfig) -> Transformer:
    """A model with no parameter equal to zero or one."""
    model = Transformer(config, rngs=nnx.Rngs(0))
    leaves, treedef = jax.tree.flatten(nnx.state(model))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    nnx.update(model, jax.tree.unflatten(treedef, noise))
    return model


def by_hand(model: Transformer, tokens: np.ndarray) -> np.ndarray:
    """The track's formulas for one sequence, in NumPy."""
    float64 = lambda x: np.asarray(x, np.float64)
    p = jax.tree.map(float64, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    block = jax.tree.map(lambda x: x[0], p["layers"])
    unit = lambda x: x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6)
    linear = lambda x, w: x @ w["kernel"] + w["bias"]

    # Pair i of the first half rotates by t / 1024^(i / (pairs - 1)), the second half not at all.
    speeds = np.concatenate([(1 / 1024) ** np.linspace(0, 1, PAIRS), np.zeros(PAIRS)])
    angle = np.arange(TOKENS)[:, None, None] * speeds

    def heads(x: np.ndarray, turned: bool) -> np.ndarray:
        x = x.reshape(TOKENS, HEADS, -1)
        if not turned:
            return x
        a, b = np.split(unit(x), 2, -1)
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([a * cos - b * sin, a * sin + b * cos], -1)

    x = unit(p["embed"]["embedding"][tokens]) * p["embedding_norm"]["scale"]
    y, w = unit(x) * block["attention_norm"]["scale"], block["attention"]
    q, k = heads(linear(y, w["query"]), True), heads(linear(y, w["key"]), True)
    v = heads(linear(y, w["value"]), False)
    scores = np.where(np.tri(TOKENS), 0.12 * np.einsum("thk,shk->hts", q, k), -np.inf)
    shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    x = x + linear(np.einsum("hts,shk->thk", shares, v).reshape(TOKENS, -1), w["output"])
    y, w = unit(x) * block["feed_forward_norm"]["scale"], block["feed_forward"]
    x = x + linear(np.maximum(linear(y, w["up"]), 0) ** 2, w["down"])
    z = linear(unit(x) * p["final_norm"]["scale"], p["head"])
    return 15 * z / np.sqrt(z**2 + 15**2)


def test_the_model_is_the_tracks():
    """In float32, of which `rounding_of` measures the effect; the formulas are computed in float64."""
    model, tokens = noisy(SPEEDRUN), np.array([5, 1, 63, 0, 5, 40])
    graphdef, state = nnx.split(model)
    found = jax.jit(lambda state: nnx.merge(graphdef, state)(tokens[None])[0])
    assert furthest(found(state), by_hand(model, tokens)) <= rounding_of(found, state)


def test_the_fused_loss_has_the_heads_bias_and_the_caps_form(getkey):
    """The loss and gradients equal those computed from logits."""
    model = noisy(dataclasses.replace(SPEEDRUN, final_soft_cap=2.0))
    batch = jax.random.randint(getkey(), (2, TOKENS + 1), 0, 64)
    both = nnx.jit(nnx.value_and_grad(loss_of), static_argnums=2)
    graphdef, state = nnx.split(model)
    plain = lambda state: both(nnx.merge(graphdef, state), batch, False)
    fused = both(model, batch, True)
    assert furthest(fused, plain(state)) <= rounding_of(plain, state)
    assert float(jnp.abs(fused[1]["head"].bias[...]).max()) > 1e-3


def test_branches_and_head_start_at_zero():
    config = dataclasses.replace(SPEEDRUN, zero_outputs=True, init_scale=0.5, width=256)
    model = Transformer(config, rngs=nnx.Rngs(0))
    zero = (model.layers.attention.output, model.layers.feed_forward.down, model.head)
    assert not any(linear.kernel[...].any() for linear in zero)
    for linear in (model.layers.attention.query, model.layers.feed_forward.up):
        kernel = linear.kernel[...]
        assert np.std(kernel) == pytest.approx(0.5 / 256**0.5, rel=5 / (2 * kernel.size) ** 0.5)
        assert not linear.bias[...].any()


def test_initial_sizes_of_each_matrix():
    sizes = {"init_output": 0.7, "init_up": 0.9, "init_down": 1.7}
    config = dataclasses.replace(SPEEDRUN, init_scale=0.5, zero_outputs=True, width=256, **sizes)
    layers = Transformer(config, rngs=nnx.Rngs(0)).layers
    found = layers.attention.query, layers.attention.output, layers.feed_forward.up
    for linear, size in zip((*found, layers.feed_forward.down), (0.5, 0.7, 0.9, 1.7), strict=True):
        kernel = linear.kernel[...]
        expected = size / kernel.shape[1] ** 0.5
        assert np.std(kernel) == pytest.approx(expected, rel=5 / (2 * kernel.size) ** 0.5)


@pytest.mark.usefixtures("float64")
def test_the_root_caps_slope_is_what_the_fused_loss_takes():
    z = jnp.array([-30.0, -1.0, 0.0, 2.0, 400.0])
    value, slope = jax.vmap(jax.value_and_grad(lambda x: soft_cap(x, 15.0, "root")))(z)
    np.testing.assert_allclose(value, z / np.sqrt(1 + (np.asarray(z) / 15) ** 2), rtol=HALF)
    np.testing.assert_allclose(slope, (1 - (np.asarray(value) / 15) ** 2) ** 1.5, rtol=HALF)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope_share": 0.0}, "rope_share must lie in"),
        ({"rope_share": 0.01}, "turn at least one pair"),
        ({"init_scale": 0.0}, "init_scale must be positive"),
        ({"attention_scale": float("nan")}, "attention_scale must be positive"),
        ({"qk_norm": False}, "qk_gains are those of qk_norm"),
        ({"tied": True}, "biases and zero_outputs need a head of its own"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SPEEDRUN, **options)

# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The shape of a model
#
# How wide, how deep, how large a feed-forward layer, how many heads? There are rules of thumb, and published models break every one of them. This lesson derives the rules, looks at who breaks them, trains five shapes of one size against each other, and then asks the question in which shape matters most: how the model is cut over many devices.

# %%
import argparse
import ast
import contextlib
import inspect
import os
import tempfile
import typing

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import ravine
from flax import nnx
from ravine.stability import next_token_loss
from ravine.training.colours import PICTURES
from ravine.training.model import ModelConfig
from ravine.training.pipeline import bubble, held, timeline
from ravine.training.shapes.presets import PRESETS
from ravine.training.shapes.rules import (
    RULES,
    breakers,
    feed_forward_width,
    head_count,
    layer_count,
    suggest,
)
from ravine.training.step import init_params

SMOKE = os.environ.get("RAVINE_SMOKE") == "1"
plt.rcParams.update(PICTURES)

# %% [markdown]
# ## 1. Where the parameters are
#
# A layer of width $d$ has two parts. *Attention* has four matrices, for queries, keys, values and output. With $h$ heads of width $k$ each is $d \times hk$, and with $hk = d$ that makes $4 d^2$. The *feed-forward part* (FFN) has a matrix up to $d_{\text{ff}}$ and one down again, $2\, d\, d_{\text{ff}}$; with $d_{\text{ff}} = 4d$ that makes $8 d^2$. So $L$ layers have
#
# $$N \approx 12\, L\, d^2$$
#
# parameters, a third of them in attention. Embedding and head, $V \times d$ each, come on top. The numbers that were published:

# %%
print("                 12 L d²      count   attention  feed-forward  experts  embeddings")
for name in ("gpt2", "gpt3-175b", "llama1-7b", "llama3-8b", "gemma2-2b", "qwen3-30b-a3b"):
    shape = PRESETS[name]
    share = {part: size / shape.count for part, size in shape.by_part().items()}
    embeddings = share["embedding"] + share.get("head", 0)
    print(
        f"{name:14} {12 * shape.layers * shape.width**2:9.3g}  {shape.count:9.3g} "
        f"{share['attention']:11.0%} {share.get('feed_forward', 0):13.0%} "
        f"{share.get('experts', 0):8.0%} {embeddings:11.0%}"
    )

# %% [markdown]
# The rule is good for models of the GPT-3 kind. Small models with large vocabularies are mostly embedding; a mixture of experts is mostly experts, of which a token meets only a few.
#
# ## 2. Four times the width, or two thirds of that
#
# $d_{\text{ff}} = 4d$ dates from 2017 and was kept. A **gated** unit (GLU: SwiGLU, GEGLU) multiplies two projections,
#
# $$\operatorname{FFN}(x) = W_{\text{down}} \big( \phi(W_{\text{gate}}\, x) \odot W_{\text{up}}\, x \big),$$
#
# and so has three matrices, $3\, d\, d_{\text{ff}}$. To compare it with an FFN of two at the same number of parameters, solve $3\, d\, d_{\text{ff}} = 8 d^2$:
#
# $$d_{\text{ff}} = \tfrac{8}{3}\, d = \tfrac{2}{3} \cdot 4d.$$
#
# That is the *two thirds* in many configuration files, and the reason for odd numbers: LLaMA's 11008 is $\frac83 \cdot 4096 = 10922.7$, rounded up to a multiple of 256.

# %%
print(feed_forward_width(12288), feed_forward_width(4096, gated=True, multiple=256))
gated = {name: shape for name, shape in PRESETS.items() if shape.gated and not shape.experts}
for name in ("llama1-7b", "qwen3-8b", "llama3-8b", "palm-540b", "qwen3-32b", "gemma2-27b"):
    print(f"{name:12} {gated[name].feed_forward_ratio:.2f}")
print("and without a gate, T5-11B:", PRESETS["t5-11b"].feed_forward_ratio)

# %% [markdown]
# A convention, then, and no law: from 2.5 to 8 with a gate, and T5-11B took 64, because large matrices kept its accelerators busy.
#
# ## 3. Heads
#
# A head compares queries with keys in a space of $k$ dimensions. One wants many heads, to look for several things at once, and wide ones, to tell many keys apart. With $hk = d$ the product is fixed, and nearly everyone settles on $k$ of 64 or 128. The table that many courses show is about the ratio $hk / d$:

# %%
print("            heads    k      d   hk / d   d_ff / d")
for name in ("gpt3-175b", "t5-11b", "t5-1.1-xxl", "lamda-137b", "palm-540b", "llama2-70b"):
    s = PRESETS[name]
    print(
        f"{name:12} {s.heads:4} {s.head_width:4} {s.width:6} {s.head_ratio:8.3g} {s.feed_forward_ratio:10.3g}"
    )
print("\nfor width 4096:", head_count(4096), "heads;", layer_count(4096), "layers")

# %% [markdown]
# (Copies with PaLM at head width 258 and a ratio of 1.48 circulate. They are wrong: $48 \cdot 256 / 18432 = 0.667$.)
#
# What has changed since is not the number of queries but that of keys and values. While a model writes, it keeps the keys and values of every earlier token, $2 \cdot L \cdot h_{kv} \cdot k$ numbers per token. *Grouped* queries share them: 64 query heads on 8 key heads need an eighth of the memory.

# %%
for name in ("llama1-65b", "llama2-70b", "palm-540b", "deepseek-v3"):
    s = PRESETS[name]
    gigabytes = s.cache_bytes() * 32768 / 1e9
    print(f"{name:12} {s.heads:3} query heads, {gigabytes:5.1f} GB for one text of 32,768 tokens")

# %% [markdown]
# ## 4. Deep or wide?
#
# $N = 12 L d^2$ leaves one freedom: the **aspect ratio** $d / L$. Twice the width with a quarter of the layers is the same size. Published decoders:

# %% mystnb={"image": {"alt": "Layers against width of published decoders, both axes logarithmic. Most lie between the lines of ratio 32 and 128, many on the latter; GPT-2 XL is at 33, PaLM 540B above 150."}}
decoders = {name: s for name, s in PRESETS.items() if not s.encoder_layers and name != "ravine"}
widths = np.geomspace(600, 22000, 2)
fig, ax = plt.subplots(figsize=(7, 3.8))
for ratio, style in ((32, ":"), (128, "-")):
    ax.loglog(widths, widths / ratio, style, color="#8A8A8A", linewidth=1)
    at = 10.5 * ratio if ratio == 128 else 650
    ax.text(at, at / ratio * 1.1, f"d / L = {ratio}", color="#5F5F5F", rotation=32)
ax.loglog(
    [s.width for s in decoders.values()],
    [s.layers for s in decoders.values()],
    "o",
    color="#0072B2",
    alpha=0.5,
)
for name, shift in {
    "gpt2-xl": (-6, 8),
    "qwen3-0.6b": (8, 2),
    "qwen3-235b-a22b": (-40, 9),
    "gpt3-175b": (-62, 4),
    "palm-540b": (-14, -15),
    "llama3-405b": (-62, 8),
    "llama3.2-1b": (8, -6),
}.items():
    s = decoders[name]
    ax.annotate(
        name, (s.width, s.layers), xytext=shift, textcoords="offset points", fontsize="small"
    )
ax.set(xlabel="width d", ylabel="layers L", ylim=(9, 190))
ax.set_yticks([10, 20, 50, 100], ["10", "20", "50", "100"])
ax.set_xticks([1000, 2000, 5000, 10000], ["1,000", "2,000", "5,000", "10,000"])
plt.show()

# %% [markdown]
# Does the choice matter to the loss? Train five shapes of one size, 200,000 parameters without the embedding, on source text of Python's library, each at the better of two learning rates:

# %%
SOURCES = (argparse, ast, contextlib, inspect, tempfile, typing)
text = np.frombuffer("".join(map(inspect.getsource, SOURCES)).encode(), np.uint8).astype(np.int32)
cut, CONTEXT, STEPS = len(text) * 9 // 10, 64, 10 if SMOKE else 300
SHAPES = [(1, 128), (4, 64)] if SMOKE else [(1, 128), (2, 96), (4, 64), (8, 48), (16, 32)]
RATES = (4e-3,) if SMOKE else (4e-3, 8e-3)


def windows(source, count, seed):
    """Windows of text at random places."""
    at = np.random.default_rng(seed).integers(0, len(source) - CONTEXT - 1, count)
    return jnp.asarray(source[at[:, None] + np.arange(CONTEXT + 1)])


held_out = windows(text[cut:], 64, 100)


def trainer(layers, width):
    """What trains this shape with a rate and a seed, and returns the held-out loss."""
    config = ModelConfig(context=CONTEXT, width=width, layers=layers, heads=width // 16)

    @jax.jit
    def run(params, rate, batches):
        schedule = ravine.schedules.warmup(ravine.schedules.cosine(1.0, STEPS), STEPS // 10)
        tx = ravine.adamw(lambda count: rate * schedule(count), b2=0.95, weight_decay=0.1)

        def step(carry, batch):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), batches)
        return loss(params, held_out)

    def loss(params, batch):
        return next_token_loss(nnx.merge(graphdef, params)(batch[:, :-1]), batch[:, 1:])

    def train(rate, seed):
        batches = windows(text[:cut], STEPS * 8, seed).reshape(STEPS, 8, -1)
        return float(run(init_params(config, seed)[1], jnp.float32(rate), batches))

    graphdef, _ = init_params(config, 0)
    return train


print("layers  width    d / L   12 L d²   held-out loss of two seeds")
ends = {}
for layers, width in SHAPES:
    train = trainer(layers, width)
    best = min(([train(rate, seed) for seed in range(2)] for rate in RATES), key=np.mean)
    ends[width / layers] = best
    print(
        f"{layers:6} {width:6} {width / layers:8.1f} {12 * layers * width**2:9,}   "
        + ", ".join(f"{loss:.3f}" for loss in best)
    )

# %% mystnb={"image": {"alt": "Held-out loss against the aspect ratio, from 2 to 128 on a logarithmic axis, with two seeds for each shape: a valley that is flat between 6 and 16 and rises by a few percent towards both ends."}}
fig, ax = plt.subplots(figsize=(6, 2.8))
ax.semilogx(list(ends), [np.mean(loss) for loss in ends.values()], "-", color="#0072B2")
for ratio, loss in ends.items():
    ax.semilogx([ratio] * len(loss), loss, "o", color="#0072B2", alpha=0.6)
ax.set(xlabel="d / L, at equal size", ylabel="held-out loss, nats per byte")
plt.show()

# %% [markdown]
# The ratio varies by a factor of 64, and the loss by 3.5 %. One layer is too few and sixteen narrow ones are too many, but between 6 and 16 the two seeds of one shape differ more than the shapes do. (The second and the fourth are 12 % larger than the others, as widths come in whole heads.) A small model and a short run, but the same was found for large ones: at a given size, [Kaplan et al. (2020)](https://arxiv.org/abs/2001.08361) changed the aspect ratio by a factor of 40 for a few percent of the loss.
#
# ## 5. Cutting it over devices
#
# If the loss hardly cares, let the machine decide. There are three ways to use many devices:
#
# | | what a device holds | what is sent |
# |---|---|---|
# | **data** parallelism | a copy of the model (or a shard, gathered when used), a part of the batch | gradients: $N$ numbers per step, whatever the shape |
# | **tensor** parallelism | a slice of every matrix | activations, twice per layer forward and twice backward: $4 L d$ numbers per token |
# | **pipeline** parallelism | some of the layers | activations at each boundary, forward and backward: $2 d$ numbers per token |
#
# Take two shapes of 2.4 billion parameters, 48 layers of width 2048 and 12 layers of width 4096:

# %%
for layers, width in ((48, 2048), (12, 4096)):
    print(
        f"{layers} x {width}: tensor {4 * layers * width:,} numbers per token, columns per device "
        f"(16 ways) {width // 16}; pipeline {2 * width:,} per boundary, at most {layers} stages"
    )

# %% [markdown]
# At a given size $L d = N / 12 d$: **the wide model sends half as much for tensor parallelism**, and its matrices stay large when they are sliced. The deep one can have more pipeline stages.
#
# ## 6. The bubble
#
# "Depth is hard to parallelise", one often reads. Layers follow one another, so one token passes $L$ of them however many devices there are. That is latency. *Throughput* is another matter: while the second stage works on the first micro-batch, the first stage works on the second. Only at both ends of a step do stages wait. With $p$ stages and $m$ micro-batches a stage works for $m$ slots, and the whole takes $m + p - 1$:
#
# $$\text{bubble} = \frac{p - 1}{m + p - 1}.$$
#
# Two orders, four stages, six micro-batches. GPipe does all forward passes first. 1F1B alternates as soon as it can:

# %% mystnb={"image": {"alt": "Two time charts of four stages. GPipe: a wedge of forward passes, then a wedge of backward passes. 1F1B: forward and backward passes alternate in the middle. Both have the same length and the same idle slots in sum."}}
STAGES, MICRO = 4, 6
fig, axes = plt.subplots(2, 1, figsize=(8, 3.6), sharex=True)
for ax, order in zip(axes, ("gpipe", "1f1b"), strict=True):
    for stage, ticks in enumerate(timeline(STAGES, MICRO, order)):
        for tick, slot in enumerate(ticks):
            if slot is not None:
                color = "#D55E00" if slot.backward else "#56B4E9"
                ax.barh(stage, 1, left=tick, color=color, edgecolor="white")
                ax.text(tick + 0.5, stage, slot.micro_batch, ha="center", va="center", fontsize=8)
    ax.set(title=f"{order}: blue forward, orange backward", ylabel="stage", yticks=range(STAGES))
    ax.invert_yaxis()
axes[1].set(xlabel="slot", xticks=range(0, 19, 3))
plt.show()
for order in ("gpipe", "1f1b"):
    rows = timeline(STAGES, MICRO, order)
    idle = np.mean([slot is None for ticks in rows for slot in ticks])
    print(
        f"{order:5} idle {idle:.3f}, by the formula {bubble(STAGES, MICRO):.3f}; "
        f"inputs kept per stage {[held(ticks) for ticks in rows]}"
    )

# %% [markdown]
# Both wait equally long. 1F1B keeps the inputs of at most $p$ micro-batches instead of all $m$, and that is its advantage. The share of waiting:

# %%
print("stages" + "".join(f"{f'm = {m}':>10}" for m in (4, 8, 16, 64, 256)))
for stages in (2, 4, 8, 16):
    print(f"{stages:6}" + "".join(f"{bubble(stages, m):10.0%}" for m in (4, 8, 16, 64, 256)))

# %% [markdown]
# So depth parallelises well *if the batch has many micro-batches in it*. The batch cannot grow for ever, though: beyond [its critical size](how_large_a_batch.ipynb) further samples buy nothing. That is the true limit of a pipeline. `ravine.training.pipeline.pipelined` is a GPipe that runs, over an axis of a mesh.
#
# ## 7. The rules, and who breaks them

# %%
for rule in RULES:
    against = breakers(rule)
    print(f"{rule.name}: broken by {len(against)}, e.g. {', '.join(against[:3])}")
print()
for line in suggest(parameters=7e9, devices=64).lines()[:3]:
    print(line)

# %% [markdown]
# `python -m ravine presets --parameters 7e9 --devices 64` prints the same, and `python -m ravine presets` all tables. [What shape of model](../docs/shapes.md) has them with sources.
#
# ## What to take along
#
# | choice | start from | because |
# |---|---|---|
# | FFN | $4d$, with a gate $\frac83 d$ | equal parameters for two matrices and for three |
# | heads | $hk = d$, $k$ of 64 to 128 | queries are a change of basis of the stream |
# | keys and values | 8 heads of them | memory while the model writes |
# | $d / L$ | about 128 | the loss is flat around it, and wide matrices are cheap to slice |
# | vocabulary | a multiple of 128 | matrices tile, and shards are equal |
# | dropout | none, when a token is seen once | there is nothing to overfit ([decay](../docs/decay.md)) |
#
# To try:
#
# 1. Section 4 with `feed_forward=` of 1, 2, 4 and 8 times the width at equal `12 L d²`. How flat is that valley?
# 2. Section 4 with `kv_heads=1`. What does it cost, and how many parameters does it spare?
# 3. Section 6 with two micro-batches and eight stages. Which stage waits longest?
# 4. `suggest(tokens=1e12, devices=256)`. Which rule does it break first, if the vocabulary is 256,000?

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
# # Compose your own, and put it on a pod
#
# An optimizer is two pure functions. This lesson writes one in thirty lines, gives it to the matrices of a transformer and AdamW to the rest, and trains it against AdamW. Then it goes to a mesh of eight devices, first with its own state and then with Shampoo's matrices, and finally the planner computes what a run on real accelerators would cost, before anyone pays for one.
#
# The eight devices are virtual: JAX makes them out of one CPU if it is told to before it does anything else.

# %%
import argparse
import ast
import collections
import contextlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import typing

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import ravine
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.colors import ListedColormap
from ravine.stability import next_token_loss
from ravine.training.colours import PICTURES, colour
from ravine.training.model import ModelConfig
from ravine.training.step import init_params

jax.config.update("jax_num_cpu_devices", 8)
SMOKE = os.environ.get("RAVINE_SMOKE") == "1"
plt.rcParams.update(PICTURES)
print(len(jax.devices()), "devices")

# %% [markdown]
# ## 1. An idea: one second moment per neuron
#
# Adam divides every element of the momentum by the root of its own second moment. That is a buffer as large as the model. But the weights that feed one neuron see inputs of similar size and one common error signal, so their second moments should be similar, too. Keep their mean over the inputs instead (the idea of [Adam-mini](https://arxiv.org/abs/2406.16793)): for a kernel $W$ of shape $[\text{in}, \text{out}]$
#
# $$m_t = \beta_1 m_{t-1} + (1 - \beta_1)\, g_t, \qquad v_{t,j} = \beta_2 v_{t-1,j} + (1 - \beta_2)\, \frac1n \sum_{i=1}^{n} g_{t,ij}^2, \qquad u_{t,ij} = \frac{m_{t,ij} / (1 - \beta_1^t)}{\sqrt{v_{t,j} / (1 - \beta_2^t)} + \varepsilon}.$$
#
# State falls from 8 bytes per parameter to hardly more than 4. The conventions to follow are few:
#
# - state is a `NamedTuple` that has the same structure, shapes and dtypes from `init` on, so that it passes through `jax.lax.scan`;
# - a *direction* is neither negated nor multiplied by the learning rate: the next link of the chain does both;
# - arithmetic is in float32, and updates come back in the gradient's dtype.


# %%
class NeuronState(typing.NamedTuple):
    count: jax.Array  # updates so far
    mu: optax.Updates  # like the parameters
    nu: optax.Updates  # one number per neuron


def mean_square(x):
    """Over the inputs of each neuron."""
    return jnp.mean(x**2, axis=-2, keepdims=True)


def scale_by_neuron(b1=0.9, b2=0.95, eps=1e-8):
    """Momentum over the root of the mean square of each neuron's gradient."""

    def init(params):
        mu = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
        return NeuronState(jnp.zeros([], jnp.int32), mu, jax.tree.map(mean_square, mu))

    def update(grads, state, params=None):
        count = state.count + 1
        wide = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, wide)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * mean_square(g), state.nu, wide)

        def direction(m, v, g):
            u = m / (1 - b1**count) / (jnp.sqrt(v / (1 - b2**count)) + eps)
            return u.astype(g.dtype)

        return jax.tree.map(direction, mu, nu, grads), NeuronState(count, mu, nu)

    return optax.GradientTransformation(init, update)


# %% [markdown]
# The axis -2 is the input axis whether a kernel is $[\text{in}, \text{out}]$ or a stack $[\text{layers}, \text{in}, \text{out}]$. A direction becomes an optimizer by a chain. And it must not be given a norm's scale or an embedding, for which "mean over the inputs" means something else or nothing. Which parameter is what is told by its **role**:


# %%
def neuron(learning_rate, *, b1=0.9, b2=0.95, weight_decay=0.1):
    """`scale_by_neuron` for matrices, AdamW for the rest."""
    matrices = optax.chain(
        scale_by_neuron(b1, b2),
        ravine.add_decayed_weights(weight_decay),
        ravine.scale_by_learning_rate(learning_rate),
    )
    rest = ravine.adamw(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay)
    roles = dict.fromkeys(("embedding", "head", "norm", "bias"), "adamw") | {"matrix": "neuron"}
    return ravine.combine_by_role({"neuron": matrices, "adamw": rest}, roles)


config = ModelConfig(context=64, width=64, layers=2 if SMOKE else 4)
graphdef, params = init_params(config, 0)
print(ravine.explain(neuron(3e-3), params))

# %% [markdown]
# `explain` has no table of optimizers. It calls `init` and looks at what it returns, so the table is right for any transformation.
#
# Once registered, the optimizer can be used by name, as in a `ravine.OptimizerConfig`:

# %%
if "neuron" not in ravine.names():
    ravine.register("neuron", neuron)
print(ravine.OptimizerConfig("neuron", {"b2": 0.99}).to_json())

# %% [markdown]
# ## 2. Does it train?
#
# Source text of Python's library, and each optimizer at the best of a few rates:

# %%
SOURCES = (argparse, ast, contextlib, inspect, tempfile, typing)
text = np.frombuffer("".join(map(inspect.getsource, SOURCES)).encode(), np.uint8).astype(np.int32)
cut, STEPS = len(text) * 9 // 10, 10 if SMOKE else 300
RATES = (4e-3,) if SMOKE else (2e-3, 4e-3, 8e-3, 1.6e-2)


def windows(source, count, seed):
    """Windows of text at random places."""
    at = np.random.default_rng(seed).integers(0, len(source) - 65, count)
    return jnp.asarray(source[at[:, None] + np.arange(65)])


def loss(params, batch):
    return next_token_loss(nnx.merge(graphdef, params)(batch[:, :-1]), batch[:, 1:])


def trainer(name):
    """What trains with a rate and returns the losses, the last one on held-out text."""

    @jax.jit
    def run(params, rate, batches):
        schedule = ravine.schedules.warmup(ravine.schedules.cosine(1.0, STEPS), STEPS // 10)
        options = {"b2": 0.95, "weight_decay": 0.1}
        tx = ravine.OptimizerConfig(name, options).build(lambda count: rate * schedule(count))

        def step(carry, batch):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, batch)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), batches)
        return losses, loss(params, windows(text[cut:], 64, 100))

    return run


batches = windows(text[:cut], STEPS * 8, 0).reshape(STEPS, 8, -1)
curves = {}
for name in ("adamw", "neuron"):
    run = trainer(name)
    ends = {rate: run(params, jnp.float32(rate), batches) for rate in RATES}
    best = min(ends, key=lambda rate: float(ends[rate][1]))
    curves[name] = np.asarray(ends[best][0])
    print(
        f"{name:7} best rate {best}; held-out loss by rate: "
        + ", ".join(f"{rate} {float(value):.3f}" for rate, (_, value) in ends.items())
    )

# %% mystnb={"image": {"alt": "Training loss over the steps for AdamW and for the optimizer with one second moment per neuron: the two curves fall together, AdamW's a little lower in the second half."}}
fig, ax = plt.subplots(figsize=(7, 3))
smooth = lambda values: np.convolve(values, np.ones(10) / 10, mode="valid")
for name, values in curves.items():
    ax.plot(smooth(values), color=colour(name), label=name)
ax.set(xlabel="step", ylabel="loss, mean of ten steps")
ax.legend()
plt.show()

# %% [markdown]
# It trains, at AdamW's rates and with half of its state for the matrices, and ends 0.065 nats behind: in this model a mean per neuron throws away something that a second moment per element has. That is a result, too. One seed and 300 steps decide nothing about large models (the paper reports no loss there); `python -m ravine race` tunes with equal trials and has error bars.
#
# ## 3. On a mesh
#
# A **mesh** gives names to the dimensions of a grid of devices, and a specification says which name cuts which axis of an array. Eight devices as $4 \times 2$, and a kernel whose rows are cut by one name and its columns by the other:

# %%
mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
kernel = jax.random.normal(jax.random.key(0), (256, 512))
with jax.set_mesh(mesh):
    sharded = {"up": {"kernel": jax.device_put(kernel, NamedSharding(mesh, P("fsdp", "tensor")))}}
DARK = ("#0072B2", "#A5480A", "#117733", "#882255", "#332288", "#7F5A0B", "#5F5F5F", "#000000")
shades = ListedColormap(DARK)  # dark enough for white letters
jax.debug.visualize_array_sharding(sharded["up"]["kernel"], color_map=shades)

# %% [markdown]
# Our optimizer was written without a thought of meshes. What happens to it here? `jit` computes where the parameters are. The momentum is element by element, so it stays; the mean over the inputs crosses devices, and the compiler inserts a sum:


# %%
def state_of(tx):
    """The state that `tx` makes for the sharded kernel, and what its update sends."""
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(sharded)
        compiled = jax.jit(tx.update).lower(sharded, state, sharded).compile()
    kinds = "all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute"
    sent = collections.Counter(re.findall(rf" ({kinds})(?:-start)?\(", compiled.as_text()))
    return state, dict(sent)


state, sent = state_of(scale_by_neuron())
print("mu", state.mu["up"]["kernel"].sharding.spec, " nu", state.nu["up"]["kernel"].sharding.spec)
print("collectives:", sent)

# %% [markdown]
# A few numbers per neuron are added up over the four devices that share its rows, and nothing else is sent.
#
# ## 4. Shampoo's factors
#
# Shampoo keeps two matrices for each block of the kernel, and roots of them. A root needs its whole block. On a mesh that is the question: does a device *have* whole blocks? The shard of a device is $64 \times 256$. With blocks of 64 it holds four whole ones:

# %%
rows = []
for size in (64, 128):
    tx = ravine.scale_by_shampoo(blocks=ravine.Blocks(size=size))
    state, sent = state_of(tx)
    statistics = state.factors["up"]["kernel"][0][0].statistics
    rows.append((size, statistics, sent))
    print(f"blocks of {size}: statistics {statistics.shape} [batch, grid, grid, block, block]")
    print(f"   sharded {statistics.sharding.spec}; collectives of an update: {sent or 'none'}")

# %% [markdown]
# Where they are, drawn over the grid of blocks. Blocks of 64 follow the kernel:

# %%
size, statistics, _ = rows[0]
grid_spec = P(*statistics.sharding.spec[1:3])
jax.debug.visualize_sharding(
    statistics.shape[1:3], NamedSharding(mesh, grid_spec), color_map=shades
)

# %% [markdown]
# Blocks of 128 cross the boundaries of `fsdp`, of which a shard has only 64 rows. Four devices hold the same factors, and the gradient's rows have to be gathered:

# %%
size, statistics, _ = rows[1]
grid_spec = P(*statistics.sharding.spec[1:3])
jax.debug.visualize_sharding(
    statistics.shape[1:3], NamedSharding(mesh, grid_spec), color_map=shades
)

# %% [markdown]
# **Choose the block size so that shards hold whole blocks**, and Shampoo sends nothing at all. The same update on one device, to be sure:

# %%
tx = ravine.scale_by_shampoo(blocks=ravine.Blocks(size=64), refresh=ravine.Refresh(every=1))
alone = {"up": {"kernel": kernel}}
one, _ = jax.jit(tx.update)(alone, tx.init(alone), alone)
with jax.set_mesh(mesh):
    eight, _ = jax.jit(tx.update)(sharded, jax.jit(tx.init)(sharded), sharded)
one, eight = (np.asarray(u["up"]["kernel"]) for u in (one, eight))
print(f"largest difference, relative: {np.abs(one - eight).max() / np.abs(one).max():.0e}")

# %% [markdown]
# Meshes made by `jax.make_mesh` carry shardings in the types of arrays, and optimizers read them there. For meshes with `Auto` axes there is `ravine.on_mesh`, and for checkpoints `ravine.state_shardings`, which also works for our own optimizer:

# %%
with jax.set_mesh(mesh):
    shardings = ravine.state_shardings(scale_by_neuron(), sharded)
print("mu", shardings.mu["up"]["kernel"].spec, " nu", shardings.nu["up"]["kernel"].spec)

# %% [markdown]
# ## 5. Ask the planner
#
# Before a long run on a pod one wants to know three things: does the state fit, what is sent, how long does the optimizer take? `python -m ravine plan` compiles the update for every chip of a topology with the shapes of a published model, and counts. Nothing is allocated. GPT-2's layers on eight GPUs, on a mesh like ours:


# %%
def plan(size):
    """The plan of Shampoo with blocks of one size."""
    command = (
        f"{sys.executable} -m ravine plan --model gpt2 --layers-only --json --optimizer shampoo"
    )
    command += " --topology h100:8 --mesh fsdp=4,tensor=2 --options"
    options = json.dumps({"blocks": {"size": size}})
    found = subprocess.run([*command.split(), options], capture_output=True, text=True, check=True)
    return json.loads(found.stdout)


print("blocks   state per chip, MB   sent per update, MB   update, ms   sending, ms")
for size in (128, 96):
    (found,) = plan(size)["plans"]
    times = found["estimate"]
    print(
        f"{size:6} {found['bytes']['state'] / 1e6:20.0f} {found['sent'] / 1e6:21.0f} "
        f"{1e3 * times['update']:12.2f} {1e3 * times['exchanges']:13.2f}"
    )

# %% [markdown]
# A shard of GPT-2's query kernel has $768 / 4 = 192$ rows: blocks of 128 cross its boundaries, blocks of 96 do not. The planner's numbers can be checked by hand. A kernel cut into square blocks of $b$ has $mn / b^2$ of them, each with two factors and two roots of $b^2$, so $4\,mn$ numbers, whatever $b$ is: 16 bytes per parameter in float32. The momentum takes 4 more, and the second moment of the graft another 4. GPT-2's layers have 85 million parameters in their matrices, and an eighth of $85 \cdot 24$ MB is 255 MB. The times are lower bounds, at the peak rates that makers publish.
#
# For TPUs the planner uses the TPU's own compiler, which needs no TPU; [the page on pods](../docs/pods.md) has plans for 512 chips and how to launch a run.
#
# ## What to take along
#
# | step | with |
# |---|---|
# | a direction | `optax.GradientTransformation(init, update)`, state as a `NamedTuple` |
# | an optimizer | `optax.chain` with `add_decayed_weights` and `scale_by_learning_rate` |
# | who gets it | `ravine.combine_by_role`; `ravine.explain` prints it |
# | a mesh | `jax.set_mesh`; shardings are part of the types |
# | blocks | as large as the shards allow, and no larger |
# | the bill | `python -m ravine plan`, before the run |
#
# To try:
#
# 1. Replace the mean in section 1 by a maximum. What does that do to the steps of rare inputs?
# 2. Give `scale_by_neuron` to the embedding, with the mean over its last axis. What is a "neuron" there?
# 3. Section 4 on a mesh of $2 \times 4$. Which sizes of block send nothing?
# 4. Section 5 for `muon`. It keeps less and sends more; which of the two decides on your network?

"""A small mixture of experts in the style of GShard, for compiling a train step with an expert axis.

Source: Lepikhin et al., 2020, https://arxiv.org/abs/2006.16668, algorithm 1. The capacity of each expert
is its even share of the tokens of a sequence; tokens beyond the capacity are dropped.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import ravine
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ravine.stability import attention, next_token_loss, rms_normalize
from ravine.training.plan.compile import Compiled, with_shardings
from ravine.training.plan.flops import arithmetic
from ravine.training.shapes.shape import ModelShape
from ravine.training.sharding import ROWS, batch_sharding, constrained, sharded_parameters


def compiled_step(
    shape: ModelShape, tx: optax.GradientTransformation, mesh: Any, sequences: int
) -> Compiled:
    """Compiles a train step of the mixture, with rematerialized layers, on a mesh with `Auto` axes."""
    with jax.set_mesh(mesh):
        params = sharded_parameters(shape, mesh)
        tx = ravine.on_mesh(tx, jax.tree.map(lambda x: x.sharding.spec, params), mesh)
        state = with_shardings(jax.eval_shape(tx.init, params), ravine.state_shardings(tx, params))
        rows = batch_sharding(mesh, sequences)
        tokens = jax.ShapeDtypeStruct((sequences, shape.context + 1), jnp.int32, sharding=rows)

        def step(params: Any, state: Any, tokens: jax.Array) -> Any:
            loss, grads = jax.value_and_grad(loss_of)(params, tokens, shape)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

        kept = jax.tree.map(lambda x: x.sharding, (params, state))
        jitted = jax.jit(
            step, out_shardings=(*kept, NamedSharding(mesh, P())), donate_argnums=(0, 1)
        )
        traced = jitted.trace(params, state, tokens)
        return Compiled(traced.lower().compile(), arithmetic(traced, mesh.size), params, state, 0.0)


def loss_of(params: dict[str, jax.Array], tokens: jax.Array, shape: ModelShape) -> jax.Array:
    """The loss of tokens `[B, T + 1]`."""
    table = constrained(params["embed/embedding"], None, None)
    x = constrained(table[tokens[:, :-1]], "rows", None, None)
    layers = {k.removeprefix("layers/"): v for k, v in params.items() if k.startswith("layers/")}
    layer = jax.checkpoint(lambda x, layer: (_layer(x, layer, shape), None))
    x, _ = jax.lax.scan(layer, x, layers)
    x = rms_normalize(x, params["final_norm/scale"])
    return next_token_loss((x @ params["head/kernel"]).astype(jnp.float32), tokens[:, 1:])


def _layer(x_BxTxD: jax.Array, layer: dict[str, jax.Array], shape: ModelShape) -> jax.Array:
    heads = lambda x: x.reshape(*x.shape[:2], -1, shape.head_width)
    normed = rms_normalize(x_BxTxD, layer["norm_0/scale"])
    names = ("query", "key", "value")
    q, k, v = (heads(normed @ layer[f"attention/{name}/kernel"]) for name in names)
    mixed = attention(q, k, v, causal=True).mixed.reshape(normed.shape)
    x_BxTxD = x_BxTxD + mixed @ layer["attention/output/kernel"]
    normed = rms_normalize(x_BxTxD, layer["norm_1/scale"])
    return constrained(x_BxTxD + _experts(normed, layer, shape), "rows", None, None)


def _experts(x_BxTxD: jax.Array, layer: dict[str, jax.Array], shape: ModelShape) -> jax.Array:
    assert shape.experts is not None
    count, chosen = shape.experts.count, shape.experts.per_token
    batch, length, _ = x_BxTxD.shape
    room = length * chosen // count
    weights = jax.nn.softmax((x_BxTxD @ layer["router/kernel"]).astype(jnp.float32))
    top, at = jax.lax.top_k(weights, chosen)
    expert = jax.nn.one_hot(at, count)  # [B, T, k, E]
    before = jnp.cumsum(expert.reshape(batch, -1, count), 1).reshape(expert.shape) - expert
    place = jax.nn.one_hot(jnp.sum(before * expert, -1), room)  # zero beyond the capacity
    combine = jnp.einsum("btk,btke,btkc->btec", top, expert, place).astype(x_BxTxD.dtype)
    dispatch = (combine > 0).astype(x_BxTxD.dtype)
    inputs = jnp.einsum("btec,btd->ebcd", dispatch, x_BxTxD)
    inputs = _to_experts(constrained(inputs, None, "rows", None, None))
    gate, up = (
        jnp.einsum("ebcd,edf->ebcf", inputs, layer[f"experts/{k}/kernel"]) for k in ("gate", "up")
    )
    hidden = jax.nn.silu(gate) * up
    outputs = _to_experts(jnp.einsum("ebcf,efd->ebcd", hidden, layer["experts/down/kernel"]))
    outputs = constrained(outputs, None, "rows", None, None)
    return jnp.einsum("btec,ebcd->btd", combine, outputs)


def _to_experts(x_ExBxCxD: jax.Array) -> jax.Array:
    """Sends tokens to the devices of their experts; rows stay sharded over the other axes."""
    mesh = jax.sharding.get_abstract_mesh()
    rows = tuple(axis for axis in ROWS if axis != "expert" and axis in mesh.shape)
    return jax.lax.with_sharding_constraint(x_ExBxCxD, P("expert", rows, None, None))

"""Programs of models and chips that are not there: an optimizer's update, or a whole train step.

Both come back as a `Compiled` with the shapes they were compiled for, of parameters and state in
their shardings.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ...optimizers.matrix.mesh.shardings import state_shardings
from ..config import RunConfig
from ..model_config import ModelConfig
from ..placed import place
from ..programs import settings_of
from ..shapes.shape import ModelShape
from ..sharding import batch_sharding, rows_of
from ..step import TrainState, abstract_state, make_train_step
from .flops import Arithmetic, arithmetic


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program, and what it takes."""

    program: jax.stages.Compiled
    arithmetic: Arithmetic
    params: Any
    """Shapes with shardings."""
    state: Any
    """The optimizer's, likewise."""
    seconds: float
    """To trace and compile."""


def compiled_update(
    tx: optax.GradientTransformation, params: Any, mesh: Mesh, *, on_host: bool = False
) -> Compiled:
    """The update of a transformation for these parameters, of an `Explicit` mesh.

    Args:
      tx: the transformation.
      params: shapes with shardings.
      mesh: with `Explicit` axes.
      on_host: keeps the state in the memory of the host and moves it to the chip and back.
    """
    started = time.perf_counter()
    with jax.set_mesh(mesh):
        state = with_shardings(jax.eval_shape(tx.init, params), state_shardings(tx, params))
        kept = kept_on_host(state) if on_host else state

        whole = optax.with_extra_args_support(tx)

        def update(grads: Any, state: Any, params: Any) -> Any:
            # Sophia's estimate of the curvature is a pass through the model, which is not here.
            extra: dict[str, Any] = {"curvature": lambda params, key: grads}
            state = moved(state, jax.memory.Space.Device) if on_host else state
            updates, state = whole.update(grads, state, params, **extra)
            params = jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, updates)
            return params, moved(state, jax.memory.Space.Host) if on_host else state

        traced = jax.jit(update, donate_argnums=(1, 2)).trace(params, kept, params)
        program = traced.lower().compile()
    seconds = time.perf_counter() - started
    return Compiled(program, arithmetic(traced, mesh.size), params, state, seconds)


def kept_on_host(state: Any) -> Any:
    """Shapes of a state that the host keeps, all but scalars."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_hosted(x.sharding, x.ndim)),
        state,
    )


def _hosted(sharding: Any, rank: int) -> Any:
    return sharding.with_memory_kind("pinned_host") if rank else sharding


def moved(state: Any, to: Any) -> Any:
    """A state in another memory, a `jax.memory.Space`, all but scalars, which stay on the chip."""
    return jax.tree.map(lambda x: jax.device_put(x, to) if x.ndim else x, state)


def compiled_train_step(
    config: ModelConfig,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    batch_size: int,
    micro_batches: int = 1,
    *,
    optimizer: str,
    fused: bool = False,
    on_host: bool = False,
) -> Compiled:
    """The trainer's step, forwards, backwards and update, its parameters in bfloat16.

    Args:
      config: of the model.
      tx: the optimizer.
      mesh: with `Auto` axes, as the trainer's.
      batch_size: sequences per step, over all devices.
      micro_batches: parts of it, worked on one after the other, or passed along the stages of a mesh
        that has them (`ravine.training.staged`).
      optimizer: its registered name, by which the trainer chooses an estimate of the curvature.
      fused: takes the loss without all logits at once.
      on_host: as of `compiled_update`.

    Raises:
      ValueError: for what the mesh does not divide.
    """
    started = time.perf_counter()
    with jax.set_mesh(mesh):
        placed = place(config, tx, mesh)
        tx, shardings = placed.tx, placed.shardings
        state = with_shardings(abstract_state(config, tx, jnp.bfloat16), shardings)
        rows = batch_sharding(mesh, batch_size)
        batch = jax.ShapeDtypeStruct((batch_size, config.context + 1), jnp.int32, sharding=rows)
        metrics = NamedSharding(mesh, PartitionSpec())
        staged = mesh.shape.get("stage", 1) > 1
        run = RunConfig(model=config, loss="fused" if fused else "plain")
        options = settings_of(run, optimizer) | {"staged": staged}
        own, kept = make_train_step(placed.graphdef, tx, micro_batches, **options), state
        if on_host:
            kept = state._replace(opt_state=kept_on_host(state.opt_state))
            shardings = jax.tree.map(lambda x: x.sharding, kept)

        def stepped(state: TrainState, batch: Any) -> Any:
            if not on_host:
                return own(state, batch)
            here = state._replace(opt_state=moved(state.opt_state, jax.memory.Space.Device))
            after, metrics = own(here, batch)
            return after._replace(opt_state=moved(after.opt_state, jax.memory.Space.Host)), metrics

        step = jax.jit(stepped, donate_argnums=0, out_shardings=(shardings, metrics))
        traced = step.trace(kept, batch)
        program = traced.lower().compile()
    seconds = time.perf_counter() - started
    counted = arithmetic(traced, mesh.size)
    return Compiled(program, counted, state.params, state.opt_state, seconds)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Shapes with shardings."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def trainer_model(name: str, shape: ModelShape) -> ModelConfig:
    """The trainer's model of these shapes, layers recomputed in the backward pass.

    Raises:
      ValueError: for models that have what the trainer's has not.

    Example:
      >>> from ravine.training.plan.compile import trainer_model
      >>> from ravine.training.shapes.presets import PRESETS
      >>> trainer_model("llama2-70b", PRESETS["llama2-70b"]).key_value_heads
      8
    """
    lacks = {
        "an encoder": shape.encoder_layers > 0,
        "a mixture of experts": shape.experts is not None,
        "latent attention": shape.latent is not None,
        "local attention": shape.local_layers > 0,
        "norms over all queries and keys": shape.qk_norm == "all",
        "GEGLU or ReLU": shape.activation not in ("swiglu", "gelu"),
        "relative positions": shape.relative_positions > 0,
        "learned positions": shape.learned_positions,
        "biases": shape.biases,
        f"{shape.norms} norm per layer": shape.norms not in (2, 4),
        "heads that are not the width together": shape.heads * shape.head_width != shape.width,
    }
    found = [what for what, has in lacks.items() if has]
    if found:
        raise ValueError(
            f"{name} has {', '.join(found)}, which the trainer's model does not have; leave out "
            "--train-step."
        )
    return ModelConfig(
        vocabulary=shape.vocabulary,
        context=shape.context,
        width=shape.width,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        feed_forward=shape.feed_forward,
        activation="swiglu" if shape.gated else "gelu",
        qk_norm=shape.qk_norm == "head",
        tied=shape.tied,
        norms=4 if shape.norms == 4 else 2,
        dtype="bfloat16",
        remat=True,
    )


def rows_for(tokens: int, context: int, mesh: Mesh) -> int:
    """Sequences per step: those of a batch of that many tokens, or without one the fewest there can
    be."""
    least = rows_of(mesh)
    if tokens == 0:
        return least
    rows, rest = divmod(tokens, context)
    if rest or rows % least:
        raise ValueError(
            f"a batch of {tokens} tokens is no multiple of {least} sequences of {context}; give "
            f"{max(1, round(tokens / (least * context))) * least * context}."
        )
    return rows


def auto(mesh: Mesh) -> Mesh:
    """The same devices and names, with `Auto` axes."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))

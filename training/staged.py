r"""The trainer's model cut into the stages of a pipeline: its loss and gradients, by GPipe.

A mesh axis `stage` cuts the stack of layers, in order; all other axes are the compiler's, as without
stages. Of p stages and m micro-batches:

==========  ==========================================================================================
layers      run in m + p - 1 ticks, in each of which a stage takes what its neighbour sent in the tick
            before. In p - 1 of them it calculates for nothing: that is the bubble. Inputs of layers are
            kept for all ticks, where 1F1B keeps those of p
stream      sent on in every tick by all stages but the last, and its gradient sent back: per chip
            :math:`2 (m + p - 1) (p - 1) / p` times what one micro-batch has there
embedding   every stage has it, and looks up its tokens in every tick; only the first one's are used
head        shared by all stages, which each take m / p micro-batches from the last one and send their
            gradient back: per chip, :math:`2 (m / p) (p - 1) / p` times the same
gradients   in float32; those of embedding and head, which every stage has, are summed over the stages
==========  ==========================================================================================

Source: Huang et al., 2018, https://arxiv.org/abs/1811.06965.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from ..core.arithmetic import wide_dtype
from ..core.paths import path_string
from .model import Transformer
from .pipeline import gpipe
from .sharding import constrained


def staged_value_and_grad(
    graphdef: nnx.GraphDef,
    micro_batches: int,
    head: Callable[[Transformer, jax.Array, jax.Array], jax.Array],
) -> Callable[[Any, Any], tuple[Any, Any]]:
    """The loss and the gradients of a batch, in the form of `micro_batch_value_and_grad` with `has_aux`.

    Under an `Auto` mesh with an axis `stage`, inside of `jax.jit`.

    Args:
      graphdef: of the model.
      micro_batches: a multiple of the stages; row r of a batch is in micro-batch r mod that number.
      head: from the model, its last states and the next tokens to their mean loss.

    Raises:
      ValueError: when called, for micro-batches of which stages cannot take equally many, and a model
        with dropout.
    """

    def loss(params: Any, batch: jax.Array) -> tuple[jax.Array, Any]:
        stages = jax.sharding.get_abstract_mesh().shape["stage"]
        if micro_batches % stages:
            raise ValueError(
                f"{stages} stages share the loss of the micro-batches, so these must be a multiple of "
                f"{stages}, got {micro_batches}."
            )
        cut = lambda path: PartitionSpec(
            "stage" if path_string(path).startswith("layers/") else None
        )
        specs = jax.tree_util.tree_map_with_path(lambda path, _: cut(path), params)
        wide = jax.tree.map(lambda x: x.astype(wide_dtype(x.dtype)), params)
        micro = jnp.moveaxis(batch.reshape(-1, micro_batches, batch.shape[-1]), 1, 0)
        run = jax.shard_map(
            lambda params, micro: _of_stage(graphdef, head, params, micro, stages),
            in_specs=(specs, PartitionSpec()),
            out_specs=PartitionSpec(),
            axis_names={"stage"},
            check_vma=False,
        )
        return run(wide, constrained(micro, None, "rows")), (None, {})

    return jax.value_and_grad(loss, has_aux=True)


def _of_stage(
    graphdef: nnx.GraphDef, head: Any, params: Any, micro: jax.Array, stages: int
) -> jax.Array:
    here, count = jax.lax.axis_index("stage"), micro.shape[0]
    config = nnx.merge(graphdef, params).config
    if config.dropout:
        raise ValueError("a staged step has no dropout; leave out dropout, or the stages.")

    def embedded(at: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params).embedded(micro[at, :, :-1])

    def through(x: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params).through_layers(x)[0]

    def add(total: jax.Array, at: jax.Array) -> tuple[jax.Array, None]:
        model = nnx.merge(graphdef, params)
        targets = micro[here * (count // stages) + at, :, 1:]
        return total + head(model, model.final_norm(mine[at]), targets), None

    _, rows, length = micro.shape
    nothing = jnp.zeros((rows, length - 1, config.width), config.dtype)
    nothing = constrained(nothing, "rows", "context", None)
    mine = _shared(gpipe(embedded, through, nothing, count, stages), here, stages)
    start = jnp.zeros([], jnp.float32)
    total, _ = jax.lax.scan(jax.checkpoint(add), start, jnp.arange(count // stages))
    return jax.lax.psum(total, "stage") / count


def _shared(out: jax.Array, here: jax.Array, stages: int) -> jax.Array:
    """To every stage its part of what the last one has."""
    # Not by psum_scatter: for it, XLA gathers what the other axes of the mesh have cut.
    *others, mine = jnp.split(out, stages)
    for stage, part in enumerate(others):
        received = jax.lax.ppermute(part, "stage", [(stages - 1, stage)])
        mine = jnp.where(here == stage, received, mine)
    return mine

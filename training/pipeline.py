r"""Pipeline parallelism, small: layers split into stages, micro-batches passed along.

With p stages and m micro-batches, a stage works m slots of a step and waits p - 1 (counted in forward
and backward passes together), whatever the order: the *bubble* is

.. math:: \frac{p - 1}{m + p - 1}.

GPipe runs all forward passes, then all backward ones, and keeps the inputs of m micro-batches. 1F1B
takes turns as soon as it can and keeps those of at most p. Depth costs latency, then, and not
throughput: with many micro-batches it parallelises as well as width does.

Source: Huang et al., 2018, https://arxiv.org/abs/1811.06965 (GPipe); Narayanan et al., 2021,
https://arxiv.org/abs/2104.04473 (1F1B and its memory).
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from ..core.checks import check_amount, check_name

Order = Literal["gpipe", "1f1b"]


class Slot(NamedTuple):
    """A pass of one micro-batch through one stage."""

    stage: int
    micro_batch: int
    backward: bool


def bubble(stages: int, micro_batches: int) -> float:
    """The share of a step that a stage waits, where a backward pass takes any multiple of a forward one.

    Raises:
      ValueError: for less than one of either.

    Example:
      >>> from ravine.training.pipeline import bubble
      >>> round(bubble(4, 12), 3), bubble(1, 8)
      (0.2, 0.0)
    """
    check_amount(1, stages=stages, micro_batches=micro_batches)
    return (stages - 1) / (micro_batches + stages - 1)


def timeline(stages: int, micro_batches: int, order: Order = "1f1b") -> list[list[Slot | None]]:
    """The pass of every stage at every tick, all passes of one length; None where it waits.

    Simulated: each stage runs its passes in the order of the schedule, each when what it needs is there.

    Args:
      stages: p.
      micro_batches: m.
      order: ``"gpipe"`` or ``"1f1b"``.

    Raises:
      ValueError: for less than one stage or micro-batch, or an unknown order.

    Example:
      >>> from ravine.training.pipeline import timeline
      >>> for ticks in timeline(2, 3, "1f1b"):
      ...     print("".join("." if s is None else "FB"[s.backward] + str(s.micro_batch) for s in ticks))
      F0F1.B0F2B1.B2
      .F0B0F1B1F2B2.
    """
    check_amount(1, stages=stages, micro_batches=micro_batches)
    check_name("order", order, ("gpipe", "1f1b"))
    queues = [_passes(stage, stages, micro_batches, order) for stage in range(stages)]
    done: dict[Slot, int] = {}
    rows: list[list[Slot | None]] = [[] for _ in queues]
    tick = 0
    while any(queues):
        ready = [queue[0] if queue and _may(queue[0], stages, done) else None for queue in queues]
        for stage, slot in enumerate(ready):
            rows[stage].append(slot)
            if slot is not None:
                done[slot] = tick
                queues[stage].pop(0)
        tick += 1
    return rows


def _passes(stage: int, stages: int, micro_batches: int, order: Order) -> list[Slot]:
    forward = [Slot(stage, i, False) for i in range(micro_batches)]
    backward = [Slot(stage, i, True) for i in range(micro_batches)]
    ahead = micro_batches if order == "gpipe" else min(micro_batches, stages - stage)
    turns = [
        slot
        for pair in zip(backward[: micro_batches - ahead], forward[ahead:], strict=True)
        for slot in pair
    ]
    return forward[:ahead] + turns + backward[micro_batches - ahead :]


def _may(slot: Slot, stages: int, done: dict[Slot, int]) -> bool:
    """Whether what the pass needs was done at an earlier tick; `done` has earlier ticks only."""
    if not slot.backward:
        return slot.stage == 0 or slot._replace(stage=slot.stage - 1) in done
    after = slot._replace(stage=slot.stage + 1)
    return after in done if slot.stage + 1 < stages else slot._replace(backward=False) in done


def held(ticks: list[Slot | None]) -> int:
    """The most micro-batches whose inputs a stage keeps at once.

    Example:
      >>> from ravine.training.pipeline import held, timeline
      >>> [[held(ticks) for ticks in timeline(4, 8, order)] for order in ("gpipe", "1f1b")]
      [[8, 8, 8, 8], [4, 3, 2, 1]]
    """
    now = most = 0
    for slot in ticks:
        if slot is not None:
            now += -1 if slot.backward else 1
            most = max(most, now)
    return most


def gpipe(
    first: Callable[[jax.Array], jax.Array],
    through: Callable[[jax.Array], jax.Array],
    nothing: jax.Array,
    micro_batches: int,
    stages: int,
    *,
    stage: str = "stage",
) -> jax.Array:
    """What a stage computes of each micro-batch, inside a `shard_map` over the stages.

    At each of m + p - 1 ticks a stage runs its layers on what its neighbour sent at the tick before.
    The gradient, by JAX, runs the ticks backwards.

    Args:
      first: from the index of a micro-batch to what the first stage's layers get.
      through: this stage's layers, from activations to activations of the same shape.
      nothing: zeros of this shape, which stages compute with until something arrives.
      micro_batches: m.
      stages: p.
      stage: the mesh axis of the stages.

    Returns:
      `[m, ...]`: on the last stage, the model's outputs; other stages' rows are p - 1 ticks too late.
    """
    here = jax.lax.axis_index(stage)

    def tick(received: jax.Array, at: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = first(jnp.minimum(at, micro_batches - 1))
        y = through(jnp.where(here == 0, x, received))
        return jax.lax.ppermute(y, stage, [(i, i + 1) for i in range(stages - 1)]), y

    _, out = jax.lax.scan(tick, nothing, jnp.arange(micro_batches + stages - 1))
    return out[stages - 1 :]


def pipelined(
    layer: Callable[[Any, jax.Array], jax.Array], mesh: Mesh, *, stage: str = "stage"
) -> Callable[[Any, jax.Array], jax.Array]:
    r"""Stacked layers as a pipeline over a mesh axis, GPipe: ``f(params, x)``, to be differentiated.

    Args:
      layer: from the parameters of one layer and activations to activations of the same shape.
      mesh: all of its axes but `stage` share the rows of micro-batches.
      stage: the mesh axis over which layers are split, in order.

    Returns:
      A function from parameters with a first axis of layers and micro-batches `[m, rows, ...]` to what
      the last layer gives of each.

    Raises:
      ValueError: when called with layers that the stages do not divide.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from ravine.training.pipeline import pipelined
      >>> mesh = jax.make_mesh((2, 4), ("stage", "data"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
      >>> run = pipelined(lambda w, x: x + w, mesh)
      >>> run(jnp.arange(4.0), jnp.zeros((3, 4, 1)))[:, 0, 0].tolist()  # 0 + 1 + 2 + 3
      [6.0, 6.0, 6.0]
    """
    stages = mesh.shape[stage]
    rows = tuple(name for name in mesh.axis_names if name != stage)

    def own(params: Any, micro: jax.Array) -> jax.Array:
        through = lambda x: jax.lax.scan(lambda x, w: (layer(w, x), None), x, params)[0]
        nothing = jnp.zeros_like(micro[0])
        out = gpipe(lambda i: micro[i], through, nothing, len(micro), stages, stage=stage)
        is_last = jax.lax.axis_index(stage) == stages - 1
        return jax.lax.psum(jnp.where(is_last, out, 0), stage)

    def run(params: Any, micro: jax.Array) -> jax.Array:
        for leaf in jax.tree.leaves(params):
            if leaf.shape[0] % stages:
                raise ValueError(
                    f"{stages} stages do not divide {leaf.shape[0]} layers; take a divisor of them."
                )
        spec = PartitionSpec(None, rows or None)
        sharded = jax.shard_map(
            own, mesh=mesh, in_specs=(PartitionSpec(stage), spec), out_specs=spec, check_vma=False
        )
        return sharded(params, micro)

    return run

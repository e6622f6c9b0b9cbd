"""The trainer's model in pipeline stages: the same step as without, its operations and exchanges."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
import pytest
import ravine
from jax.sharding import AxisType
from ravine.training.model_config import ModelConfig
from ravine.training.placed import place
from ravine.training.plan.flops import arithmetic
from ravine.training.sharding import batch_sharding
from ravine.training.step import init_state, make_train_step

from .run_rounding import rounding_of
from .tolerances import furthest

MODEL = ModelConfig(
    vocabulary=64, context=8, width=16, layers=4, heads=2, feed_forward=32, remat=True
)
MICRO, ROWS = 4, 16
# A step so long that what is left of the parameters are the gradients.
STEEP = optax.sgd(2.0**20)


def mesh_of(sizes):
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)


def step_of(mesh, model=MODEL, tx=None, micro_batches=MICRO, **options):
    placed = place(model, tx or optax.sgd(1.0), mesh)
    options = {"staged": True, "attention_logits": False} | options
    step = make_train_step(placed.graphdef, placed.tx, micro_batches, **options)
    return placed, jax.jit(step, out_shardings=(placed.shardings, None))


def traced(mesh, **options):
    placed, step = step_of(mesh, **options)
    state = jax.eval_shape(placed.init, 0)
    return step.trace(state, jax.ShapeDtypeStruct((ROWS, MODEL.context + 1), jnp.int32))


def stepped(mesh, start, **options):
    """Parameters after a step, and its metrics."""
    with jax.set_mesh(mesh):
        placed, step = step_of(mesh, **options)
        tokens = jax.random.randint(jax.random.key(1), (ROWS, MODEL.context + 1), 0, 64)
        state = jax.device_put(init_state(start, placed.tx), placed.shardings)
        state, metrics = step(state, jax.device_put(tokens, batch_sharding(mesh, ROWS)))
        return jax.device_get(state.params), jax.device_get(metrics)


# The planner counts this step, and no run uses it. Each case compiles for four seconds, because its sums
# in loops must not come from the cache.
@pytest.mark.slow
@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"stage": 2, "fsdp": 2, "tensor": 2}, {}),
        ({"stage": 4, "context": 2}, {"fused": True}),
        (
            {"data": 2, "stage": 2, "fsdp": 2},
            {"fused": True, "model": dataclasses.replace(MODEL, tied=True)},
        ),
    ],
)
def test_a_staged_step_is_that_without_stages(sizes, options):
    one = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    model = options.get("model", MODEL)
    start = jax.tree.map(jnp.asarray, jax.device_get(place(model, STEEP, one).init(0).params))

    def found(mesh, start, **options):
        after, said = stepped(mesh, start, tx=STEEP, **options)
        return after, said["loss"], said["gradient_norm"]

    have = found(mesh_of(sizes), start, **options)
    alone = functools.partial(found, one, model=model, staged=False)
    assert furthest(have, alone(start)) <= rounding_of(alone, start)


def test_stages_calculate_in_the_bubble_and_share_the_head():
    mesh = mesh_of({"stage": 2, "fsdp": 4})
    with jax.set_mesh(mesh):
        found = arithmetic(traced(mesh), 8)
    tokens = ROWS * MODEL.context
    # Four attention matrices, three of the feed-forward part, and the scores: forward, recomputed, and
    # backward, which costs twice as much. The layer's output, from its last matrix, is not recomputed.
    layer = 2 * (4 * 16 * 16 + 3 * 16 * 32) + 4 * 8 * 16
    layer, head = 4 * layer - 2 * 16 * 32, 4 * 2 * 16 * 64
    ticks = MICRO + 2 - 1
    products = sum(product.operations * n for product, n in found.products.items())
    assert products == tokens * (4 * layer * ticks / MICRO + head) / 8


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"micro_batches": 2}, "these must be a multiple of 4, got 2"),
        ({"model": dataclasses.replace(MODEL, dropout=0.1)}, "a staged step has no dropout"),
        ({"attention_logits": True}, "a staged step measures nothing; leave out attention_logits"),
        ({"tx": ravine.sophia_g(1e-3)}, "passes through all layers at once"),
    ],
    ids=["micro-batches", "dropout", "attention", "sophia"],
)
def test_what_stages_cannot_do_is_refused(options, complaint):
    mesh = mesh_of({"stage": 4, "data": 2})
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=complaint):
        traced(mesh, **options)

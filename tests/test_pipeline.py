"""Pipelines: the bubble by formula and by simulation, and a pipeline that runs and learns."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from ravine.training.pipeline import bubble, held, pipelined, timeline

from .tolerances import HALF, furthest

SHAPES = [(1, 1), (1, 5), (2, 1), (2, 6), (4, 4), (4, 12), (8, 3)]


@pytest.mark.parametrize("order", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("stages", "micro"), SHAPES)
def test_the_simulated_bubble_is_the_formula(stages, micro, order):
    rows = timeline(stages, micro, order)
    for stage, ticks in enumerate(rows):
        assert ticks.count(None) / len(ticks) == pytest.approx(bubble(stages, micro))
        assert held(ticks) == (micro if order == "gpipe" else min(micro, stages - stage))
    assert len({slot for ticks in rows for slot in ticks if slot}) == 2 * stages * micro


@pytest.mark.parametrize("order", ["gpipe", "1f1b"])
def test_no_pass_runs_before_what_it_needs(order):
    at = {
        slot: tick
        for ticks in timeline(3, 5, order)
        for tick, slot in enumerate(ticks)
        if slot is not None
    }
    for slot, tick in at.items():
        if slot.backward:
            assert at[slot._replace(backward=False)] < tick
            later = slot._replace(stage=slot.stage + 1)
            assert at.get(later, -1) < tick
        elif slot.stage:
            assert at[slot._replace(stage=slot.stage - 1)] < tick


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("shape", [(2, 4), (4, 2), (8, 1)])
def test_a_pipeline_computes_and_learns_as_the_layers_one_after_the_other(shape, getkey):
    mesh = jax.make_mesh(shape, ("stage", "data"), axis_types=(AxisType.Auto,) * 2)
    layer = lambda w, x: x + jnp.tanh(x @ w)
    params = 0.3 * jax.random.normal(getkey(), (8, 4, 4))
    micro = jax.random.normal(getkey(), (3, 4, 4))
    plain = lambda w, x: jax.lax.scan(lambda x, w: (layer(w, x), None), x, w)[0]
    loss = lambda f: lambda w: jnp.mean(jnp.square(f(w, micro)))
    want, have = (
        jax.jit(jax.value_and_grad(loss(f)))(params) for f in (plain, pipelined(layer, mesh))
    )
    assert have[1].dtype == jnp.float64
    assert furthest(have, want) <= HALF


def test_bad_input():
    mesh = jax.make_mesh((2, 4), ("stage", "data"), axis_types=(AxisType.Auto,) * 2)
    with pytest.raises(ValueError, match="2 stages do not divide 3 layers"):
        pipelined(lambda w, x: x, mesh)(jnp.zeros(3), jnp.zeros((1, 4)))
    with pytest.raises(ValueError, match="stages must be a whole number of at least 1"):
        bubble(0, 1)
    with pytest.raises(ValueError, match="unknown order '1f2b'; did you mean 1f1b"):
        timeline(2, 2, "1f2b")

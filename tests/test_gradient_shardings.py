"""Shardings from step to step: gradients are moved to the parameters, and nothing else changes."""

import jax
import jax.numpy as jnp
import pytest
import ravine
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from .arrays import normal_leaves
from .optimizers_table import FAMILIES, TABLE
from .tolerances import HALF, double, furthest

SHAPES = {"w": (4, 8), "stack": (2, 4, 8)}
OF_PARAMETERS = {"w": P("x", "y"), "stack": P(None, "x", "y")}
OF_GRADIENTS = {"w": P("y", None), "stack": P("x", None, None)}
ROWS = [
    pytest.param(row, id=row.label, marks=[pytest.mark.slow] * (row not in FAMILIES))
    for row in TABLE
]


def tree(seed):
    return double(normal_leaves(SHAPES, seed))


def two_steps(tx, params, grads):
    """Parameters and state after a scan of two steps, and the initial state."""
    first = jax.jit(tx.init)(params)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (jax.tree.map(jnp.add, params, updates), state), None

    after, _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=2))((params, first))
    return *after, first


@pytest.mark.parametrize("row", ROWS)
def test_the_state_stays_where_it_is(row):
    with jax.enable_x64(True):
        expected, _, _ = two_steps(row.build(), tree(0), tree(1))
        mesh = jax.make_mesh((2, 2), ("x", "y"), devices=jax.devices()[:4])
        placed = lambda tree, specs: jax.device_put(
            tree, {k: NamedSharding(mesh, s) for k, s in specs.items()}
        )
        with jax.set_mesh(mesh):
            params, state, first = two_steps(
                row.build(), placed(tree(0), OF_PARAMETERS), placed(tree(1), OF_GRADIENTS)
            )
        assert furthest(params, expected) <= HALF
    for name, x in params.items():
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, OF_PARAMETERS[name]), x.ndim)
    for after, before in zip(jax.tree.leaves(state), jax.tree.leaves(first), strict=True):
        assert after.sharding.is_equivalent_to(before.sharding, after.ndim)


@pytest.mark.parametrize("row", ROWS)
def test_in_a_shard_map_with_the_same_parameters_on_every_device(row):
    with jax.enable_x64(True):
        expected, _, _ = two_steps(row.build(), tree(0), tree(1))
        mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])
        # Weights of four parts that are the gradient on average.
        shares = jnp.array([0.5, 1.0, 1.5, 1.0])

        def steps(params, grads, share):
            mean = jax.tree.map(lambda g: jax.lax.pmean(share[0] * g, "data"), grads)
            return two_steps(row.build(), params, mean)[0]

        inside = jax.shard_map(steps, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P())
        params = jax.jit(inside)(tree(0), tree(1), shares)
        assert furthest(params, expected) <= HALF


def test_moments_tell_where_gradients_go_without_parameters():
    mesh = jax.make_mesh((2, 2), ("x", "y"), devices=jax.devices()[:4])
    tx = ravine.scale_by_adam()
    with jax.set_mesh(mesh):
        w = jax.device_put(jnp.ones((4, 8)), P("x", "y"))
        state = jax.jit(tx.init)({"w": w})
        update, _ = jax.jit(tx.update)({"w": jax.reshard(w, P("y", None))}, state)
    assert update["w"].sharding.spec == P("x", "y")


@pytest.mark.parametrize("count", [1, 4])
def test_on_mesh_is_traced_once_if_parameters_are_on_the_mesh(count):
    """Otherwise JAX traces twice: the types of results have a mesh, those of the arguments had none."""
    devices = jax.devices()[:count]
    mesh = jax.make_mesh((count,), ("x",), devices=devices, axis_types=(AxisType.Auto,))
    params = jax.device_put({"w": jnp.ones((4, 8))}, NamedSharding(mesh, P("x")))
    tx, traces = ravine.on_mesh(ravine.scale_by_adam(), params), []

    @jax.jit
    def step(params, state):
        traces.append(None)
        updates, state = tx.update(params, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(params)
        for _ in range(3):
            params, state = step(params, state)
    assert len(traces) == 1

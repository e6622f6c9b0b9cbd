"""`jax.vmap` over seeds that a mesh axis distributes over devices: they exchange nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ravine
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from ravine.training.plan.collectives import collectives

from .optimizers_table import TABLE
from .tolerances import HALF, double, furthest, without_residuals

SHORT = (
    "adamw-Explicit",
    "muon-rules-Explicit",
    "muon-rules-Auto",
    "kl_shampoo-rules-refresh-Explicit",
)


def gated():
    return ravine.stability.finite_gate(ravine.scale_by_adam())


CASES = [
    pytest.param(build, kind, id=name, marks=[pytest.mark.slow] * (name not in SHORT))
    for label, build in ({row.label: row.build for row in TABLE} | {"gate": gated}).items()
    for kind in (AxisType.Explicit, AxisType.Auto)
    for name in (f"{label}-{kind.name}",)
]

assert {case.id for case in CASES} >= set(SHORT)


def seeds(seed):
    rng = np.random.default_rng(seed)
    return double({"kernel": jnp.asarray(rng.normal(size=(2, 4, 8)))})


def after_two_steps(tx, params, grads, **options):
    """Updates and state after two steps, and the collectives of an update."""
    state = jax.jit(jax.vmap(tx.init, **options))(params)
    update = jax.jit(jax.vmap(lambda g, s, p: tx.update(g, s, p), **options))
    _, state = update(grads, state, params)
    compiled = update.lower(grads, state, params).compile()
    return compiled(grads, state, params), collectives(compiled.as_text())


@pytest.mark.parametrize(("build", "kind"), CASES)
def test_seeds_on_a_mesh(build, kind):
    mesh = jax.make_mesh((2, 2), ("seed", "x"), axis_types=(kind, kind))
    is_auto = kind == AxisType.Auto
    tx = ravine.on_mesh(build(), {"kernel": P("x")}) if is_auto else build()
    with jax.enable_x64(True):
        expected, _ = after_two_steps(build(), seeds(0), seeds(1))
        with jax.set_mesh(mesh):
            sharding = NamedSharding(mesh, P("seed", "x"))
            placed = [jax.device_put(seeds(seed), sharding) for seed in (0, 1)]
            options = {"spmd_axis_name": "seed"} if is_auto else {}
            found, exchanged = after_two_steps(tx, *placed, **options)
        assert furthest(*map(without_residuals, (found, expected))) <= HALF
    assert all(
        x.sharding.spec[0] == "seed" for x in jax.tree.leaves(found) if x.ndim > 1 or not is_auto
    )
    # Devices 0 and 1 hold the first seed.
    assert all(set(c.group) <= {0, 1} for c in exchanged)


def test_a_guarded_step_of_seeds_on_a_mesh():
    tx = gated()

    @jax.jit
    @jax.vmap
    def step(params, grads):
        return ravine.stability.guarded_step(tx, grads, tx.init(params), params)

    mesh = jax.make_mesh((2, 2), ("seed", "x"))
    with jax.enable_x64(True):
        params, grads = seeds(0), seeds(1)
        grads["kernel"] = grads["kernel"].at[1, 2, 3].set(jnp.nan)
        expected = step(params, grads)
        with jax.set_mesh(mesh):
            sharding = NamedSharding(mesh, P("seed", "x"))
            found = step(*(jax.device_put(x, sharding) for x in (params, grads)))
        assert furthest(found, expected) <= HALF
    assert found.params["kernel"].sharding.spec[:2] == ("seed", "x")
    np.testing.assert_array_equal(np.asarray(found.params["kernel"])[1], params["kernel"][1])
    np.testing.assert_array_equal(found.state.skipped, [0, 1])

"""Hyperparameters in the state, on meshes of both kinds of axes."""

import functools

import jax
import pytest
import ravine
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from ravine.optimizers.roles import IN_OUT

from .arrays import normal_leaves, single
from .tolerances import HALF, double, furthest

AXES = {
    "explicit": (AxisType.Explicit, AxisType.Explicit),
    "auto": (AxisType.Auto, AxisType.Auto),
    "of two kinds": (AxisType.Explicit, AxisType.Auto),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [*(("shampoo", kind) for kind in AXES), ("soap", "explicit"), ("kl_shampoo", "of two kinds")],
)
def test_injected_hyperparameters_on_a_mesh(name, kind):
    """Hyperparameters in the state are arrays of the mesh, and as good as numbers."""
    build = functools.partial(getattr(ravine, name), rules=[("", "matrix", IN_OUT)])
    specs = {"a": P("x", "y"), "b": P("y")}
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=AXES[kind])
    shapes = {"a": (16, 8), "b": (8, 8)}
    params, grads = (jax.tree.map(single, normal_leaves(shapes, seed)) for seed in (0, 1))
    found = []
    for tx in (build(1e-3), ravine.inject_hyperparams(build)(learning_rate=1e-3)):
        with jax.enable_x64(True), jax.set_mesh(mesh):
            tx = ravine.on_mesh(tx, specs)
            shardings = {k: NamedSharding(mesh, spec) for k, spec in specs.items()}
            placed = jax.device_put(double((params, grads)), (shardings, shardings))
            state = jax.jit(tx.init)(placed[0])
            for _ in range(2):
                updates, state = jax.jit(tx.update)(placed[1], state, placed[0])
            found.append(jax.device_get(updates))
    assert furthest(*found) <= HALF

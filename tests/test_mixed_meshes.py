"""Meshes with `Explicit` and `Auto` axes: results as on one device, exchanges as for `Explicit`."""

from collections import Counter

import jax
import optax
import pytest
import ravine
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from ravine.training.plan.collectives import collectives

from .arrays import normal_leaves
from .optimizers_table import TABLE
from .tolerances import HALF, double, furthest, without_residuals

SHAPES = {"stack": (2, 4, 8)}
# The types on a mesh with `Explicit` x and `Auto` y, and the shardings that only `on_mesh` knows there.
SPECS = {
    "typed": {"stack": P(None, None, "x")},
    "told": {"stack": P(None, "y", "x")},
}
MATRICES = {row.label: row.build for row in TABLE if row.needs_matrices}
OTHERS = {
    "hyperball": lambda: optax.chain(
        ravine.scale_by_parameter_norm(), ravine.keep_parameter_norm()
    ),
    "shape": lambda: ravine.scale_by_matrix_shape("moonlight"),
    "gate": lambda: ravine.stability.finite_gate(ravine.scale_by_muon()),
}
SHORT = ("muon-rules-typed", "soap-rules-refresh-eps-b1-b2-typed", "hyperball-told", "gate-told")
CASES = [
    pytest.param(build, specs, id=name, marks=[pytest.mark.slow] * (name not in SHORT))
    for label, build in (MATRICES | OTHERS).items()
    for specs in SPECS
    for name in (f"{label}-{specs}",)
]

assert {case.id for case in CASES} >= set(SHORT)


def tree(seed):
    return double(normal_leaves(SHAPES, seed))


def after_two_steps(tx, params, grads):
    """Updates and state after two steps, and the collectives of an update."""
    state = jax.jit(tx.init)(params)
    update = jax.jit(tx.update).lower(grads, state, params).compile()
    kinds = Counter(c.kind for c in collectives(update.as_text()))
    _, state = update(grads, state, params)
    return update(grads, state, params), kinds


@pytest.mark.parametrize(("build", "specs"), CASES)
def test_results_of_one_device_and_exchanges_of_explicit_axes(build, specs):
    exchanged = {}
    with jax.enable_x64(True):
        expected, _ = after_two_steps(build(), tree(0), tree(1))
        for kind in (AxisType.Explicit, AxisType.Auto):
            mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit, kind))
            shardings = {k: NamedSharding(mesh, s) for k, s in SPECS[specs].items()}
            tx = ravine.on_mesh(build(), shardings) if specs == "told" else build()
            with jax.set_mesh(mesh):
                placed = [jax.device_put(tree(seed), shardings) for seed in (0, 1)]
                found, exchanged[kind] = after_two_steps(tx, *placed)
            assert furthest(*map(without_residuals, (found, expected))) <= HALF
    updates, _ = found
    assert all(x.sharding.is_equivalent_to(shardings[k], x.ndim) for k, x in updates.items())
    assert exchanged[AxisType.Auto] <= exchanged[AxisType.Explicit]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("placed", [True, False])
def test_on_mesh_with_a_mesh_needs_neither_jit_nor_set_mesh(kind, placed):
    """`nnx.Optimizer` calls `init` outside of `jax.jit`."""
    mesh = jax.make_mesh((2, 2), ("x", "y"), (kind,) * 2, devices=jax.devices()[:4])
    specs, tx = {"w": P("x", "y")}, ravine.shampoo(0.1, refresh=ravine.Refresh(every=1))
    alone = double(normal_leaves({"w": (4, 8)}, 0))
    params = jax.device_put(alone, NamedSharding(mesh, specs["w"])) if placed else alone
    with jax.enable_x64(True):
        told = ravine.on_mesh(tx, specs, mesh)
        updates, _ = told.update(params, told.init(params), params)
        assert furthest(updates, tx.update(alone, tx.init(alone), alone)[0]) <= HALF

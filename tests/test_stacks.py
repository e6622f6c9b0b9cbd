"""Small leaves that are alike are one in every update, and nobody sees it but the compiler."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ravine
from ravine.optimizers.matrix.shape.blocks import blockings_of
from ravine.optimizers.preconditioners.stacks import SMALL, STACKED, stacks_of
from ravine.optimizers.roles import IN_OUT

from .arrays import single
from .tolerances import HALF, double, furthest

NAMES = ["shampoo", "soap", "kl_shampoo"]
SHAPES = {
    "a": (12, 8),
    "b": (12, 8),
    "wide": (8, 12),
    "c": (12, 8),
    "layers": (3, 12, 8),
    "more layers": (3, 12, 8),
}


def optimizer(name, **options):
    blocks = ravine.Blocks(size=8)
    return getattr(ravine, f"scale_by_{name}")(
        axes=IN_OUT, refresh=ravine.Refresh(every=2), blocks=blocks, **options
    )


def gradients(shapes, step):
    """Gradients with rows and columns whose scales fall by a power law."""
    rng = np.random.default_rng([7, step])

    def one(shape):
        scales = [(1 + np.arange(n)) ** -0.7 for n in shape[-2:]]
        return single(rng.normal(size=shape) * scales[0][:, None] * scales[-1])

    return {name: one(shape) for name, shape in shapes.items()}


def trajectory(tx, steps):
    state, update, found = tx.init(steps[0]), jax.jit(tx.update), []
    for gradient in steps:
        updates, state = update(gradient, state)
        found.append(updates)
    return found, state


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", NAMES)
def test_each_leaf_moves_as_if_alone(name):
    steps = [double(gradients(SHAPES, step)) for step in range(6)]
    together, state = trajectory(optimizer(name), steps)
    assert jax.tree.structure(state) == jax.tree.structure(optimizer(name).init(steps[0]))
    for leaf in steps[0]:
        alone, _ = trajectory(optimizer(name), [{leaf: step[leaf]} for step in steps])
        assert furthest([x[leaf] for x in together], [x[leaf] for x in alone]) <= HALF


@pytest.mark.parametrize("name", NAMES)
def test_a_spike_stays_in_its_leaf(name):
    steps = [gradients(SHAPES, step) for step in range(5)]
    spiked = [dict(step) for step in steps]
    spiked[2]["b"] = spiked[2]["b"].at[3, 4].set(jnp.inf)
    expected, _ = trajectory(optimizer(name), steps)
    found, state = trajectory(optimizer(name), spiked)
    for leaf in steps[0]:
        assert (leaf == "b") == (furthest(found[-1][leaf], expected[-1][leaf]) > HALF)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((found, state)))


def test_a_graft_per_parameter_has_one_size_for_each_leaf():
    tx = optimizer("shampoo", graft=ravine.Grafting(per="parameter"))
    steps = [gradients(SHAPES, step) for step in range(4)]
    _, state = trajectory(tx, steps)
    ratios = {leaf: np.unique(x[0]) for leaf, x in state.graft_ratio.items()}
    assert {len(x) for x in ratios.values()} == {1}
    assert len(np.unique(np.concatenate(list(ratios.values())))) == len(ratios)


@pytest.mark.parametrize("name", NAMES)
def test_leaves_of_other_dtypes_keep_theirs(name):
    given = gradients({"a": (12, 8), "b": (12, 8), "c": (12, 8)}, 0)
    given["b"] = given["b"].astype(jnp.bfloat16)
    tx = optimizer(name)
    updates, state = jax.jit(tx.update)(given, tx.init(given))
    assert {k: x.dtype for k, x in updates.items()} == {k: x.dtype for k, x in given.items()}
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(state) == shapes(tx.init(given))


@pytest.mark.parametrize("name", NAMES)
def test_one_more_small_leaf_is_few_instructions(name):
    """What grows with the leaves is what takes each array of a leaf into a stack, and out of it."""

    def instructions(leaves):
        given = {str(at): jax.ShapeDtypeStruct((12, 8), jnp.float32) for at in range(leaves)}
        tx = optimizer(name)
        lowered = jax.jit(tx.update).lower(given, jax.eval_shape(tx.init, given))
        entry = str(lowered.compile().as_text()).partition("ENTRY")[2]
        return len(re.findall(r"^  (?:ROOT )?%(?!param)[\w.\-]+ = \S+ (?!parameter)", entry, re.M))

    more = (instructions(24) - instructions(16)) / 8
    assert more <= 24, more


def test_large_leaves_and_large_stacks_stay_apart():
    shapes = [(SMALL, 1)] * (STACKED // SMALL + 1) + [(SMALL + 1, 1)] * 2 + [(4, 4)] * 2
    leaves = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    cuts = blockings_of(leaves, IN_OUT, ravine.Blocks(size=8))
    found = [stack.members for stack in stacks_of(cuts, leaves, [leaf.dtype for leaf in leaves])]
    most = STACKED // SMALL
    assert sorted(map(tuple, found)) == [
        tuple(range(most)),
        (most,),
        (most + 1,),
        (most + 2,),
        (most + 3, most + 4),
    ]


@pytest.mark.parametrize("name", ["soap", "kl_shampoo"])
def test_the_state_of_large_leaves_is_not_copied(name):
    """Old bases and moments are overwritten: temporary memory is less than a copy of all arrays."""
    shapes = [(192, 384), (256, 192), (160, 256)]
    leaves = {str(shape): jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes}
    assert min(leaf.size for leaf in leaves.values()) > SMALL
    tx = getattr(ravine, f"scale_by_{name}")(axes=IN_OUT)
    update = jax.jit(tx.update, donate_argnums=1).lower(leaves, jax.eval_shape(tx.init, leaves))
    memory = update.compile().memory_analysis()
    assert memory.temp_size_in_bytes < memory.argument_size_in_bytes

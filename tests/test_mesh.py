"""Optimizers on meshes: the updates, state and shardings that they have there."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from ravine.optimizers.roles import IN_OUT

from .arrays import normal_leaves, single
from .preconditioned import EXPERTS, EXPERTS_ALONE, on_matrices
from .tolerances import HALF, double, furthest, without_residuals

RULES = ((".*", "matrix", IN_OUT),)
SHAPES = {"a": (8, 16), "b": (16, 8), "stack": (4, 8, 8), "odd": (6, 10), "tall": (24, 4)}
COMMON = {"rules": RULES, "refresh": ravine.Refresh(every=2)}
RARE = ravine.Refresh(every=2, statistics_every=2, need=0.05)
# float32 represents these decay rates exactly.
MOMENTS = {"b1": 0.9375, "b2": 0.9375, "eps": 1e-2}
SHAMPOO = {**COMMON, "b2": 0.96875}
OPTIMIZERS = {
    "shampoo": lambda: ravine.shampoo(0.1, blocks=ravine.Blocks(size=4), **SHAMPOO),
    "per-parameter": lambda: ravine.shampoo(
        0.1, blocks=ravine.Blocks(size=4), graft=ravine.Grafting(per="parameter"), **SHAMPOO
    ),
    "staggered": lambda: ravine.shampoo(
        0.1,
        blocks=ravine.Blocks(size=4),
        **{**SHAMPOO, "refresh": ravine.Refresh(every=2, staggered=True)},
    ),
    "one-sided": lambda: ravine.shampoo(
        0.1, blocks=ravine.Blocks(size=4, bound=8), **{**SHAMPOO, "refresh": RARE}
    ),
    "unblocked": lambda: ravine.shampoo(0.1, **SHAMPOO),
    "kl": lambda: ravine.shampoo(
        0.1,
        blocks=ravine.Blocks(size=4, bound=8),
        factors=ravine.Factors(statistics="kl"),
        **SHAMPOO,
    ),
    "soap": lambda: ravine.soap(0.1, blocks=ravine.Blocks(size=4), **MOMENTS, **COMMON),
    "soap-one-sided": lambda: ravine.soap(
        0.1, blocks=ravine.Blocks(size=4, bound=8), **MOMENTS, **{**COMMON, "refresh": RARE}
    ),
    "kl_shampoo": lambda: ravine.kl_shampoo(
        0.1, blocks=ravine.Blocks(size=4), **{**COMMON, "refresh": RARE}
    ),
    "muon": lambda: ravine.muon(0.1, rules=RULES),
    "normuon": lambda: ravine.normuon(0.1, rules=RULES),
    "hyperball": lambda: optax.chain(
        ravine.scale_by_muon(),
        ravine.scale_by_parameter_norm(),
        ravine.scale_by_learning_rate(0.01),
        ravine.keep_parameter_norm(),
    ),
    "split-adamw": lambda: ravine.split_state(ravine.adamw(0.1)),
    "options": lambda: ravine.shampoo(
        0.1,
        blocks=ravine.Blocks(size=4, bound=8),
        factors=ravine.Factors(statistics="kl"),
        graft=ravine.Grafting(per="parameter"),
        **{**SHAMPOO, "refresh": ravine.Refresh(every=2, staggered=True)},
    ),
}
MESHES = {
    "fsdp": ({"x": 8}, {"a": P("x"), "b": P("x"), "stack": P(None, "x"), "tall": P("x")}),
    "mixed": (
        {"x": 4, "y": 2},
        {"a": P("x", "y"), "b": P("y"), "stack": P(None, "x", "y"), "odd": P(None, "y")},
    ),
    "data": ({"data": 2, "x": 2, "y": 2}, {"a": P(("x", "y")), "b": P("y", "x"), "stack": P("x")}),
}


def tree(seed):
    return jax.tree.map(single, normal_leaves(SHAPES, seed))


def train(tx, params, target):
    """Parameters and state after ten steps, the initial state, and the step function."""
    first = state = jax.jit(tx.init)(params)

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(lambda p, t: p - t, params, target)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(10):
        params, state = step(params, state)
    return params, state, first, step


@functools.cache
def train_on_one_device(name):
    return train(OPTIMIZERS[name](), *double((tree(0), tree(1))))[0]


# Every path through the driver runs on one layout. One optimizer of each kind runs on the others and on
# Auto axes, which give the same program inside. The rest are slow tests.
WAYS = (
    "shampoo",
    "unblocked",
    "soap",
    "kl_shampoo",
    "muon",
    "normuon",
    "hyperball",
    "split-adamw",
    "options",
)
KINDS = ("shampoo", "muon")
SOME = ("shampoo", "soap", "muon", "split-adamw")
# Statistics of every second gradient, for matrices whose summed axis is sharded.
SUMS_IN_LOOPS = ("one-sided", "soap-one-sided")
assert set(OPTIMIZERS) >= {*WAYS, *KINDS, *SOME, *SUMS_IN_LOOPS}


def cases(names, layout, kind, short):
    for name in names:
        yield pytest.param(name, layout, kind, marks=[pytest.mark.slow] * (name not in short))


CASES = [
    *cases(OPTIMIZERS, "mixed", AxisType.Explicit, WAYS),
    *cases(OPTIMIZERS, "data", AxisType.Explicit, KINDS),
    *cases(SOME, "fsdp", AxisType.Explicit, ["muon"]),
    *cases(SOME, "mixed", AxisType.Auto, KINDS),
]


@pytest.mark.parametrize(("name", "layout", "kind"), CASES)
def test_ten_steps_equal_those_of_one_device(name, layout, kind, request):
    if name in SUMS_IN_LOOPS:
        request.getfixturevalue("uncached")
    build = OPTIMIZERS[name]
    sizes, specs = MESHES[layout]
    specs = {k: specs.get(k, P()) for k in SHAPES}
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))
    shardings = {k: NamedSharding(mesh, s) for k, s in specs.items()}
    tx = ravine.on_mesh(build(), specs) if kind == AxisType.Auto else build()
    with jax.enable_x64(True), jax.set_mesh(mesh):
        placed = [jax.device_put(double(tree(seed)), shardings) for seed in (0, 1)]
        params, state, first, step = train(tx, *placed)
    with jax.enable_x64(True):
        assert furthest(params, train_on_one_device(name)) <= HALF
    same = lambda a, b: a.is_equivalent_to(b, len(a.spec))
    assert all(same(x.sharding, shardings[k]) for k, x in params.items())
    for after, before in zip(jax.tree.leaves(state), jax.tree.leaves(first), strict=True):
        assert after.sharding.is_equivalent_to(before.sharding, after.ndim)
    # One program for arguments from `device_put`, one for its own outputs.
    assert step._cache_size() <= 2


ROWS_ALONE = {"blocks": ravine.Blocks(bound=8), "refresh": ravine.Refresh(every=1)}


def first_step(tx, gradient):
    """The first update and state when the columns of the gradient are split in two."""
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        cut = jax.device_put(jnp.array(gradient), NamedSharding(mesh, P(None, "x")))
        return jax.jit(tx.update)(cut, jax.jit(tx.init)(cut))


@pytest.mark.usefixtures("float64")
def test_sums_over_columns_that_shards_cut():
    """With a factor or basis for the short side only, the long side stays sharded."""
    gradient = np.random.default_rng(0).normal(size=(4, 16))
    roots = ravine.Roots(ridge=0.0)
    update, _ = first_step(ravine.scale_by_shampoo(eps=0.0, roots=roots, **ROWS_ALONE), gradient)
    # The polar factor, scaled to the size of Adam's first step, which consists of ones.
    left, _, right = np.linalg.svd(gradient, full_matrices=False)
    assert furthest(update, left @ right * np.sqrt(4 * 16 / 4)) <= HALF
    _, state = first_step(ravine.scale_by_soap(b2=0.75, **ROWS_ALONE), gradient)
    ((rows, columns),) = state.bases
    assert columns is None
    assert furthest(jnp.squeeze(rows.statistics), 0.25 * gradient @ gradient.T) <= HALF


@pytest.mark.parametrize("name", ["shampoo", "muon"])
def test_sharded_experts_have_the_updates_and_the_state_of_one_device(name):
    tx = on_matrices(name)
    specs = {**EXPERTS_ALONE, "layers-experts": P(None, "x", "y")}
    rng = np.random.default_rng(0)
    made = {k: jnp.array(np.float32(rng.normal(size=shape))) for k, shape in EXPERTS.items()}

    def twice(grads):
        state = tx.init(grads)
        for _ in range(2):
            updates, state = tx.update(grads, state)
        return updates, state

    mesh = jax.make_mesh((4, 2), ("x", "y"))
    with jax.enable_x64(True):
        grads = double(made)
        expected = jax.jit(twice)(grads)
        with jax.set_mesh(mesh):
            placed = {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in grads.items()}
            found = jax.jit(twice)(placed)
    assert furthest(without_residuals(found), without_residuals(expected)) <= HALF


def test_state_is_split_over_mesh_axes_that_parameters_do_not_use():
    mesh = jax.make_mesh((4, 2), ("data", "x"))
    params = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    shampoo = ravine.state_shardings(ravine.scale_by_shampoo(blocks=ravine.Blocks(size=4)), params)
    assert shampoo.factors[0][0].statistics.spec == P(None, "x", "data", None, None)
    assert shampoo.mu[0].spec == P(None, "x", "data", None, None)
    adam = ravine.state_shardings(ravine.split_state(ravine.scale_by_adam()), params)
    assert adam.mu.spec == P("x", "data")


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=["explicit", "auto"])
def test_curvature_reaches_sophia(kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    tx = ravine.scale_by_sophia(0.0, 0.0, 1.0, every=1)
    curvature = lambda params, key: 2 * jnp.ones_like(params)
    with jax.set_mesh(mesh):
        params = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, P()))
        split = ravine.on_mesh(ravine.split_state(tx), P())
        update = jax.jit(lambda g, s, p: split.update(g, s, p, curvature=curvature))
        found, _ = update(params, jax.jit(split.init)(params), params)
    np.testing.assert_array_equal(found, jnp.full((8, 4), 0.5))


def test_state_shardings_of_other_transformations():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    params = {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(mesh, P("x")))}
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.masked(optax.adam(1e-3), {"w": True}), optax.ema(0.9)
    )
    found = ravine.state_shardings(tx, params)
    assert jax.tree.structure(found) == jax.tree.structure(jax.eval_shape(tx.init, params))
    specs = {s.spec for s in jax.tree.leaves(found)}
    assert specs == {P(), P("x", None)}
    assert all(s.mesh == mesh for s in jax.tree.leaves(found))


def test_init_and_pjit_take_state_shardings():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    params = jax.device_put(tree(0)["a"], NamedSharding(mesh, P("x")))
    tx = ravine.on_mesh(
        ravine.scale_by_shampoo(blocks=ravine.Blocks(size=4), refresh=ravine.Refresh(every=2)),
        P("x"),
        mesh,
    )
    shardings = ravine.state_shardings(tx, params)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    update = jax.jit(
        tx.update,
        in_shardings=(params.sharding, shardings),
        out_shardings=(params.sharding, shardings),
    )
    updates, state = update(params, state)
    assert updates.sharding == params.sharding
    assert jax.tree.map(lambda x: x.sharding, state) == shardings


@pytest.mark.usefixtures("float64")
def test_the_old_spelling_of_jit_works_while_jax_has_it():
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            from jax.experimental.pjit import pjit
    except ImportError:
        pytest.skip("this JAX has no pjit any more")
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    params = jax.device_put(double(tree(0))["a"], NamedSharding(mesh, P("x")))
    tx = ravine.on_mesh(
        ravine.scale_by_shampoo(blocks=ravine.Blocks(size=4), refresh=ravine.Refresh(every=2)),
        P("x"),
        mesh,
    )
    state = jax.jit(tx.init, out_shardings=ravine.state_shardings(tx, params))(params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found, _ = pjit(tx.update)(params, state)
    assert furthest(found, jax.jit(tx.update)(params, state)[0]) <= HALF


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ({"w": P("y")}, r"'w' of shape \(6, 4\): the mesh has no axis 'y', only 'x'"),
        ({"w": P("x")}, r"'w' of shape \(6, 4\): axis 0 of 6 does not divide by the 4 devices"),
        ({"w": P(None, None, "x")}, r"'w' of shape \(6, 4\) has fewer axes"),
    ],
)
def test_bad_specifications(specs, message):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    tx = ravine.on_mesh(ravine.scale_by_adam(), specs, mesh)
    with pytest.raises(ValueError, match=message):
        tx.init({"w": jnp.ones((6, 4))})


def test_missing_mesh_and_missing_shardings():
    with pytest.raises(ValueError, match="there is no mesh"):
        ravine.on_mesh(ravine.scale_by_adam(), P()).init(jnp.ones(2))
    with pytest.raises(ValueError, match="'w' has no NamedSharding"):
        ravine.state_shardings(ravine.scale_by_adam(), {"w": jnp.ones(2)})
    with pytest.raises(ValueError, match="no leaf"):
        ravine.state_shardings(ravine.scale_by_adam(), {})

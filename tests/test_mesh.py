"""Optimizers on meshes: blocks, whole matrices, sums over shards, and the communication they need."""

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
from ravine.optimizers.matrix.algebra.polar import NewtonSchulz
from ravine.optimizers.matrix.mesh.exchange import per_shard
from ravine.optimizers.matrix.shape.blocking import blockings_of
from ravine.optimizers.matrix.shape.layout import MatrixAxes
from ravine.optimizers.preconditioners.blockwise import Tensors
from ravine.optimizers.roles import IN_OUT
from ravine.training.plan.collectives import collectives

from .arrays import normal_leaves, single
from .newton_schulz import of_bfloat16, relative_norm
from .tolerances import HALF, double, furthest, without_residuals

RULES = ((".*", "matrix", IN_OUT),)
SHAPES = {"a": (8, 16), "b": (16, 8), "stack": (4, 8, 8), "odd": (6, 10), "tall": (24, 4)}
SQUARES = {"square": (8, 8), "turned": (8, 8)}
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


def exchanges(tx, specs, sizes, shapes=SHAPES | SQUARES):
    """The collectives in the compiled update."""
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes))
    with jax.set_mesh(mesh):
        params = {
            k: jax.ShapeDtypeStruct(shapes[k], jnp.float32, sharding=NamedSharding(mesh, s))
            for k, s in specs.items()
        }
        state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            jax.eval_shape(tx.init, params),
            ravine.state_shardings(tx, params),
        )
        text = jax.jit(tx.update).lower(params, state).compile().as_text()
    return collectives(text)


def communicated(*arguments):
    """Names of the collectives in the compiled update, and of those inside loops."""
    found = exchanges(*arguments)
    return [c.kind for c in found], [c.kind for c in found if c.in_loop]


ALIGNED = {"a": P("x", "y"), "b": P("y", "x"), "stack": P(None, "x", "y")}


@pytest.mark.parametrize(
    "tx",
    [
        ravine.scale_by_shampoo(blocks=ravine.Blocks(size=4), refresh=ravine.Refresh(every=2)),
        ravine.scale_by_shampoo(
            blocks=ravine.Blocks(size=4), refresh=ravine.Refresh(every=2, staggered=True)
        ),
        ravine.scale_by_soap(blocks=ravine.Blocks(size=4), refresh=ravine.Refresh(every=2)),
        ravine.scale_by_kl_shampoo(blocks=ravine.Blocks(size=4), refresh=ravine.Refresh(every=2)),
    ],
    ids=["shampoo", "staggered", "soap", "kl_shampoo"],
)
def test_aligned_blocks_need_no_communication(tx):
    assert communicated(tx, ALIGNED, {"x": 2, "y": 2}) == ([], [])


EXPERTS = {"layers-experts": (2, 8, 4, 8), "experts-layers": (8, 3, 4, 8), "stages": (2, 4, 8, 4)}
EXPERTS_ALONE = {
    "layers-experts": P(None, ("x", "y")),
    "experts-layers": P(("x", "y")),
    "stages": P("y", "x"),
}


def on_matrices(name):
    makers = {
        "shampoo": ravine.scale_by_shampoo,
        "soap": ravine.scale_by_soap,
        "kl_shampoo": ravine.scale_by_kl_shampoo,
    }
    if name == "muon":
        return ravine.scale_by_muon(scale="moonlight")
    return makers[name](refresh=ravine.Refresh(every=2), axes=lambda path: IN_OUT)


@pytest.mark.parametrize("name", ["shampoo", "soap", "kl_shampoo", "muon"])
def test_sharded_experts_need_no_communication(name):
    """This holds wherever the expert axis is among the batch axes, and if two of these are sharded."""
    found = communicated(on_matrices(name), EXPERTS_ALONE, {"x": 4, "y": 2}, EXPERTS)
    assert found == ([], [])


def test_muon_exchanges_for_experts_what_rows_and_columns_ask():
    specs = {"layers-experts": P(None, "x", "y"), "experts-layers": P("x", None, None, "y")}
    found, inside = communicated(ravine.scale_by_muon(), specs, {"x": 4, "y": 2}, EXPERTS)
    assert found == ["all-to-all"] * 4
    assert not inside


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


def test_blocks_that_shards_cross_are_seen_by_these_tests():
    found, inside = communicated(
        ravine.scale_by_shampoo(refresh=ravine.Refresh(every=2)), ALIGNED, {"x": 2, "y": 2}
    )
    assert found
    assert not inside


@pytest.mark.parametrize(
    ("name", "gathers", "leaves", "moves"),
    [
        # Momentum and Adam's step are sent together, once the gradient shows which blocks are usable.
        ("shampoo", 2, 3, [1, 2, 1]),
        ("kl_shampoo", 1, 2, [2, 1]),
        ("soap", 1, 1, [1, 1]),
    ],
)
def test_what_travels_together_is_one_exchange(name, gathers, leaves, moves):
    tx = on_matrices(name)
    whole = exchanges(tx, {"a": P("x")}, {"x": 8}, {"a": (8, 16)})
    assert [c.kind for c in whole] == ["all-gather"] * gathers
    assert sum(c.sent for c in whole) == leaves * 8 * 16 * 4 * 7 / 8
    # Two leaves of four layers each; every device gets some of them.
    specs, shapes = dict.fromkeys("ab", P(None, "x")), dict.fromkeys("ab", (4, 8, 16))
    dealt = exchanges(tx, specs, {"x": 4}, shapes)
    moved = [c.sent for c in dealt if c.kind == "all-to-all"]
    assert sorted(moved) == sorted(leaf * 8 * 16 * 4 * 3 / 4 for leaf in 2 * moves)
    # One byte per block of all leaves says whether it is usable.
    flags = [c.sent for c in dealt if c.kind != "all-to-all"]
    assert flags == ([] if name == "soap" else [2 * 4 * 3 / 4])


def test_flags_of_blocks_that_shards_cross_reach_every_element():
    shapes = {"rows": (12, 4), "uneven": (4, 10), "stack": (2, 8, 12), "heads": (4, 2, 6)}
    names = ("x", "y")
    specs = {
        "rows": P(names),
        "uneven": P(*names),
        "stack": P(None, names),
        "heads": P(*names),
    }
    axes = lambda path: MatrixAxes((0,), (1, 2)) if "heads" in path else IN_OUT
    tensors = {k: single(x) for k, x in normal_leaves(shapes, 0).items()}
    tensors = {k: x.at[(-1,) * x.ndim].set(jnp.inf) for k, x in tensors.items()}

    def finite_blocks(updates, state, found):
        assert all(not cut.is_local or cut.takes_flags for cut in found)
        each = Tensors(updates, found)
        flags = [jnp.all(jnp.isfinite(blocks), axis=(-2, -1)) for blocks in each.opened(updates)]
        return each.zero_unless(flags, updates), state

    on_shards = per_shard(finite_blocks, lambda _: optax.EmptyState())
    kept = lambda x: on_shards(x, optax.EmptyState(), blockings_of(x, axes, ravine.Blocks(size=6)))
    expected, _ = jax.jit(kept)(tensors)
    mesh = jax.make_mesh((2, 2), names, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        placed = {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in tensors.items()}
        found, _ = jax.jit(kept)(placed)
    for name, shape in shapes.items():
        np.testing.assert_array_equal(found[name], expected[name])
        assert 0 < np.count_nonzero(found[name]) < np.prod(shape)


def test_muon_exchanges_once_in_and_once_out_for_every_shape():
    found, inside = communicated(ravine.scale_by_muon(), ALIGNED, {"x": 4, "y": 2})
    # a and the transposed b form one batch, the stack another.
    assert found == ["all-to-all"] * 4
    assert not inside


def test_state_is_split_over_mesh_axes_that_parameters_do_not_use():
    mesh = jax.make_mesh((4, 2), ("data", "x"))
    params = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    shampoo = ravine.state_shardings(ravine.scale_by_shampoo(blocks=ravine.Blocks(size=4)), params)
    assert shampoo.factors[0][0].statistics.spec == P(None, "x", "data", None, None)
    assert shampoo.mu.spec == P("x", None)
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


def test_matrices_of_one_shape_are_exchanged_together_however_they_are_cut():
    specs = {"a": P("x", "y"), "b": P("x", "y"), "square": P("x", "y"), "turned": P("y", "x")}
    found, _ = communicated(ravine.scale_by_muon(), specs, {"x": 4, "y": 2})
    # a and the transposed b would share a batch, but one is sharded by rows and the other by columns.
    assert found == ["all-to-all"] * 6


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


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (3, 4, 24)], ids=str)
def test_gram_matrices_are_summed_where_columns_stay_cut(shape, method):
    """The update equals that of whole matrices, and only sums are exchanged.

    "float32" computes the products of float64 matrices in float64. In "bfloat16", a sum in another order
    may round the other way, and a single element affects all others. Each result is off by what random
    rounding does to the products, so their difference is below twice that, times the root of 2.
    """
    mesh = jax.make_mesh((2, 4), ("x", "y"))
    names = P(*[None] * (len(shape) - 2), *(("x", "y") if shape[-1] > shape[-2] else ("y", "x")))
    dtype = np.float64 if method == "float32" else np.float32
    g = jnp.array(np.random.default_rng(0).normal(size=shape), dtype)
    updates, programs = {}, {}
    for distribution in ("whole", "ragged", "gram"):
        polar = NewtonSchulz(dtype=method, distribution=distribution)
        tx = ravine.orthogonalize(polar)
        with jax.set_mesh(mesh):
            cut = jax.device_put(g, NamedSharding(mesh, names))
            compiled = jax.jit(lambda g, tx=tx: tx.update(g, tx.init(g))[0]).lower(cut).compile()
            updates[distribution] = np.asarray(compiled(cut))
        programs[distribution] = {c.kind for c in collectives(compiled.as_text())}
    alone = NewtonSchulz(dtype=method, form="gram" if method == "float32" else "standard")
    expected = jax.jit(ravine.orthogonalize(alone).update)(g, optax.EmptyState())[0]
    wide = g if shape[-1] > shape[-2] else g.T
    of_one = of_bfloat16(wide.reshape(-1, *wide.shape[-2:]), "standard")
    tolerance = HALF if method == "float32" else 2 * 2**0.5 * of_one
    for found in updates.values():
        assert relative_norm(found, expected) <= tolerance
    # XLA for CPU has no ragged exchange; ours is emulated with even ones.
    assert programs["whole"] == programs["ragged"] == {"all-to-all"}
    assert "all-reduce" in programs["gram"]


def test_few_long_matrices_stay_cut_unless_asked_otherwise():
    """For 8 x 4096 on eight devices, a Gram matrix is far smaller than seven more such matrices."""
    mesh = jax.make_mesh((8,), ("x",))
    g = jax.ShapeDtypeStruct((8, 4096), jnp.float32, sharding=NamedSharding(mesh, P(None, "x")))
    for distribution, kinds in (("auto", {"all-reduce"}), ("whole", {"all-to-all"})):
        tx = ravine.orthogonalize(NewtonSchulz(distribution=distribution))
        with jax.set_mesh(mesh):
            program = jax.jit(lambda g, tx=tx: tx.update(g, optax.EmptyState())[0]).lower(g)
        assert {c.kind for c in collectives(program.compile().as_text())} == kinds

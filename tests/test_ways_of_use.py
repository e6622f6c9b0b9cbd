"""Every registered optimizer wherever people use optimizers: the same numbers everywhere.

The way of use changes the trees that an optimizer gets, never the arithmetic. So updates are compiled as
functions of leaves in one order: all ways of using an optimizer share one program and agree bit for bit.
"""

import dataclasses
import functools
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import cloudpickle
import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine
from flax import linen as nn
from flax import nnx
from flax.nnx.spmd import get_var_pspec
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from .optimizers_table import builder
from .run_rounding import rounding_of
from .tolerances import double, furthest, without_residuals

STEPS = 3
SPECS = {
    "dense": {"bias": (None,), "kernel": ("data", "model")},
    "embed": {"embedding": ("data", None)},
    "norm": {"scale": (None,)},
}
# Similar in construction to another one, so only `make test-slow` tries them everywhere.
ALIKE = {
    "adagrad",
    "rmsprop",
    "adam",
    "nadam",
    "nadamw",
    "lion",
    "adan",
    "ademamix",
    "mars",
    "cautious_adamw",
    "cautious_lion",
    "sophia_h",
    "schedule_free_sgd",
    "muon",
    "adamuon",
    "soap_muon",
    "kl_shampoo",
}

every_optimizer = pytest.mark.parametrize("name", ravine.names())
some_optimizers = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in ALIKE else []) for n in ravine.names()],
)


def tree(seed=0):
    """Parameters, or gradients when given another seed: correlated, with a decaying spectrum."""
    rng = np.random.default_rng(seed)

    def matrix(rows, columns):
        left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (rows, columns))
        spectrum = np.arange(1.0, 1.0 + max(rows, columns)) ** -1.5
        return left @ (np.eye(rows, columns) * spectrum[:columns]) @ right

    shapes = {"bias": (4,), "kernel": (4, 4), "embedding": (8, 4), "scale": (4,)}
    make = lambda shape: matrix(*shape) if len(shape) == 2 else rng.normal(size=shape)
    return {
        module: {name: jnp.asarray(make(shapes[name]), jnp.float32) for name in group}
        for module, group in SPECS.items()
    }


TUPLE_RULES = (("0/0", "bias"), ("0/1", "matrix"), ("1/0", "embedding"), ("2/0", "norm"))


class Compiled(NamedTuple):
    """An optimizer whose update is compiled as a function of its leaves."""

    init: Callable[..., Any]
    run: Callable[..., Any]

    def update(self, grads, state, params):
        leaves, structure = jax.tree.flatten((grads, state, params))
        done = self.run(structure, leaves)
        return jax.tree.unflatten(jax.tree.structure((grads, state)), done)


@functools.cache
def build(name, rules=None):
    """The optimizer with few hyperparameters, and with rules if it accepts any."""
    config = ravine.OptimizerConfig(name)
    # An axis longer than the limit has no factor, so the state contains None.
    options = {"refresh": ravine.Refresh(every=2), "blocks": ravine.Blocks(bound=4)} | (
        {} if rules is None else {"rules": rules}
    )
    accepted = {key: value for key, value in options.items() if config.accepts(key)}
    return builder(name)(ravine.schedules.linear(1e-2, 10), **accepted)


@functools.cache
def compiled(name, rules=None):
    tx = build(name, rules)

    @functools.partial(jax.jit, static_argnums=0)
    def run(structure, leaves):
        grads, state, params = jax.tree.unflatten(structure, leaves)
        done, found = jax.tree.flatten(tx.update(grads, state, params))
        assert found == jax.tree.structure((grads, state))
        return done

    return Compiled(tx.init, run)


def go_on(tx, params, state, gradients):
    for grads in gradients:
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def loop(tx, convert):
    """Parameters and state after the steps, on trees converted from dictionaries."""
    params = convert(tree())
    return go_on(tx, params, tx.init(params), map(convert, map(tree, range(1, STEPS + 1))))


@functools.cache
def plain(name):
    return loop(compiled(name), lambda tree: tree)


@functools.cache
def rounding(name):
    """How far another program's results may be off, relative to each leaf's largest element."""
    tx, params = compiled(name), tree()
    end = lambda gradients: without_residuals(go_on(tx, params, tx.init(params), gradients))
    return rounding_of(end, [tree(seed) for seed in range(1, STEPS + 1)])


def assert_same(found, expected):
    """Compares numbers exactly, whatever types the trees have."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def assert_near(found, expected, tolerance):
    """Checks for equal dtypes, and for numbers as close as `rounding` allows."""
    found, expected = (jax.tree.leaves(without_residuals(x)) for x in (found, expected))
    assert [a.dtype for a in found] == [b.dtype for b in expected]
    assert furthest(found, expected) <= tolerance


# Flax NNX


class Model(nnx.Module):
    """The tree as an NNX module, with one parameter that is not trained."""

    def __init__(self, seed=0, *, partitioned=False):
        self.frozen = nnx.Param(jnp.ones((3, 3)))
        for name, group in tree(seed).items():
            module = nnx.Module()
            for key, value in group.items():
                sharding = {"out_sharding": SPECS[name][key]} if partitioned else {}
                setattr(module, key, nnx.Param(value, **sharding))
            setattr(self, name, module)


TRAINED = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("frozen")))


def nnx_update(model, optimizer, grads):
    optimizer.update(model, grads)


def nnx_train(tx, update=nnx_update, **options):
    model = Model()
    optimizer = nnx.Optimizer(model, tx, wrt=TRAINED, **options)
    for seed in range(1, STEPS + 1):
        update(model, optimizer, nnx.state(Model(seed), TRAINED))
    return nnx_result(model, optimizer)


def nnx_result(model, optimizer):
    return nnx.as_pure(nnx.state(model, TRAINED)), nnx.as_pure(optimizer.opt_state)


@every_optimizer
def test_nnx_jitted(name):
    # This is a separate program, in which the update may be fused with what follows.
    assert_near(nnx_train(build(name), nnx.jit(nnx_update)), plain(name), rounding(name))


@every_optimizer
def test_nnx_with_partitioned_variables(name):
    # State kept beside a parameter can have other axes, and must not be sharded like it.
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
    with jax.set_mesh(mesh):
        model = Model(partitioned=True)
        optimizer = nnx.Optimizer(model, build(name), wrt=TRAINED)
        before = jax.eval_shape(lambda: nnx.state(optimizer))
        is_variable = lambda node: isinstance(node, nnx.Variable)
        for variable in jax.tree.leaves(nnx.state(optimizer), is_leaf=is_variable):
            for x in jax.tree.leaves(variable):
                NamedSharding(mesh, get_var_pspec(variable)).shard_shape(x.shape)

        @jax.eval_shape
        def after():
            new = nnx.clone(optimizer)
            new.update(nnx.clone(model), nnx.state(Model(1, partitioned=True), TRAINED))
            return nnx.state(new)

        assert jax.tree.structure(after) == jax.tree.structure(before)
        assert jax.tree.leaves(after) == jax.tree.leaves(before)


@pytest.mark.parametrize("name", ["adamw", "muon", "shampoo"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_nnx_on_a_mesh(name, kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        model = Model(partitioned=True)
        tx = build(name)
        if kind == AxisType.Auto:
            tx = ravine.on_mesh(tx, nnx.state(model, TRAINED))
        optimizer = nnx.Optimizer(model, tx, wrt=TRAINED)
        placed = lambda: [x.sharding for x in jax.tree.leaves(nnx.state(optimizer)) if x.ndim]
        before = placed()
        update = nnx.jit(nnx_update)
        for seed in range(1, STEPS + 1):
            update(model, optimizer, nnx.state(Model(seed, partitioned=True), TRAINED))
    assert_near(nnx_result(model, optimizer)[0], plain(name)[0], rounding(name))
    same = lambda a, b, x: a.is_equivalent_to(b, x.ndim)
    state = [x for x in jax.tree.leaves(nnx.state(optimizer)) if x.ndim]
    assert all(map(same, placed(), before, state))
    assert model.dense.kernel.sharding.spec == P("data", "model")


def test_on_mesh_takes_what_says_how_parameters_are_sharded():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
    params = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    specs = {"kernel": P("data", "model"), "bias": P()}
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    struct = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    boxes = {"kernel": nn.Partitioned(specs["kernel"], ("data", "model")), "bias": specs["bias"]}
    placed, states = jax.device_put(params, shardings), set()
    for given in (
        specs,
        shardings,
        placed,
        jax.tree.map(struct, params, shardings),
        nnx.State(jax.tree.map(nnx.Param, specs)),
        boxes,
        {"kernel": shardings["kernel"], "bias": params["bias"]},
    ):
        tx = ravine.on_mesh(ravine.scale_by_adam(), given)
        part = optax.masked(tx, {"kernel": True, "bias": False})
        with jax.set_mesh(mesh):
            whole, alone = (jax.jit(init)(placed) for init in (tx.init, part.init))
        states.add((whole.mu["kernel"].sharding.spec, whole.mu["bias"].sharding.spec))
        states.add((alone.inner_state.mu["kernel"].sharding.spec, P()))
    assert states == {(P("data", "model"), P())}
    # The mesh from the shardings is used.
    jax.jit(ravine.on_mesh(ravine.scale_by_adam(), shardings).init)(placed)
    with pytest.raises(ValueError, match=r"not told how the parameter 'bias' of shape \(4,\)"):
        ravine.on_mesh(ravine.scale_by_adam(), {"kernel": P()}, mesh).init(params)
    with pytest.raises(ValueError, match="none of these has a NamedSharding"):
        ravine.on_mesh(ravine.scale_by_adam(), params, mesh)


# Derivatives through an update


@pytest.mark.usefixtures("float64")
def test_shampoo_is_differentiated_in_forward_mode():
    tx = ravine.scale_by_shampoo(
        refresh=ravine.Refresh(every=1),
        graft=ravine.Grafting(step="none"),
        roots=ravine.Roots(ridge=1e-2),
    )
    params, grads, direction = (double(tree(seed)["dense"]["kernel"]) for seed in range(3))
    update = lambda g: tx.update(g, tx.init(params))[0]
    slope = jax.jit(lambda g: jax.jvp(update, (g,), (direction,))[1])(grads)
    at = jax.jit(lambda step: update(grads + step * direction))
    near, far = ((at(step) - at(-step)) / (2 * step) for step in (1e-4, 2e-4))
    # The error is a third of the difference between the two, up to terms of fourth order.
    assert jnp.max(jnp.abs(slope - near)) <= jnp.max(jnp.abs(far - near))
    with pytest.raises(ValueError, match="Reverse-mode differentiation"):
        jax.jit(jax.grad(lambda g: jnp.sum(update(g))))(grads)


# Flax Linen


def boxed(tree):
    """Adds the boxes of `nn.with_partitioning`."""
    return jax.tree.map(nn.Partitioned, tree, SPECS, is_leaf=lambda x: isinstance(x, jax.Array))


def linen_state(tx, convert=boxed):
    return TrainState.create(apply_fn=None, params=convert(tree()), tx=tx)


def linen_train(tx, convert=boxed):
    state = linen_state(tx, convert)
    for seed in range(1, STEPS + 1):
        state = state.apply_gradients(grads=convert(tree(seed)))
    return state.params, state.opt_state


@some_optimizers
def test_linen_boxes_say_how_the_state_is_sharded(name):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
    state = jax.eval_shape(lambda: linen_state(build(name)))

    def check(spec, tree):
        for x in jax.tree.leaves(tree):
            NamedSharding(mesh, spec).shard_shape(x.shape)

    jax.tree.map(check, nn.get_partition_spec(state), nn.unbox(state))


# Equinox, dataclasses, tuples


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Record:
    bias: Any = None
    dense: Any = None
    embed: Any = None
    embedding: Any = None
    kernel: Any = None
    norm: Any = None
    scale: Any = None


class Module(eqx.Module):
    """With a leaf that is not an array, which `eqx.filter` replaces by None."""

    bias: Any = None
    dense: Any = None
    embed: Any = None
    embedding: Any = None
    kernel: Any = None
    norm: Any = None
    scale: Any = None
    activation: Callable[..., Any] = jax.nn.relu


def records(kind):
    """A function from dictionaries to objects of this kind."""
    convert = lambda tree: kind(
        **{k: convert(v) if type(v) is dict else v for k, v in tree.items()}
    )
    return convert


def equinox_train(tx):
    convert = records(Module)
    model = convert(tree())
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    for seed in range(1, STEPS + 1):
        grads = eqx.filter(convert(tree(seed)), eqx.is_inexact_array)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        model = eqx.apply_updates(model, updates)
    return eqx.filter(model, eqx.is_inexact_array), state


WAYS = {
    "nnx eager": nnx_train,
    "nnx without graph": functools.partial(nnx_train, graph=False),
    "nnx variables": lambda tx: loop(tx, lambda t: nnx.State(jax.tree.map(nnx.Param, t))),
    "linen": functools.partial(linen_train, convert=lambda tree: tree),
    "linen boxes": linen_train,
    "frozen dict": lambda tx: loop(tx, flax.core.freeze),
    "equinox": equinox_train,
    "dataclass": lambda tx: loop(tx, records(Record)),
}


@some_optimizers
@pytest.mark.parametrize("way", WAYS)
def test_ways_of_use(name, way):
    assert_same(WAYS[way](compiled(name)), plain(name))


@some_optimizers
def test_tuples(name):
    convert = lambda t: tuple(tuple(group.values()) for group in t.values())
    assert_same(loop(compiled(name, TUPLE_RULES), convert), plain(name))


# Checkpoints: saved after two steps, restored into a fresh start, then the third step


def unlike(tree):
    """A fresh start to restore into, without any of the saved values."""
    return jax.tree.map(jnp.zeros_like, tree)


def with_orbax(path, saved, like):
    ocp.save(path, saved)
    shapes = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    return ocp.load(path, jax.tree.map(shapes, like))


def with_pickle(path, saved, like):
    path.write_bytes(pickle.dumps(saved))
    return pickle.loads(path.read_bytes())


def with_flax(path, saved, like):
    path.write_bytes(flax.serialization.to_bytes(saved))
    # It restores NumPy arrays, which NNX cannot write to.
    return jax.tree.map(jnp.asarray, flax.serialization.from_bytes(like, path.read_bytes()))


def with_equinox(path, saved, like):
    eqx.tree_serialise_leaves(path, saved)
    return eqx.tree_deserialise_leaves(path, like)


def dictionaries(tx, restore):
    params, state = go_on(tx, tree(), tx.init(tree()), [tree(1), tree(2)])
    params, state = restore((params, state), unlike((params, state)))
    return go_on(tx, params, state, [tree(3)])


def linen(tx, restore):
    state = linen_state(tx)
    for seed in (1, 2):
        state = state.apply_gradients(grads=boxed(tree(seed)))
    saved = (state.params, state.opt_state)
    params, opt_state = restore(saved, unlike(saved))
    state = state.replace(params=params, opt_state=opt_state).apply_gradients(grads=boxed(tree(3)))
    return state.params, state.opt_state


def modules(tx, restore):
    saved, fresh = (
        (model, nnx.Optimizer(model, tx, wrt=TRAINED)) for model in (Model(), Model(seed=7))
    )
    for seed in (1, 2):
        nnx_update(*saved, nnx.state(Model(seed), TRAINED))
    pure = lambda nodes: tuple(nnx.to_pure_dict(nnx.state(node)) for node in nodes)
    for node, found in zip(fresh, restore(pure(saved), pure(fresh)), strict=True):
        state = nnx.state(node)
        nnx.replace_by_pure_dict(state, found)
        nnx.update(node, state)
    nnx_update(*fresh, nnx.state(Model(3), TRAINED))
    return nnx_result(*fresh)


CHECKPOINTS = {
    "dictionaries, Orbax": (dictionaries, with_orbax),
    "dictionaries, pickle": (dictionaries, with_pickle),
    "dictionaries, Flax": (dictionaries, with_flax),
    "dictionaries, Equinox": (dictionaries, with_equinox),
    "Linen, Orbax": (linen, with_orbax),
    "Linen, Flax": (linen, with_flax),
    "Linen, pickle": (linen, with_pickle),
    "NNX, Orbax": (modules, with_orbax),
    "NNX, Flax": (modules, with_flax),
    "NNX, pickle": (modules, with_pickle),
}


@some_optimizers
@pytest.mark.parametrize("way", CHECKPOINTS)
def test_saved_restored_and_on(name, way, tmp_path):
    train, store = CHECKPOINTS[way]
    restore = lambda saved, like: store(tmp_path / "saved", saved, like)
    assert_same(train(compiled(name), restore), plain(name))


# Copies for other processes, as Ray, Dask and submitit send them


WRAPPED = {
    "accumulate": lambda tx: ravine.accumulate(tx, 2),
    "finite_gate": ravine.stability.finite_gate,
    "inject_hyperparams": lambda _: ravine.inject_hyperparams(ravine.shampoo)(learning_rate=1e-3),
    "with_noise_scale": ravine.stability.with_noise_scale,
    "with_telemetry": ravine.with_telemetry,
}


def assert_alike(copy, tx):
    """Checks that two optimizers make the same program, and say the same about it."""
    traced = lambda tx: str(jax.make_jaxpr(tx.update)(tree(1), tx.init(tree()), tree()))
    assert traced(copy) == traced(tx)
    assert ravine.explain(copy, tree()) == ravine.explain(tx, tree())


@every_optimizer
def test_cloudpickle_copies_an_optimizer(name):
    assert_alike(cloudpickle.loads(cloudpickle.dumps(build(name))), build(name))


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_cloudpickle_copies_what_is_around_an_optimizer(wrapper):
    tx = WRAPPED[wrapper](build("muon"))
    assert_alike(cloudpickle.loads(cloudpickle.dumps(tx)), tx)

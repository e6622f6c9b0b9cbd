"""What every optimizer must do, whatever its algorithm; `optimizers_table.py` has the rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from .optimizers_table import FAMILIES, TABLE, VARIANTS
from .run_rounding import rounding_of
from .tolerances import HALF, double, furthest, without_residuals

DECAYING = [row for row in TABLE if row.accepts("weight_decay")]
every_optimizer = pytest.mark.parametrize("row", TABLE, ids=[row.label for row in TABLE])
every_first = pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.label, marks=[pytest.mark.slow] * (row in VARIANTS))
        for row in TABLE
    ],
)
every_family = pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.label, marks=[pytest.mark.slow] * (row not in FAMILIES))
        for row in TABLE
    ],
)


@jax.jit
def add(params, updates):
    """`optax.apply_updates` for mixed dtypes, which it refuses under strict promotion."""
    wide = lambda x: x if x.dtype == jnp.float64 else x.astype(jnp.float32)
    return jax.tree.map(lambda p, u: (wide(p) + wide(u)).astype(p.dtype), params, updates)


def run(tx, params, grads, steps, update=None, init=None):
    """Parameters, updates and state after `steps` updates with the same gradients."""
    update = update or jax.jit(tx.update)
    state = (init or jax.jit(tx.init))(params)
    for _ in range(steps):
        updates, state = update(grads, state, params)
        params = add(params, updates)
    return params, updates, state


class Plain:
    """An optimizer built from its row and compiled once: most tests run it or compare with it."""

    def __init__(self, row):
        self.tx, self.traces = row.build(), []
        self.init = jax.jit(self.tx.init)

        def update(grads, state, params):
            self.traces.append(jax.tree.leaves(grads)[0].dtype)
            return self.tx.update(grads, state, params)

        self.update = jax.jit(update)


plain = functools.cache(Plain)


def run_plain(row, params, grads, steps):
    return run(plain(row).tx, params, grads, steps, plain(row).update, plain(row).init)


@functools.cache
def rounding(row):
    """How far another program's first update may be off, relative to each leaf's largest element."""
    return rounding_of(lambda grads: run_plain(row, row.tree(0), grads, 1)[1], row.tree(1))


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_close(actual, expected, tolerance):
    """Checks that differences are below `tolerance` times the largest magnitude of each leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.max(np.abs(a - b), initial=0) <= tolerance * np.max(np.abs(b), initial=0)


def test_every_registered_optimizer_has_a_row():
    assert {row.name for row in TABLE} == set(ravine.names())


@every_optimizer
def test_converges(row):
    target = {"matrix": jnp.array([[3.0, -2.0], [1.0, 4.0]])}
    if not row.needs_matrices:
        target |= {"vector": jnp.array([3.0, -2.0, 1.0])}
    tx = row.without_decay(ravine.schedules.linear(row.learning_rate, row.steps))

    def step(carry, _):
        params, state = carry
        grads = jax.tree.map(lambda p, t: 2 * (p - t), params, target)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def solve(start):
        return jax.lax.scan(step, (start, tx.init(start)), length=row.steps)[0][0]

    for found, expected in zip(
        *map(jax.tree.leaves, (solve(jax.tree.map(jnp.zeros_like, target)), target)), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-2)


# Every pair of two dtypes occurs among these four.
@every_optimizer
@pytest.mark.parametrize(
    ("params_dtype", "grads_dtype", "state_dtype"),
    [
        (jnp.bfloat16, jnp.bfloat16, None),
        (jnp.bfloat16, jnp.float32, jnp.bfloat16),
        (jnp.float32, jnp.bfloat16, jnp.bfloat16),
        (jnp.float32, jnp.float32, None),
    ],
)
def test_state_is_a_fixed_point_for_every_mix_of_dtypes(
    row, params_dtype, grads_dtype, state_dtype
):
    dtypes = {k: state_dtype for k in ("mu_dtype", "nu_dtype") if row.accepts(k)}
    tx = row.build(**(dtypes if state_dtype else {}))
    params, grads = row.tree(0, params_dtype), row.tree(1, grads_dtype)

    # Tracing is enough here.
    init = jax.eval_shape(tx.init, params)
    updates, state = jax.eval_shape(tx.update, grads, init, params)
    assert state == init  # weak types too
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(grads_dtype)}
    leaves = jax.tree_util.tree_leaves_with_path(init)
    floating = [
        s
        for path, s in leaves
        if jnp.issubdtype(s.dtype, jnp.floating)
        and getattr(path[-1], "name", None) not in ("learning_rate", "scheduled")
    ]
    if state_dtype is None:
        assert all(s.dtype == jnp.float32 for s in floating)
    elif dtypes and floating:
        assert any(s.dtype == state_dtype for s in floating)


@pytest.mark.usefixtures("float64")
@every_family
@pytest.mark.parametrize(
    ("params_dtype", "grads_dtype", "state_dtype"),
    [
        (jnp.float64, jnp.float64, jnp.bfloat16),
        (jnp.float32, jnp.float64, None),
        pytest.param(jnp.float64, jnp.float32, None, marks=pytest.mark.slow),
        pytest.param(jnp.float64, jnp.bfloat16, jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_state_is_a_fixed_point_beside_float64(row, params_dtype, grads_dtype, state_dtype):
    dtypes = {k: state_dtype for k in ("mu_dtype", "nu_dtype") if row.accepts(k)}
    tx = row.build(**(dtypes if state_dtype else {}))
    params, grads = row.tree(0, params_dtype), row.tree(1, grads_dtype)
    init = jax.eval_shape(tx.init, params)
    updates, state = jax.eval_shape(tx.update, grads, init, params)
    assert state == init
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(grads_dtype)}


@pytest.mark.usefixtures("float64")
@every_first
def test_injected_hyperparameters_and_a_schedule_of_updates_made_give_the_same_updates(row):
    # In float32, the relative error of 1 - b2 for an injected b2 is 5e-5.
    params, grads = double((row.tree(0), row.tree(1)))
    twice = lambda count: jnp.where(count < 2, row.learning_rate, 0.0)
    injected = ravine.inject_hyperparams(row.builder)(learning_rate=twice, **row.hyperparameters)
    update, init = jax.jit(injected.update), jax.jit(injected.init)
    found = run(injected, params, grads, 2, update, init)[1]
    assert furthest(found, run_plain(row, params, grads, 2)[1]) <= HALF
    if not row.averages:
        third = run(injected, params, grads, 3, update, init)[1]
        assert_equal(third, jax.tree.map(jnp.zeros_like, grads))


@pytest.mark.usefixtures("float64")
@every_family
def test_masked(row):
    params, grads = double((row.tree(0), row.tree(1)))
    masked = optax.masked(row.build(), {k: k == "first" for k in params})
    updates = run(masked, params, grads, 2)[1]
    alone = run(row.build(), {"first": params["first"]}, {"first": grads["first"]}, 2)[1]
    # Not bit for bit: the compiler may fuse the smaller program differently.
    assert furthest(updates["first"], alone["first"]) <= HALF
    assert_equal(updates | {"first": None}, grads | {"first": None})


@pytest.mark.usefixtures("float64")
def test_slow_momentum_warms_up_with_injected_decay_rates():
    params, grads = double(({"w": np.ones(3)}, {"w": np.array([1.0, -2.0, 0.5])}))
    warmups = ("alpha_warmup", "b3_warmup")
    injected = optax.inject_hyperparams(ravine.ademamix, static_args=warmups)
    options = {"learning_rate": 0.1, "b3": 0.99, "alpha_warmup": 4, "b3_warmup": 4}
    found, expected = (
        run(make(**options), params, grads, 6)[1] for make in (injected, ravine.ademamix)
    )
    assert furthest(found, expected) <= HALF


@pytest.mark.parametrize(
    ("row", "dtype"),
    [
        pytest.param(
            row,
            dtype,
            id=f"{row.label}-{dtype.__name__}",
            marks=[pytest.mark.slow] * (row not in FAMILIES),
        )
        for row in TABLE
        for dtype in (jnp.float32, jnp.bfloat16)
        # Optimizers for matrices convert all gradients to float32 first, whatever accumulates them.
        if dtype == jnp.float32 or not row.needs_matrices
    ],
)
def test_accumulates_under_multi_steps(row, dtype):
    params, grads = row.tree(0, dtype), row.tree(1, dtype)
    accumulating = optax.MultiSteps(row.build(), every_k_schedule=2)
    update, state = jax.jit(accumulating.update), accumulating.init(params)
    # MultiSteps itself divides floats by an int32 counter.
    with jax.numpy_dtype_promotion("standard"):
        waiting, state = update(grads, state, params)
        updates, state = update(grads, state, params)
    assert_equal(waiting, jax.tree.map(jnp.zeros_like, grads))
    # The mean of two equal gradients is that gradient.
    once = run_plain(row, params, grads, 1)[1]
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    # In bfloat16, equal up to the last place of the update.
    assert_close(updates, once, rounding(row) if dtype == jnp.float32 else 2.0**-7)


@every_optimizer
def test_checkpoint_round_trip(row, tmp_path):
    """The state has the structure, shapes and dtypes from `init`, but other values."""
    low = {"mu_dtype": jnp.bfloat16} if row.accepts("mu_dtype") else {}
    params = {k: p for k, p in row.tree().items() if p.size}  # Orbax refuses empty arrays
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda s: jnp.array(np.asarray(rng.integers(0, 100, s.shape), s.dtype)),
        jax.eval_shape(row.build(**low).init, params),
    )
    ocp.save(tmp_path / "state", state)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    restored = ocp.load(tmp_path / "state", like)
    assert_equal(restored, state)
    dtypes = lambda tree: [x.dtype for x in jax.tree.leaves(tree)]
    assert dtypes(restored) == dtypes(state)


@every_optimizer
def test_map_params_finds_the_parameters_in_the_state(row):
    state = run_plain(row, row.tree(0), row.tree(1), 1)[2]
    assert_equal(optax.tree.map_params(plain(row).tx, lambda x: x, state), state)


def train(tx, params, target):
    """Parameters and state after ten steps, and the initial state."""
    state = jax.jit(tx.init)(params)
    first = state

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(lambda p, t: p - t, params, target)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(10):
        params, state = step(params, state)
    return params, state, first


@functools.cache
def train_unsharded(row):
    return train(plain(row).tx, *double((row.tree(0), row.tree(1))))


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        pytest.param(
            row,
            kind,
            id=f"{row.label}-{kind.name.lower()}",
            marks=[pytest.mark.slow] * (row not in FAMILIES or kind == AxisType.Auto),
        )
        for row in TABLE
        for kind in (AxisType.Explicit, AxisType.Auto)
    ],
)
def test_sharded_equals_unsharded(row, kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    specs = {"first": P("data", "model"), "vector": P("data"), "stack": P("data")}
    # An odd shape is replicated on all devices.
    specs["second"] = P() if row.survives_nan else P("model")
    shardings = {k: NamedSharding(mesh, specs.get(k, P())) for k in row.tree()}
    tx = plain(row).tx
    with jax.enable_x64(True), jax.set_mesh(mesh):
        sharded = jax.device_put(double((row.tree(0), row.tree(1))), (shardings, shardings))
        if kind == AxisType.Auto:
            tx = ravine.on_mesh(tx, jax.tree.map(lambda s: s.spec, shardings))
        params, state, first = train(tx, *sharded)
    with jax.enable_x64(True):
        expected = train_unsharded(row)[:2]
    assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(params))
    assert furthest(without_residuals((params, state)), without_residuals(expected)) <= HALF

    same = lambda x, sharding: x.sharding.is_equivalent_to(sharding, x.ndim)
    assert all(jax.tree.leaves(jax.tree.map(same, params, shardings)))

    of_shape = {p.shape: p.sharding for p in jax.tree.leaves(params)}  # all shapes differ

    def check(moment):
        if moment.shape in of_shape:
            assert same(moment, of_shape[moment.shape])
        return moment

    with jax.enable_x64(True):
        optax.tree.map_params(tx, check, state)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: same(a, b.sharding), state, first)))


@every_optimizer
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_what_is_not_finite_shows_and_stays_in_its_leaf(row, bad):
    params, grads = row.tree(0), row.tree(1)
    clean = run_plain(row, params, grads, 3)[1]
    poisoned = grads | {"first": grads["first"].at[0, 0].set(bad)}
    updates = run_plain(row, params, poisoned, 3)[1]
    assert np.all(np.isfinite(updates["first"])) == row.survives_nan
    assert_equal(updates | {"first": None}, clean | {"first": None})


@every_optimizer
def test_zero_gradients_give_zero_updates(row):
    params = row.tree(0)
    if row.accepts("weight_decay"):
        params = jax.tree.map(jnp.zeros_like, params)  # weight decay has no effect on zeros
    grads = jax.tree.map(jnp.zeros_like, params)
    _, updates, state = run_plain(row, params, grads, 3)
    assert_equal(updates, grads)
    assert all(np.all(np.isfinite(s)) for s in jax.tree.leaves(state))


@every_optimizer
def test_jit_compiles_once(row):
    run_plain(row, row.tree(0), row.tree(1), 3)
    traces = plain(row).traces
    assert len(traces) == len(set(traces))  # one trace for each gradient dtype


NAN = float("nan")
BAD = {
    "learning_rate": (-1.0, NAN),
    "b1": (-0.1, 1.0, NAN),
    "b2": (-0.1, 1.0, NAN),
    "b3": (-0.1, 1.0, NAN),
    "momentum": (-0.1, 1.0, NAN),
    "dampening": (-0.1, 1.0, NAN),
    "eps": (-1e-8, NAN),
    "eps_root": (-1e-8, NAN),
    "initial_accumulator_value": (-1.0, NAN),
    "weight_decay": (-1.0, NAN),
}


@every_optimizer
def test_bad_hyperparameters_are_named(row):
    for argument, values in BAD.items():
        for value in values if row.accepts(argument) else ():
            if row.hyperparameters.get(argument) == value:
                continue  # valid in this row: sums have a decay rate of one
            # The subject is this argument, alone or with another one, or the inner part's argument.
            named = rf"(^|\.|\band ){argument} (must|act)\b"
            with pytest.raises(ValueError, match=named):
                row.build(**{argument: value})
    if row.accepts("eps") and row.accepts("eps_root"):
        with pytest.raises(ValueError, match="eps and eps_root"):
            row.build(eps=0.0, eps_root=0.0)


@pytest.mark.parametrize("builder", [ravine.sgd, ravine.rmsprop])
def test_nesterov_without_momentum_is_refused(builder):
    with pytest.raises(ValueError, match=r"^nesterov .*; give momentum > 0"):
        builder(0.1, nesterov=True)


def test_nesterov_with_dampening_is_refused():
    with pytest.raises(
        ValueError, match=r"^nesterov=True needs dampening=0, got dampening=0\.1; drop one"
    ):
        ravine.sgd(0.1, momentum=0.9, nesterov=True, dampening=0.1)


@every_optimizer
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.complex64], ids=lambda d: d.__name__)
def test_leaves_that_are_not_real_floats_are_named(row, dtype):
    with pytest.raises(TypeError, match=r"parameter \['layer'\]\['kernel'\] has dtype .*cast it"):
        row.build().init(row.tree() | {"layer": {"kernel": jnp.zeros((2, 2), dtype)}})


@pytest.mark.parametrize("row", DECAYING, ids=[row.label for row in DECAYING])
def test_missing_parameters_are_named(row):
    tx = row.build(weight_decay=0.1)
    with pytest.raises(ValueError, match="needs the parameters"):
        jax.eval_shape(lambda p, g: tx.update(g, tx.init(p)), row.tree(0), row.tree(1))


def test_float32_moments_of_bfloat16_parameters_converge_where_bfloat16_moments_stall():
    steps = 4000

    def train(nu_dtype):
        tx = ravine.adam(0.01, b2=0.997, nu_dtype=nu_dtype)
        start = jnp.ones(4, jnp.bfloat16)

        def step(carry, t):
            params, state = carry
            # Ten large gradients come first. To forget them, the second moment has to shrink by 0.3 %
            # per step, which is less than half a unit in the last place of bfloat16.
            grads = jnp.where(t < 10, 1000.0, 1.0).astype(jnp.bfloat16) * params
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), jnp.arange(steps))
        return params.astype(jnp.float32)

    assert jnp.all(jnp.abs(train(None)) < 1e-2)
    assert jnp.all(jnp.abs(train(jnp.bfloat16)) > 0.5)

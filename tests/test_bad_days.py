"""Bad gradients, at one step or at every step, and how the run recovers.

The poison is an input to one compiled run per optimizer: the value, its position and its first step.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine

from .optimizers_table import builder

POISONED, STEPS = 40, 150
LATER = slice(POISONED + 90, POISONED + 101)  # the steps at which update sizes are compared
BAD = (math.nan, math.inf, -math.inf, 1e20, 1e30, -1e38)
PLACES = ("element", "block", "bias", "everything")
SHAPES = {"kernel": (8, 12), "bias": (12,)}
GATED = ("shampoo", "soap", "soap_muon", "kl_shampoo")
OTHERS = tuple(sorted(set(ravine.names()) - set(GATED)))


@functools.cache
def gradients():
    """Gradients with correlated rows and columns and a power-law spectrum."""
    rng = np.random.default_rng(0)
    sides = [np.linalg.qr(rng.normal(size=(n, n)))[0] / np.arange(1, n + 1) for n in (8, 12)]
    noise = rng.normal(size=(STEPS, 8, 12)) + 0.3 * rng.normal(size=(8, 12))
    kernel = np.einsum("ab,tbc,dc->tad", sides[0], noise, sides[1])
    bias = 0.1 * (1 + rng.normal(size=(STEPS, 12)))
    return {"kernel": np.float32(0.1 * kernel), "bias": np.float32(bias)}


def poison(place, bad):
    """The masks and the value that overwrite gradients; the value may be NaN."""
    masks = {name: np.zeros(shape, bool) for name, shape in SHAPES.items()}
    if place in ("block", "everything"):
        masks["kernel"][:] = True
    if place in ("bias", "everything"):
        masks["bias"][3:5] = True
    if place == "element":
        masks["kernel"][3, 5] = True
    return masks, np.float32(bad)


@functools.cache
def runner(name, guarded=False):
    """Maps a poison and its steps to the norms of all updates and the final state."""
    tx = builder(name)(1e-2)
    tx = ravine.stability.finite_gate(tx) if guarded else tx
    params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}

    @jax.jit
    def run(given, masks, bad, when):
        def step(carry, xs):
            params, state = carry
            grads, now = xs
            grads = jax.tree.map(lambda g, mask: jnp.where(mask & now, bad, g), grads, masks)
            updates, state = tx.update(grads, state, params)
            norms = jax.tree.map(lambda u: jnp.sqrt(jnp.sum(jnp.square(u))), updates)
            return (optax.apply_updates(params, updates), state), norms

        return jax.lax.scan(step, (params, tx.init(params)), (given, when))

    given = gradients()
    return lambda masks, bad, when: jax.device_get(run(given, masks, bad, when))


@functools.cache
def clean(name, guarded=False):
    return runner(name, guarded)(*poison("element", 0), np.zeros(STEPS, bool))[1]


def recovers(name, bad, place, guarded=False):
    """Checks that everything stays finite and that updates soon return to their normal size."""
    when = np.arange(STEPS) == POISONED
    (params, state), norms = runner(name, guarded)(*poison(place, bad), when)
    for path, x in jax.tree_util.tree_leaves_with_path((params, state)):
        assert np.all(np.isfinite(x)), jax.tree_util.keystr(path)
    for leaf, undisturbed in clean(name, guarded).items():
        ratio = np.mean(norms[leaf][LATER]) / np.mean(undisturbed[LATER])
        assert abs(ratio - 1) < 0.01, (leaf, ratio)
        assert np.max(norms[leaf]) < 2 * np.max(undisturbed), leaf


def every_case(test):
    places = pytest.mark.parametrize("place", PLACES)
    return places(pytest.mark.parametrize("bad", BAD, ids=str)(test))


@every_case
@pytest.mark.parametrize("name", GATED)
def test_what_gates_its_blocks_recovers_from_any_gradient(name, bad, place):
    recovers(name, bad, place)


@every_case
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n not in ("adamw", "muon"))) for n in OTHERS],
)
def test_inside_the_gate_everything_recovers_from_any_gradient(name, bad, place):
    recovers(name, bad, place, guarded=True)


@pytest.mark.parametrize("bad", [math.nan, 1e38], ids=str)
@pytest.mark.parametrize(
    ("name", "guarded"),
    [
        *((name, False) for name in GATED),
        ("adamw", True),
        *(pytest.param(name, True, marks=pytest.mark.slow) for name in GATED),
    ],
)
def test_bad_gradients_at_every_step_leave_everything_finite_and_calm(name, guarded, bad):
    (params, state), norms = runner(name, guarded)(
        *poison("everything", bad), np.arange(STEPS) >= POISONED
    )
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((params, state)))
    for leaf, undisturbed in clean(name, guarded).items():
        # Remaining momentum decays; only SOAP-Muon's steps keep their size, however small it is.
        bound = 1 if name == "soap_muon" else 0.25
        assert np.max(norms[leaf][LATER]) <= bound * np.max(undisturbed)


def test_adam_alone_freezes_where_squares_overflow():
    """As its docstring says: the second moment stays infinite, so the step stays zero."""
    when = np.arange(STEPS) == POISONED
    (_, state), norms = runner("adamw")(*poison("block", 1e20), when)
    assert np.all(np.isinf(optax.tree.get(state, "nu")["kernel"]))
    # Only weight decay is left.
    assert np.max(norms["kernel"][POISONED + 1 :]) < 0.01 * np.min(norms["kernel"][:POISONED])
    assert np.max(norms["bias"][LATER]) > 0.1 * np.max(norms["bias"][:POISONED])


@pytest.mark.parametrize("name", ["soap", "kl_shampoo", "soap_muon"])
def test_parameters_do_not_decay_before_the_first_update_that_moves_them(name):
    """The first update only sets the bases; an update skipped by a guard does not count as one."""
    tx = ravine.stability.finite_gate(getattr(ravine, name)(1e-2, weight_decay=0.5))
    params = {"kernel": jnp.ones((4, 6))}
    state = tx.init(params)
    update = jax.jit(tx.update)
    for value, moves in ((jnp.nan, False), (1.0, False), (1.0, True)):
        updates, state = update({"kernel": jnp.full((4, 6), value)}, state, params)
        assert bool(jnp.any(updates["kernel"] != 0)) == moves


FIRST, LAST = 60, 600
GUARDS = {
    None: lambda tx: tx,
    "clip_by_global_norm": lambda tx: optax.chain(ravine.stability.clip_by_global_norm(1.0), tx),
    "skip_step": ravine.stability.skip_step,
}


@functools.cache
def regression(name, guard):
    """Maps a bad element and its step to the final loss: least squares, 8 x 12 weights, noise."""
    tx = GUARDS[guard](getattr(ravine, name)(ravine.schedules.cosine(0.01, LAST)))
    tx = optax.with_extra_args_support(tx)
    rng = np.random.default_rng(0)
    goal, mix = rng.normal(size=(8, 12)), np.linalg.qr(rng.normal(size=(8, 8)))[0]
    goal, mix = np.float32(goal), np.float32(mix / np.arange(1, 9) ** 0.5)
    inputs = np.float32(rng.normal(size=(LAST, 32, 8))) @ mix
    outputs = inputs @ goal + np.float32(0.3 * rng.normal(size=(LAST, 32, 12)))

    def loss(params, x, y):
        return 12 * jnp.mean(jnp.square(x @ params["kernel"] - y))

    @jax.jit
    def run(bad, when):
        def step(carry, xs):
            (params, state), (x, y, now) = carry, xs
            value, grads = jax.value_and_grad(loss)(params, x, y)
            spoiled = {"kernel": grads["kernel"].at[3, 5].set(bad)}
            grads = jax.tree.map(lambda a, b: jnp.where(now, a, b), spoiled, grads)
            updates, state = tx.update(grads, state, params, loss=value)
            return (optax.apply_updates(params, updates), state), value

        params = {"kernel": jnp.zeros((8, 12))}
        return jax.lax.scan(step, (params, tx.init(params)), (inputs, outputs, when))[1]

    def end(bad=0.0, at=None):
        return float(np.mean(run(np.float32(bad), np.arange(LAST) == at)[-50:]))

    return end


_slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "guard", "bad", "at"),
    [
        ("soap", None, 1e20, FIRST),
        ("soap", None, 1e4, FIRST),
        ("kl_shampoo", "clip_by_global_norm", 1e4, FIRST),
        _slow("shampoo", None, 1e20, FIRST),
        _slow("kl_shampoo", None, 1e20, FIRST),
        # skip_step accepts everything during its 64 steps of warm-up.
        *(
            _slow(name, guard, bad, at)
            for name in ("shampoo", "soap", "kl_shampoo")
            for guard, at in (("clip_by_global_norm", FIRST), ("skip_step", 100))
            for bad in (1e4, 1e8, 1e14, 1e18, 1e20, 1e38)
        ),
    ],
)
def test_one_bad_element_costs_less_than_as_much_loss_again(name, guard, bad, at):
    run = regression(name, guard)
    assert run(bad, at) < 2 * run()

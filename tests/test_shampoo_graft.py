"""What Shampoo grafts: an optimizer's own step until there are roots, and its step size from then on."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine

from .preconditioned import normal, run
from .tolerances import HALF, double, furthest

RATE = 0.01


def direction(weight_decay=0.0, **options):
    return optax.chain(
        ravine.scale_by_shampoo(
            blocks=ravine.Blocks(size=10), refresh=ravine.Refresh(start=math.inf), **options
        ),
        ravine.add_decayed_weights(weight_decay),
        ravine.scale_by_learning_rate(RATE),
    )


GRAFTED = {
    "sgd": (lambda decay: ravine.sgd(RATE, weight_decay=decay), {"b1": 0.0}),
    "adagrad": (
        lambda decay: ravine.adagrad(RATE, weight_decay=decay),
        {"b1": 0.0, "eps": 1e-10},
    ),
    "rmsprop": (
        lambda decay: ravine.rmsprop(RATE, weight_decay=decay),
        {"b1": 0.0, "graft": {"step": "rmsprop", "b2": 0.99}},
    ),
    "adam": (
        lambda decay: optax.chain(
            ravine.scale_by_adam(),
            ravine.add_decayed_weights(decay),
            ravine.scale_by_learning_rate(RATE),
        ),
        {"graft": {"b2": 0.999}},
    ),
    "adamw": (
        lambda decay: ravine.adamw(RATE, weight_decay=decay),
        {"graft": {"step": "adamw", "b2": 0.999}},
    ),
}


def graft_problem():
    shapes = {"matrix": (16, 24), "tensor": (3, 4, 12), "vector": (11,), "scalar": ()}
    params = {name: normal(shape, at) for at, (name, shape) in enumerate(shapes.items())}
    gradients = [
        {name: normal(shape, 10 * at + seed + 7) for at, (name, shape) in enumerate(shapes.items())}
        for seed in range(10)
    ]
    return params, gradients


# The case without decay is also tested with Adam, below.
@pytest.mark.parametrize("weight_decay", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
@pytest.mark.parametrize("graft", GRAFTED)
def test_graft_before_the_start_is_the_plain_optimizer(graft, weight_decay):
    """The two are equal to the last bit."""
    build, options = GRAFTED[graft]
    params, gradients = graft_problem()
    options = {"graft": {"step": graft}, **options}
    found, _ = run(direction(weight_decay, **options), gradients, params)
    expected, _ = run(build(weight_decay), gradients, params)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.usefixtures("float64")
def test_adam_without_decay_is_adam():
    params, gradients = map(double, graft_problem())
    found, _ = run(direction(graft=ravine.Grafting(b2=0.999)), gradients, params)
    ours, _ = run(ravine.adam(RATE), gradients, params)
    with jax.numpy_dtype_promotion("standard"):
        optaxs, _ = run(optax.adam(RATE), gradients, params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(ours), strict=True):
        np.testing.assert_array_equal(a, b)
    assert furthest(found, optaxs) <= HALF


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("shape", [(6,), (4, 4), (3, 4, 2)], ids=str)
def test_grafted_update_has_the_direction_of_one_and_the_size_of_the_other(shape):
    gradients = double(normal(shape, count=3))
    options = {"b1": 0.8, "b2": 0.9, "refresh": ravine.Refresh(every=1)}
    found, states = run(
        ravine.scale_by_shampoo(**options, graft=ravine.Grafting(step="adam")), gradients
    )
    pointing, _ = run(
        ravine.scale_by_shampoo(**options, graft=ravine.Grafting(step="none")), gradients
    )
    sized, _ = run(ravine.scale_by_adam(0.8, 0.9), gradients)
    for u, p, d, state in zip(found, pointing, sized, states, strict=True):
        ratio = jnp.linalg.norm(d) / jnp.linalg.norm(p)
        assert furthest((u, state.graft_ratio[0].reshape(())), (p * ratio, ratio)) <= HALF


@pytest.mark.usefixtures("float64")
def test_graft_per_parameter_or_per_block():
    gradients = double(normal((8, 8), count=3))
    gradients = [g.at[:4].multiply(100) for g in gradients]
    sized = run(ravine.scale_by_adam(0.9, 0.99), gradients)[0][-1]

    def norms(x):
        blocks = x.reshape(2, 4, 2, 4).transpose(0, 2, 1, 3).reshape(4, 16)
        return jnp.linalg.norm(blocks, axis=1)

    options = {"refresh": ravine.Refresh(every=1), "blocks": ravine.Blocks(size=4)}
    for per in ("block", "parameter"):
        update = run(ravine.scale_by_shampoo(**options, graft=ravine.Grafting(per=per)), gradients)[
            0
        ][-1]
        assert furthest(jnp.linalg.norm(update), jnp.linalg.norm(sized)) <= HALF
        assert (furthest(norms(update), norms(sized)) <= HALF) == (per == "block")


@pytest.mark.usefixtures("float64")
def test_nesterov_looks_ahead():
    gradients = double(normal((4, 4), count=3))
    options = {"refresh": ravine.Refresh(start=math.inf), "graft": ravine.Grafting(b2=0.999)}
    found, _ = run(ravine.scale_by_shampoo(nesterov=True, **options), gradients)
    expected, _ = run(ravine.scale_by_adam(nesterov=True), gradients)
    assert furthest(found, expected) <= HALF


@pytest.mark.usefixtures("float64")
def test_sums_with_a_graft_of_their_own():
    """The factors are sums, and an update has the norm of the graft's own update."""
    gradients = double(normal((4, 4), count=2))
    for graft, alone in (
        ({"graft": {"step": "adam", "b2": 0.99}}, ravine.scale_by_adam(0.0, 0.99)),
        ({"graft": {"step": "adagrad"}, "eps": 1e-10}, ravine.scale_by_adagrad()),
    ):
        tx = ravine.scale_by_shampoo(b1=0.0, b2=1.0, refresh=ravine.Refresh(every=1), **graft)
        found, expected = (
            [jnp.linalg.norm(update) for update in run(each, gradients)[0]] for each in (tx, alone)
        )
        assert furthest(found, expected) <= HALF


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("per", ["block", "parameter"])
def test_leaves_of_one_shape_have_sizes_of_their_own(per):
    gradients = [
        {name: normal((8, 6), 3 * step + at, scale=100.0**at) for at, name in enumerate("abc")}
        for step in range(3)
    ]
    gradients = double(gradients)
    tx = ravine.scale_by_shampoo(
        refresh=ravine.Refresh(every=1),
        blocks=ravine.Blocks(size=4),
        graft=ravine.Grafting(step="sgd", per=per),
    )
    updates, states = run(tx, gradients)
    for name in "abc":
        alone, of_one = run(tx, [g[name] for g in gradients])
        found = [update[name] for update in updates], states[-1].graft_ratio[name]
        assert furthest(found, (alone, of_one[-1].graft_ratio)) <= HALF


@pytest.mark.parametrize("per", ["block", "parameter"])
def test_blocks_without_a_trusted_root_take_the_grafts_step(per):
    """The tolerance refuses every root."""
    gradients = [{"a": normal((8, 6), step), "b": normal((4, 4), step)} for step in range(3)]
    options = {"blocks": ravine.Blocks(size=4), "graft": ravine.Grafting(per=per)}
    roots = ravine.Roots(tolerance=1e-30, patience=1)
    refused = ravine.scale_by_shampoo(**options, roots=roots, refresh=ravine.Refresh(every=1))
    plain = ravine.scale_by_shampoo(**options, refresh=ravine.Refresh(start=math.inf))
    found, expected = run(refused, gradients)[0], run(plain, gradients)[0]
    for at in range(3):
        for ours, theirs in zip(*map(jax.tree.leaves, (found[at], expected[at])), strict=True):
            assert np.array_equal(ours, theirs) == (at > 0)


def test_sizes_of_all_leaves_are_found_together():
    """Per leaf they were a quarter of the compiled program's kernels."""
    tx = ravine.scale_by_shampoo()

    def reductions(leaves):
        params = {str(at): jnp.ones((4, 6)) for at in range(leaves)}
        update = jax.make_jaxpr(tx.update)(params, jax.eval_shape(tx.init, params))
        return str(update).count("reduce_max")

    assert reductions(5) == reductions(1)

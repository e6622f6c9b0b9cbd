"""Shampoo: what it must equal, when its roots are refreshed, and what is refused."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine
from ravine.optimizers.matrix.algebra.roots import CoupledNewtonSchulz, PseudoInverse

from .arrays import single
from .preconditioned import (
    all_finite,
    assert_trees_close,
    conditioned,
    factors,
    normal,
    refreshed_roots,
    run,
)

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


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("graft", GRAFTED)
def test_graft_before_the_start_is_the_plain_optimizer(graft, weight_decay):
    """To the last bit."""
    build, options = GRAFTED[graft]
    params, gradients = graft_problem()
    options = {"graft": {"step": graft}, **options}
    found, _ = run(direction(weight_decay, **options), gradients, params)
    expected, _ = run(build(weight_decay), gradients, params)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_adam_without_decay_is_adam():
    params, gradients = graft_problem()
    found, _ = run(direction(graft=ravine.Grafting(b2=0.999)), gradients, params)
    ours, _ = run(ravine.adam(RATE), gradients, params)
    with jax.numpy_dtype_promotion("standard"):
        optaxs, _ = run(optax.adam(RATE), gradients, params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(ours), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(optaxs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def one_step(gradient, **options):
    plain = {"refresh": {"every": 1}, "roots": {"ridge": 0.0}, "graft": {"step": "none"}}
    options = {**plain, **options}
    tx = ravine.scale_by_shampoo(0.0, 1.0, **options)
    return run(tx, [single(gradient)])[0][0]


@pytest.mark.parametrize("ridge", [0.0, 1e-9])
def test_first_step_is_the_polar_factor(ridge):
    gradient = 3 * conditioned(6, 0)
    left, _, right = np.linalg.svd(gradient)
    np.testing.assert_allclose(
        one_step(gradient, roots=ravine.Roots(ridge=ridge)), left @ right, atol=1e-5
    )


@pytest.mark.parametrize(
    ("sides", "shape"), [("rows", (4, 7)), ("columns", (7, 4)), ("smaller", (4, 7))]
)
def test_first_one_sided_step_is_the_polar_factor(sides, shape):
    gradient = normal(shape)
    left, _, right = np.linalg.svd(np.asarray(gradient, np.float64), full_matrices=False)
    np.testing.assert_allclose(
        one_step(gradient, blocks=ravine.Blocks(sides=sides)), left @ right, atol=1e-4
    )


def test_first_step_of_a_vector_is_its_unit_vector():
    gradient = 5 * normal((9,))
    found = one_step(gradient, roots=ravine.Roots(method=PseudoInverse(), ridge=0.0))
    np.testing.assert_allclose(found, gradient / jnp.linalg.norm(gradient), atol=1e-5)


def test_one_by_one_block_and_scalar():
    """A matrix of one element becomes its sign; a scalar has no factor, and stays."""
    assert one_step([[-7.0]])[0, 0] == pytest.approx(-1)
    assert one_step(-7.0) == -7


@pytest.mark.parametrize("graft", ["none", "sgd"])
def test_rotated_gradients_have_rotated_updates(graft):
    left, right = (np.linalg.qr(np.random.default_rng(s).normal(size=(8, 8)))[0] for s in (1, 2))
    gradients = [conditioned(8, seed) for seed in range(6)]
    rotated = [single(left @ g @ right.T) for g in gradients]
    tx = ravine.scale_by_shampoo(refresh=ravine.Refresh(every=2), graft=ravine.Grafting(step=graft))
    plain, turned = (run(tx, grads)[0] for grads in ([single(g) for g in gradients], rotated))
    for a, b in zip(plain, turned, strict=True):
        assert_trees_close(b, single(left @ np.asarray(a, np.float64) @ right.T), 1e-5)


def reference(gradients, b1, b2, ridge, factored=None):
    """Shampoo without graft, a root every step, in float64."""
    order = gradients[0].ndim
    factored = range(order) if factored is None else factored
    statistics: dict[int, Any] = dict.fromkeys(factored, 0.0)
    mu, updates = 0.0, []
    for step, gradient in enumerate(gradients, 1):
        g = np.asarray(gradient, np.float64)
        mu = b1 * mu + (1 - b1) * g
        update = mu / (1 - b1**step)
        for axis in factored:
            others = [other for other in range(order) if other != axis]
            gram = np.tensordot(g, g, (others, others))
            weight = 1 if b2 == 1 else 1 - b2
            statistics[axis] = b2 * statistics[axis] + weight * gram
            corrected = statistics[axis] / (1 if b2 == 1 else 1 - b2**step)
            values, vectors = np.linalg.eigh(corrected)
            values = values + ridge * values[-1]
            root = (vectors * values ** (-1 / (2 * len(factored)))) @ vectors.T
            update = np.moveaxis(np.tensordot(root, update, (1, axis)), 0, axis)
        updates.append(update)
    return updates


@pytest.mark.parametrize("b2", [0.9, 1.0])
@pytest.mark.parametrize("shape", [(5,), (4, 6), (3, 4, 2), (2, 3, 2, 3)], ids=str)
def test_three_steps_in_double_precision(shape, b2):
    gradients = normal(shape, count=3)
    tx = ravine.scale_by_shampoo(
        0.8, b2, refresh=ravine.Refresh(every=1), graft=ravine.Grafting(step="none")
    )
    updates, states = run(tx, gradients)
    assert len(factors(states[-1])) == len(shape)
    for found, expected in zip(updates, reference(gradients, 0.8, b2, 1e-5), strict=True):
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("shape", [(6,), (4, 4), (3, 4, 2)], ids=str)
def test_grafted_update_has_the_direction_of_one_and_the_size_of_the_other(shape):
    gradients = normal(shape, count=3)
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
        assert_trees_close(u, p * ratio, 1e-5)
        assert float(state.graft_ratio[0].reshape(())) == pytest.approx(float(ratio), rel=1e-4)


@pytest.mark.parametrize("graft", ["none", "adam"])
def test_blocks_are_parameters_of_their_own(graft):
    gradients = normal((8, 12), count=5)
    tx = ravine.scale_by_shampoo(
        refresh=ravine.Refresh(every=2),
        blocks=ravine.Blocks(size=4),
        graft=ravine.Grafting(step=graft),
    )

    def cut(x):
        return {
            f"{i}{j}": x[4 * i : 4 * i + 4, 4 * j : 4 * j + 4] for i in range(2) for j in range(3)
        }

    whole, states = run(tx, gradients)
    assert factors(states[-1])[0].statistics.shape == (1, 2, 3, 4, 4)
    apart, _ = run(tx, [cut(g) for g in gradients])
    for a, b in zip(whole, apart, strict=True):
        assert_trees_close(cut(a), b, 1e-5)


def test_uneven_blocks_are_padded_without_trace():
    """A 7 x 5 leaf in blocks of at most 4: padding rows and columns neither move nor harm."""
    gradients = normal((7, 5), count=5)
    updates, states = run(
        ravine.scale_by_shampoo(refresh=ravine.Refresh(every=2), blocks=ravine.Blocks(size=4)),
        gradients,
    )
    padded = [jnp.pad(g, ((0, 1), (0, 1))) for g in gradients]
    wider, _ = run(
        ravine.scale_by_shampoo(refresh=ravine.Refresh(every=2), blocks=ravine.Blocks(size=4)),
        padded,
    )
    assert all(not np.any(f.refused) for f in factors(states[-1]))
    for a, b in zip(updates, wider, strict=True):
        assert_trees_close(a, b[:7, :5], 1e-5)
        assert not np.any(b[7:])


def test_graft_per_parameter_or_per_block():
    gradients = normal((8, 8), count=3)
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
        assert jnp.linalg.norm(update) == pytest.approx(float(jnp.linalg.norm(sized)), rel=1e-5)
        agree = np.allclose(norms(update), norms(sized), rtol=1e-4)
        assert agree == (per == "block")


def test_axis_over_the_limit_has_no_factor():
    gradients = normal((40, 4), count=3)
    tx = ravine.scale_by_shampoo(
        0.8,
        0.9,
        refresh=ravine.Refresh(every=1),
        blocks=ravine.Blocks(size=16, bound=16),
        graft=ravine.Grafting(step="none"),
    )
    updates, states = run(tx, gradients)
    rows, columns = states[-1].factors[0]
    assert rows is None
    assert columns.root.shape == (1, 1, 1, 4, 4)
    expected = reference(gradients, 0.8, 0.9, 1e-5, factored=[1])
    for a, b in zip(updates, expected, strict=True):
        assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max()


@pytest.mark.parametrize(("sides", "factored"), [("rows", [0]), ("columns", [1]), ("smaller", [1])])
def test_one_sided(sides, factored):
    gradients = normal((6, 4), count=3)
    tx = ravine.scale_by_shampoo(
        0.8,
        0.9,
        refresh=ravine.Refresh(every=1),
        blocks=ravine.Blocks(sides=sides),
        graft=ravine.Grafting(step="none"),
    )
    updates, states = run(tx, gradients)
    present = [at for at, factor in enumerate(states[-1].factors[0]) if factor is not None]
    assert present == factored
    expected = reference(gradients, 0.8, 0.9, 1e-5, factored=factored)
    for a, b in zip(updates, expected, strict=True):
        assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max()


def test_the_exponent_given_is_used():
    gradient = conditioned(5, 0)
    left, sizes, right = np.linalg.svd(gradient)
    found = one_step(gradient, roots=ravine.Roots(exponent=-1 / 8, ridge=0.0))
    np.testing.assert_allclose(found, (left * sizes**0.5) @ right, atol=1e-5)


@pytest.mark.parametrize(("every", "start"), [(4, 4), (4, 10), (3, 7)])
def test_staggered_refresh_visits_every_root_once_per_period(every, start):
    gradients = [{"a": normal((8, 8), s), "b": normal((5, 3), 50 + s)} for s in range(20)]
    refresh = ravine.Refresh(every=every, start=start, staggered=True)
    tx = ravine.scale_by_shampoo(refresh=refresh, blocks=ravine.Blocks(size=4))
    first = tx.init(gradients[0])
    updates, states = run(tx, gradients)
    changed = [refreshed_roots(a, b) for a, b in zip([first, *states[:-1]], states, strict=True)]
    assert len(changed[0]) == 8 + 4
    begin = start - every
    assert not np.any(changed[:begin])
    for at in range(begin, 20 - every + 1):
        np.testing.assert_array_equal(np.sum(changed[at : at + every], axis=0), 1)
    assert all(1 <= flags.sum() <= 12 / every + 1 for flags in changed[begin:])
    plain, _ = run(
        ravine.scale_by_shampoo(
            refresh=ravine.Refresh(every=every, start=math.inf), blocks=ravine.Blocks(size=4)
        ),
        gradients,
    )
    for at in range(start - 1):
        np.testing.assert_array_equal(updates[at]["a"], plain[at]["a"])
    assert jnp.any(updates[start - 1]["a"] != plain[start - 1]["a"])


def test_synchronous_refresh_visits_all_at_once():
    gradients = normal((8, 8), count=12)
    tx = ravine.scale_by_shampoo(
        refresh=ravine.Refresh(every=4, start=6), blocks=ravine.Blocks(size=4)
    )
    _, states = run(tx, gradients)
    changed = [refreshed_roots(a, b) for a, b in itertools.pairwise(states)]
    assert [int(flags.sum()) for flags in changed] == [0, 0, 0, 0, 8, 0, 8, 0, 0, 0, 8]


def test_staggered_agrees_with_synchronous_on_a_constant_gradient():
    gradients = [{"a": single(conditioned(8, 0)), "b": single(conditioned(4, 1))}] * 30
    found, expected = (
        run(
            ravine.scale_by_shampoo(
                refresh=ravine.Refresh(every=5, staggered=staggered), blocks=ravine.Blocks(size=4)
            ),
            gradients,
        )[0][-1]
        for staggered in (True, False)
    )
    assert_trees_close(found, expected, 1e-2)


def test_kl_statistics():
    """Other than the Gram matrices' once there are roots, and of the same first step."""
    gradients = normal((6, 8), count=12)
    gram, kl = (
        run(
            ravine.scale_by_shampoo(
                refresh=ravine.Refresh(every=2), factors=ravine.Factors(statistics=name)
            ),
            gradients,
        )
        for name in ("gram", "kl")
    )
    assert all_finite(kl)
    assert_trees_close(kl[0][2], gram[0][2], 1e-6)
    assert jnp.max(jnp.abs(kl[0][-1] - gram[0][-1])) > 1e-2
    assert all(not np.any(f.refused) for f in factors(kl[1][-1]))


def test_kl_statistics_of_the_second_step():
    gradients = normal((3, 4), count=2)
    tx = ravine.scale_by_shampoo(
        0.0,
        0.9,
        refresh=ravine.Refresh(every=1),
        factors=ravine.Factors(statistics="kl"),
        graft=ravine.Grafting(step="none"),
    )
    _, states = run(tx, gradients)
    first, second = (factors(state) for state in states)
    g = np.asarray(gradients[1], np.float64)
    rows, columns = (np.asarray(f.root[0, 0, 0], np.float64) for f in first)
    expected = [g @ columns @ columns @ g.T, g.T @ rows @ rows @ g]
    for old, new, gram in zip(first, second, expected, strict=True):
        mixed = 0.9 * np.asarray(old.statistics[0, 0, 0]) + 0.1 * gram
        np.testing.assert_allclose(new.statistics[0, 0, 0], mixed, rtol=1e-4, atol=1e-4)


def test_nesterov_looks_ahead():
    gradients = normal((4, 4), count=3)
    options = {"refresh": ravine.Refresh(start=math.inf), "graft": ravine.Grafting(b2=0.999)}
    found, _ = run(ravine.scale_by_shampoo(nesterov=True, **options), gradients)
    expected, _ = run(ravine.scale_by_adam(nesterov=True), gradients)
    assert_trees_close(found, expected, 1e-6)


def test_shampoo_leaves_vectors_to_the_fallback():
    params = {"dense": {"kernel": normal((6, 4)), "bias": normal((4,), 1)}}
    gradients = [jax.tree.map(lambda x, s=s: jnp.cos(s * x), params) for s in range(1, 6)]
    found, _ = run(
        ravine.shampoo(RATE, refresh=ravine.Refresh(every=2), weight_decay=0.1), gradients, params
    )
    kernels = [g["dense"]["kernel"] for g in gradients]
    tx = optax.chain(
        ravine.scale_by_shampoo(refresh=ravine.Refresh(every=2)),
        ravine.add_decayed_weights(0.1),
        ravine.scale_by_learning_rate(RATE),
    )
    expected, _ = run(tx, kernels, params["dense"]["kernel"])
    for ours, kernel in zip(found, expected, strict=True):
        assert_trees_close(ours["dense"]["kernel"], kernel, 1e-5)
    biases = [g["dense"]["bias"] for g in gradients]
    adamw, _ = run(ravine.adamw(RATE, b2=0.95, weight_decay=0.1), biases, params["dense"]["bias"])
    for ours, bias in zip(found, adamw, strict=True):
        assert_trees_close(ours["dense"]["bias"], bias, 1e-5)


BAD = [
    ({"blocks": {"size": 0}}, r"blocks\.size must be a whole number of at least 1, got 0"),
    ({"blocks": {"size": 2.5}}, r"blocks\.size must be a whole number or None, got 2\.5"),
    ({"refresh": {"every": 0}}, r"refresh\.every must be a whole number of at least 1"),
    ({"refresh": {"every": 1.5}}, r"refresh\.every must be a whole number, got 1\.5"),
    ({"roots": {"exponent": 0.25}}, r"exponent must be negative.*None takes -1/\(2 k\)"),
    ({"roots": {"exponent": 0.0}}, r"exponent must be negative, as -0\.25, got 0\.0"),
    ({"refresh": {"every": 10, "start": 9}}, r"refresh\.start must be a step from 10 .*, got 9"),
    ({"refresh": {"start": 12.5}}, r"refresh\.start must be a step from 10 .*, got 12\.5"),
    (
        {"graft": {"step": "adamax"}},
        r"graft\.step must be one of .*, got 'adamax'; did you mean adam",
    ),
    (
        {"b2": 1.0, "graft": {"step": "adam"}},
        r"graft 'adam' .*: graft\.b2 must lie .*give graft\.b2",
    ),
    ({"b2": 1.0, "graft": {"step": "rmsprop"}}, r"graft 'rmsprop' .*: graft\.b2 must lie"),
    ({"graft": {"b2": 1.5}}, r"graft\.b2 must lie in \[0, 1\), got 1\.5"),
    ({"graft": {"step": "sgd", "b2": 5.0}}, r"graft\.b2 must lie in \[0, 1\), got 5\.0"),
    ({"eps": -1.0, "graft": {"step": "none"}}, "eps must be finite and not negative"),
    ({"graft": "sgd"}, r"give ravine\.Grafting\(step='sgd'\)"),
    ({"graft": "adamax"}, r"graft must be ravine\.Grafting\(\.\.\.\), got 'adamax'\."),
    ({"refresh": 20}, r"give ravine\.Refresh\(every=20\)"),
    ({"factors": {"max_elements": 0}}, r"factors\.max_elements must be a whole number of at"),
    ({"eps": -1.0}, "eps must be finite and not negative"),
    ({"graft": {"per": "row"}}, r"graft\.per must be one of 'block', 'parameter'"),
    ({"blocks": {"sides": "left"}}, r"blocks\.sides must be one of 'both', .*, got 'left'"),
    ({"factors": {"statistics": "hessian"}}, r"factors\.statistics must be one of 'gram', 'kl'"),
    ({"blocks": {"bound": 0}}, r"blocks\.bound must be a whole number of at least 1"),
    ({"roots": {"patience": -1}}, r"roots\.patience must be a whole number of at least 0"),
    ({"roots": {"patience": 1.5}}, r"roots\.patience must be a whole number, got 1\.5"),
    ({"b1": 1.0}, r"^b1 must lie in \[0, 1\), got 1\.0"),
    ({"b2": 1.1}, r"^b2 must lie in \[0, 1\), got 1\.1"),
    ({"roots": {"ridge": -1e-5}}, r"roots\.ridge must be finite and not negative"),
    ({"roots": {"absolute_ridge": math.nan}}, r"roots\.absolute_ridge must be a finite number"),
    ({"roots": {"tolerance": -0.1}}, r"roots\.tolerance must be finite and not negative"),
]


@pytest.mark.parametrize(("options", "culprit"), BAD, ids=str)
@pytest.mark.parametrize("build", [ravine.scale_by_shampoo, ravine.shampoo])
def test_bad_option(build, options, culprit):
    with pytest.raises(ValueError, match=culprit):
        build(**options)


def test_sums_with_a_graft_of_their_own():
    """Factors are sums, and the norm of an update is that of the graft by itself."""
    gradients = normal((4, 4), count=2)
    for graft, alone in (
        ({"graft": {"step": "adam", "b2": 0.99}}, ravine.scale_by_adam(0.0, 0.99)),
        ({"graft": {"step": "adagrad"}}, ravine.scale_by_adagrad()),
    ):
        tx = ravine.scale_by_shampoo(b1=0.0, b2=1.0, refresh=ravine.Refresh(every=1), **graft)
        for u, v in zip(run(tx, gradients)[0], run(alone, gradients)[0], strict=True):
            np.testing.assert_allclose(jnp.linalg.norm(u), jnp.linalg.norm(v), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("staggered", [False, True])
@pytest.mark.parametrize("statistics", ["gram", "kl"])
def test_shampoo_solves_a_badly_conditioned_least_squares_problem(statistics, staggered):
    """min |A (W - W*) B|^2, both factors of condition 100, where Adam is far behind."""
    a, b = (single(conditioned(16, seed, 0.1, 10.0)) for seed in (1, 2))
    target = normal((16, 16), 3)

    def loss(w):
        return jnp.mean(jnp.square(a @ (w - target) @ b))

    def final(tx):
        def step(carry, _):
            w, state = carry
            updates, state = tx.update(jax.grad(loss)(w), state, w)
            return (optax.apply_updates(w, updates), state), None

        w = jnp.zeros((16, 16))
        (w, _), _ = jax.lax.scan(step, (w, tx.init(w)), None, length=2000)
        return float(loss(w))

    rate = optax.linear_schedule(0.03, 0.0, 2000)
    direction = ravine.scale_by_shampoo(
        refresh=ravine.Refresh(every=5, staggered=staggered), factors={"statistics": statistics}
    )
    ours = optax.chain(direction, ravine.scale_by_learning_rate(rate))
    assert final(ours) < 0.2 * final(ravine.adam(rate, 0.9, 0.99))


def test_padding_is_not_an_eigenvalue():
    """Seven rows in blocks of four are two of four, and one row of them is padding."""
    gradients = [normal((7, 8), seed) for seed in range(6)]
    options = {
        "refresh": {"every": 2},
        "roots": {"ridge": 0.0},
        "b2": 1.0,
        "graft": {"step": "none"},
    }
    _, states = run(ravine.scale_by_shampoo(blocks=ravine.Blocks(size=4), **options), gradients)
    rows, columns = factors(states[-1])
    assert not np.any(rows.refused)
    assert not np.any(columns.refused)
    assert jnp.max(rows.condition) < 1e3
    padded = rows.root[0, 1]
    assert not np.any(padded[:, 3])
    alone, _ = run(ravine.scale_by_shampoo(**options), [g[4:, :4] for g in gradients])
    whole, _ = run(ravine.scale_by_shampoo(blocks=ravine.Blocks(size=4), **options), gradients)
    assert_trees_close(whole[-1][4:, :4], alone[-1], 1e-4)


def test_roots_that_a_method_does_not_find_are_refused_at_init():
    tx = ravine.scale_by_shampoo(roots=ravine.Roots(method=CoupledNewtonSchulz()))
    tx.init({"matrix": jnp.ones((2, 3))})
    with pytest.raises(ValueError, match=r"parameter cube has 3 axes .* -1/6; use Eigh"):
        tx.init({"cube": jnp.ones((2, 3, 4))})
    halves = ravine.Roots(method=CoupledNewtonSchulz(), exponent=-0.5)
    ravine.scale_by_shampoo(roots=halves).init(jnp.ones((2, 3, 4)))

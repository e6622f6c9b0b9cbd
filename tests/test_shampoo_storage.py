"""How Shampoo stores its state: factors packed, in chunks or in bfloat16, with the same updates."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ravine
from ravine.core.arithmetic import cast
from ravine.core.own_norm import norms_in
from ravine.optimizers.matrix.algebra.roots import Eigh

from .arrays import single
from .preconditioned import (
    all_finite,
    factors,
    normal,
    refreshed_roots,
    run,
    shampoo,
)
from .roots import attainable, relative, roots_of
from .run_rounding import rounding_of
from .tolerances import HALF, double, furthest, without_residuals


def assert_only_kept_numbers_are_rounded(exact, gradients, updates, states):
    """Checks that from every state, the float32 version `exact` takes the same step.

    Numbers kept in bfloat16 may differ by half a unit in the last place; updates are compared where no
    root is new.
    """
    step, narrow = jax.jit(exact.update), jnp.bfloat16
    for gradient, before, after, found in zip(
        gradients[1:], states, states[1:], updates[1:], strict=False
    ):
        start = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == narrow else x, before)
        go = lambda gradient, start=start: without_residuals(step(gradient, start))
        expected, state = go(gradient)
        float32 = rounding_of(go, gradient)
        for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
            if a.dtype == narrow:
                a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
                assert np.all(np.abs(a - b) <= 2.0**-8 * np.abs(b) + float32 * np.max(np.abs(b)))
        if not np.any(refreshed_roots(before, after)):
            assert furthest(found, expected) <= float32


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("storage", [{}, {"packed": True}, {"packed": True, "statistics": "kl"}])
@pytest.mark.parametrize("max_elements", [16, 100])
def test_roots_found_and_factors_used_in_chunks(max_elements, storage):
    gradients = [{"a": normal((8, 12), s), "b": normal((4, 4), 50 + s)} for s in range(4)]
    gradients = double(gradients)
    options = {"refresh": ravine.Refresh(every=2), "blocks": ravine.Blocks(size=4)}
    build = lambda **factors: shampoo(**options, factors=ravine.Factors(**factors))
    found, _ = run(build(max_elements=max_elements, **storage), gradients)
    expected, _ = run(build(**storage), gradients)
    assert furthest(found, expected) <= HALF


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("shape", [(8, 12), (7, 5), (3, 4, 2), (6,)], ids=str)
def test_packed_makes_no_difference(shape):
    gradients = double(normal(shape, count=6))
    found, states = run(
        shampoo(
            refresh=ravine.Refresh(every=2),
            blocks=ravine.Blocks(size=6),
            factors=ravine.Factors(packed=True),
        ),
        gradients,
    )
    expected, _ = run(
        shampoo(refresh=ravine.Refresh(every=2), blocks=ravine.Blocks(size=6)),
        gradients,
    )
    assert furthest(found, expected) <= HALF
    assert all_finite(states)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("staggered", [False, True])
def test_dtypes_are_kept(staggered, packed):
    dtypes = {"mu_dtype": jnp.bfloat16, "nu_dtype": jnp.bfloat16}
    gradients = normal((8, 12), count=6)
    tx = shampoo(
        refresh=ravine.Refresh(every=3, staggered=staggered),
        blocks=ravine.Blocks(size=4),
        factors=ravine.Factors(packed=packed, root_dtype=jnp.bfloat16),
        **dtypes,
    )
    updates, states = run(tx, gradients)
    first = tx.init(gradients[0])
    for state in states:
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
            lambda x: (x.shape, x.dtype), first
        )
    for factor in factors(states[-1]):
        assert factor.root.dtype == jnp.bfloat16
        assert factor.statistics.dtype == jnp.float32
        assert factor.residual.dtype == jnp.float32
        assert factor.refused.dtype == jnp.int32
        assert not np.any(factor.refused)
    assert states[-1].mu[0].dtype == states[-1].nu[0].dtype == jnp.bfloat16
    assert updates[-1].dtype == jnp.float32
    exact = shampoo(
        refresh=ravine.Refresh(every=3, staggered=staggered),
        blocks=ravine.Blocks(size=4),
        factors=ravine.Factors(packed=packed),
    )
    assert_only_kept_numbers_are_rounded(exact, gradients, updates, states)


NARROW = {"statistics_dtype": "bfloat16", "root_dtype": "float16"}
OF_OTHER_WIDTH = {
    "narrow": {**NARROW, "packed": True},
    "narrow-kl": {**NARROW, "statistics": "kl"},
    "single": {"statistics_dtype": "float32", "root_dtype": "float32"},
    "double-statistics": {"statistics_dtype": "float64"},
    "double-roots": {"root_dtype": "float64", "statistics": "kl"},
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("params_dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", OF_OTHER_WIDTH)
def test_factors_of_another_width_than_parameters_and_gradients(name, params_dtype):
    """Nothing is promoted implicitly, and the state keeps its dtypes."""
    tx = ravine.scale_by_shampoo(
        b2=jnp.asarray(0.99) if name == "double-statistics" else 0.99,
        factors=ravine.Factors(**OF_OTHER_WIDTH[name]),
        roots=ravine.Roots(ridge=0.03),
        refresh=ravine.Refresh(every=2, need=0.05),
    )
    for dtype in ("float64", "bfloat16"):
        params, grads = jnp.zeros((6, 4), params_dtype), jnp.zeros((6, 4), dtype)
        step = lambda state, _, grads=grads, params=params: tx.update(grads, state, params)[::-1]
        go = lambda params, step=step: jax.lax.scan(step, tx.init(params), length=2)
        assert jax.eval_shape(go, params)[1].dtype == dtype
        norms = lambda grads, params: norms_in(tx, grads, tx.init(params))
        jax.eval_shape(norms, grads, params)


@pytest.mark.usefixtures("float64")
def test_float64_gradients_take_narrow_roots_as_they_are():
    """A step without new roots is that of the same roots in float64."""
    gradients, options = double(normal((6, 4), count=3)), {"refresh": ravine.Refresh(every=2)}
    narrow = ravine.Factors(root_dtype="bfloat16")
    (*_, found), (*_, state, _) = run(shampoo(**options, factors=narrow), gradients)
    start = jax.tree.map(lambda x: cast(x, jnp.float64) if x.dtype == jnp.bfloat16 else x, state)
    expected, _ = jax.jit(shampoo(**options).update)(gradients[-1], start)
    assert furthest(found, expected) <= HALF


@pytest.mark.parametrize(
    ("options", "times"),
    [
        ({}, 6.1),
        ({"factors": {"packed": True, "root_dtype": "bfloat16"}, "mu_dtype": jnp.bfloat16}, 3.1),
    ],
    ids=["default", "small"],
)
def test_bytes_of_the_state(options, times):
    params = {"square": jnp.zeros((64, 64)), "wide": jnp.zeros((64, 256))}
    state = jax.eval_shape(
        ravine.scale_by_shampoo(blocks=ravine.Blocks(size=64), **options).init, params
    )
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert size <= times * 4 * (64 * 64 + 64 * 256)


def power_law(shape, count, decay=1.5, seed=0):
    """Gradients whose rows and columns have singular values i^-decay."""
    rng = np.random.default_rng(seed)
    left, right = (
        np.linalg.qr(rng.normal(size=(n, n)))[0] * np.arange(1.0, n + 1) ** -decay for n in shape
    )
    return [single(left @ rng.normal(size=shape) @ right.T) for _ in range(count)]


def of_rounded_roots(state):
    """The relative error (root mean square) of a step whose roots are rounded to bfloat16.

    Rounding moves an element by up to half a unit in the last place; the mean square is a third of its
    square.
    """
    left, right = (np.asarray(factor.root, np.float64).squeeze() for factor in factors(state))
    mean = np.asarray(state.mu, np.float64)
    variance = lambda x: (2.0 ** np.floor(np.log2(np.abs(x)))) ** 2 * 2.0**-16 / 3
    squares = variance(left) @ (mean @ right) ** 2 + (left @ mean) ** 2 @ variance(right)
    return np.sum(squares) ** 0.5 / np.linalg.norm(left @ mean @ right)


@pytest.mark.parametrize("packed", [False, True])
def test_narrow_roots_of_a_power_law(packed):
    """No root is refused, and the step equals that of float32 up to the rounding of its roots.

    The bound is twice the root mean square: the squares of ten or more terms stay below four times their
    mean.
    """
    gradients, refresh = power_law((64, 48), 24), ravine.Refresh(every=6)
    narrow = ravine.Factors(root_dtype="bfloat16", packed=packed)
    found, states = run(shampoo(refresh=refresh, factors=narrow), gradients)
    assert not any(np.any(factor.refused) for factor in factors(states[-1]))
    expected, states = run(shampoo(refresh=refresh), gradients)
    error = jnp.linalg.norm(found[-1] - expected[-1]) / jnp.linalg.norm(expected[-1])
    assert error < 2 * of_rounded_roots(states[-1])
    # The graft's own step differs, so the comparison is not with the fallback.
    graft, _ = run(shampoo(refresh=ravine.Refresh(start=math.inf)), gradients)
    assert jnp.linalg.norm(graft[-1] - expected[-1]) > 0.2 * jnp.linalg.norm(expected[-1])


def test_narrow_statistics_of_a_power_law():
    """No root is refused, and only the stored statistics, from which roots are computed, are rounded."""
    gradients = power_law((64, 48), 24)
    options = {"refresh": ravine.Refresh(every=6), "roots": ravine.Roots(ridge=0.03)}
    narrow = ravine.Factors(statistics_dtype="bfloat16")
    found, states = run(shampoo(**options, factors=narrow), gradients)
    assert not any(np.any(factor.refused) for factor in factors(states[-1]))
    assert_only_kept_numbers_are_rounded(shampoo(**options), gradients, found, states)
    for before, after in itertools.pairwise(states):
        if np.any(refreshed_roots(before, after)):
            for n, factor in zip((64, 48), factors(after), strict=True):
                kept = factor.statistics.reshape(1, n, n).astype(jnp.float32)
                mean = kept / (1 - 0.99 ** int(after.count))
                expected = roots_of(mean, -1 / 4, Eigh(), ridge=0.03).root
                bound = attainable(1 + 1 / 0.03, 4, "eigh", n)
                assert relative(factor.root.reshape(1, n, n), expected).max() <= bound


def test_narrow_statistics_are_refused_without_a_ridge():
    with pytest.raises(ValueError, match=r"bfloat16 needs a roots\.ridge .*root_dtype"):
        ravine.shampoo(factors={"statistics_dtype": jnp.bfloat16})

"""How Shampoo stores its state: factors packed, in chunks or in bfloat16, with the same updates."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ravine

from .arrays import single
from .preconditioned import (
    all_finite,
    assert_trees_close,
    factors,
    normal,
    run,
    shampoo,
)
from .tolerances import HALF, double, furthest


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
    assert states[-1].mu.dtype == states[-1].nu.dtype == jnp.bfloat16
    assert updates[-1].dtype == jnp.float32
    exact, _ = run(
        shampoo(refresh=ravine.Refresh(every=3, staggered=staggered), blocks=ravine.Blocks(size=4)),
        gradients,
    )
    assert_trees_close(updates[-1], exact[-1], 0.1)


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


@pytest.mark.parametrize(
    "options",
    [
        {"factors": {"root_dtype": "bfloat16"}},
        {"factors": {"root_dtype": "bfloat16", "packed": True}},
        {"factors": {"statistics_dtype": "bfloat16"}, "roots": {"ridge": 0.03}},
    ],
    ids=["roots", "packed roots", "statistics"],
)
def test_narrow_factors_of_a_power_law(options):
    """No root is refused, and the step is that of float32, to the rounding of bfloat16."""
    gradients = power_law((64, 48), 24)
    found, states = run(
        ravine.scale_by_shampoo(refresh=ravine.Refresh(every=6), **options), gradients
    )
    roots = options.get("roots", {})
    expected, _ = run(
        ravine.scale_by_shampoo(refresh=ravine.Refresh(every=6), roots=roots), gradients
    )
    assert not any(np.any(factor.refused) for factor in factors(states[-1]))
    error = jnp.linalg.norm(found[-1] - expected[-1]) / jnp.linalg.norm(expected[-1])
    assert error < 0.02
    # The graft's own step differs, so what is compared is not the fallback.
    graft, _ = run(shampoo(refresh=ravine.Refresh(start=math.inf)), gradients)
    assert jnp.linalg.norm(graft[-1] - expected[-1]) > 0.2 * jnp.linalg.norm(expected[-1])


def test_narrow_statistics_are_refused_without_a_ridge():
    with pytest.raises(ValueError, match=r"bfloat16 needs a roots\.ridge .*root_dtype"):
        ravine.shampoo(factors={"statistics_dtype": jnp.bfloat16})

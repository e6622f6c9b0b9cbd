"""Adan's restarts, and the coefficient that other implementations get wrong."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine

from .tolerances import UNIT

GRADS = jnp.array([1.0, 0.5, -0.3, 0.8, 0.1])[:, None]


def directions(tx, grads=GRADS, restart_at=None):
    params = jnp.zeros(1)
    state, found = tx.init(params), []
    for at, g in enumerate(grads):
        if at == restart_at:
            state = ravine.restart_adan(state)
        u, state = tx.update(g, state, params)
        found.append(float(u[0]))
    return np.array(found), state


def test_the_authors_coefficient():
    """Computed by hand from the authors' file; optax.adan 0.2.8 gives 1, 0.935, 0.532, 0.679, 0.614."""
    m, v, n, last, expected = 0.0, 0.0, 0.0, 1.0, []
    for k, g in enumerate(np.asarray(GRADS, np.float64)[:, 0], 1):
        change, last = g - last, g
        m, v = 0.98 * m + 0.02 * g, 0.92 * v + 0.08 * change
        n = 0.99 * n + 0.01 * (g + 0.92 * change) ** 2
        direction = m / (1 - 0.98**k) + 0.92 * v / (1 - 0.92**k)
        expected.append(direction / np.sqrt(n / (1 - 0.99**k)))
    np.testing.assert_allclose(expected, [1, 0.7195, -0.0334, 0.4142, 0.2358], rtol=0, atol=5e-5)
    # Three roundings per step in each moment; their quotients are at most 1, and are then summed.
    found, _ = directions(ravine.scale_by_adan())
    np.testing.assert_allclose(found, expected, rtol=0, atol=32 * UNIT)


def test_a_restart_makes_the_next_update_a_first_one():
    tx = optax.chain(optax.clip(10.0), ravine.scale_by_adan())
    restarted, _ = directions(tx, restart_at=3)
    np.testing.assert_array_equal(restarted[:3], directions(tx)[0][:3])
    np.testing.assert_array_equal(restarted[3:], directions(tx, GRADS[3:])[0])


def test_the_condition_restarts_by_itself_and_counts_its_own_path():
    plain, _ = directions(ravine.scale_by_adan())
    after_three = ravine.scale_by_adan(restart_condition=lambda count, path: count >= 3)
    found, state = directions(after_three)
    np.testing.assert_array_equal(found[:3], plain[:3])
    np.testing.assert_array_equal(found[3:], directions(ravine.scale_by_adan(), GRADS[3:])[0])
    assert int(state.count) == 2

    _, state = directions(ravine.scale_by_adan(restart_condition=lambda count, path: path < 0))
    # The path, computed by hand: the sum of u^2 sqrt(n).
    length, n, last = 0.0, 0.0, None
    for u, g in zip(plain, np.asarray(GRADS)[:, 0], strict=True):
        n = 0.99 * n + 0.01 * (g + 0.92 * (0.0 if last is None else g - last)) ** 2
        length, last = length + u**2 * np.sqrt(n), g
    # Five terms, and half the roundings under the root of n: three per step and those of the square.
    np.testing.assert_allclose(state.path, length, rtol=16 * UNIT)


def test_the_condition_of_the_paper():
    holds = ravine.adan_restart_condition(2.0)
    assert [bool(holds(jnp.int32(k), jnp.float32(1.5))) for k in (1, 2, 3)] == [False, False, True]
    with pytest.raises(ValueError, match="radius must be positive"):
        ravine.adan_restart_condition(0.0)


def test_nan_in_one_leaf_neither_restarts_nor_spreads():
    tx = ravine.scale_by_adan(restart_condition=ravine.adan_restart_condition(1e9))
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update({"a": jnp.full(2, jnp.nan), "b": jnp.ones(2)}, state)
    assert int(state.count) == 2
    assert jnp.all(jnp.isnan(updates["a"]))
    assert jnp.all(jnp.isfinite(updates["b"]))
    assert jnp.isfinite(state.path)


def test_a_state_without_adan_is_refused():
    with pytest.raises(ValueError, match="no Adan"):
        ravine.restart_adan(ravine.adam(1e-3).init(jnp.zeros(1)))

"""Roll-back: when it happens, where it returns to, and that the run continues as without the spike."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ravine
from ravine.training.rollback import Rollback, RollbackPolicy

POLICY = RollbackPolicy(every=4, keep=3, margin=2, window=8, patience=3, skip_batches=5)


def drive(batches, steps, policy=POLICY):
    """A loop with donated state; returns the final state and the batches that led to it."""
    tx = ravine.sgd(0.1, momentum=0.9)

    def step(state, batch):
        params, opt_state = state
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((p - batch) ** 2))(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (params + updates, opt_state), loss

    step = jax.jit(step, donate_argnums=0)
    start = jnp.zeros(3)
    state, data, at, used, rollback = (
        (start, tx.init(start)),
        iter(batches),
        0,
        [],
        Rollback(policy),
    )
    while at < steps:
        index, batch = next(data)
        state, loss = step(state, batch)
        at += 1
        used.append(index)
        if back := rollback.observe(at, state, float(loss)):
            state, at, used = back.state, back.step, used[: back.step]
            for _ in range(back.skip_batches):
                next(data)
    return state, used, rollback


def stream(bad=()):
    rng = np.random.default_rng(0)
    for index in range(200):
        batch = 1 + 0.1 * rng.normal(size=3)
        yield index, jnp.asarray(batch + (100.0 if index in bad else 0.0), jnp.float32)


def test_returns_to_before_a_spike_that_stays_and_leaves_its_data_out():
    bad = range(18, 60)
    state, used, rollback = drive(stream(bad), 40)
    assert rollback.returns > 1  # repeated until the data are good again
    # Update 19 sees the first bad loss, so the run returns to the state after update 16.
    assert used[:16] == list(range(16))
    assert len(used) == 40
    assert not set(used).intersection(bad)
    by_index = dict(stream())
    expected, _, _ = drive(((i, by_index[i]) for i in used), 40)
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_a_short_spike_is_sat_out_and_a_nan_is_not():
    _, _, rollback = drive(stream(bad=[]), 30)
    assert rollback.returns == 0
    watch = Rollback(POLICY)
    state = jnp.zeros(1)
    for step in range(1, 13):
        assert watch.observe(step, state, 1.0 + 0.01 * (step % 2)) is None
    assert watch.observe(13, state, 9.0) is None
    assert watch.observe(14, state, 9.0) is None
    assert watch.observe(15, state, 1.0) is None  # recovers by itself
    back = watch.observe(16, state, float("nan"))
    assert (back.step, back.skip_batches) == (12, 5)


def test_the_margin_counts_back_from_the_first_bad_loss():
    watch = Rollback(POLICY)
    for step in range(1, 13):
        watch.observe(step, jnp.full(1, step), 1.0 + 0.01 * (step % 2))
    for step in (13, 14):
        assert watch.observe(step, jnp.full(1, step), 9.0) is None
    # The snapshot from step 12 is one update older than the first bad loss, three older than the last.
    assert watch.observe(15, jnp.full(1, 15), 9.0).step == 8


def test_gives_up_in_plain_words():
    watch = Rollback(POLICY)
    with pytest.raises(RuntimeError, match="no snapshot 2 updates before update 1"):
        watch.observe(1, jnp.zeros(1), float("inf"))
    watch = Rollback(RollbackPolicy(every=1, margin=0, limit=2))
    watch.observe(1, jnp.zeros(1), 1.0)
    for _ in range(2):
        assert watch.observe(2, jnp.zeros(1), float("nan")).step == 1
    with pytest.raises(RuntimeError, match="after 2 returns; lower the learning rate"):
        watch.observe(2, jnp.zeros(1), float("nan"))


@pytest.mark.parametrize(
    "fields", [{"every": 0}, {"keep": 0}, {"margin": -1}, {"deviations": 0.0}, {"window": 0}]
)
def test_bad_policies_are_refused(fields):
    with pytest.raises(ValueError, match=f"^{next(iter(fields))} must (be|not be) "):
        RollbackPolicy(**fields)


def test_what_is_kept_in_a_checkpoint_makes_the_same_decisions():
    rng = np.random.default_rng(1)
    losses = [2 + 0.01 * rng.normal() for _ in range(14)] + [9.0] * 2
    whole = Rollback(POLICY)
    for step, loss in enumerate(losses, 1):
        assert whole.observe(step, jnp.full(1, step), loss) is None
    again = Rollback(POLICY)
    again.set_state(json.loads(json.dumps(whole.get_state())), whole.snapshots)
    for watch in (whole, again):  # the third bad loss in a row; two of them came before
        back = watch.observe(17, jnp.full(1, 17), 9.0)
        assert (back.step, float(back.state[0]), watch.returns) == (12, 12, 1)
    assert again.get_state() == whole.get_state()

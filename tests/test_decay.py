"""Weight decay: every form by hand, its place in the chain, its masks, and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine
from ravine.optimizers.roles import mask_by_role

from .tolerances import HALF, UNIT

P, G, RATE, DECAY = 2.0, 3.0, 0.1, 0.5
# The step and the decay are products, sums or a quotient: eight roundings of numbers up to P.
ONE_STEP = 8 * UNIT


def after_one_step(form, *, rate=RATE, decay=DECAY, grads=G, **options):
    tx = ravine.with_decay(ravine.scale_by_momentum(0.9), rate, decay, form=form, **options)
    params = jnp.array([P])
    updates, _ = tx.update(jnp.array([grads]), tx.init(params), params)
    return float((params + updates)[0])


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("coupled", P - RATE * (G + DECAY * P)),
        ("independent", P - RATE * G - DECAY * P),
        ("adamc", P - RATE * (G + DECAY * P)),
        ("l2", P - RATE * (G + DECAY * P)),
        ("proximal", (P - RATE * G) / (1 + RATE * DECAY)),
        ("cautious", P - RATE * (G + DECAY * P)),
    ],
)
def test_one_step_by_hand(form, expected):
    np.testing.assert_allclose(after_one_step(form), expected, rtol=ONE_STEP)


def test_cautious_leaves_alone_what_the_update_pulls_outward():
    np.testing.assert_allclose(after_one_step("cautious", grads=-G), P + RATE * G, rtol=ONE_STEP)


def test_adamc_follows_the_square_of_the_learning_rate():
    low = after_one_step("adamc", rate=lambda count: RATE, peak_learning_rate=4 * RATE)
    np.testing.assert_allclose(low, P - RATE * (G + DECAY / 4 * P), rtol=ONE_STEP)


@pytest.mark.usefixtures("float64")
def test_l2_goes_through_the_direction():
    tx = ravine.sgd(RATE, momentum=0.9, weight_decay=DECAY, weight_decay_form="l2")
    params, state = jnp.array([P]), None
    state, expected, velocity = tx.init(params), P, 0.0
    for _ in range(3):
        updates, state = tx.update(jnp.array([G]), state, params)
        params += updates
        velocity = 0.9 * velocity + G + DECAY * expected
        expected -= RATE * velocity
    np.testing.assert_allclose(params[0], expected, rtol=HALF)


@pytest.mark.parametrize("form", ["coupled", "independent", "adamc", "l2", "proximal", "cautious"])
def test_decay_may_be_a_schedule_and_masked_by_role(form):
    rules = [("kernel$", "matrix"), ("scale$", "norm")]
    tx = ravine.with_decay(
        ravine.scale_by_lion(),
        RATE,
        lambda count: jnp.where(count == 0, 0.0, DECAY),
        mask_by_role(["matrix"], rules),
        form=form,
    )
    params = {"kernel": jnp.full((2, 2), P), "scale": jnp.full((2,), P)}
    state, zeros = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    first, state = tx.update(zeros, state, params)
    second, _ = tx.update(zeros, state, params)
    assert all(jnp.all(u == 0) for u in jax.tree.leaves(first))
    assert jnp.all(second["kernel"] < 0)
    assert jnp.all(second["scale"] == 0)


@pytest.mark.parametrize("form", ["coupled", "proximal", "independent"])
def test_bfloat16_updates_of_float32_parameters_keep_their_dtype(form):
    tx = ravine.with_decay(ravine.scale_by_lion(), RATE, DECAY, form=form)
    params = jnp.ones(3)
    updates, _ = tx.update(jnp.ones(3, jnp.bfloat16), tx.init(params), params)
    assert updates.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "decoupled"}, "form must be one of 'coupled', 'independent'"),
        ({"form": "proximal"}, "needs a learning_rate"),
        ({"form": "coupled", "learning_rate": 0.1}, "does not take a learning_rate"),
        ({"form": "adamc", "learning_rate": lambda c: 0.1}, r"with_decay.*peak_learning_rate"),
        ({"form": "coupled", "peak_learning_rate": 0.1}, "drop it"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and not negative"),
    ],
)
def test_faults_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        ravine.add_decayed_weights(**{"weight_decay": 0.1, **options})


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"a": False, "b": False}, "weight_decay_mask selects no parameter"),
        (lambda params: jax.tree.map(lambda _: False, params), "selects no parameter"),
        ({"a": True}, "weight_decay_mask is not shaped like the parameters"),
        ({"a": True, "b": {"c": True}}, "weight_decay_mask is not shaped"),
    ],
)
def test_masks_that_match_nothing_or_leave_a_leaf_out_are_refused(mask, message):
    tx = ravine.adamw(1e-3, weight_decay=0.1, weight_decay_mask=mask)
    with pytest.raises(ValueError, match=message):
        tx.init({"a": jnp.ones(2), "b": jnp.ones(2)})


def test_a_mask_may_select_nothing_in_a_part_of_the_tree():
    decaying = ravine.adamw(1e-3, weight_decay=0.1, weight_decay_mask=mask_by_role(["matrix"]))
    params = {"x": {"kernel": jnp.ones((2, 2))}, "norm": {"scale": jnp.ones(2)}}
    tx = optax.partition(
        {"x": decaying, "norm": decaying}, {"x": {"kernel": "x"}, "norm": {"scale": "norm"}}
    )
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["x"]["kernel"], np.full((2, 2), -1e-4), rtol=4 * UNIT)
    assert not np.any(updates["norm"]["scale"])

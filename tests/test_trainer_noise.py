"""The noise scale in the trainer: measured at some steps, in an unchanged run, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ravine.core.transformation import states_of
from ravine.optimizers.roles import RAVINE_RULES
from ravine.stability import NoiseScaleState, noise_scale, squared_norms
from ravine.training.compare.entrants import line_up
from ravine.training.config import RunConfig
from ravine.training.gradients import micro_batch_value_and_grad
from ravine.training.model import ModelConfig
from ravine.training.step import (
    abstract_state,
    init_params,
    init_state,
    make_loss,
    make_train_step,
)

from .run_rounding import furthest_record, moved, rounding
from .short_race import race, records
from .tolerances import UNIT

pytestmark = pytest.mark.usefixtures("untimed")

MODEL = ModelConfig(width=16, layers=2, heads=2, context=16)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_estimates_are_those_of_every_micro_batch(micro_batches):
    run = RunConfig(model=MODEL, noise_scale_every=2, skip_spikes=True)
    (entrant,) = line_up("adamw")
    tx = entrant.build(run)
    graphdef, params = init_params(MODEL, 0)
    batch = jax.random.randint(jax.random.key(0), (8, 17), 0, 256)
    step = make_train_step(graphdef, tx, micro_batches, attention_logits=False, noise_scale_every=2)
    state, metrics = jax.jit(step)(init_state(params, tx), batch)
    found = {name: float(x) for name, x in noise_scale(state.opt_state).items()}

    parts, total, loss = max(micro_batches, 2), 8 * 16, make_loss(graphdef)

    @jax.jit
    def squares(params):
        """The loss, and the squared gradient norms of the parts and of the whole."""
        norm = lambda grads: sum(squared_norms(grads, None, RAVINE_RULES).values())
        interleaved = jnp.stack([batch[i::parts] for i in range(parts)])
        each = jax.lax.map(lambda part: norm(jax.grad(loss)(params, part)), interleaved)
        value, grads = micro_batch_value_and_grad(loss, parts)(params, batch)
        return value, each, norm(grads)

    def by_hand(params):
        value, each, whole = (np.float64(x) for x in squares(params))
        trace = (total / parts * each.sum() - total * whole) / (parts - 1)
        square = whole - trace / total
        return np.array([value, trace / square])

    expected = by_hand(params)
    rngs = [np.random.default_rng(seed) for seed in range(3)]
    near = [abs(by_hand(moved(params, rng))[1] / expected[1] - 1) for rng in rngs]
    # Differences of nearly equal norms: as in `run_rounding`, eight times the effect of moving the last
    # place of the parameters, and at least 16 units.
    bound = max(8 * max(near), 16 * UNIT)
    np.testing.assert_allclose(found["noise_scale"], expected[1], rtol=bound)
    np.testing.assert_allclose(metrics["loss"], expected[0], rtol=16 * UNIT)

    before = noise_scale(state.opt_state)
    state, _ = jax.jit(step)(state, batch)  # no measurement at step 1
    jax.tree.map(np.testing.assert_array_equal, noise_scale(state.opt_state), before)
    state, _ = jax.jit(step)(state, jnp.flip(batch))
    after = noise_scale(state.opt_state)
    assert any(float(after[name]) != float(x) for name, x in before.items())


@pytest.mark.parametrize(("name", "has_norm"), [("muon", True), ("soap_muon", False)])
def test_preconditioned_scales_are_those_of_optimizers_with_a_norm(name, has_norm):
    run = RunConfig(model=MODEL, noise_scale_every=2, skip_spikes=True)
    (entrant,) = line_up(name)
    state = abstract_state(MODEL, entrant.build(run), jnp.float32)
    (noise,) = states_of(NoiseScaleState, state.opt_state)
    assert noise.preconditioned is has_norm


def test_the_noise_scale_is_in_the_records_of_its_steps_and_changes_nothing(tmp_path, text):
    def run(every="0"):
        words = ["--optimizers", "adamw", "--noise-scale-every", every, "--overwrite"]
        assert race(*words, text=text, out=tmp_path / every) == 0
        return records(tmp_path / every / "adamw")

    plain, measured = run(), run("2")
    assert furthest_record(measured, plain) <= rounding(run, plain, furthest_record)
    for record in measured:
        sampled = "loss" in record and record["step"] % 2 == 0
        assert ("noise_scale" in record) == sampled
        assert ("preconditioned_noise_scale/matrix" in record) == sampled


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--noise-scale-every", "2", "--batch-size", "3"], "does not divide by 2 micro_batches"),
        (["--noise-scale-every", "2", "--qk-clip", "9"], "needs --micro-batches 2"),
        (["--noise-scale-every", "-1"], "must not be negative"),
    ],
)
def test_impossible_options_are_refused(words, expected, tmp_path, text, capsys):
    out = tmp_path / "race"
    assert race("--optimizers", "sgd", *words, text=text, out=out) == 2
    complaint = capsys.readouterr().err
    assert expected in complaint
    assert complaint.count("\n") == 1
    assert not out.exists()

"""The noise scale in the trainer: measured at some steps, the same run, and what is refused."""

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

from .short_race import race, records

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

    # By hand, from the gradients of the parts.
    parts = max(micro_batches, 2)
    loss = make_loss(graphdef)
    norms = lambda grads: squared_norms(grads, None, RAVINE_RULES)
    each = [norms(jax.grad(loss)(params, batch[i::parts])) for i in range(parts)]
    value, grads = micro_batch_value_and_grad(loss, parts)(params, batch)
    whole, total = norms(grads), 8 * 16
    trace = {
        role: (total / parts * sum(float(e[role]) for e in each) - total * float(square))
        / (parts - 1)
        for role, square in whole.items()
    }
    square = {role: float(x) - trace[role] / total for role, x in whole.items()}
    expected = sum(trace.values()) / sum(square.values())
    if sum(square.values()) > 0:
        assert found["noise_scale"] == pytest.approx(expected, rel=1e-2)
    else:
        assert found["noise_scale"] == np.inf
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-6)

    before = noise_scale(state.opt_state)
    state, _ = jax.jit(step)(state, batch)  # step 1 is not sampled
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


def test_it_is_in_the_records_of_its_steps_and_changes_nothing(tmp_path, text):
    runs = []
    for every in ("0", "2"):
        out = tmp_path / every
        words = ["--optimizers", "adamw", "--noise-scale-every", every]
        assert race(*words, text=text, out=out) == 0
        runs.append(records(out / "adamw"))
    for plain, measured in zip(*runs, strict=True):
        key = "loss" if "loss" in plain else "heldout_loss"
        assert measured[key] == pytest.approx(plain[key], rel=1e-4)
        sampled = key == "loss" and plain["step"] % 2 == 0
        assert ("noise_scale" in measured) == sampled
        assert ("preconditioned_noise_scale/matrix" in measured) == sampled


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--noise-scale-every", "2", "--batch-size", "3"], "does not divide by 2 micro_batches"),
        (["--noise-scale-every", "2", "--qk-clip", "9"], "needs --micro-batches 2"),
        (["--noise-scale-every", "-1"], "must not be negative"),
    ],
)
def test_what_cannot_be_is_refused(words, expected, tmp_path, text, capsys):
    out = tmp_path / "race"
    assert race("--optimizers", "sgd", *words, text=text, out=out) == 2
    complaint = capsys.readouterr().err
    assert expected in complaint
    assert complaint.count("\n") == 1
    assert not out.exists()

"""Schedule-Free: how its state is found, what it averages, and its dtypes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine
from flax import nnx
from ravine.training.cli import main
from ravine.training.compare.entrants import Entrant
from ravine.training.compare.space import Point
from ravine.training.compare.trial import Trials
from ravine.training.config import RunConfig
from ravine.training.data.batches import heldout_batches, train_batches
from ravine.training.model import ModelConfig
from ravine.training.placed import place
from ravine.training.run.around import RunPaths
from ravine.training.run.outcome import Outcome
from ravine.training.schedule_free import with_own_schedule
from ravine.training.sharding import build_mesh
from ravine.training.step import make_train_step, mean_loss
from ravine.training.train import train

from .short_race import race, records
from .tolerances import UNIT, furthest


def run(tx, params, grads, steps):
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(grads, state, params)
        with jax.numpy_dtype_promotion("standard"):
            return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: tx,
        lambda tx: optax.chain(optax.clip_by_global_norm(1e9), tx),
        lambda tx: ravine.accumulate(tx, 1),
        lambda tx: ravine.with_telemetry(tx, [("", "matrix")]),
        lambda tx: optax.partition({"w": tx, "b": tx}, {"w": "w", "b": "b"}),
    ],
    ids=["bare", "chain", "accumulate", "telemetry", "partition"],
)
def test_the_average_is_found_however_deep(wrap):
    params = {"w": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}
    grads = {"w": jnp.array([1.0, -1.0]), "b": jnp.array([2.0])}
    params, state = run(wrap(ravine.schedule_free_sgd(0.1)), params, grads, 3)
    found = ravine.schedule_free_eval_params(state, params)
    # z is 1, 2 and 3 steps of 0.1 g away; with equal weights their mean is 2 steps. Each of the three
    # steps has one rounding in z and three in the average.
    np.testing.assert_allclose(found["w"], [0.8, 2.2], rtol=12 * UNIT)
    np.testing.assert_allclose(found["b"], [2.6], rtol=12 * UNIT)
    np.testing.assert_allclose(
        params["w"], [0.9 * 0.8 + 0.1 * 0.7, 0.9 * 2.2 + 0.1 * 2.3], rtol=16 * UNIT
    )


def test_parameters_outside_a_mask_are_evaluated_as_they_are():
    tx = optax.masked(ravine.schedule_free_sgd(0.1), {"w": True, "b": False})
    params = {"w": jnp.ones(2), "b": jnp.ones(1)}
    found = ravine.schedule_free_eval_params(tx.init(params), {"w": params["w"], "b": jnp.zeros(1)})
    assert float(found["b"][0]) == 0.0


def test_a_state_without_schedule_free_is_refused():
    with pytest.raises(ValueError, match="no schedule_free"):
        ravine.schedule_free_eval_params(ravine.adam(1e-3).init(jnp.zeros(1)), jnp.zeros(1))


def test_the_average_of_bfloat16_parameters_goes_on():
    """In bfloat16, a sum of equal weights (as in optax 0.2.8) stops growing after 256 of them."""
    steps = 600
    grads = jnp.array([1.0], jnp.bfloat16)
    params = jnp.zeros(1, jnp.bfloat16)
    _, state = run(ravine.schedule_free_sgd(1.0, b1=0.0), params, grads, steps)
    assert state.weight_sum == steps
    # The average is rounded once per step.
    np.testing.assert_allclose(state.x, -(steps + 1) / 2, rtol=steps * UNIT)


def test_polynomial_weights_and_a_learning_rate_of_zero():
    tx = ravine.schedule_free_sgd(lambda count: jnp.where(count == 0, 0.0, 1.0), weight_power=1.0)
    _, state = run(tx, jnp.zeros(1), jnp.ones(1), 3)
    # z is 0, -1, -2 with weights 0, 2, 3.
    np.testing.assert_allclose(state.x, [-(2 * 1 + 3 * 2) / 5], rtol=4 * UNIT)


def test_muon_may_be_the_base():
    base = ravine.muon(0.02, b1=0.0, rules=[("", "matrix")])
    tx = ravine.schedule_free(base, 0.02)
    params = {"kernel": jnp.ones((4, 3))}
    params, state = run(tx, params, {"kernel": jnp.eye(4, 3)}, 2)
    assert jnp.all(jnp.isfinite(ravine.schedule_free_eval_params(state, params)["kernel"]))


@pytest.mark.parametrize("jitted", [False, True])
def test_flax_models_are_evaluated_at_the_average(jitted):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    plain = nnx.as_pure(nnx.state(model, nnx.Param))
    tx = optax.chain(optax.clip(1.0), ravine.schedule_free_sgd(0.5))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 2))) ** 2))(model))

    step = nnx.jit(step) if jitted else step
    for _ in range(3):
        step(model, optimizer)
    graphdef = nnx.graphdef(model)
    loss = lambda p: jnp.sum(nnx.merge(graphdef, p)(jnp.ones((1, 2))) ** 2)
    state, params = tx.init(plain), plain
    for _ in range(3):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    average = ravine.schedule_free_eval_params(optimizer.opt_state, nnx.state(model, nnx.Param))
    nnx.update(model, average)
    expected = ravine.schedule_free_eval_params(state, params)
    found = nnx.as_pure(nnx.state(model, nnx.Param))
    # Ten roundings in each of three steps, which clipped gradients do not magnify.
    assert furthest(found, expected) <= 30 * UNIT


def test_parameters_of_another_model_are_refused():
    state = ravine.schedule_free_sgd(0.5).init({"a": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"average of \['a'\], which is not in params"):
        ravine.schedule_free_eval_params(state, {"b": jnp.ones(2)})


def test_the_trainer_evaluates_the_average_at_a_constant_rate(corpus, tmp_path):
    """The gradients' point is not it, nor would an average of iterates that a cosine has stopped be."""
    run = RunConfig(
        model=ModelConfig(width=16, layers=1, heads=1, context=16),
        steps=12,
        warmup_steps=1,
        batch_size=4,
        eval_batches=2,
        eval_every=12,
        weight_decay=0.0,
    )
    point = Point(0.05, 0.0, 1 / 12, ravine.OptimizerConfig("schedule_free_adamw"))
    entrant = Entrant(point.optimizer, point.learning_rate)
    adapted, outcome = entrant.adapted(run), Outcome(entrant.name, point.learning_rate)
    train(adapted, entrant.build(run), corpus, outcome, RunPaths(tmp_path))
    assert len({record["learning_rate"] for record in outcome.steps}) == 1

    placed = place(run.model, entrant.build(run), build_mesh())
    batches = train_batches(corpus, batch_size=4, context=16, seed=0, order=run.order)
    state, step = placed.init(0), make_train_step(placed.graphdef, placed.tx)
    for _ in range(12):
        state, _ = jax.jit(step)(state, next(batches))
    heldout = heldout_batches(corpus, batches=2, batch_size=4, context=16)
    average = ravine.schedule_free_eval_params(state.opt_state, state.params)
    at_y, at_x = (float(mean_loss(placed.graphdef, p, heldout)) for p in (state.params, average))
    # 12 steps with losses near 5 nats, sums over 64 numbers: 12 * 5 * 64 * 6e-8 = 2e-4.
    assert abs(at_y - at_x) > 2e-3
    assert outcome.final_loss == pytest.approx(at_x, abs=2e-4)
    assert Trials(run, corpus).loss(point, 12) == pytest.approx(at_x, abs=2e-4)


FREE = "schedule_free_adamw"


def rates(run):
    return [record["learning_rate"] for record in records(run) if "loss" in record]


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize(("words", "is_constant"), [([], True), (["--schedule", "cosine"], False)])
def test_a_schedule_that_is_asked_for_is_followed(words, is_constant, tmp_path, text, capsys):
    words = ["--optimizers", f"sgd,{FREE}", "--warmup-steps", "0", *words]
    assert race(*words, text=text, out=tmp_path / "race") == 0
    free = rates(tmp_path / "race" / FREE)
    assert (len(set(free)) == 1) == is_constant
    assert len(set(rates(tmp_path / "race" / "sgd"))) > 1
    meta = json.loads((tmp_path / "race" / FREE / "meta.json").read_text())
    assert meta["run"]["schedule"] == ("constant" if is_constant else "cosine")
    told = f"cosine; constant for {FREE}"
    assert (told in capsys.readouterr().out) == is_constant
    assert (told in (tmp_path / "race" / "report.html").read_text()) == is_constant


@pytest.mark.parametrize(
    ("asked", "followed"),
    [
        ({"schedule": "constant"}, ["constant", "constant"]),
        ({"end_ratio": 0.1}, ["cosine", "cosine"]),
    ],
)
def test_any_word_about_the_schedule_is_one_for_all(asked, followed):
    run = RunConfig(**asked)
    assert [with_own_schedule(run, name).schedule for name in ("adamw", FREE)] == followed


def test_a_configuration_keeps_whether_a_schedule_was_asked_for(tmp_path, capsys):
    for words, schedule in (([], None), (["--schedule", "cosine"], "cosine")):
        assert main(["race", *words, "--print-config"]) == 0
        printed = capsys.readouterr().out
        assert json.loads(printed)["run"]["schedule"] == schedule
        (tmp_path / "config.json").write_text(printed)
        assert main(["race", "--config", str(tmp_path / "config.json"), "--print-config"]) == 0
        assert capsys.readouterr().out == printed


@pytest.mark.usefixtures("untimed")
def test_a_race_from_before_the_default_was_the_optimizers_own(tmp_path, text, capsys):
    """Its `race.json` says cosine, typed or not; the schedule of a run is in its `meta.json`."""

    def as_before(out):
        """Turns the records of a race into those of the version that always wrote a schedule."""
        told = json.loads((out / "race.json").read_text())
        told["configuration"]["run"]["schedule"] = "cosine"
        (out / "race.json").write_text(json.dumps(told))

    words = ["--optimizers", f"adamw,{FREE}", "--checkpoint-every", "3"]
    out = tmp_path / "constant"
    assert race(*words, text=text, out=out) == 0
    before = records(out / FREE)
    as_before(out)
    (out / FREE / "outcome.json").unlink()
    assert race(*words, "--resume", text=text, out=out) == 0
    assert records(out / FREE) == before

    out = tmp_path / "cosine"
    assert race(*words, "--schedule", "cosine", text=text, out=out) == 0
    before = records(out / FREE)
    (out / FREE / "outcome.json").unlink()
    capsys.readouterr()
    assert race(*words, "--resume", text=text, out=out) == 2
    refused = capsys.readouterr().err
    assert f"{FREE} would follow constant, and followed cosine there" in refused
    assert "give --schedule cosine" in refused
    assert race(*words, "--schedule", "cosine", "--resume", text=text, out=out) == 0
    assert records(out / FREE) == before

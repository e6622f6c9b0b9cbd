"""Stability in the trainer: roll-back, monitors and QK-clip from the run's configuration."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from ravine.training import programs
from ravine.training import step as step_module
from ravine.training import train as loop
from ravine.training.cli import main
from ravine.training.compare.entrants import line_up
from ravine.training.config import RunConfig
from ravine.training.model import ModelConfig
from ravine.training.run.around import RunPaths
from ravine.training.run.outcome import Outcome
from ravine.training.step import init_params, init_state, make_train_step

from .run_rounding import rounding_of
from .short_race import records
from .tolerances import UNIT, furthest

MODEL = ModelConfig(width=16, layers=2, heads=2, kv_heads=1, context=16)
BAD = 255  # a byte that no text contains
SIZES = {"batch_size": 4, "eval_batches": 1, "eval_every": 4}
untimed = pytest.mark.usefixtures("untimed")


class Spoiled:
    """Batches of which some are replaced by bad ones or left out."""

    def __init__(self, batches, bad=(), left_out=()):
        self.batches, self.bad, self.left_out, self.at = batches, bad, left_out, -1

    def __next__(self):
        while True:
            self.at += 1
            batch = next(self.batches)
            if self.at in self.bad:
                return np.full_like(batch, BAD)
            if self.at not in self.left_out:
                return batch

    def get_state(self):
        return {"at": self.at, "inner": self.batches.get_state()}

    def set_state(self, state):
        self.at = state["at"]
        self.batches.set_state(state["inner"])


def train(monkeypatch, folder, corpus, run, **spoiled):
    """A run on corrupted data, in which every bad batch makes everything NaN."""
    make_step, make_batches = programs.make_train_step, loop.train_batches

    def spoiling(*args, **kwargs):
        step = make_step(*args, **kwargs)

        def spoiled_step(state, batch):
            state, metrics = step(state, batch)
            factor = jnp.where(batch[0, 0] == BAD, jnp.nan, 1.0).astype(jnp.float32)
            params = jax.tree.map(lambda p: p * factor, state.params)
            return state._replace(params=params), metrics | {"loss": metrics["loss"] * factor}

        return spoiled_step

    with monkeypatch.context() as patch:
        patch.setattr(programs, "make_train_step", spoiling)
        patch.setattr(
            loop, "train_batches", lambda *a, **k: Spoiled(make_batches(*a, **k), **spoiled)
        )
        (entrant,) = line_up("adamw")
        folder.mkdir(exist_ok=True)
        outcome = Outcome(entrant.name, entrant.learning_rate)
        return loop.train(run, entrant.build(run), corpus, outcome, RunPaths(folder))


ROLLBACK = "every=2, margin=1, skip_batches=3, window=4"


@untimed
def test_a_run_returns_to_before_a_spike_and_leaves_its_data_out(monkeypatch, tmp_path, corpus):
    run = RunConfig(steps=12, model=MODEL, rollback=ROLLBACK, checkpoint_every=5, **SIZES)
    # Update 6 is not finite, so the run returns to the state after 4 and continues with batch 9.
    found = train(monkeypatch, tmp_path / "found", corpus, run, bad=(5,))
    plain = RunConfig(steps=12, model=MODEL, **SIZES)
    expected = train(monkeypatch, tmp_path / "expected", corpus, plain, left_out=range(4, 9))
    assert found.status == expected.status == "finished"
    assert found.final_loss == expected.final_loss
    assert [r["step"] for r in found.steps] == [0, 1, 2, 3, 4, 5, *range(4, 12)]
    assert [r.get("returned_to") for r in found.steps[:7]] == [None] * 5 + [4, None]
    assert sum("returned_to" in record for record in records(tmp_path / "found")) == 1

    # Cut off just after the return, the run continues from there: the checkpoint after 5, which would
    # lead to the bad data, is gone.
    assert_the_same_run(train_cut(monkeypatch, tmp_path / "cut", corpus, run, 2), found)


@untimed
@pytest.mark.slow
def test_a_run_cut_off_before_the_spike_returns_as_well(monkeypatch, tmp_path, corpus):
    """The checkpoint contains the snapshots and losses."""
    run = RunConfig(steps=12, model=MODEL, rollback=ROLLBACK, checkpoint_every=5, **SIZES)
    found = train(monkeypatch, tmp_path / "found", corpus, run, bad=(5,))
    assert_the_same_run(train_cut(monkeypatch, tmp_path / "cut", corpus, run, 1), found)


def assert_the_same_run(resumed, found):
    assert resumed.status == "finished"
    assert resumed.final_loss == found.final_loss
    kept = [[(r["step"], r["loss"]) for r in outcome.steps] for outcome in (resumed, found)]
    np.testing.assert_array_equal(*kept)


def train_cut(monkeypatch, folder, corpus, run, cut):
    """A run whose sixth batch is bad, cut off after its first or second checkpoint and resumed."""
    make, saves = loop.Checkpoints.save, []

    def save(self, state, batches, rollback):
        make(self, state, batches, rollback)
        saves.append(int(state.step))
        if len(saves) == cut:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.Checkpoints, "save", save)
        with pytest.raises(KeyboardInterrupt):
            train(patch, folder, corpus, run, bad=(5,))
    assert saves == [5, 4][:cut]
    return train(monkeypatch, folder, corpus, run, bad=(5,))


@untimed
def test_a_run_that_cannot_return_has_diverged(monkeypatch, tmp_path, corpus):
    run = RunConfig(steps=6, model=MODEL, rollback="default", **SIZES)
    with pytest.warns(UserWarning, match="no snapshot 50 updates before update 3"):
        found = train(monkeypatch, tmp_path / "run", corpus, run, bad=(2,))
    assert found.status == "diverged"
    assert len(found.steps) == 3


def train_skipping(monkeypatch, folder, corpus, bad):
    """A guarded run in which some batches have a NaN loss; records contain the rate from the state."""
    losses, make_step = step_module._trained_loss, programs.make_train_step

    def spoiled(*args):
        def loss(params, batch):
            value, said = losses(*args)(params, batch)
            return value * jnp.where(batch[0, 0] == BAD, jnp.nan, 1.0).astype(jnp.float32), said

        return loss

    def telling(*args, **kwargs):
        def step(state, batch):
            state, metrics = make_step(*args, **kwargs)(state, batch)
            return state, metrics | {"used": optax.tree.get(state.opt_state, "learning_rate")}

        return step

    run = RunConfig(steps=6, model=MODEL, skip_spikes=True, warmup_steps=0, **SIZES)
    with monkeypatch.context() as patch:
        patch.setattr(step_module, "_trained_loss", spoiled)
        patch.setattr(programs, "make_train_step", telling)
        make_batches = loop.train_batches
        patch.setattr(loop, "train_batches", lambda *a, **k: Spoiled(make_batches(*a, **k), bad))
        (entrant,) = line_up("adamw")
        folder.mkdir()
        outcome = Outcome(entrant.name, entrant.learning_rate)
        return loop.train(run, entrant.build(run), corpus, outcome, RunPaths(folder))


@untimed
def test_the_logged_rate_is_the_one_used_even_after_skipped_steps(monkeypatch, tmp_path, corpus):
    found = train_skipping(monkeypatch, tmp_path / "run", corpus, bad=(1, 2))
    assert found.status == "finished"
    assert [record["skipped"] for record in found.steps] == [0, 1, 2, 2, 2, 2]
    made = [record for record in found.steps if record["step"] not in (1, 2)]
    for record in made:
        assert record["learning_rate"] == record["used"]
    assert len({record["learning_rate"] for record in made}) == len(made)


@untimed
def test_a_run_whose_steps_are_all_skipped_says_so(monkeypatch, tmp_path, corpus):
    with pytest.warns(UserWarning, match="learned nothing: all 6 steps were skipped"):
        found = train_skipping(monkeypatch, tmp_path / "run", corpus, bad=range(6))
    assert found.status == "diverged"
    assert found.final_loss == math.inf


@untimed
def test_monitors_say_what_goes_on_and_change_nothing(monkeypatch, tmp_path, corpus):
    fields = {"steps": 5, "model": MODEL, "skip_spikes": True, "z_loss": 1e-4, **SIZES}
    plain = train(monkeypatch, tmp_path / "plain", corpus, RunConfig(**fields))
    watched = train(monkeypatch, tmp_path / "watched", corpus, RunConfig(monitor_every=2, **fields))
    assert [r["loss"] for r in watched.steps] == [r["loss"] for r in plain.steps]
    for record in watched.steps:
        sampled = record["step"] % 2 == 0
        assert ("update_ratio/matrix" in record) == sampled
        if sampled:
            assert 1 < record["momentum_rank/matrix"] <= 16
            assert 0 < record["entropy"] <= np.log(256) * (1 + 16 * UNIT)
            assert np.isfinite(record["max_attention_logit"])
            assert 0 <= record["spike_score/loss"] < 0.5


@pytest.mark.parametrize("micro_batches", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_measurements_of_micro_batches_are_those_of_the_batch(getkey, micro_batches):
    run = RunConfig(model=MODEL, monitor_every=1)
    (entrant,) = line_up("adamw")
    tx = entrant.build(run)
    graphdef, params = init_params(MODEL, 0)
    batch = jax.random.randint(getkey(), (4, 17), 0, 256)
    step = jax.jit(make_train_step(graphdef, tx, micro_batches, monitor_every=1))
    state, _ = step(init_state(params, tx), batch)
    measured = state.opt_state.metrics

    @jax.jit
    def by_hand(params):
        logits, highest = nnx.merge(graphdef, params).with_attention_logits(batch[:, :-1])
        shares = jax.nn.softmax(logits)
        entropy = -jnp.mean(jnp.sum(shares * jnp.log(shares), axis=-1))
        assert highest.shape == (2, 2)
        found = {"max_attention_logit": highest.max(), "max_logit": logits.max()}
        return found | {"entropy": entropy}

    expected = by_hand(params)
    assert furthest({k: measured[k] for k in expected}, expected) <= rounding_of(by_hand, params)


def test_qk_clip_scales_exactly_the_heads_whose_logits_are_too_large(getkey):
    graphdef, params = init_params(MODEL, 0)
    batch = jax.random.randint(getkey(), (4, 17), 0, 256)
    logits_of = lambda p: nnx.merge(graphdef, p).with_attention_logits(batch[:, :-1])[1]
    logits_of = jax.jit(logits_of)
    highest = logits_of(params)
    threshold = float(jnp.median(highest))
    (entrant,) = line_up("adamw")
    ends = []
    for clip in (0.0, threshold):
        tx = entrant.build(RunConfig(model=MODEL, qk_clip=clip))
        state, _ = jax.jit(make_train_step(graphdef, tx))(init_state(params, tx), batch)
        ends.append(state.params["layers"]["attention"])
    plain, clipped = ends
    gamma = threshold / np.maximum(np.asarray(highest, np.float64), threshold)  # [L, H]
    assert (gamma < 1).any()
    assert (gamma == 1).any()
    # Both query heads share a key head, which takes the root of the larger factor.
    kappa = np.sqrt(gamma.max(axis=1, keepdims=True))
    query = np.repeat(gamma / kappa, MODEL.head_width, axis=1)[:, None]
    # The factors contain the rounding of the logits; the new weights add a few more roundings.
    bound = rounding_of(logits_of, params) + 4 * UNIT

    def compare(name, factor):
        most = bound * np.max(abs(plain[name]["kernel"]))
        expected = factor * plain[name]["kernel"]
        np.testing.assert_allclose(clipped[name]["kernel"], expected, rtol=0, atol=most)

    compare("query", query)
    compare("key", kappa[:, :, None])
    compare("value", 1.0)


def test_words_reach_the_run(tmp_path, text):
    words = "--width 16 --layers 1 --heads 2 --context 16 --batch-size 4 --steps 2 --eval-batches 1"
    devices = "--monitor-every 2 --qk-clip 1 --rollback default --skip-spikes --z-loss 1e-4"
    out = tmp_path / "race"
    files = ["--data", text, "--out", str(out)]
    assert main(["race", "--optimizers", "adamw", *words.split(), *devices.split(), *files]) == 0
    first, second, *_ = records(out / "adamw")
    assert "entropy" in first
    assert "entropy" not in second
    outcome = json.loads((out / "adamw" / "outcome.json").read_text())
    assert outcome["optimizer_milliseconds"] > 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--rollback", "evry=5"], "did you mean every?"),
        (["--rollback", "every=2.5"], "every must be a whole number, got 2.5"),
        (["--rollback", "every=inf"], "every must be a whole number, got inf"),
        (["--rollback", "deviations=nan"], "deviations must be positive"),
        (["--rollback", "every=soon"], "must be a number"),
        (["--rollback", "limit=0"], "limit must be at least 1"),
        (["--qk-clip", "100", "--qk-norm"], "does nothing under"),
        (["--monitor-every", "-1"], "monitor_every must not be negative, got -1"),
    ],
)
def test_bad_words_are_refused(words, expected, tmp_path, capsys):
    assert main(["race", "--out", str(tmp_path / "race"), *words]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "race").exists()

"""Growing batches: the same data in other pieces, rates by rule, exact after an interruption."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ravine import schedules
from ravine.training import programs
from ravine.training import train as loop
from ravine.training.batch_schedule import BatchSchedule
from ravine.training.compare.entrants import line_up
from ravine.training.config import RunConfig
from ravine.training.cost import Cost
from ravine.training.data.batches import train_batches, train_rows
from ravine.training.data.taking import OfManySizes, OfOneSize
from ravine.training.model import ModelConfig
from ravine.training.run.around import Hooks, RunPaths
from ravine.training.run.outcome import Outcome
from ravine.training.step import TrainState

from .schedules_table import SCHEDULE
from .short_race import race, records
from .tolerances import UNIT

pytestmark = pytest.mark.usefixtures("untimed")

MODEL = ModelConfig(width=16, layers=1, heads=2, context=16)
RAMP = BatchSchedule("ramp", ramp_start=2, ramp_examples=8)
SIZES = {"model": MODEL, "batch_size": 8, "eval_batches": 1, "eval_every": 100}


def train(corpus, folder, stop=None, **options):
    """The outcome and records of a run, which may be stopped after a given step."""
    run = RunConfig(**SIZES | options)
    (entrant,) = line_up("adamw")
    folder.mkdir(exist_ok=True)
    outcome = Outcome(entrant.name, entrant.learning_rate)

    def on_record(record):
        if record["step"] == stop:
            raise KeyboardInterrupt

    try:
        loop.train(
            run, entrant.build(run), corpus, outcome, RunPaths(folder), Hooks(on_record=on_record)
        )
    except KeyboardInterrupt:
        assert stop is not None
    return outcome, records(folder)


def test_a_ramp_that_is_interrupted_is_the_one_that_is_not(corpus, tmp_path, monkeypatch):
    sizes, costs, make, cost_of = [], [], programs.make_train_step, loop.cost_of

    def counted(graphdef, tx, micro_batches, **options):
        step = make(graphdef, tx, micro_batches, **options)

        def counting(state, batch):  # runs while tracing: once per program
            sizes.append(batch.shape[0])
            events.append("traced")
            return step(state, batch)

        return counting

    def priced(*args):
        costs.append(cost_of(*args))
        return costs[-1]

    programs._step.cache_clear()
    monkeypatch.setattr(programs, "make_train_step", counted)
    monkeypatch.setattr(loop, "cost_of", priced)
    options = {"steps": 4, "batches": RAMP, "checkpoint_every": 1, "log_every": 1}
    # The clock must not stop for a program before the previous step is done.
    events, stop, wait = [], loop.Clock.stop, jax.block_until_ready
    monkeypatch.setattr(loop.Clock, "stop", lambda clock: events.append("stopped") or stop(clock))
    waited = lambda x: (events.append("waited") if isinstance(x, TrainState) else None) or wait(x)
    monkeypatch.setattr(jax, "block_until_ready", waited)
    # 32 examples: 2 + 2 + 4 in the ramp, then three batches of 8.
    run = RunConfig(**SIZES | options)
    assert [run.batch_sizes.at(at) for at in range(run.updates)] == [2, 2, 4, 8, 8, 8]
    outcome, whole = train(corpus, tmp_path / "whole", **options)
    assert sizes == [2, 4, 8]
    assert " ".join(events).count("waited stopped traced") == 2
    assert [record["step"] for record in whole] == [0, 1, 2, 3, 4, 5, 6]
    train(corpus, tmp_path / "cut", stop=3, **options)
    assert train(corpus, tmp_path / "cut", **options)[1] == whole
    # The cost is that of the largest batch, and the tokens are those of this run's batches.
    two, four, eight = (cost.step_flop for cost in costs[:3])
    assert Cost(**outcome.cost) == costs[2]
    assert eight - four == 2 * (four - two) > 0  # except for work done once per step
    assert outcome.batch_sizes == run.batch_sizes


def test_the_data_are_those_of_a_constant_batch_in_other_pieces(corpus):
    each = train_rows(corpus, context=16, seed=3)
    read = train_batches(corpus, batch_size=4, context=16, seed=3)
    expected = np.concatenate(list(itertools.islice(read, 5)))
    many = OfManySizes(each, 4, (0,), 1)
    np.testing.assert_array_equal(np.concatenate([many.take(n) for n in (2, 4, 6, 8)]), expected)
    assert many.get_state() == {"next_example": 20}
    # The file is checked for changes once per batch.
    asked, watched = [], dataclasses.replace(corpus)
    object.__setattr__(watched, "check_unchanged", lambda: asked.append(True))
    OfManySizes(train_rows(watched, context=16, seed=3), 4, (0, 1), 2).take(8)
    assert len(asked) == 1
    # Each of two shards has its half of every batch.
    half = OfManySizes(each, 4, (1,), 2)
    np.testing.assert_array_equal(half.take(8), expected[4:8])
    # Either one resumes from the position of the other.
    one = OfOneSize(train_batches(corpus, batch_size=4, context=16, seed=3), 4)
    one.set_state({"next_example": 12})
    np.testing.assert_array_equal(one.take(4), expected[12:16])
    many.set_state(one.get_state())
    np.testing.assert_array_equal(many.take(4), expected[16:20])
    with pytest.raises(ValueError, match="10 examples were read, which batches of 4 never do"):
        one.set_state({"next_example": 10})


def test_rates_follow_the_data_and_the_rule():
    run = RunConfig(
        steps=16, warmup_steps=0, schedule="linear", batches=RAMP, **{**SIZES, "batch_size": 8}
    )
    reference = schedules.linear(1.0, 16)
    counts = range(run.updates)
    seen = [run.batch_sizes.data_offset(at) / 8 for at in counts]
    at_data = np.interp(seen, np.arange(17), np.asarray(reference(jnp.arange(17))))
    ratios = np.array([run.batch_sizes.at(at) / 8 for at in counts])
    for rule, power in (("sqrt", 0.5), ("linear", 1.0)):
        rates = run.learning_rate(1.0, rule)(jnp.arange(run.updates))
        np.testing.assert_allclose(rates, at_data * ratios**power, rtol=0, atol=SCHEDULE)


def test_seesaw_has_the_rates_of_its_rule_and_a_bound():
    seesaw = BatchSchedule("seesaw", largest_batch=32)
    run = RunConfig(steps=64, warmup_steps=0, schedule="linear", batches=seesaw, **SIZES)
    assert run.sizes_used == (8, 16, 32)
    assert run.updates < 64
    assert 0 <= run.batch_sizes.data_offset(run.updates) - 64 * 8 < 32
    counts = jnp.arange(run.updates)
    sizes = np.array([run.batch_sizes.at(at) for at in range(run.updates)])
    free = [at for at in range(run.updates) if sizes[at] < 32]
    np.testing.assert_allclose(run.learning_rate(1.0, "sqrt")(counts)[0], 1.0)
    np.testing.assert_allclose(
        np.asarray(run.learning_rate(1.0, "sqrt")(counts))[free],
        np.sqrt(8 / sizes[free]),
        rtol=8 * UNIT,
    )
    by_line = np.asarray(run.learning_rate(1.0, "linear")(counts))
    np.testing.assert_allclose(by_line[free], 1.0, rtol=8 * UNIT)  # the rates of SGD do not change
    # Once the batch reaches its bound it stays there, and the rate falls to the reference's end.
    bound = np.asarray(run.learning_rate(1.0, "sqrt")(counts))[sizes == 32]
    offsets = np.array([run.batch_sizes.data_offset(at) for at in range(run.updates)])[sizes == 32]
    # Half of a schedule, times two.
    np.testing.assert_allclose(bound, (1 - offsets / 8 / 64) * 2, rtol=0, atol=2 * SCHEDULE)


def test_a_seesaw_has_the_sizes_and_rates_of_one_schedule():
    seesaw = BatchSchedule("seesaw")
    for name in ("cosine", "wsd", "one_cycle"):
        run = RunConfig(steps=300, schedule=name, batches=seesaw, **SIZES)
        for peak in (0.02, 7e-4):
            counts = np.arange(run.batch_sizes.boundaries[0] - 1, run.updates)
            sizes = np.array([run.batch_sizes.at(at) for at in counts])
            rates = np.asarray(run.learning_rate(peak, "sqrt")(jnp.asarray(counts)))
            np.testing.assert_allclose(rates, peak * np.sqrt(8 / sizes), rtol=8 * UNIT)
    run = RunConfig(steps=60, schedule="power_law", batches=seesaw, **SIZES)
    with pytest.raises(ValueError, match="proportional to its peak, which power_law is not"):
        run.learning_rate(0.02, "sqrt")


def test_rates_of_a_batch_schedule_need_a_rule():
    with pytest.raises(ValueError, match=r"need a rule; give rule_of"):
        RunConfig(batches=RAMP, **SIZES).learning_rate(1.0)


def test_micro_batches_never_grow():
    run = RunConfig(batches=RAMP, micro_batches=2, **SIZES)
    assert [run.micro_batches_of(size, 1) for size in (2, 4, 8, 16, 6)] == [1, 1, 2, 4, 2]
    assert run.micro_batches_of(16, 2) == 4
    with pytest.raises(ValueError, match="a batch of 6 does not divide by the 4 part"):
        run.micro_batches_of(6, 4)


RAMPED = ["--batch-schedule", "ramp", "--ramp-examples", "6"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--batch-schedule", "ramp"], "ramp needs ramp_start of at least 1"),
        (["--ramp-start", "2"], "options of a ramp are given"),
        (["--batch-schedule", "seesaw", "--largest-batch", "2"], "2 is below the batch_size of 4"),
        (
            [*RAMPED, "--ramp-start", "3"],
            "increment 3 must divide",
        ),
        (["--batch-schedule", "seesaw", "--read-threads", "1"], "read_threads do nothing"),
        (
            ["--batch-schedule", "seesaw", "--schedule", "power_law", "--steps", "60"],
            "power_law is not; take another schedule",
        ),
        (
            [*RAMPED, "--ramp-start", "1", "--ramp-increment", "3", "--mesh", "data=2,tensor=4"],
            "batch of 1 does not divide by the 2 part",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    words, expected, text, tmp_path, capsys
):
    out = tmp_path / "race"
    assert race(*words, "--optimizers", "adamw", text=text, out=out) == 2
    assert expected in capsys.readouterr().err
    assert not out.exists()

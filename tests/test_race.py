"""The race from its command line: results, refusals, divergence, interruption and resumption."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ravine import schedules
from ravine.training import programs
from ravine.training.cli import main
from ravine.training.compare import race as race_module
from ravine.training.compare.summary import difference
from ravine.training.config import RunConfig
from ravine.training.run.outcome import Outcome

from .schedules_table import SCHEDULE
from .short_race import race
from .short_race import timed_records as records
from .tolerances import UNIT

pytestmark = pytest.mark.usefixtures("untimed")


def test_a_race_leaves_metrics_meta_and_a_self_contained_report(tmp_path, text, capsys):
    assert race("--optimizers", "adamw,lion,sgd", text=text, out=tmp_path / "race") == 0
    printed = capsys.readouterr().out
    for name in ("adamw", "lion", "sgd"):
        assert name in printed
        rows = records(tmp_path / "race" / name)
        assert [r["step"] for r in rows if "heldout_loss" in r] == [3, 6]
        assert [r["step"] for r in rows if "loss" in r] == [0, 1, 2, 3, 4, 5]
        assert {"learning_rate", "update_norm", "gradient_norm", "seconds"} <= set(rows[0])
        meta = json.loads((tmp_path / "race" / name / "meta.json").read_text())
        assert meta["optimizer"]["name"] == name
        assert {"versions", "device", "git_revision", "run", "text"} <= set(meta)
    page = (tmp_path / "race" / "report.html").read_text()
    assert "src=" not in page.split("<script")[0]
    assert "<link" not in page


def test_the_schedule_and_its_options_reach_the_run(tmp_path, text):
    words = ["--schedule", "wsd", "--schedule-options", "decay_steps=2, shape=linear"]
    assert race("--optimizers", "sgd", *words, text=text, out=tmp_path / "race") == 0
    rows = [r for r in records(tmp_path / "race" / "sgd") if "loss" in r]
    rates = [row["learning_rate"] / rows[0]["learning_rate"] for row in rows]
    # Quotients of two rates, each from a schedule.
    assert rates == pytest.approx([1, 1, 1, 1, 1, 0.5], rel=0, abs=2 * SCHEDULE)


@pytest.mark.parametrize("asked", [0, 1, 10, 50, 99])
def test_the_warm_up_has_as_many_updates_as_asked_for(asked):
    rates = RunConfig(steps=100, schedule="constant", warmup_steps=asked).learning_rate(1.0)
    values = [float(rates(step)) for step in range(100)]
    wanted = [min(1.0, (step + 1) / max(asked, 1)) for step in range(100)]
    assert values == pytest.approx(wanted, rel=0, abs=2 * UNIT)


def test_a_warm_up_that_nobody_asked_for_is_at_most_a_tenth():
    assert [RunConfig(steps=steps).warmup for steps in (700, 150, 5)] == [20, 15, 0]


def test_a_warm_up_as_long_as_the_schedule_is_refused():
    with pytest.raises(
        ValueError, match="warmup_steps must be fewer than the 100 updates of the sche"
    ):
        RunConfig(steps=100, warmup_steps=100)
    with pytest.raises(ValueError, match="must be fewer than the 60 updates"):
        RunConfig(steps=100, schedule_steps=60, warmup_steps=60)


@pytest.mark.parametrize("name", schedules.schedule_names())
def test_every_schedule_is_reached_by_its_name(name):
    config = RunConfig(steps=100, schedule=name, warmup_steps=10)
    values = jax.jit(config.learning_rate(0.1))(jnp.arange(100))
    assert float(values.max()) == pytest.approx(0.1, rel=3 * UNIT)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_the_first_schedules_keep_their_values(name):
    """The same values as before other schedules existed: a peak, its share at the end, a warm-up."""
    values = RunConfig(steps=100, schedule=name, warmup_steps=10, end_ratio=0.1).learning_rate(0.1)
    x = np.clip((np.arange(105) - 10) / 90, 0, 1)
    fall = {"cosine": 0.5 * (1 + np.cos(np.pi * x)), "linear": 1 - x, "constant": 1 + 0 * x}[name]
    ramp = np.minimum(1, (np.arange(105) + 1) / 10)
    # A rounding of the ramp or of the fall, units of one, is ten units where they are a tenth; six more
    # roundings.
    expected = 0.1 * ramp * (0.1 + 0.9 * fall)
    np.testing.assert_allclose(values(jnp.arange(105)), expected, rtol=16 * UNIT)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--optimizers", "adamv"], "did you mean adam or nadam or adamw"),
        (["--optimizers", "adamw,adamw"], "given twice"),
        (["--optimizers", ","], "no optimizer"),
        (["--stepz", "3"], "--steps"),
        (["--steps", "many"], "--steps"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--schedule-steps", "5"], "steps 6 is more than the 5 updates the schedule covers"),
        (["--schedule", "cosin"], "did you mean cosine"),
        (["--schedule", "wsd", "--schedule-options", "decay=3"], "unknown option of wsd"),
        (["--schedule", "wsd", "--schedule-options", "decay_steps=9"], "longer than the run"),
        (
            ["--schedule", "wsd", "--schedule-options", "decay_steps=1.5"],
            "decay_steps must be a whole number",
        ),
        (["--schedule", "exponential", "--end-ratio", "0"], "never reaches zero"),
        (["--learning-rates", "adamw=0"], "positive and finite"),
        (["--learning-rates", "adamw=nan"], "positive and finite"),
        (["--learning-rates", "adamw=-1"], "positive and finite"),
        (["--learning-rates", "adamw=fast"], "must be a number"),
        (["--learning-rates", "adan=1"], "'adan' is no optimizer of this race"),
        (["--context", "100000"], "and at least 100,001 are needed"),
        (["--width", "15"], "width 15 must be an even multiple of heads 2"),
        (["--attention", "cudnn", "--dtype", "bfloat16"], "needs an NVIDIA GPU"),
        (["--log-every", "0"], "log_every must be at least 1"),
        (["--data", "no-such-file.txt"], "no-such-file.txt"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(words, expected, tmp_path, text, capsys):
    out = tmp_path / "race"
    assert race(*words, text=text, out=out) == 2
    complaint = capsys.readouterr().err
    assert expected in complaint
    assert complaint.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "empty"), (b"\x00\x01text", "not UTF-8"), (b"short", "more text")],
)
def test_unusable_files_are_named(content, expected, tmp_path, capsys):
    (tmp_path / "file.txt").write_bytes(content)
    assert race(text=str(tmp_path / "file.txt"), out=tmp_path / "race") == 2
    complaint = capsys.readouterr().err
    assert expected in complaint
    assert not (tmp_path / "race").exists()


def test_unknown_commands_are_refused(capsys):
    assert main(["walk"]) == 2
    assert "race" in capsys.readouterr().err


def test_results_are_never_overwritten_unasked(tmp_path, text, capsys):
    out = tmp_path / "race"
    assert race("--optimizers", "sgd", text=text, out=out) == 0
    assert race("--optimizers", "sgd", text=text, out=out) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert race("--optimizers", "lion", "--overwrite", text=text, out=out) == 0
    assert not (out / "sgd").exists()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    assert race("--overwrite", text=text, out=tmp_path / "notes") == 2
    assert (tmp_path / "notes" / "mine.txt").exists()


def test_a_diverged_run_is_shown_and_the_others_go_on(tmp_path, text, capsys):
    out = tmp_path / "race"
    rates = "sgd=1e30"
    assert race("--optimizers", "sgd,adamw", "--learning-rates", rates, text=text, out=out) == 0
    printed = capsys.readouterr().out
    assert "diverged" in printed
    assert "diverged" in (out / "report.html").read_text()
    assert records(out / "adamw")[-1]["step"] == 6
    assert len([r for r in records(out / "sgd") if "loss" in r]) < 6


def test_an_interruption_leaves_finished_runs_reported_and_can_be_resumed(
    tmp_path, text, capsys, monkeypatch
):
    out, whole = tmp_path / "race", tmp_path / "whole"
    words = ["--optimizers", "adamw,lion", "--checkpoint-every", "2"]
    assert race(*words, text=text, out=whole) == 0
    capsys.readouterr()

    train = race_module.train

    def interrupted(run_config, tx, corpus, outcome, paths, hooks, *rest):
        def stop(record):
            hooks.on_record(record)
            if outcome.name == "lion" and record["step"] == 4 and "loss" in record:
                raise KeyboardInterrupt

        changed = dataclasses.replace(hooks, on_record=stop)
        return train(run_config, tx, corpus, outcome, paths, changed, *rest)

    monkeypatch.setattr(race_module, "train", interrupted)
    assert race(*words, text=text, out=out) == 130
    printed = capsys.readouterr().out
    assert "adamw" in printed
    assert "interrupted" in printed
    assert (out / "report.html").exists()

    monkeypatch.setattr(race_module, "train", train)
    assert race(*words, "--steps", "7", "--resume", text=text, out=out) == 2
    assert "another configuration" in capsys.readouterr().err
    assert race(*words, "--resume", text=text, out=out) == 0
    for name in ("adamw", "lion"):
        resumed, unbroken = records(out / name), records(whole / name)
        for record in (*resumed, *unbroken):
            del record["seconds"]
        assert resumed == unbroken


def test_a_checkpoint_of_another_text_is_refused(tmp_path, text, capsys):
    mine, out = tmp_path / "mine.txt", tmp_path / "race"
    original = Path(text).read_text()
    mine.write_text(original)
    words = ["--optimizers", "sgd", "--checkpoint-every", "2"]
    assert race(*words, text=str(mine), out=out) == 0
    (out / "sgd" / "outcome.json").unlink()  # as if it was cut off before its end
    before = records(out / "sgd")
    mine.write_text(original[::-1])
    assert race(*words, "--resume", text=str(mine), out=out) == 2
    assert "another text" in capsys.readouterr().err
    assert records(out / "sgd") == before


def test_reaching_interpolates_between_evaluations():
    outcome = Outcome("adamw", 1e-3)
    for step, loss in ((10, 4.0), (20, 3.0), (30, 1.0)):
        outcome.evaluations.append({"step": step, "seconds": step / 10, "heldout_loss": loss})
    assert outcome.reaching(1.5) == {"step": 27.5, "seconds": 2.75}
    assert outcome.reaching(5.0) == {"step": 10, "seconds": 1.0}
    assert outcome.reaching(0.5) is None


def test_several_seeds_have_means_errors_and_noise_named(tmp_path, text, capsys, monkeypatch):
    out = tmp_path / "race"
    traced, telling = [], programs._telling

    def counted(step, *every):
        return telling(lambda *args: traced.append(1) or step(*args), *every)

    programs._step.cache_clear()
    monkeypatch.setattr(programs, "_telling", counted)
    assert race("--optimizers", "adamw,sgd", "--seeds", "3", text=text, out=out) == 0
    assert len(traced) == 2  # one step per optimizer, shared by all seeds
    printed = capsys.readouterr().out
    last = {
        label: [r["heldout_loss"] for r in records(out / label) if "heldout_loss" in r][-1]
        for name in ("adamw", "sgd")
        for label in (name, f"{name}-2", f"{name}-3")
    }
    metas = [json.loads((out / label / "meta.json").read_text()) for label in last]
    assert [meta["run"]["seed"] for meta in metas] == [0, 1, 2, 0, 1, 2]
    # Computed with NumPy: the mean, its standard error, and the standard error of paired differences.
    adamw, sgd = (np.array(list(last.values()))[part] for part in (slice(3), slice(3, 6)))
    error = lambda x: np.std(x, ddof=1) / 3**0.5
    assert f"{np.mean(sgd):.3g} ± {error(sgd):.2g}" in printed
    mean, noise = np.mean(sgd - adamw), error(sgd - adamw)
    said = f"{mean:+.3f} ± {noise:.3f}"
    assert said in printed  # no line is cut off at 80 columns
    page = (out / "report.html").read_text()
    assert said in page
    assert (f"{said} (noise)" in page) == (abs(mean) < 2 * noise)
    # Resuming runs nothing again; another number of seeds is a different race.
    before = {label: (out / label / "metrics.jsonl").stat().st_mtime_ns for label in last}
    words = ["--optimizers", "adamw,sgd", "--resume"]
    assert race(*words, "--seeds", "3", text=text, out=out) == 0
    assert before == {label: (out / label / "metrics.jsonl").stat().st_mtime_ns for label in last}
    assert race(*words, "--seeds", "2", text=text, out=out) == 2
    assert "another configuration" in capsys.readouterr().err


def test_a_difference_within_two_standard_errors_is_noise():
    assert difference([0.1, 0.1, 0.13]) == "+0.110 ± 0.010"
    assert difference([0.1, -0.1, 0.03]) == "+0.010 ± 0.059 (noise)"
    assert difference([0.1]) == "-"  # one seed gives no standard error


def test_what_was_tuned_holds_where_the_run_does_not_say():
    from ravine.training.compare.entrants import line_up, tuned_table

    (entrant,) = line_up("adamw")
    row = tuned_table()["optimizers"]["adamw"]
    adapted = entrant.adapted(RunConfig(steps=1000))
    assert adapted.weight_decay == row["weight_decay"]
    assert adapted.warmup_steps == round(1000 * row["warmup"])
    told = entrant.adapted(RunConfig(steps=1000, weight_decay=0.5, warmup_steps=3))
    assert (told.weight_decay, told.warmup_steps) == (0.5, 3)


def test_a_run_ends_with_a_checkpoint_and_a_longer_race_goes_on_from_it(tmp_path, text, capsys):
    words = ["--optimizers", "adamw,sgd", "--schedule", "constant", "--warmup-steps", "1"]
    short, whole = tmp_path / "short", tmp_path / "whole"
    assert race(*words, "--steps", "10", text=text, out=whole) == 0
    assert race(*words, text=text, out=short) == 0
    assert [path.name for path in (short / "sgd" / "checkpoints").iterdir()] == ["6"]
    capsys.readouterr()

    assert race(*words, "--resume", "--steps", "5", text=text, out=short) == 2
    assert "may only grow" in capsys.readouterr().err
    cosine = [*words[:2], "--steps", "10", "--resume"]
    assert race(*cosine, text=text, out=short) == 2
    assert "adamw would follow cosine, and followed constant there" in capsys.readouterr().err
    assert len(records(short / "sgd")) == 8

    moved = tmp_path / "moved.txt"
    moved.write_text(Path(text).read_text())
    other = ["--steps", "10", "--eval-every", "5", "--checkpoint-every", "4", "--resume"]
    assert race(*words, *other, text=str(moved), out=short) == 0
    assert json.loads((short / "race.json").read_text())["configuration"]["run"]["steps"] == 10
    for name in ("adamw", "sgd"):
        losses = [
            {r["step"]: r["loss"] for r in records(out / name) if "loss" in r}
            for out in (short, whole)
        ]
        assert losses[0] == losses[1]
        assert list(losses[0]) == list(range(10))
        ends = [r for r in records(short / name) if "heldout_loss" in r]
        assert [r["step"] for r in ends] == [3, 6, 10]
        assert ends[-1]["heldout_loss"] == records(whole / name)[-1]["heldout_loss"]
    # A second time, there is nothing left to do.
    before = records(short / "sgd")
    assert race(*words, *other, text=str(moved), out=short) == 0
    assert records(short / "sgd") == before


def test_other_hyperparameters_are_not_resumed(tmp_path, text, capsys):
    words = ["--optimizers", "sgd"]
    assert race(*words, text=text, out=tmp_path / "race") == 0
    again = [*words, "--set", "sgd.momentum=0.5", "--resume"]
    assert race(*again, text=text, out=tmp_path / "race") == 2
    assert "another configuration" in capsys.readouterr().err

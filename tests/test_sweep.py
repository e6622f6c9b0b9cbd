"""The sweep: equal for all, with the trainer's own numbers, resumable, and the source of the table."""

import argparse
import dataclasses
import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import ravine
from ravine.optimizers.registry import OptimizerConfig
from ravine.training.cli import main
from ravine.training.compare import trial
from ravine.training.compare.entrants import Entrant, tuned_table
from ravine.training.compare.space import CHOICES, MIDDLE, RATES, SQUARES, Point, points
from ravine.training.compare.sweep import TRIALS, derived, read_trials
from ravine.training.compare.trial import Trials
from ravine.training.config import RunConfig
from ravine.training.data.corpus import load_corpus
from ravine.training.model import ModelConfig, Transformer
from ravine.training.run.around import RunPaths
from ravine.training.run.outcome import Outcome
from ravine.training.train import train

TEXT = Path(argparse.__file__)  # 100 kB of Python
MODEL = ModelConfig(width=16, layers=1, heads=1, context=16)
RUN = RunConfig(
    steps=12, batch_size=4, eval_every=12, eval_batches=3, seed=7, data=(TEXT,), model=MODEL
)


def test_all_optimizers_search_the_same_points():
    unit = {
        name: [point.learning_rate / RATES.get(name, MIDDLE) for point in points(name, 8, seed=3)]
        for name in ("adamw", "muon", "sgd", "soap")
    }
    for found in unit.values():  # three digits are kept
        np.testing.assert_allclose(found, unit["adamw"], rtol=0.01)
    spread = np.log(unit["adamw"]) / math.log(16)
    assert all(np.histogram(spread, bins=8, range=(-1, 1))[0] == 1)  # one in every eighth


def test_every_registered_optimizer_has_a_space():
    """Both decay rates, its own parameter where it has one, and AdamW's points."""
    for name in ravine.names():
        adamw, found = points("adamw", 16, seed=0), points(name, 16, seed=0)
        accepts = found[0].optimizer.accepts
        searched = {key for p in found for key, _ in p.optimizer.hyperparameters}
        assert not accepts("b2") or {"b1", "b2"} <= searched or name == "rmsprop"
        assert name not in CHOICES or CHOICES[name][0] in searched
        if not SQUARES.get(name) and accepts("b1") and accepts("b2"):
            for mine, theirs in zip(found, adamw, strict=True):
                assert (
                    dict(mine.optimizer.hyperparameters).items()
                    >= dict(theirs.optimizer.hyperparameters).items()
                )
    adan = [dict(point.optimizer.hyperparameters) for point in points("adan", 16, seed=0)]
    assert [p["b3"] for p in adan] == [p.optimizer.value("b2") for p in points("adamw", 16, seed=0)]
    assert {p["b2"] for p in adan} == {0.92, 0.8}  # of differences of gradients


@pytest.mark.parametrize(
    "name",
    [
        "muon",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "adamw",
                "sgd",
                "adan",
                "ademamix",
                "mars",
                "schedule_free_sgd",
                "sophia_h",
            )
        ),
    ],
)
def test_a_trial_has_the_trainers_own_loss(name, tmp_path):
    """Equal up to how compiled-in numbers round differently from arguments, over 12 small steps."""
    (point,) = points(name, 1, seed=5)
    point = dataclasses.replace(point, learning_rate=RATES.get(name, MIDDLE), warmup=0.1)
    corpus = load_corpus((TEXT,)).for_tuning()
    run = dataclasses.replace(RUN, warmup_steps=1, weight_decay=point.weight_decay)
    entrant = Entrant(point.optimizer, point.learning_rate)
    outcome, run = Outcome(name, point.learning_rate), entrant.adapted(run)
    train(run, entrant.build(run), corpus, outcome, RunPaths(tmp_path))
    found = Trials(run, corpus).loss(point, 12)
    # 12 steps with a loss near 5 nats, float32 sums over 16 to 64 numbers: 12 * 5 * 64 * 6e-8 = 2e-4.
    assert found == pytest.approx(outcome.final_loss, abs=2e-4)
    assert abs(found - math.log(256)) > 0.05  # the model has learned


def test_seeds_share_a_program(monkeypatch):
    corpus = load_corpus((TEXT,)).for_tuning()
    trial._programs.cache_clear()
    traced, make = [], trial.make_train_step
    monkeypatch.setattr(trial, "make_train_step", lambda *a, **k: traced.append(1) or make(*a, **k))
    point = Point(0.1, 0.0, 0.0, OptimizerConfig("sgd"))
    trials = Trials(RUN, corpus)
    other = trials.with_seed(8)
    losses = [of.loss(point, 4) for of in (trials, other, trials)]
    assert len(traced) == 1
    assert losses[0] == losses[2] != losses[1]
    assert losses[1] == Trials(dataclasses.replace(RUN, seed=8), corpus).loss(point, 4)


@pytest.mark.parametrize(
    ("vocabulary", "loss", "fused"),
    [(8192, "auto", False), (8193, "auto", True), (8193, "plain", False), (256, "fused", True)],
)
def test_a_trial_takes_the_fused_loss_where_a_race_does(vocabulary, loss, fused, monkeypatch):
    """The fused loss never asks the model for logits."""
    model = dataclasses.replace(MODEL, vocabulary=vocabulary, width=8)
    run = dataclasses.replace(RUN, model=model, loss=loss)
    asked, logits = [], Transformer.logits
    monkeypatch.setattr(Transformer, "logits", lambda *a: asked.append(1) or logits(*a))
    corpus = load_corpus((TEXT,)).for_tuning()
    assert math.isfinite(Trials(run, corpus).loss(Point(0.1, 0.0, 0.0, OptimizerConfig("sgd")), 2))
    assert run.fused == fused == (not asked)


def test_a_diverged_trial_is_infinite_and_null_in_the_file(tmp_path):
    corpus = load_corpus((TEXT,)).for_tuning()
    point = Point(1e30, 0.0, 0.0, OptimizerConfig("sgd"))
    assert Trials(RUN, corpus).loss(point, 12) == math.inf
    row = {"optimizer": "sgd", "trial": 0, "steps": 12, "task": "t", "learning_rate": 1.0}
    assert derived([row | {"heldout_loss": None}])["optimizers"] == {}


SMALL = {
    "optimizers": "sgd,adamw",
    "trials": 4,
    "rungs": "4 8",
    "batch-size": 2,
    "eval-batches": 2,
    "width": 16,
    "layers": 1,
    "heads": 1,
    "unroll": 1,
    "context": 16,
    "data": TEXT,
}


def test_a_stopped_sweep_goes_on_with_what_is_missing(tmp_path, capsys):
    out = tmp_path / "trials.jsonl"
    given = " ".join(f"--{name} {value}" for name, value in SMALL.items()).split()
    words = ["sweep", *given, "--out", str(out)]
    assert main(words) == 0
    lines = out.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    counts = {(row["optimizer"], row["steps"]) for row in rows}
    assert counts == {("sgd", 4), ("sgd", 8), ("adamw", 4), ("adamw", 8)}
    assert len(rows) == 2 * (4 + 1)  # a quarter of four continues
    for name in ("sgd", "adamw"):
        first = {
            r["trial"]: r["heldout_loss"] for r in rows if (r["optimizer"], r["steps"]) == (name, 4)
        }
        (last,) = [r["trial"] for r in rows if (r["optimizer"], r["steps"]) == (name, 8)]
        assert last == min(first, key=first.__getitem__)
    assert all(row["versions"]["jax"] == jax.__version__ for row in rows)

    out.write_text("\n".join(lines[:3]) + "\n")
    assert main(words) == 0
    told = lambda line: {k: v for k, v in json.loads(line).items() if k != "started"}
    assert list(map(told, out.read_text().splitlines())) == list(map(told, lines))

    out.write_text(lines[0] + "\n{\n")
    capsys.readouterr()
    assert main(words) == 2
    assert "is damaged in line 2" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["{", "3", "null", "[]", "{}"])
def test_a_line_that_is_not_a_trial_is_refused_by_its_number(line, tmp_path):
    file = tmp_path / "trials.jsonl"
    file.write_text(f"{TRIALS.read_text().splitlines()[0]}\n{line}\n")
    with pytest.raises(ValueError, match="is damaged in line 2; remove that line, and its trial"):
        read_trials(file)


def test_the_races_table_is_what_the_trials_say():
    """Nobody edits the table by hand: `python -m ravine sweep --derive` generates it."""
    assert tuned_table() == derived(read_trials(TRIALS))


def test_every_entrant_had_as_many_trials():
    table = tuned_table()["optimizers"]
    assert set(table) == set(ravine.names())
    assert len({(row["trials"], row["steps"]) for row in table.values()}) == 1


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("--trials 0", "trials must be at least 1"),
        ("--rungs 8 4", "rungs must be rising numbers"),
        ("--optimizers adamv", "unknown optimizer 'adamv'; did you mean adam"),
        ("--steps 300 --z-loss 1e-4", "only a race uses --steps, --z-loss; leave out"),
        ("--optimizers sgd,sgd", "must be named once each"),
    ],
)
def test_bad_sweeps_are_refused(given, named, tmp_path, capsys):
    words = ["sweep", "--out", str(tmp_path / "a" / "b.jsonl"), *given.split()]
    assert main(words) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_a_sweep_reports_its_own_trials_only(tmp_path, capsys, monkeypatch):
    """Wider models and longer rungs of earlier sweeps in the file have lower losses."""
    monkeypatch.setattr(
        Trials, "loss", lambda trials, _, steps: 128 / steps / trials._run.model.width
    )

    def best(width, rungs):
        given = SMALL | {"optimizers": "sgd", "width": width, "rungs": rungs}
        words = " ".join(f"--{name} {value}" for name, value in given.items()).split()
        assert main(["sweep", *words, "--out", str(tmp_path / "trials.jsonl")]) == 0
        return re.findall(r"^ +sgd +([\d.]+)", capsys.readouterr().out, re.MULTILINE)

    assert best(16, "4 8") == ["1.000"]
    assert best(8, "4") == ["4.000"]
    assert best(16, "2 4") == ["2.000"]
    assert best(16, "4 8") == ["1.000"]

"""The studies run, and report what is expected of a small case."""

import argparse
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ravine.training.cli import main
from ravine.training.compare.entrants import line_up
from ravine.training.compare.kept import digest
from ravine.training.compare.runs import Late, kept_losses
from ravine.training.config import RunConfig
from ravine.training.model import ModelConfig
from ravine.training.studies.decay import DecayStudyConfig, largest_rise
from ravine.training.studies.optimum import Optimum, optimum, search
from ravine.training.studies.width import moved
from ravine.training.studies.width_config import WidthStudyConfig
from ravine.training.studies.width_lines import Line
from ravine.training.studies.width_runs import WidthRuns
from rich.console import Console

SMALL = """--steps 12 --batch-size 4 --eval-batches 1 --width 16 --layers 1 --heads 1 --unroll 1
--context 16"""


def test_the_study_of_decay_runs_and_matches_the_effective_rate(tmp_path, capsys):
    words = ["study", "decay", *SMALL.split(), "--no-bfloat16", "--data", argparse.__file__]
    assert main([*words, "--weight-decay", "5", "--out", str(tmp_path)]) == 0
    assert "without, rate matched" in capsys.readouterr().out
    runs = json.loads((tmp_path / "decay.json").read_text())
    assert (tmp_path / "decay.png").stat().st_size > 10_000
    norms = {name: np.array(run["norms"]) for name, run in runs.items()}
    assert norms["with decay"][-1] < norms["without"][-1]
    # The first update is the same in all runs: equal parameters and equal norms.
    assert len({run["losses"][0] for run in runs.values()}) == 1
    # The matched run keeps its large weights and moves them further than the plain run.
    assert norms["without, rate matched"][-1] > norms["with decay"][-1]


def test_the_largest_rise_is_after_the_lowest_mean():
    assert largest_rise([5.0, 4.0, 3.0, 2.0], window=1) == 0
    assert largest_rise([1.0, 3.0], window=5) == 0
    assert largest_rise([5.0, 1.0, 1.0, 4.0, 1.0], window=2) == 1.5


def searched(valley, start=1.0, most=math.inf):
    """What a search tries and finds for a loss with one valley."""
    found = {}

    def measure(factor):
        if len(found) >= most:
            raise Late
        return [1 + (math.log2(factor) - valley) ** 2]

    search(measure, found, start)
    return found


@pytest.mark.parametrize(("valley", "start"), [(0.1, 1.0), (3.3, 1.0), (-2.4, 2**0.5), (0.9, 8.0)])
def test_the_search_goes_on_until_worse_rates_are_on_both_sides(valley, start):
    found = searched(valley, start)
    best = optimum(found)
    assert best.inside
    assert best.log2 == pytest.approx(valley)
    assert best.error == pytest.approx(0, abs=1e-6)
    halves = {round(2 * math.log2(factor)): loss for factor, loss in found.items()}
    around = min(halves, key=halves.get)
    assert {around - 2, around - 1, around + 1, around + 2} <= set(halves)


def test_a_search_ends_with_what_it_has_when_its_time_is_over():
    assert not searched(5.0, most=0)
    at = optimum(searched(5.0, most=3))
    assert (at.log2, at.inside) == (2, False)


def test_the_error_of_an_optimum_includes_scatter_around_the_parabola_and_between_seeds():
    bowl = {2.0**k: 1 + 0.1 * k**2 for k in (-1, -0.5, 0, 0.5, 1)}
    rough = {rate: [loss + 0.01 * (-1) ** i] for i, (rate, loss) in enumerate(bowl.items())}
    assert 0.01 < optimum(rough).error < 0.2
    apart = {rate: [loss, loss + 0.1 * math.log2(rate)] for rate, loss in bowl.items()}
    assert optimum(apart).error == pytest.approx(0.25)  # vertices 0 and -1/2, over the root of 2
    assert not optimum({1.0: [math.inf], 2.0: [1.0]}).inside


def test_the_interval_of_a_move_has_the_degrees_of_freedom_of_both_ends():
    end = Optimum(log2=0.0, error=0.1, free=2, loss=1.0, inside=True)
    ends = lambda first, last: {("adamw", True, 64): first, ("adamw", True, 256): last}
    by, half = moved(ends(end, end._replace(log2=0.5)), "adamw", True)
    assert by == 0.5
    assert half == pytest.approx(2.1318 * 0.1 * 2**0.5, rel=1e-4)  # Student's with 4, two from each
    exact = end._replace(error=0.0)
    assert moved(ends(exact, end), "adamw", True)[1] == pytest.approx(2.9200 * 0.1, rel=1e-4)
    assert moved(ends(exact, exact), "adamw", True) == (0.0, 0.0)
    unknown = end._replace(error=math.inf, free=0)
    assert moved(ends(end, unknown), "adamw", True) == (0.0, math.inf)


WIDE = """--widths 8 16 --length 3 --batch-size 2 --eval-batches 1 --width 8 --layers 1 --heads 1
--unroll 1 --context 8 --optimizers adamw"""


def test_the_study_of_width_reports_what_is_there_when_its_time_is_over(tmp_path, capsys):
    words = ["study", "width", *WIDE.split(), "--data", argparse.__file__, "--out", str(tmp_path)]
    assert main([*words, "--minutes", "1e-9"]) == 0
    assert "by the rule" in capsys.readouterr().out
    assert json.loads((tmp_path / "width.json").read_text())["best"] == []
    (tmp_path / "runs.jsonl").write_text("{")
    assert main(words) == 2
    assert "is damaged in line 1; remove that line" in capsys.readouterr().err


@pytest.mark.slow
def test_the_study_of_width_goes_on_where_it_stopped(tmp_path, capsys):
    words = ["study", "width", *WIDE.split(), "--data", argparse.__file__, "--out", str(tmp_path)]
    assert main([*words, "--no-control"]) == 0
    first = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert main(words) == 0
    rows = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [json.loads(line) for line in first] == rows[: len(first)]
    assert {row["width"] for row in rows} == {8, 16}
    assert {row["width"] for row in rows[len(first) :]} == {16}  # the rule changes only wide models
    assert len({tuple(row["key"]) for row in rows}) == len(rows)
    assert (tmp_path / "width.png").stat().st_size > 10_000
    assert "one for all" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["muon", "shampoo", "soap"])
def test_with_a_fallback_rate_only_that_of_the_matrices_is_swept(name):
    (entrant,) = line_up(name)
    line = Line(entrant, fallback_rate=0.01)
    params = {"dense": {"kernel": jnp.ones((4, 4))}, "norm": {"scale": jnp.ones(4)}}
    grads = jax.tree.map(lambda x: x + jnp.arange(1.0 * x.size).reshape(x.shape), params)
    steps = []
    for factor in (1.0, 2.0):
        tried = line.at(factor)
        tx = tried.optimizer.build(tried.learning_rate, weight_decay=0.0)
        steps.append(tx.update(grads, tx.init(params), params)[0])
    kernels = [np.asarray(step["dense"]["kernel"]) for step in steps]
    np.testing.assert_allclose(kernels[1], 2 * kernels[0], rtol=1e-6)
    for step in steps:
        np.testing.assert_allclose(step["norm"]["scale"], -0.01, rtol=1e-6)  # Adam's first step


def test_a_fallback_rate_at_the_tuned_one_is_the_same_run_under_another_key(tmp_path):
    config = WidthStudyConfig(
        optimizers="muon",
        widths=(8, 16),
        length=12,
        run=RunConfig(
            model=ModelConfig(width=8, layers=1, heads=1, unroll=1, context=8),
            batch_size=2,
            eval_batches=1,
            data=(argparse.__file__,),
        ),
    )
    (entrant,) = line_up("muon")
    together, apart = Line(entrant), Line(entrant, entrant.learning_rate)
    with kept_losses(config.run, tmp_path / "runs.jsonl") as (corpus, kept):
        runs = WidthRuns(config, corpus, kept, Console(quiet=True))
        found = {
            (line.name, width, factor): runs.losses(line, True, width, factor)[0]
            for width in config.widths
            for line in (together, apart)
            for factor in (1.0, 2.0)
        }
    names = ("muon", "muon, fallback 0.0493")
    for width in config.widths:  # decay is coupled in one and independent in the other
        same, other = ([found[name, width, factor] for name in names] for factor in (1.0, 2.0))
        assert same[0] == pytest.approx(same[1], rel=1e-5)
        assert abs(other[0] - other[1]) > 1e-3
    rows = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert len({tuple(row["key"]) for row in rows}) == len(rows) == 8
    told = [row.get("fallback_rate") for row in rows]
    assert told == [None, None, 0.0493, 0.0493] * 2


def test_runs_without_a_fallback_rate_keep_their_keys():
    (entrant,) = line_up("muon")
    tried = Line(entrant).at(1.0)
    told = [tried.optimizer.to_json(), tried.learning_rate, tried.weight_decay, tried.warmup]
    assert digest(told) == "7dc094d2c02c"  # of the first run of Muon in docs/width/runs.jsonl


def test_a_line_for_the_matrices_alone_stands_beside_that_for_both():
    config = WidthStudyConfig(optimizers="adamw,muon,soap", fallback_rates="muon=0.02")
    assert [line.name for line in config.lines()] == [
        "adamw",
        "muon",
        "muon, fallback 0.02",
        "soap",
    ]
    assert [line.kinds(control=True) for line in config.lines()] == [
        (True, False),
        (True, False),
        (True,),
        (True, False),
    ]


def test_bad_input(capsys):
    assert main(["study", "decai"]) == 2
    assert "no study 'decai'; write: study decay or study width" in capsys.readouterr().err
    assert main(["study"]) == 2
    assert "study needs a name; write: study decay" in capsys.readouterr().err
    with pytest.raises(ValueError, match="widths must be two or more that rise"):
        WidthStudyConfig(widths=(64,))
    with pytest.raises(ValueError, match="minutes must be finite and not negative"):
        WidthStudyConfig(minutes=-1.0)
    with pytest.raises(
        ValueError, match="adamw has no fallback: all parameters are its own; leave"
    ):
        WidthStudyConfig(fallback_rates="adamw=0.01")
    with pytest.raises(ValueError, match="'lion' is no optimizer of this study"):
        WidthStudyConfig(fallback_rates="lion=0.01")
    with pytest.raises(
        ValueError, match="learning rate of muon's fallback must be positive and fin"
    ):
        WidthStudyConfig(fallback_rates="muon=-0.01")
    with pytest.raises(ValueError, match="muon must be a number, got 'tuned'"):
        WidthStudyConfig(fallback_rates="muon=tuned")
    with pytest.raises(ValueError, match="weight_decay must be finite and positive, got 0"):
        DecayStudyConfig(weight_decay=0.0)
    with pytest.raises(ValueError, match="steps must be at least 2, got 1"):
        DecayStudyConfig(steps=1)
    with pytest.raises(ValueError, match="float32, and then in bfloat16; leave out --dtype"):
        DecayStudyConfig(model=ModelConfig(dtype="bfloat16"))

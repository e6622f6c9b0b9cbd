"""The page of a race: what it reports and draws, and that it is self-contained."""

import argparse
import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import vl_convert
from ravine.schedules import BatchSizes
from ravine.training.batch_schedule import BatchSchedule
from ravine.training.compare.charts import POINTS, SOLID, specification
from ravine.training.compare.hardware import hardware_rows
from ravine.training.compare.report import VEGA_LITE, headline, write_report
from ravine.training.compare.results import race_lines
from ravine.training.compare.summary import summary_columns, summary_rows
from ravine.training.config import RunConfig
from ravine.training.cost import Cost
from ravine.training.data.corpus import load_corpus
from ravine.training.identity import to_json
from ravine.training.run.outcome import Outcome

SIX_DIGITS = 5e-6  # half of the last digit

RUN = RunConfig(steps=300)


def outcome(name, end, repeat=0, steps=300, status="finished"):
    """A run whose loss falls to a given value, with seeded noise."""
    rng = np.random.default_rng([repeat, *name.encode()])
    loss = lambda step: end + 2 * math.exp(-step / 60)
    shared = {"learning_rate": 0.1, "update_norm": 0.2, "gradient_norm": 1.0}
    records = [
        {"step": s, "seconds": s / 10, "loss": loss(s) + 0.1 * rng.normal(), **shared}
        for s in range(steps)
    ]
    evaluations = [
        {"step": s, "seconds": s / 10, "heldout_loss": loss(s) + 0.002 * rng.normal()}
        for s in range(50, steps + 1, 50)
    ]
    return Outcome(name, 0.1, repeat, status, records, evaluations, parameters=1000, trials=16)


def race(seeds=1):
    ends = {"adamw": 1.5, "muon": 1.4, "sgd": 1.6}
    return [outcome(name, end, seed) for name, end in ends.items() for seed in range(seeds)]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    out = tmp_path_factory.mktemp("race")
    corpus = load_corpus((Path(argparse.__file__),))
    race_file = {"optimizers": {"muon": {"name": "muon", "b1": 0.9}}}
    (out / "race.json").write_text(json.dumps(race_file))
    return write_report(out, race(seeds=2), RUN, corpus).read_text()


def test_the_page_loads_nothing_and_is_read_without_scripts(page):
    head, _, scripts = page.partition('<script type="application/json"')
    assert not re.findall(r"\b(?:src|href)=", head.split("<noscript>")[0])
    assert head.count("<noscript>") == head.count("<svg") == 1
    assert "<h1>muon ends lowest" in head
    assert "&#34;b1&#34;: 0.9" in head  # the hyperparameters
    given = scripts.partition(">")[2].partition("</script>")[0]
    assert json.loads(given)["concat"]
    assert '<html lang="en">' in page
    assert "1,000 parameters, 300 steps of 1,024 tokens each." in page
    assert head.count('scope="col"') == head.count('<button type="button">') > 10


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("along", ["steps", "seconds", "tokens"])
def test_the_charts_are_drawn_whatever_they_are_drawn_against(seeds, along):
    spec = specification(race(seeds), RUN)
    for switch, value in zip(spec["params"], (along, False, True), strict=True):
        switch["value"] = value
    svg = vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE)
    titles = ("speed-up over adamw", "held-out loss", "training loss", "learning rate")
    for title in titles:
        assert title in svg
    for color in ("#000000", "#0072B2", "#E69F00"):
        assert f'stroke="{color}"' in svg
    assert "NaN" not in svg


def test_growing_batches_are_counted_as_each_optimizer_has_them(tmp_path):
    """100 updates of 16 sequences of 64 tokens, then 200 of 32; Muon's batch grows at update 200."""
    run = dataclasses.replace(RUN, batches=BatchSchedule("seesaw"))
    outcomes = [outcome("adamw", 1.5), outcome("muon", 1.4)]
    for made, boundary in zip(outcomes, (100, 200), strict=True):
        made.batch_sizes = BatchSizes((16, 32), (boundary,))
        made.cost = dataclasses.asdict(Cost(2.0, 1.0, 0.0, 1, 1))
    chart = next(
        chart
        for chart in specification(outcomes, run)["concat"]
        if chart["title"]["text"] == "held-out loss"
    )
    last = {p["optimizer"]: p["tokens"] for p in chart["data"]["values"] if p["steps"] == 300}
    assert last == {"adamw": (1600 + 6400) * 64, "muon": (3200 + 3200) * 64}
    # Rivals are compared by tokens, not updates: halfway through its updates, Muon has seen less text.
    loss = outcomes[0].final_loss
    at = outcomes[1].reaching(loss)["step"]
    assert 150 < at < 200
    tokens = at * 16 * 64
    (bar,) = (
        bar["speedup"]
        for bar in specification(outcomes, run)["concat"][0]["data"]["values"]
        if bar["optimizer"] == "muon"
    )
    assert bar == pytest.approx(last["adamw"] / tokens, rel=SIX_DIGITS)
    assert f"after {tokens:,.0f} of {last['adamw']:,.0f} tokens." in headline(outcomes, run)
    column = summary_columns(outcomes, run).index("million tokens to adamw's loss")
    found = {row[0]: row[column] for row in summary_rows(outcomes, run)}
    assert found == {"adamw": "0.512", "muon": f"{1e-6 * tokens:.3f}"}
    speeds = [row[1] for row in hardware_rows(outcomes, run, "cpu")]
    assert speeds == [f"{tokens / 29.9:,.0f}" for tokens in last.values()]
    corpus = load_corpus((Path(argparse.__file__),))
    page = write_report(tmp_path, outcomes, run, corpus).read_text()
    assert "the data of 300 steps of 1,024 tokens each, in batches that grow." in page


def test_curves_have_few_points_and_a_band_over_seeds():
    spec = specification(race(seeds=3), RUN)
    curves = {chart["title"]["text"]: chart["data"]["values"] for chart in spec["concat"]}
    training = [point for point in curves["training loss"] if point["optimizer"] == "muon"]
    assert len(training) == POINTS
    assert training[-1]["steps"] == 299
    assert training[-1]["tokens"] == 299 * RUN.batch_size * RUN.model.context
    assert all(point["low"] <= point["smooth"] <= point["high"] for point in training)
    (muon,) = (bar for bar in spec["concat"][0]["data"]["values"] if bar["optimizer"] == "muon")
    ratios = [
        300 / outcome("muon", 1.4, k).reaching(outcome("adamw", 1.5, k).final_loss)["step"]
        for k in range(3)
    ]
    assert muon["speedup"] == pytest.approx(np.mean(ratios), rel=SIX_DIGITS)
    assert {bar["optimizer"] for bar in spec["concat"][0]["data"]["values"]} == {"adamw", "muon"}


def test_a_single_evaluation_is_drawn_as_a_point():
    spec = specification([outcome("adamw", 1.5, steps=50)], RUN)
    held_out = spec["concat"][0]
    assert held_out["title"]["text"] == "held-out loss"
    assert held_out["data"]["values"][0]["alone"]


def test_a_race_without_evaluations_is_drawn():
    early = [outcome(name, 1.5, steps=20, status="interrupted") for name in ("adamw", "muon")]
    svg = vl_convert.vegalite_to_svg(specification(early, RUN), vl_version=VEGA_LITE)
    assert "training loss" in svg
    assert "held-out" not in svg


def test_many_lines_are_told_apart_by_dashes_too():
    names = ["adamw", "muon", "soap", "shampoo", "lion", "sgd", "adam", "adan"]
    assert len(names) > SOLID
    spec = specification([outcome(name, 1.5) for name in names], RUN)
    lines = spec["concat"][1]["layer"][0]["encoding"]
    dashes = lines["strokeDash"]["scale"]["range"]
    assert dashes[0] != dashes[-1]


@pytest.mark.parametrize(
    ("outcomes", "said"),
    [
        ([], "No optimizer has come to its end."),
        ([outcome("sgd", 1.0, status="diverged")], "No optimizer has come to its end."),
        ([outcome("muon", 1.4)], "muon ends lowest, at 1.41 nats per token."),
        (race(), "one seed does not show"),
        (race(seeds=3), "over 3 seeds. It passes adamw's last loss after"),
        (
            [outcome("adamw", 1.4), outcome("sgd", 1.6)],
            "adamw ends lowest, at 1.41 nats per token.",
        ),
    ],
)
def test_the_headline_says_what_came_out(outcomes, said):
    assert said in headline(outcomes, RUN)


def test_the_tables_of_results_read_the_batches_of_every_run(tmp_path):
    """A Seesaw schedule of 300 steps makes fewer updates; its boundary depends on the warm-up."""
    seesaw = dataclasses.replace(RUN, batches=BatchSchedule("seesaw", largest_batch=64))
    runs = [dataclasses.replace(seesaw, warmup_steps=warmup) for warmup in (10, 20)]
    assert runs[0].batch_sizes != runs[1].batch_sizes
    made = []
    for name, run in zip(("adamw", "muon"), runs, strict=True):
        folder = tmp_path / name
        folder.mkdir()
        run_made = outcome(name, {"adamw": 1.5, "muon": 1.4}[name], steps=run.updates)
        run_made.evaluations.append(
            {"step": run.updates, "seconds": 30.0, "heldout_loss": run_made.final_loss}
        )
        run_made.cost = dataclasses.asdict(Cost(2.0, 1.0, 0.0, 1, 1))
        run_made.save(folder)
        with (folder / "metrics.jsonl").open("w") as file:
            file.writelines(
                json.dumps(r) + "\n"
                for r in sorted(
                    run_made.steps + run_made.evaluations,
                    key=lambda r: r["step"] - ("heldout_loss" in r) / 2,
                )
            )
        meta = {"run": to_json(run), "device": "cpu"}
        (folder / "meta.json").write_text(json.dumps(meta))
        run_made.batch_sizes = run.batch_sizes
        made.append(run_made)
    expected = summary_rows(made, seesaw)
    assert race_lines(tmp_path)[2:] == [f"| {' | '.join(row)} |" for row in expected]
    heading, _, *told = race_lines(tmp_path, "losses")
    assert not any(word in heading for word in ("seconds", " ms ", "compile"))
    assert "held-out loss" in heading
    assert [line.split(" | ")[:5] for line in told] == [
        line.split(" | ")[:5] for line in race_lines(tmp_path)[2:]
    ]
    told = race_lines(tmp_path, "hardware")[2:]
    for run_made, run in zip(made, runs, strict=True):
        tokens = run.batch_sizes.data_offset(run.updates) * run.model.context
        speed = tokens / run_made.steps[-1]["seconds"]
        assert any(run_made.name in line and f"| {speed:,.0f} |" in line for line in told)

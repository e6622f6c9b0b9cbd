"""A race's costs: operations and memory by hand, and the front of loss against time."""

import argparse
import io
import math
from pathlib import Path

import pytest
from ravine.training import train as loop
from ravine.training.compare.entrants import line_up
from ravine.training.compare.hardware import COLUMNS, front, hardware_rows, hardware_table
from ravine.training.config import RunConfig
from ravine.training.cost import Cost
from ravine.training.data.corpus import load_corpus
from ravine.training.model import ModelConfig
from ravine.training.run.around import RunPaths
from ravine.training.run.outcome import Outcome
from rich.console import Console

MODEL = ModelConfig(width=64, layers=2, heads=2, context=32)
RUN = RunConfig(steps=2, batch_size=4, eval_every=2, eval_batches=1, model=MODEL)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    corpus, found = load_corpus((Path(argparse.__file__),)), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "optimizer_milliseconds", lambda *args: math.nan)
        for entrant in line_up("adamw,muon,shampoo"):
            outcome = Outcome(entrant.name, entrant.learning_rate)
            folder = tmp_path_factory.mktemp("run")
            loop.train(RUN, entrant.build(RUN), corpus, outcome, RunPaths(folder))
            found.append(outcome)
    return found


def test_operations_of_the_model_are_those_counted_by_hand(outcomes):
    """6 per matrix parameter and token; 12 per pair of tokens, layer and unit of attention width."""
    cost = Cost(**outcomes[0].cost)
    tokens, width, hidden = 4 * 32, 64, MODEL.hidden
    multiplied = 2 * (4 * width**2 + 3 * width * hidden) + 256 * width
    by_hand = 6 * multiplied * tokens + 12 * 2 * width * 32 * tokens
    # Norms, rotations, SiLU, softmax and the loss take a few operations per activation.
    assert 1.0 <= (cost.step_flop - cost.optimizer_flop) / by_hand <= 1.1


def test_operations_and_memory_of_the_optimizer(outcomes):
    adamw, muon, shampoo = (Cost(**outcome.cost) for outcome in outcomes)
    n = outcomes[0].parameters
    # Two averages, their bias corrections, the root, the quotient, the decay and the rate.
    assert 10 * n <= adamw.optimizer_flop <= 25 * n
    assert 0 < adamw.state_bytes - 8 * n <= 64  # the rest are counts and rates
    assert adamw.peak_bytes >= 12 * n
    # One moment for the matrices; five steps of X X' and (b A + c A A) X for X of shape [64, m], less
    # what the Gram form saves where m exceeds 64.
    assert muon.state_bytes < adamw.state_bytes < shampoo.state_bytes
    sides = 2 * (4 * [64] + 3 * [MODEL.hidden])
    products = sum(2 * (2 * 64 * 64 * m + 64**3) for m in sides)
    assert 0.6 <= muon.optimizer_flop / (5 * products) <= 1.1
    assert shampoo.refresh_flop > shampoo.optimizer_flop > muon.refresh_flop


def test_the_table_fits_a_terminal(outcomes):
    rows = hardware_rows(outcomes, RUN, "TPU v5 lite")
    assert [len(row) for row in rows] == [len(COLUMNS)] * 3
    assert all("MFU" in row[1] for row in rows)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(hardware_table(outcomes, RUN))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text


def test_a_run_that_never_led_has_no_span():
    def run(name, *points):
        evaluated = [{"step": 0, "seconds": t, "heldout_loss": loss} for t, loss in points]
        return Outcome(name, 0.1, evaluations=evaluated)

    found = front([run("a", (1.0, 3.0), (4.0, 1.0)), run("b", (2.0, 2.0)), run("c", (3.0, 2.5))])
    assert found == {"a": [(1.0, 2.0), (4.0, 4.0)], "b": [(2.0, 4.0)], "c": []}

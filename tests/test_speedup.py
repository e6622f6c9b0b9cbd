"""Speed-up in tokens: the fit, its inverse, and the command that goes on where it was stopped."""

import argparse
import math
from pathlib import Path

import numpy as np
import pytest
from ravine.training.cli import main
from ravine.training.compare.speedup import fitted, steps_for, worth

STEPS = (100, 200, 400, 800, 1600)


@pytest.mark.parametrize(("a", "b", "c"), [(1.2, 30.0, 0.6), (0.0, 5.0, 0.2), (2.0, 400.0, 1.1)])
def test_a_power_law_with_an_offset_is_found_and_inverted(a, b, c):
    curve = fitted(STEPS, [a + b * s**-c for s in STEPS])
    np.testing.assert_allclose(curve, (a, b, c), rtol=1e-3, atol=1e-3)
    assert steps_for(a + b * 700**-c, curve) == pytest.approx(700, rel=1e-3)
    assert steps_for(a - 0.1, curve) == math.inf


def test_a_rival_twice_as_fast_is_worth_twice_the_tokens():
    """With noise of 0.003 nats; the slope at 1,600 steps is 0.36 nats per factor e: 1 % each."""
    rng = np.random.default_rng(0)
    loss = lambda steps: 1.2 + 30 * steps**-0.6 + 0.003 * rng.normal(size=3)
    middle, low, high = worth({s: loss(s) for s in STEPS}, loss(1400), 700)
    assert low < 2 < high
    assert middle == pytest.approx(2, rel=0.1)


SMALL = (
    "--horizons 4 8 12 16 --length 8 --batch-size 2 --eval-batches 2 --width 16 --layers 1 --heads 1 "
    "--unroll 1 --context 16 --optimizers sgd"
)


def test_the_command_goes_on_with_what_is_missing(tmp_path, capsys):
    out = tmp_path / "speedup.jsonl"
    words = ["speedup", *SMALL.split(), "--data", str(Path(argparse.__file__)), "--out", str(out)]
    assert main([*words, "--seeds", "1"]) == 0
    assert "x the tokens" in capsys.readouterr().out
    rows = out.read_text().splitlines()
    assert len(rows) == 4 + 1
    assert main([*words, "--seeds", "2"]) == 0
    assert out.read_text().splitlines()[:5] == rows
    assert len(out.read_text().splitlines()) == 10
    out.write_text("{\n")
    assert main(words) == 2
    assert "is damaged in line 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("--horizons 1 2 3", "four horizons or more"),
        ("--seeds 0", "at least 1"),
        ("--optimizers adamv", "unknown optimizer 'adamv'; did you mean adam"),
        ("--steps 300 --z-loss 1e-4", "only a race uses --steps, --z-loss; leave out"),
    ],
)
def test_bad_input_is_refused(given, named, tmp_path, capsys):
    assert main(["speedup", "--out", str(tmp_path / "a" / "b"), *given.split()]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "a").exists()

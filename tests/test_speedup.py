"""Speed-up in tokens: the fit, its inverse, and a command that resumes where it was stopped."""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import pytest
from ravine.training.cli import main
from ravine.training.compare.speedup import fitted, steps_for, worth

STEPS = (100, 200, 400, 800, 1600)


def slopes(steps, b, c):
    """Derivatives of the curve by its offset, log b and c: one row for each number of steps."""
    x = np.log(steps)
    fall = b * np.exp(-c * x)
    return np.stack([np.ones_like(fall), fall, -x * fall], -1)


def reach(a, b, c, of):
    """Twice the error of products of the parameters with the rows of `of`, given where the fit stops.

    SciPy stops when each gradient times the distance to the bound that it points to is below 1e-8, on a
    curve without noise. For an offset at its bound, that distance is the offset itself: hence the root.
    """
    of_curve = slopes(STEPS, b, c)
    covariance = np.linalg.inv(of_curve.T @ of_curve)
    moved = np.abs(of @ covariance)
    room = np.array([min(a, of_curve[:, 1].min()), 50 - np.log(b), min(c, 5 - c) - 1e-3])
    if a == 0:
        return 2 * (
            moved[:, 1:] @ (1e-8 / room[1:]) + moved[:, 0] * (1e-8 / covariance[0, 0]) ** 0.5
        )
    return 2 * moved @ (1e-8 / room)


@pytest.mark.parametrize(("a", "b", "c"), [(1.2, 30.0, 0.6), (0.0, 5.0, 0.2), (2.0, 400.0, 1.1)])
def test_a_power_law_with_an_offset_is_found_and_inverted(a, b, c):
    curve = fitted(STEPS, [a + b * s**-c for s in STEPS])
    off = np.subtract(curve, (a, b, c)) / [1, b, 1]
    assert np.all(np.abs(off) <= reach(a, b, c, np.eye(3)))
    at = slopes(700, b, c)
    (most,) = reach(a, b, c, at[None]) / (c * at[1])
    assert steps_for(a + b * 700**-c, curve) == pytest.approx(700, rel=most)
    assert steps_for(a - 0.1, curve) == math.inf


def test_a_rival_twice_as_fast_is_worth_twice_the_tokens():
    """With noise of 0.003 nats and three runs each, within five standard errors of 0.9 %."""
    rng = np.random.default_rng(0)
    loss = lambda steps: 1.2 + 30 * steps**-0.6 + 0.003 * rng.normal(size=3)
    middle, low, high = worth({s: loss(s) for s in STEPS}, loss(1400), 700)
    assert low < 2 < high
    of_curve, at = slopes(STEPS, 30, 0.6), slopes(1400, 30, 0.6)
    variance = 0.003**2 / 3 * (1 + at @ np.linalg.inv(of_curve.T @ of_curve) @ at)
    assert middle == pytest.approx(2, rel=5 * variance**0.5 / (0.6 * at[1]))


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
    out.write_text("\n".join(rows[:4]) + "\n")
    assert main([*words, "--seeds", "1"]) == 0
    assert out.read_text().splitlines()[:4] == rows[:4]
    again, before = json.loads(out.read_text().splitlines()[4]), json.loads(rows[4])
    assert again["key"] == before["key"]
    assert again["heldout_loss"] == before["heldout_loss"]
    # A second rate of AdamW at every horizon; the better one is the curve's.
    capsys.readouterr()
    assert main([*words, "--seeds", "1", "--factors", "1", "4"]) == 0
    rows = [json.loads(row) for row in out.read_text().splitlines()]
    assert len(rows) == 4 + 1 + 4
    ends = {
        (row["steps"], row["learning_rate"]): row["heldout_loss"] for row in rows[:4] + rows[5:]
    }
    tuned, more = sorted({rate for _, rate in ends})
    assert more == pytest.approx(4 * tuned)
    told = " ".join(capsys.readouterr().out.split())
    for steps in (4, 8, 12, 16):
        better = min((1, tuned), (4, more), key=lambda factor, s=steps: ends[s, factor[1]])
        assert f"{steps} at x {better[0]}: {ends[steps, better[1]]:.3f} (" in told
    out.write_text("{\n")
    assert main(words) == 2
    assert "is damaged in line 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("--horizons 1 2 3", "four horizons or more"),
        ("--seeds 0", "at least 1"),
        ("--factors 1 0", "factors must be positive and named once each, got [1.0, 0.0]"),
        ("--optimizers adamv", "unknown optimizer 'adamv'; did you mean adam"),
        ("--steps 300 --z-loss 1e-4", "only a race uses --steps, --z-loss; leave out"),
    ],
)
def test_bad_input_is_refused(given, named, tmp_path, capsys):
    assert main(["speedup", "--out", str(tmp_path / "a" / "b"), *given.split()]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "a").exists()

"""Losses over learning rates: the width of the valley, and a command that resumes."""

import argparse
import math
from pathlib import Path

import pytest
from ravine.training.cli import main
from ravine.training.compare.sensitivity import width

SMALL = (
    "--optimizers sgd --length 4 --factors 0.5 1 --batch-size 2 --eval-batches 2 --width 16 --layers 1 "
    "--heads 1 --unroll 1 --context 16"
)


def test_the_width_of_a_parabola_and_of_a_cliff():
    """1 + log2(f)**2 / 25 rises by 0.04 to the nearest neighbours; half of that is at 2**0.5."""
    parabola = {2.0**k: 1 + k * k / 25 for k in range(-3, 4)}
    assert width(parabola, 0.04) == pytest.approx(4.0)
    assert width(parabola, 0.02) == pytest.approx(2.0)
    assert width({0.5: 1.01, 1.0: 1.0, 2.0: math.inf}) == pytest.approx(2.0)
    assert width({1.0: 1.0}) == 1.0


def test_the_command_goes_on_with_what_is_missing(tmp_path, capsys):
    out = tmp_path / "sensitivity.jsonl"
    words = [
        "sensitivity",
        *SMALL.split(),
        "--data",
        str(Path(argparse.__file__)),
        "--out",
        str(out),
    ]
    assert main(words) == 0
    assert "within 0.02" in capsys.readouterr().out
    rows = out.read_text()
    assert rows.count("\n") == 2
    assert main([*words, "--factors", "0.5", "1", "2"]) == 0
    assert out.read_text().startswith(rows)
    assert out.read_text().count("\n") == 3


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("--factors 1 1", "factors must be positive, once each"),
        ("--factors 0.5 2", "1 among them"),
        ("--factors 1 -2", "factors must be positive, once each"),
        ("--seeds 0", "at least 1"),
        ("--optimizers adamv", "unknown optimizer 'adamv'; did you mean adam"),
        ("--steps 300 --z-loss 1e-4", "only a race uses --steps, --z-loss; leave out"),
    ],
)
def test_bad_input_is_refused(given, named, tmp_path, capsys):
    assert main(["sensitivity", "--out", str(tmp_path / "a" / "b"), *given.split()]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "a").exists()

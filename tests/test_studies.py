"""The studies run, and say what they are to say of a small case."""

import argparse
import json

import numpy as np
import pytest
from ravine.training.cli import main
from ravine.training.studies.decay import DecayStudyConfig, largest_rise

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
    # The first update is the same in all: the same parameters, and norms that are equal.
    assert len({run["losses"][0] for run in runs.values()}) == 1
    # The matched run keeps its large weights, and moves them further than the plain one does.
    assert norms["without, rate matched"][-1] > norms["with decay"][-1]


def test_the_largest_rise_is_after_the_lowest_mean():
    assert largest_rise([5.0, 4.0, 3.0, 2.0], window=1) == 0
    assert largest_rise([5.0, 1.0, 1.0, 4.0, 1.0], window=2) == 1.5


def test_bad_input(capsys):
    assert main(["study", "decai"]) == 2
    assert "no study 'decai'; write: study decay" in capsys.readouterr().err
    with pytest.raises(ValueError, match="weight_decay must be finite and positive, got 0"):
        DecayStudyConfig(weight_decay=0.0)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        DecayStudyConfig(steps=0)

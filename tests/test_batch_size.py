"""The critical batch size: where it is known exactly, for a small model, and refused input."""

import argparse
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from ravine.optimizers.registry import OptimizerConfig
from ravine.training.batch_size.branches import best_steps, steps_to
from ravine.training.batch_size.config import BatchSizeConfig
from ravine.training.batch_size.fit import fit_critical_batch
from ravine.training.batch_size.rescale import rescaled
from ravine.training.batch_size.trainer import Trainer
from ravine.training.cli import main
from ravine.training.data.corpus import load_corpus
from ravine.training.model import ModelConfig

NOISE = 64.0  # the critical batch size: a gradient coordinate's variance over its square


def descend(batch, factor, seed, target=0.05):
    """SGD on a ravine-shaped loss whose gradient noise is proportional to each gradient coordinate.

    A step is theta (1 - e c (1 + xi)), with xi of variance NOISE / B. Steep coordinates stay bounded up
    to e = 2 / (1 + NOISE / B), so the fastest descent along the flat ones takes steps in proportion to
    1 + NOISE / B.
    """
    rng = np.random.default_rng(seed)
    steep, flat = np.ones(256), np.ones(256)
    rate = factor * batch / NOISE  # linear, following the rule for SGD
    for step in range(1, 4000):
        for theta, curvature in ((steep, 1.0), (flat, 0.02)):
            noise = rng.normal(size=256) * math.sqrt(NOISE / batch)
            theta *= 1 - rate * curvature * (1 + noise)
        loss = 0.5 * (np.mean(steep**2) + np.mean(flat**2))
        if loss <= target:
            return float(step)
        if loss > 1e3:
            break
    return math.inf


def test_a_known_critical_batch_size_is_found():
    factors = [0.25 * 1.3**k for k in range(8)]
    steps, best = best_steps(descend, [16, 32, 64, 128, 256], factors, [1, 2, 3])
    found = fit_critical_batch(steps)
    # Rates on a grid of ratio 1.3 miss the best one by up to log 1.3 in log S, with a deviation of
    # log 1.3 / 12^0.5 = 0.076, of which least squares makes 0.076 / 0.236^0.5 = 0.16 in log B: 0.236 is
    # the sum over batches of (w - 1/2)^2, w = 1 / (1 + B / NOISE). 0.3 is two of these.
    assert found.batch == pytest.approx(NOISE, rel=0.3)
    assert found.low < found.batch < found.high
    assert best[256] < best[16]  # beyond the critical size, the linear rule asks for too much


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """With 100 known answers, 90 should be inside; fewer than 78 has a probability of 1e-4.

    A bootstrap over n = 8 runs is too narrow by sqrt(7 / 8), so 88 are expected, and 76 has a
    probability of 1e-3.
    """
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        steps = {
            b: (100 * (1 + 30 / b) * np.exp(rng.normal(size=8) * 0.1)).tolist()
            for b in (8, 16, 32, 64, 128)
        }
        found = fit_critical_batch(steps, samples=200)
        hits += found.low <= 30 <= found.high
    assert hits >= 76


def test_one_seed_has_no_interval():
    found = fit_critical_batch({4: [500.0], 16: [200.0], 64: [125.0]})
    assert math.isnan(found.low)
    assert found.sentence("examples").startswith("B* = 16 examples:")


@pytest.mark.parametrize(
    ("losses", "expected"),
    [([4, 3, 2], 15), ([2, 1], 0), ([4, 3], math.inf), ([4, math.nan], math.inf)],
)
def test_steps_to_a_loss(losses, expected):
    assert steps_to(2.5, [10 * k for k in range(len(losses))], losses) == expected


@pytest.mark.parametrize(
    ("name", "rate", "decay"), [("sgd", 4.0, 1.0), ("lion", 2.0, 2.0), ("muon", 2.0, 2.0)]
)
def test_rules_by_optimizer(name, rate, decay):
    found = rescaled(OptimizerConfig(name), 1.0, 1.0, 4)
    assert (found.learning_rate, found.weight_decay) == (rate, decay)
    # The decay per token stays the same: learning rate times decay grows with the batch.
    assert found.learning_rate * found.weight_decay == 4.0


def test_too_few_that_reach_the_loss():
    with pytest.raises(ValueError, match=r"three batch sizes that reach the loss, got 2 \(4, 8\)"):
        fit_critical_batch({4: [9.0], 8: [5.0], 16: [math.inf]})
    with pytest.raises(ValueError, match=r"three or more different batch sizes .* and positive"):
        best_steps(descend, [4, 4, 8], [0.0], [1])


SMALL = {
    "batch-sizes": "2 4 8",
    "rate-factors": 1,
    "seeds": 1,
    "batch-size": 4,
    "start-steps": 12,
    "target-steps": 8,
    "evaluations": 4,
    "eval-batches": 2,
    "width": 16,
    "layers": 1,
    "heads": 1,
    "unroll": 1,
    "context": 16,
}


def test_the_command_goes_on_where_it_was_stopped(tmp_path, capsys):
    text_file = Path(argparse.__file__)  # 100 kB of Python
    small = " ".join(f"--{name} {value}" for name, value in SMALL.items()).split()
    words = ["batch-size", *small, "--data", str(text_file), "--out", str(tmp_path)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "B* = " in said
    rows = (tmp_path / "branches.jsonl").read_text().splitlines()
    assert len(rows) == 3
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert answer["noise_scale_tokens"] > 0
    assert (tmp_path / "batch_size.png").stat().st_size > 10_000

    (tmp_path / "branches.jsonl").write_text("\n".join(rows[:2]) + "\n")
    assert main(words) == 0
    assert (tmp_path / "branches.jsonl").read_text().splitlines() == rows  # every digit matches
    assert json.loads((tmp_path / "answer.json").read_text()) == answer

    capsys.readouterr()
    assert main([*words, "--weight-decay", "0.1"]) == 2
    assert "branches of another configuration" in capsys.readouterr().err
    (tmp_path / "branches.jsonl").write_text(rows[0] + "\n{\n")
    assert main(words) == 2
    assert "is damaged in line 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("--batch-sizes 4 8", "three or more different batch sizes"),
        ("--rate-factors -1", "positive factors"),
        ("--batch-size 6", "must be a multiple of 4"),
        ("--most 0.5", "most must be finite and at least 1"),
        ("--optimizer adamv", "unknown optimizer 'adamv'; did you mean adam"),
    ],
)
def test_the_command_refuses(given, named, tmp_path, capsys):
    words = ["batch-size", "--out", str(tmp_path / "out"), *given.split()]
    assert main(words) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_kernel_of_attention_that_is_asked_for_is_used(text):
    """The largest logits, of all axes but heads, are our own kernel's; no other maximum is like that."""
    model = ModelConfig(width=16, layers=1, heads=2, context=16, attention="xla")
    config = BatchSizeConfig(model=model, batch_size=4, eval_batches=1, data=(Path(text),))
    trainer = Trainer(config, load_corpus(config.data))
    batch = next(trainer.batches(4, seed=0))
    step = jax.make_jaxpr(trainer.step(4))(trainer.fresh(), batch, 1e-3)
    assert "reduce_max[axes=(0, 2, 3)" not in str(step)

"""Cooldowns that branch off a checkpoint: the same past, another end, and an unchanged original run."""

import json
import math
import shutil
from pathlib import Path

import pytest
from ravine.training import train as loop

from .short_race import race, records

pytestmark = pytest.mark.usefixtures("untimed")

LONG = ["--optimizers", "sgd", "--schedule", "constant", "--warmup-steps", "1"]
COOLDOWN = ["--optimizers", "sgd", "--schedule", "wsd", "--warmup-steps", "1"]
OPTIONS = ["--schedule-options", "decay_steps=2"]


def tree(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def long(text, tmp_path_factory):
    """A six-step run at a constant rate that keeps all of its checkpoints."""
    out = tmp_path_factory.mktemp("race") / "long"
    words = [*LONG, "--checkpoint-every", "1", "--keep-checkpoints", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "optimizer_milliseconds", lambda *args: math.nan)
        assert race(*words, text=text, out=out) == 0
    steps = sorted(path.name for path in (out / "sgd" / "checkpoints").iterdir())
    assert steps == ["1", "2", "3", "4", "5", "6"]
    return out


def test_a_cooldown_is_the_run_that_was_to_end_there(long, text, tmp_path, capsys):
    before, branch, whole = tree(long), tmp_path / "branch", tmp_path / "whole"
    ends = [*COOLDOWN, *OPTIONS, "--steps", "5"]
    assert race(*ends, "--branch-from", f"{long}@3", text=text, out=branch) == 0
    assert race(*ends, text=text, out=whole) == 0
    assert records(branch / "sgd") == records(whole / "sgd")
    assert tree(long) == before
    meta = json.loads((branch / "sgd" / "meta.json").read_text())
    assert meta["branched_from"] == {"run": str(long / "sgd"), "step": 3}
    assert json.loads((branch / "race.json").read_text())["configuration"]["branch_from"]
    # On resumption, the branch no longer needs the original run.
    (branch / "sgd" / "outcome.json").unlink()
    again = [*ends, "--branch-from", f"{long}@3", "--resume"]
    assert race(*again, text=text, out=branch) == 0
    assert records(branch / "sgd") == records(whole / "sgd")
    # Without a checkpoint of its own it still does, and says so before it writes anything.
    (branch / "sgd" / "outcome.json").unlink()
    shutil.rmtree(branch / "sgd" / "checkpoints")
    capsys.readouterr()
    left, origin = tree(branch), long / "sgd" / "checkpoints" / "3"
    origin.rename(tmp_path / "3")
    try:
        assert race(*again, text=text, out=branch) == 2
    finally:
        (tmp_path / "3").rename(origin)
    assert "the checkpoint of step 3" in capsys.readouterr().err
    assert tree(branch) == left


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["@9", "--steps", "12"],
            "step 9 in {run} is not there; those of steps [1, 2, 3, 4, 5, 6] are",
        ),
        ([""], "takes FOLDER@STEP"),
        (
            ["@5", "--schedule-options", "decay_steps=4"],
            "step 5 in {run} has another past (learning rates before step 5 are others);",
        ),
        (["@3", *OPTIONS, "--seed", "1"], "has another past (run.seed is 0 there and 1 here"),
        (["@6"], "a branch from step 6 needs more than the 6 steps"),
        (["@3", "--out", "{long}"], "lies in {long}, which this race writes to"),
    ],
)
def test_what_would_change_the_past_is_refused(words, expected, long, text, tmp_path, capsys):
    names = {"long": long, "run": Path(long, "sgd")}
    before, (at, *rest) = tree(long), [word.format(**names) for word in words]
    out = tmp_path / "race"
    arguments = [*COOLDOWN, "--branch-from", f"{long}{at}", *rest]
    if "--out" in rest:
        arguments, out = arguments[:-2], long
    assert race(*arguments, text=text, out=out) == 2
    assert expected.format(**names) in capsys.readouterr().err
    assert not Path(tmp_path, "race").exists()
    assert tree(long) == before

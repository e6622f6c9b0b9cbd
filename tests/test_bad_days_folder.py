"""Bad days of a run and its folder: what a race survives, and what makes it stop between two steps.

docs/reliability.md states the guarantees. Refusals are tested in test_bad_days_refused.py; cases that
need real processes, a full disk or signals at random times are in test_bad_days_processes.py.
"""

import dataclasses
import errno
import io
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from ravine.training import checkpoint
from ravine.training import train as loop
from ravine.training.compare import race as race_module
from ravine.training.compare import report
from ravine.training.data.corpus import load_corpus
from ravine.training.run import folder, interrupts
from ravine.training.run.files import naming

from . import bad_days
from .bad_days import METRICS, RESUME, Fault, damaged, launch, line, tree, write_bin
from .short_race import records

race, day = bad_days.race, bad_days.day


def sealed_and_flipped(day):
    (day.run / "outcome.json").unlink()
    # Flips a bit in a name: Orbax itself would reject it if it were read before the seal is checked.
    path = day.run / "checkpoints" / "6" / "_CHECKPOINT_METADATA"
    flipped = path.read_bytes().replace(b"init_timestamp", b"init_timestam0")
    assert flipped != path.read_bytes()
    path.write_bytes(flipped)
    return RESUME


def older_flipped(day):
    """The newest checkpoint is intact, but Orbax reads the metadata of all checkpoints."""
    (day.run / "outcome.json").unlink()
    path = day.run / "checkpoints" / "4" / "_CHECKPOINT_METADATA"
    path.write_bytes(path.read_bytes().replace(b"init_timestamp", b"init_timestam0"))
    return RESUME


WARNED = [
    Fault("a record lost", damaged(METRICS, line(2, lambda _: [])), "step 2 are lost"),
    Fault("a record doubled", damaged(METRICS, line(2, lambda x: [x, x])), "step 2 are doubled"),
    Fault(
        "an evaluation lost",
        damaged(METRICS, line(3, lambda _: [])),
        "the evaluation after 3 are lost",
    ),
    Fault(
        "an evaluation doubled", damaged(METRICS, line(3, lambda x: [x, x])), "after 3 are doubled"
    ),
    Fault("the end of the records lost", damaged(METRICS, lambda x: x[:-300]), "are lost"),
    Fault("all records doubled", damaged(METRICS, lambda x: x + x), "are doubled"),
    Fault(
        "a record lost in a run that goes on",
        damaged(METRICS, line(1, lambda _: []), unfinished=True),
        "step 1 are lost",
    ),
    Fault(
        "all records lost in a run that goes on",
        damaged(METRICS, lambda _: b"", unfinished=True),
        "steps 0 to 3, the evaluation after 3 are lost",
    ),
    Fault(
        "a bit flipped in a checkpoint", sealed_and_flipped, "step 6 in .* is damaged .* of step 4"
    ),
    Fault("a bit flipped in the one before", older_flipped, "step 4 in .* is damaged .* of step 6"),
]


@pytest.mark.parametrize("fault", WARNED, ids=lambda fault: fault.name)
def test_a_fault_that_a_run_survives_is_reported(fault, day):
    whole = records(day.run)
    words = fault.words(day)
    with pytest.warns(UserWarning, match=fault.said):
        assert launch(words) == 0
    assert (day.run / "outcome.json").exists()
    if fault.name == "a bit flipped in a checkpoint":
        assert records(day.run) == whole
        assert (day.run / "checkpoints-refused" / "6.0").is_dir()


def full_at_a_record(day):
    calls = iter(range(10**6))

    def full(self, value):
        with naming(self._name):
            if next(calls) > 10:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(self, value)

    original = loop.Lines.write
    day.patch.setattr(loop.Lines, "write", full)
    return ["--optimizers", "sgd,lion"]


def full_at_a_checkpoint(day):
    class Full(checkpoint.ocp.training.Checkpointer):
        def save_checkpointables_async(self, step, *args, **kwargs):
            if "lion" in str(self.directory):
                raise RuntimeError("RESOURCE_EXHAUSTED: no space left\nand more")
            return super().save_checkpointables_async(step, *args, **kwargs)

    day.patch.setattr(checkpoint.ocp.training, "Checkpointer", Full)
    return ["--optimizers", "sgd,lion"]


def text_changes(change):
    """Tokens on disk that change once the second run has made two steps."""

    def make(day):
        path = write_bin(day, (7, 60), count=40_000)
        train = race_module.train

        def changing(run, tx, corpus, outcome, paths, hooks, *rest):
            def hook(record):
                hooks.on_record(record)
                if outcome.name == "lion" and record["step"] == 1:
                    change(path)

            changed = dataclasses.replace(hooks, on_record=hook)
            return train(run, tx, corpus, outcome, paths, changed, *rest)

        day.patch.setattr(race_module, "train", changing)
        return ["--optimizers", "sgd,lion", "--data", "tokens.bin"]

    return make


def rewritten(path):
    path.rename(path.with_name("old.bin"))
    np.zeros(40_000, "<u2").tofile(path)


FAILED = [
    Fault("disk full at a checkpoint", full_at_a_checkpoint, "checkpoint of step 2 in"),
    Fault("tokens replaced", text_changes(rewritten), "tokens.bin has changed"),
]
FAILED_ALIKE = [
    Fault("disk full at a record", full_at_a_record, "lion/metrics.jsonl: No space left"),
    Fault(
        "tokens cut off", text_changes(lambda path: os.truncate(path, 10)), "tokens.bin has changed"
    ),
    Fault("tokens lost", text_changes(lambda path: path.unlink()), "tokens.bin disappeared"),
]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("fault", [*FAILED, *map(slow, FAILED_ALIKE)], ids=lambda fault: fault.name)
def test_what_ends_a_race_is_reported_and_finished_runs_are_kept(fault, day, capsys):
    assert launch(fault.words(day)) == 1
    day.patch.undo()
    told = capsys.readouterr()
    assert fault.said in told.err
    assert "kept" in told.err
    assert told.err.count("\n") == 1
    assert json.loads((day.new / "sgd" / "outcome.json").read_text())["status"] == "finished"
    assert not (day.new / "lion" / "outcome.json").exists()
    assert "sgd" in told.out
    assert "sgd" in (day.new / "report.html").read_text()


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), slow(signal.SIGTERM, 143)],
    ids=["ctrl-c", "sigterm"],
)
def test_a_signal_ends_a_race_between_two_steps_and_it_resumes(number, status, day, capsys):
    train = race_module.train

    def signalled(run, tx, corpus, outcome, paths, hooks, *rest):
        def hook(record):
            hooks.on_record(record)
            if outcome.name == "lion" and record["step"] == 2:
                signal.raise_signal(number)
                for _ in range(1000):  # waits for the thread that records it
                    if interrupts.pending():
                        break
                    time.sleep(0.01)

        changed = dataclasses.replace(hooks, on_record=hook)
        return train(run, tx, corpus, outcome, paths, changed, *rest)

    before = [signal.getsignal(number) for number in interrupts.SIGNALS]
    day.patch.setattr(race_module, "train", signalled)
    assert launch(["--optimizers", "sgd,lion"]) == status
    assert [signal.getsignal(number) for number in interrupts.SIGNALS] == before
    told = capsys.readouterr()
    assert "interrupted" in told.err
    assert "sgd" in told.out
    assert [entry["step"] for entry in records(day.new / "lion")] == [0, 1, 2, 3]
    assert (day.new / "lion" / "checkpoints" / "3").exists()
    day.patch.setattr(race_module, "train", train)
    assert launch(["--optimizers", "sgd,lion", "--resume"]) == 0
    assert [entry["step"] for entry in records(day.new / "lion")] == [0, 1, 2, 3, 3, 4, 5, 6]


def test_overwriting_removes_a_race_and_nothing_else(day):
    (day.run / "checkpoints" / "8.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (day.run / "checkpoints" / "8.orbax-checkpoint-tmp" / "state" / "manifest.ocdbt").touch()
    (day.run / "checkpoints" / "6" / "files.json").write_bytes(b"cut")
    (day.run / "metrics.jsonl.tmp").touch()
    kept = tree(day.elsewhere)
    assert launch(["--out", "race", "--overwrite", "--optimizers", "lion"]) == 0
    assert sorted(path.name for path in day.out.iterdir()) == [
        "lion",
        "race.json",
        "race.lock",
        "report.html",
    ]
    assert tree(day.elsewhere) == kept


def test_races_are_not_read_as_text_and_names_and_vocabularies_are_taken_as_given(day):
    name = " [red]r\u00e4ce \U0001f98a\n"
    day.text.rename(day.path / os.fsdecode(b"\xff text.txt"))
    assert launch(["--out", name, "--data", ".", "--vocabulary", "300"]) == 0
    meta = json.loads((day.path / name / "sgd" / "meta.json").read_text())
    assert ": 2 files," in meta["text"]["description"]
    assert meta["run"]["model"]["vocabulary"] == 300


def test_a_subfolder_that_cannot_be_read_is_named():
    """Root may read everything, so the process switches to another user for the check."""
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        root.chmod(0o755)
        (root / "a.txt").write_text("text")
        (root / "locked").mkdir()
        (root / "locked" / "b.txt").write_text("more text")
        (root / "locked").chmod(0)
        mine = os.geteuid()
        try:
            if mine == 0:
                os.seteuid(65534)
            with pytest.raises(ValueError, match="locked: Permission denied; make it readable"):
                load_corpus([root])
            with (
                pytest.raises(ValueError, match=r"Permission denied.*another --out"),
                folder.claimed(root / "locked" / "race", {"optimizers": {}}),
            ):
                pass
            with (
                pytest.raises(ValueError, match=r"Permission denied.*another --out"),
                folder.claimed(root / "locked", {"optimizers": {}}),
            ):
                pass
        finally:
            os.seteuid(mine)
            (root / "locked").chmod(0o755)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["[red]race", "r\u00e4ce \U0001f98a", " race\n"])
def test_any_name_is_a_path(name, day, capsys):
    data = os.fsdecode(b"\xff") + name + ".txt"
    day.text.rename(day.path / data)
    assert launch(["--out", name, "--data", data]) == 0
    printed = capsys.readouterr().out
    assert f"results: {day.path}/{name}" in printed
    assert (day.path / name / "report.html").exists()


def test_an_impossible_report_is_refused_before_the_first_run(day, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no font")

    day.patch.setattr(report, "specification", broken)
    assert launch([]) == 2
    assert "report of the race cannot be made (RuntimeError: no font)" in capsys.readouterr().err
    assert not day.new.exists()


def test_a_race_in_which_all_diverge_fails_and_its_records_are_json(day, capsys):
    words = ["--learning-rates", "sgd=1e30"]
    assert launch(words) == 1
    assert "every optimizer diverged" in capsys.readouterr().err
    last = records(day.new / "sgd")[-1]
    assert None in last.values()
    assert json.loads((day.new / "sgd" / "outcome.json").read_text())["status"] == "diverged"
    # Null is read back as NaN, and the result of the race is the same.
    assert launch([*words, "--resume"]) == 1


def test_divergence_before_the_first_update_is_not_blamed_on_the_optimizer(day, capsys):
    assert launch(["--final-soft-cap", "1e-38"]) == 1
    assert "before the first update: check the model's options" in capsys.readouterr().err
    assert not (day.new / "sgd" / "outcome.json").exists()


class Broken(io.StringIO):
    """A stream that works only once."""

    written = 0

    def write(self, text):
        self.written += 1
        if self.written > 1:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        return super().write(text)


def test_a_broken_pipe_loses_no_result(day, capsys):
    broken = Broken()
    day.patch.setattr(sys, "stdout", broken)
    assert launch([]) == 0
    assert broken.getvalue().startswith("text: ")
    assert capsys.readouterr().err == (
        "ravine: standard output cannot be written (Broken pipe); the run goes on.\n"
    )
    assert json.loads((day.new / "sgd" / "outcome.json").read_text())["status"] == "finished"

"""Bad days of the command line and the run's folder: each fault with its status and what is said.

A refusal (status 2) is one line and leaves every file as it was; docs/reliability.md has the promises.
What needs real processes, a full disk or signals at random times is in test_bad_days_processes.py.
"""

import contextlib
import errno
import fcntl
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from ravine.training import checkpoint
from ravine.training import train as loop
from ravine.training.cli import main
from ravine.training.compare import race as race_module
from ravine.training.compare import report
from ravine.training.data.corpus import load_corpus
from ravine.training.metrics import Rates
from ravine.training.run import folder, interrupts
from ravine.training.run.files import naming

SMALL = ["--width", "16", "--layers", "1", "--heads", "2", "--context", "16", "--batch-size", "4"]
WORDS = [
    "--steps",
    "6",
    "--eval-every",
    "3",
    "--eval-batches",
    "2",
    "--checkpoint-every",
    "2",
    *SMALL,
]


class Day:
    """What a fault finds: a text, a finished race of sgd in `out`, an empty folder beside it."""

    def __init__(self, path, text, race, patch):
        self.lock = None
        self.path, self.text, self.patch = path, path / "text.txt", patch
        self.out, self.new = path / "race", path / "new"
        shutil.copy(text, self.text)
        shutil.copytree(race, self.out)
        self.run = self.out / "sgd"
        self.elsewhere = path / "elsewhere"
        self.elsewhere.mkdir()
        (self.elsewhere / "mine.txt").write_text("mine")

    def words(self, *words, out=None, data=None):
        data = self.text if data is None else data
        return [*words, "--out", str(out or self.new), "--data", str(data)]

    def unfinished(self):
        """As if cut off after step 4."""
        (self.run / "outcome.json").unlink()
        shutil.rmtree(self.run / "checkpoints" / "6")


def base(text, out):
    return ["race", "--optimizers", "sgd", *WORDS, "--data", str(text), "--out", str(out)]


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """The same small programs in every race: kept, however little time they took."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 0.0)
    yield
    jax.config.update(name, before)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {i * i} of a text that says little. " for i in range(400)))
    return path


@pytest.fixture(scope="module")
def race(tmp_path_factory, text):
    """A race of sgd with checkpoints, made once and copied for each fault."""
    where = tmp_path_factory.mktemp("made")
    shutil.copy(text, where / "text.txt")
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(where):
        patch.setattr(loop, "optimizer_milliseconds", lambda *args: 1.0)
        assert main(base("text.txt", "race")) == 0
    return where / "race"


@pytest.fixture
def day(tmp_path, text, race, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "optimizer_milliseconds", lambda *args: 1.0)
    made = Day(tmp_path, text, race, monkeypatch)
    yield made
    if made.lock is not None:
        made.lock.close()


def launch(words):
    """A command in the test's folder, with the flags of the race that was made."""
    full = ["race", "--optimizers", "sgd", *WORDS, *words]
    for flag, value in (("--data", "text.txt"), ("--out", "new")):
        if not any(word == flag or word.startswith(f"{flag}=") for word in words):
            full += [flag, value]
    return main(full)


def tree(root):
    """Every path with its content, locks left out."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.name.startswith("race.lock"):
            continue
        content = None
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file() and os.access(path, os.R_OK):
            content = path.read_bytes()
        found[path] = content
    return found


class Fault(NamedTuple):
    name: str
    words: Callable[[Day], list[str]] | list[str]
    said: str
    status: int = 2


def write_bin(day, tokens=(7, 300), count=4000):
    path = day.path / "tokens.bin"
    np.resize(np.array(tokens, "<u2"), count).tofile(path)
    return path


def made(*steps):
    """A fault of several acts, the last of which gives the words."""

    def make(day):
        words = None
        for step in steps:
            words = step(day)
        return words

    return make


def empty_folder(day):
    (day.path / "empty").mkdir()
    return ["--data", "empty"]


def pipe(day):
    os.mkfifo(day.path / "pipe.txt")
    return ["--data", "pipe.txt"]


COMMAND_LINE = [
    Fault("data of no name", ["--data", ""], "a path is empty"),
    Fault("data of no name, joined", ["--data="], "a path is empty"),
    Fault("data of blanks", ["--data", "  "], "a path is empty"),
    Fault("data of no name beside another", ["--data", "text.txt", ""], "a path is empty"),
    Fault("out of no name", ["--out", ""], "a path is empty"),
    Fault("out without a value", ["--out"], "--out"),
    Fault("a vocabulary too small for bytes", ["--vocabulary", "100"], "at least 256 for bytes"),
    Fault(
        "a vocabulary too small for tokens",
        lambda day: ["--data", str(write_bin(day)), "--vocabulary", "300"],
        "token 300 needs a vocabulary above it",
    ),
    Fault("rope base 0", ["--rope-base", "0"], "rope_base must be finite and at least 1"),
    Fault("rope base nan", ["--rope-base", "nan"], "rope_base must be finite and at least 1"),
    Fault("rope base inf", ["--rope-base", "inf"], "rope_base must be finite and at least 1"),
    Fault("rope base negative", ["--rope-base", "-1e4"], "rope_base"),
    Fault("steps past int32", ["--steps", str(2**31)], "steps must be below 2**31"),
    Fault("steps past everything", ["--steps", "9" * 40], "steps must be below 2**31"),
    Fault("schedule past int32", ["--schedule-steps", str(2**40)], "schedule_steps must be below"),
    Fault("warm-up past int32", ["--warmup-steps", str(2**40)], "warmup_steps must be below"),
    Fault("seed past 32 bits", ["--seed", str(2**32)], "seed must be below 2**32"),
    Fault("seed past everything", ["--seed", "9" * 40], "seed must be below 2**32"),
    Fault("seed negative", ["--seed", "-1"], "seed must not be negative"),
    Fault("steps with a point", ["--steps", "1e6"], "--steps"),
    Fault("soap cap nan", ["--final-soft-cap", "nan"], "final_soft_cap"),
    Fault("weight decay nan", ["--weight-decay", "nan"], "weight_decay must be finite"),
    Fault("clip norm inf", ["--clip-norm", "inf"], "clip_norm must be finite"),
    Fault("end ratio nan", ["--end-ratio", "nan"], "end_ratio"),
    Fault("no optimizer", ["--optimizers", ""], "no optimizer given"),
    Fault("learning rate inf", ["--learning-rates", "sgd=inf"], "positive and finite"),
    Fault("a mesh of no axis", ["--mesh", "rows=2"], "rows"),
    Fault("a text that is not there", ["--data", "gone.txt"], "no such file"),
    Fault("an overlong path of a text", ["--data", "x" * 5000], "no such file"),
    Fault(
        "a path of a text that is no text", ["--data", os.fsdecode(b"\xff\xfe.txt")], "no such file"
    ),
    Fault("an empty folder as text", empty_folder, "no UTF-8 text"),
    Fault("a pipe as text", pipe, "no such file"),
    Fault("more context than text", ["--context", "99999"], "more text"),
]


def at(name, content="mine"):
    """A file of the user's in the race's folder."""

    def make(day):
        (day.out / name).parent.mkdir(parents=True, exist_ok=True)
        (day.out / name).write_text(content)
        return ["--out", "race", "--overwrite"]

    return make


def linked(name):
    """A link in the race's folder that leads out of it."""

    def make(day):
        path = day.out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        path.symlink_to(day.elsewhere)
        return ["--out", "race", "--overwrite"]

    return make


def link_to_race(day):
    (day.path / "link").symlink_to(day.out)
    return ["--out", "link", "--overwrite"]


def dangling(day):
    (day.path / "link").symlink_to(day.path / "gone")
    return ["--out", "link"]


def project(content):
    """Somebody's project, with a file that is named like a race's."""

    def make(day):
        day.elsewhere.joinpath("race.json").write_text(content)
        return ["--out", "elsewhere", "--overwrite"]

    return make


def text_inside(day):
    shutil.copy(day.text, day.out / "text.txt")
    return ["--out", "race", "--overwrite", "--data", "race/text.txt"]


def empty_user_folder(day):
    (day.out / "figures").mkdir()
    return ["--out", "race", "--overwrite"]


def current(day):
    day.patch.chdir(day.elsewhere)
    return ["--out", ".", "--overwrite", "--data", "../text.txt"]


def held(*words):
    """The folder is in use: its lock is held through another open file."""

    def make(day):
        day.lock = (day.out / "race.lock").open("w")
        fcntl.flock(day.lock, fcntl.LOCK_EX)
        holder = {"pid": 4242, "host": "node7", "since": "noon"}
        (day.out / "race.lock.json").write_text(json.dumps(holder))
        return ["--out", "race", *words]

    return make


def refusing(method, number, words):
    """The system refuses what a `Path` does below the folder `new`; as root no file's mode does."""

    def make(day):
        original = getattr(Path, method)

        def fail(self, *args, **kwargs):
            if "new" in self.parts:
                raise OSError(number, os.strerror(number), str(self))
            return original(self, *args, **kwargs)

        day.patch.setattr(Path, method, fail)
        return words

    return make


NOTES = "what no race has written"
FOLDER = [
    Fault("out is a file", ["--out", "text.txt"], "text.txt is not a folder"),
    Fault("out is below a file", ["--out", "text.txt/race"], "give another --out"),
    Fault("out is no text", ["--out", os.fsdecode(b"race\xff")], "is not UTF-8"),
    Fault("out is overlong", ["--out", "x" * 300], "File name too long"),
    Fault("out is a dangling link", dangling, "is not a folder"),
    Fault("out is read-only", refusing("mkdir", errno.EROFS, []), "Read-only file system"),
    Fault("out may not be made", refusing("mkdir", errno.EACCES, []), "Permission denied"),
    Fault("the disk is full at once", refusing("write_text", errno.ENOSPC, []), "No space left"),
    Fault("another race is there", ["--out", "race"], "--overwrite or another --out"),
    Fault("the current folder is somebody's", current, "not a race's"),
    Fault("somebody's folder", ["--out", "elsewhere", "--overwrite"], "not a race's"),
    Fault("somebody's race.json", project('{"horses": 7}'), "not a race's"),
    Fault("somebody's race.json, a list", project("[1, 2]"), "race.json is damaged"),
    Fault("somebody's race.json, no JSON", project("ready, steady"), "race.json is damaged"),
    Fault("somebody's race.json, other lists", project('{"writes": [1]}'), "not a race's"),
    Fault("notes beside the runs", at("notes.txt"), NOTES),
    Fault("notes in a run", at("sgd/notes.txt"), NOTES),
    Fault("notes beside checkpoints", at("sgd/checkpoints/notes.txt"), NOTES),
    Fault("notes in a checkpoint", at("sgd/checkpoints/6/notes.txt"), NOTES),
    Fault("notes deep in a checkpoint", at("sgd/checkpoints/6/state/d/notes.txt"), NOTES),
    Fault("notes in an unsealed checkpoint", at("sgd/checkpoints/8/notes.txt"), NOTES),
    Fault("notes in a hidden folder", at(".git/config"), NOTES),
    Fault("a run of another race", at("lion/metrics.jsonl"), NOTES),
    Fault("an empty folder of the user's", empty_user_folder, NOTES),
    Fault("a link beside the runs", linked("latest"), NOTES),
    Fault("a link for a run", linked("sgd"), NOTES),
    Fault("a link for the report", linked("report.html"), NOTES),
    Fault("a link for the checkpoints", linked("sgd/checkpoints"), NOTES),
    Fault("a link to the race", link_to_race, "is a link"),
    Fault("the text in the race's folder", text_inside, "lies in race, which --overwrite clears"),
    Fault(
        "a race's own file as the text",
        ["--out", "race", "--overwrite", "--data", "race/report.html"],
        "lies in race",
    ),
    Fault(
        "in use, to overwrite", held("--overwrite"), "in use by process 4242 on node7 since noon"
    ),
    Fault("in use, to resume", held("--resume"), "in use by process 4242 on node7 since noon"),
]

RESUME = ["--out", "race", "--resume"]


def damaged(name, change, *, unfinished=False):
    """A file of the race, changed."""

    def make(day):
        if unfinished:
            day.unfinished()
        path = day.out / name
        content = path.read_bytes() if path.is_file() else b""
        changed = change(content)
        if changed is None:
            path.unlink()
        else:
            path.write_bytes(changed)
        return RESUME

    return make


def zeroed(content):
    return bytes(len(content))


def halved(content):
    return content[: len(content) // 2]


def edited(*path, value):
    """JSON with another value."""

    def change(content):
        whole = tree = json.loads(content)
        for name in path[:-1]:
            tree = tree[name]
        tree[path[-1]] = value
        return json.dumps(whole).encode()

    return change


def line(number, change):
    """Lines of records, one of them changed: cut, doubled or spoilt."""

    def change_all(content):
        lines = content.splitlines(keepends=True)
        lines[number : number + 1] = change(lines[number])
        return b"".join(lines)

    return change_all


def other_text(day):
    day.text.write_text(day.text.read_text()[::-1])
    return RESUME


def all_flipped(day):
    day.unfinished()
    for path in (day.run / "checkpoints").rglob("d/*"):
        path.write_bytes(zeroed(path.read_bytes()))
    return RESUME


METRICS = "sgd/metrics.jsonl"
RESUMED = [
    Fault("no race to resume", ["--out", "elsewhere", "--resume"], "holds no race"),
    Fault("no folder to resume", ["--out", "gone", "--resume"], "does not exist"),
    Fault(
        "other steps",
        [*RESUME, "--steps", "7"],
        "configuration (6 steps there and 7 here: learning rates of",
    ),
    Fault("another seed", [*RESUME, "--seed", "1"], "another configuration (seed is 0 there"),
    Fault(
        "another optimizer",
        [*RESUME, "--optimizers", "lion"],
        "configuration and optimizers",
    ),
    Fault("another learning rate", [*RESUME, "--learning-rates", "sgd=1"], "another configuration"),
    Fault("another text", other_text, "another text"),
    Fault(
        "other hyperparameters",
        damaged("race.json", edited("optimizers", "sgd", "learning_rate", value=7.0)),
        "another optimizers (learning_rate is 7.0 there",
    ),
    Fault("race.json cut off", damaged("race.json", halved), "race.json is damaged (not JSON"),
    Fault("race.json zeroed", damaged("race.json", zeroed), "race.json is damaged"),
    Fault("race.json empty", damaged("race.json", lambda content: b""), "race.json is damaged"),
    Fault("race.json no text", damaged("race.json", lambda _: b"\xff\xfe"), "race.json is damaged"),
    Fault("race.json lost", damaged("race.json", lambda _: None), "holds no race"),
    Fault(
        "outcome cut off", damaged("sgd/outcome.json", halved), "outcome.json is damaged (not JSON"
    ),
    Fault("outcome a list", damaged("sgd/outcome.json", lambda _: b"[]"), "not a JSON object"),
    Fault("outcome of others", damaged("sgd/outcome.json", edited("name", value="lion")), "of sgd"),
    Fault(
        "outcome with more", damaged("sgd/outcome.json", edited("new", value=1)), "not an outcome"
    ),
    Fault("meta cut off", damaged("sgd/meta.json", halved), "meta.json is damaged"),
    Fault(
        "a run of another text",
        damaged("sgd/meta.json", edited("text", "fingerprint", value="0")),
        "run of another text; move",
    ),
    Fault(
        "a run of another configuration",
        damaged("sgd/meta.json", edited("run", "batch_size", value=7)),
        "meta.json is of a run of another run",
    ),
    Fault("records lost whole", damaged(METRICS, lambda _: None), "metrics.jsonl is missing"),
    Fault(
        "a record spoilt",
        damaged(METRICS, line(2, lambda _: [b"{nonsense\n"])),
        "metrics.jsonl is damaged (line 3 is no record)",
    ),
    Fault(
        "a record zeroed",
        damaged(METRICS, line(2, lambda old: [zeroed(old)[:-1] + b"\n"])),
        "(line 3 is no record)",
    ),
    Fault(
        "a record spoilt in a run that goes on",
        damaged(METRICS, line(2, lambda _: [b"7\n"]), unfinished=True),
        "(line 3 is no record)",
    ),
    Fault("every checkpoint zeroed", all_flipped, "none of the checkpoints in"),
]


@pytest.mark.parametrize("fault", [*COMMAND_LINE, *FOLDER, *RESUMED], ids=lambda fault: fault.name)
def test_a_fault_is_refused_in_one_line_and_nothing_is_changed(fault, day, capsys):
    words = fault.words if isinstance(fault.words, list) else fault.words(day)
    before = tree(day.path)
    status = launch(words)
    complaint = capsys.readouterr().err
    day.patch.undo()
    assert fault.said in complaint
    assert status == fault.status
    assert complaint.count("\n") == 1
    after = tree(day.path)
    if fault.name == "the disk is full at once":  # what is made by then is an empty folder
        after.pop(day.new)
    elif fault.name == "every checkpoint zeroed":  # found by the run, when the race had begun
        after.pop(day.out / "report.html"), before.pop(day.out / "report.html")
    assert after == before


def records(run):
    """Strict JSON, or an error."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(text, parse_constant=refuse) for text in lines]


def without_seconds(run):
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in records(run)]


def sealed_and_flipped(day):
    (day.run / "outcome.json").unlink()
    # In a name, which Orbax would refuse by itself if it read it before the seal is compared.
    path = day.run / "checkpoints" / "6" / "_CHECKPOINT_METADATA"
    flipped = path.read_bytes().replace(b"init_timestamp", b"init_timestam0")
    assert flipped != path.read_bytes()
    path.write_bytes(flipped)
    return RESUME


def older_flipped(day):
    """The newest is sound; Orbax reads the metadata of all."""
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
def test_a_fault_that_a_run_survives_is_said(fault, day):
    whole = without_seconds(day.run)
    words = fault.words(day)
    with pytest.warns(UserWarning, match=fault.said):
        assert launch(words) == 0
    assert (day.run / "outcome.json").exists()
    if fault.name == "a bit flipped in a checkpoint":
        assert without_seconds(day.run) == whole
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
    """Tokens on disk, changed once the second run has made two steps."""

    def make(day):
        path = write_bin(day, (7, 60), count=40_000)
        train = race_module.train

        def changing(run, tx, corpus, outcome, out, on_record, *rest):
            def hook(record):
                on_record(record)
                if outcome.name == "lion" and record["step"] == 1:
                    change(path)

            return train(run, tx, corpus, outcome, out, hook, *rest)

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
    Fault("tokens lost", text_changes(lambda path: path.unlink()), "tokens.bin is gone"),
]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("fault", [*FAILED, *map(slow, FAILED_ALIKE)], ids=lambda fault: fault.name)
def test_what_ends_a_race_is_said_and_what_had_ended_is_kept(fault, day, capsys):
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

    def signalled(run, tx, corpus, outcome, out, on_record, *rest):
        def hook(record):
            on_record(record)
            if outcome.name == "lion" and record["step"] == 2:
                signal.raise_signal(number)
                for _ in range(1000):  # the thread that notes it
                    if interrupts.pending():
                        break
                    time.sleep(0.01)

        return train(run, tx, corpus, outcome, out, hook, *rest)

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


def test_races_are_no_part_of_a_text_and_names_and_vocabularies_are_taken_as_given(day):
    name = " [red]r\u00e4ce \U0001f98a\n"
    day.text.rename(day.path / os.fsdecode(b"\xff text.txt"))
    assert launch(["--out", name, "--data", ".", "--vocabulary", "300"]) == 0
    meta = json.loads((day.path / name / "sgd" / "meta.json").read_text())
    assert ": 2 files," in meta["text"]["description"]
    assert meta["run"]["model"]["vocabulary"] == 300


def test_a_subfolder_that_cannot_be_read_is_named():
    """Root may read anything, so the process is another user while it looks."""
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


def test_a_report_that_cannot_be_made_is_told_before_a_run_is_spent(day, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no font")

    day.patch.setattr(report, "specification", broken)
    assert launch([]) == 2
    assert "report of the race cannot be made (RuntimeError: no font)" in capsys.readouterr().err
    assert not day.new.exists()


def test_divergence_of_all_is_no_success_and_its_records_are_json(day, capsys):
    words = ["--learning-rates", "sgd=1e30"]
    assert launch(words) == 1
    assert "every optimizer diverged" in capsys.readouterr().err
    last = records(day.new / "sgd")[-1]
    assert None in last.values()
    assert json.loads((day.new / "sgd" / "outcome.json").read_text())["status"] == "diverged"
    # Loaded, what is null is no number again, and the race is told the same.
    assert launch([*words, "--resume"]) == 1


def test_divergence_before_the_first_update_is_not_an_optimizers(day, capsys):
    assert launch(["--final-soft-cap", "1e-38"]) == 1
    assert "before the first update: check the model's options" in capsys.readouterr().err
    assert not (day.new / "sgd" / "outcome.json").exists()


class Broken(io.StringIO):
    """A stream that works once."""

    written = 0

    def write(self, text):
        self.written += 1
        if self.written > 1:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        return super().write(text)


def test_an_output_whose_reader_left_costs_no_result(day, capsys):
    broken = Broken()
    day.patch.setattr(sys, "stdout", broken)
    assert launch([]) == 0
    assert broken.getvalue().startswith("text: ")
    assert capsys.readouterr().err == (
        "ravine: standard output cannot be written (Broken pipe); the run goes on.\n"
    )
    assert json.loads((day.new / "sgd" / "outcome.json").read_text())["status"] == "finished"


def test_learning_rates_are_asked_for_a_block_at_a_time():
    asked = []

    def schedule(count):
        asked.append(count.shape[0])
        return 1e-3 * count.astype("float32")

    rates = Rates(schedule, 2**31 - 1)
    steps = [0, 1, 4095, 4096, 7, 2**31 - 2]
    np.testing.assert_allclose([rates[step] for step in steps], 1e-3 * np.array(steps), rtol=1e-6)
    assert asked == [4096, 4096, 4096, 4095]

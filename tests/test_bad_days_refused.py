"""Refusals by the command line, the folder and a resumed race: status 2, one line, no file changed.

docs/reliability.md states the guarantees; what a race survives or stops on is in
test_bad_days_folder.py.
"""

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest

from . import bad_days
from .bad_days import METRICS, RESUME, Fault, damaged, launch, line, tree, write_bin

race, day = bad_days.race, bad_days.day


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
    Fault("a pipe as text", pipe, "a pipe or a device"),
    Fault("more context than text", ["--context", "99999"], "more text"),
]


def at(name, content="mine"):
    """A file of the user's inside the race's folder."""

    def make(day):
        (day.out / name).parent.mkdir(parents=True, exist_ok=True)
        (day.out / name).write_text(content)
        return ["--out", "race", "--overwrite"]

    return make


def linked(name):
    """A link in the race's folder that points outside it."""

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
    """Somebody's project, with a file that has the same name as a race's file."""

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
    """Makes a `Path` operation fail below the folder `new`: file modes do not stop root."""

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


def zeroed(content):
    return bytes(len(content))


def halved(content):
    return content[: len(content) // 2]


def edited(*path, value):
    """JSON with one value changed."""

    def change(content):
        whole = tree = json.loads(content)
        for name in path[:-1]:
            tree = tree[name]
        tree[path[-1]] = value
        return json.dumps(whole).encode()

    return change


def other_text(day):
    day.text.write_text(day.text.read_text()[::-1])
    return RESUME


def all_flipped(day):
    day.unfinished()
    for path in (day.run / "checkpoints").rglob("d/*"):
        path.write_bytes(zeroed(path.read_bytes()))
    return RESUME


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
    assert status == 2
    assert complaint.count("\n") == 1
    after = tree(day.path)
    if fault.name == "the disk is full at once":  # only an empty folder was created by then
        after.pop(day.new)
    elif fault.name == "every checkpoint zeroed":  # found by the run after the race had begun
        after.pop(day.out / "report.html"), before.pop(day.out / "report.html")
    assert after == before

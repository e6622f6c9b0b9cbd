"""What a run meets when something has gone wrong, and the functions that cause the damage."""

import contextlib
import math
import os
import shutil
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
from ravine.training import train as loop
from ravine.training.cli import main

from .short_race import SHORT

WORDS = [*SHORT, "--checkpoint-every", "2"]
RESUME = ["--out", "race", "--resume"]
METRICS = "sgd/metrics.jsonl"


class Day:
    """What a fault works on: a text, a finished sgd race in `out`, and an empty folder beside it."""

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

    def unfinished(self):
        """Makes the run look as if it was cut off after step 4."""
        (self.run / "outcome.json").unlink()
        shutil.rmtree(self.run / "checkpoints" / "6")


@pytest.fixture(scope="module")
def race(tmp_path_factory, text):
    """An sgd race with checkpoints, run once and copied for each fault."""
    where = tmp_path_factory.mktemp("made")
    shutil.copy(text, where / "text.txt")
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(where):
        patch.setattr(loop, "optimizer_milliseconds", lambda *args: math.nan)
        assert launch(["--out", "race"]) == 0
    return where / "race"


@pytest.fixture
def day(tmp_path, text, race, untimed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = Day(tmp_path, text, race, monkeypatch)
    yield made
    if made.lock is not None:
        made.lock.close()


def launch(words):
    """Runs a command in the test's folder with the flags of the prepared race."""
    full = ["race", "--optimizers", "sgd", *WORDS, *words]
    for flag, value in (("--data", "text.txt"), ("--out", "new")):
        if not any(word == flag or word.startswith(f"{flag}=") for word in words):
            full += [flag, value]
    return main(full)


def tree(root):
    """Every path and its content, except for locks."""
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


def write_bin(day, tokens=(7, 300), count=4000):
    path = day.path / "tokens.bin"
    np.resize(np.array(tokens, "<u2"), count).tofile(path)
    return path


def damaged(name, change, *, unfinished=False):
    """Changes one file of the race."""

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


def line(number, change):
    """Changes one line of the records: cuts, duplicates or corrupts it."""

    def change_all(content):
        lines = content.splitlines(keepends=True)
        lines[number : number + 1] = change(lines[number])
        return b"".join(lines)

    return change_all

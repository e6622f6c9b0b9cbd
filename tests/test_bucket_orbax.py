"""Races in `gs://`, where Orbax writes the checkpoints: a directory stands in for the store."""

import json
import math
import os
import shutil
import tempfile

import pytest
from ravine.training import train as loop

from .object_store import standing_in
from .short_race import SHORT, race, records
from .test_processes import finish, launched

URL = "gs://bucket/run with spaces/ä"
WORDS = ["--optimizers", "sgd", "--schedule", "constant", "--warmup-steps", "1"]
WORDS += ["--checkpoint-every", "2", "--keep-checkpoints", "0"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, standing_in(tmp_path_factory.mktemp("store")) as at:
        temporary = tmp_path_factory.mktemp("tmp")
        patch.setattr(tempfile, "tempdir", str(temporary))
        patch.setattr(loop, "optimizer_milliseconds", lambda *args: math.nan)
        yield at
        assert not os.listdir(temporary)


def test_checkpoints_go_to_the_bucket_and_a_damaged_one_is_set_aside(store, text, tmp_path):
    run = store / URL.removeprefix("gs://")
    assert race(*WORDS, text=text, out=URL) == 0
    written = records(run / "sgd")
    assert not (run / "race.lock").exists()
    for step in (2, 4, 6):
        there = {path.name for path in (run / "sgd" / "checkpoints" / str(step)).iterdir()}
        assert {"files.json", "commit_success.txt"} <= there

    # A branch that changes nothing goes on as the run did.
    branch = tmp_path / "branch"
    assert race(*WORDS, "--branch-from", f"{URL}@4", text=text, out=branch) == 0
    assert records(branch / "sgd") == written

    # As if the run was killed, and the newest checkpoint is damaged.
    (run / "sgd" / "outcome.json").unlink()
    flipped = run / "sgd" / "checkpoints" / "6" / "state" / "_METADATA"
    flipped.write_bytes(flipped.read_bytes()[::-1])
    with pytest.warns(
        UserWarning, match=f"step 6 in {URL}/sgd/checkpoints is damaged .* set aside"
    ):
        assert race(*WORDS, "--resume", text=text, out=URL) == 0
    assert records(run / "sgd") == written
    assert (run / "sgd" / "checkpoints-refused" / "6.0" / "files.json").exists()
    shutil.rmtree(run)


@pytest.mark.processes
def test_processes_that_share_only_the_bucket(text, tmp_path):
    """Each has arrays that no other has; the first one alone has records."""
    run = tmp_path / "store" / "bucket" / "run"
    words = ["race", *SHORT, *WORDS, "--data", text, "--mesh", "fsdp=4", "--out", "gs://bucket/run"]
    command = ["ravine.tests.object_store", str(tmp_path / "store")]

    def go(*flags):
        cache = tmp_path / "cache"
        with launched([*words, *flags], 2, 2, tmp_path, cache, command=command) as started:
            finish(started, tmp_path)
        return records(run / "sgd")

    written = go()
    assert json.loads((run / "sgd" / "meta.json").read_text())["processes"] == 2
    assert (run / "sgd" / "checkpoints" / "6" / "state" / "ocdbt.process_1").is_dir()

    # As if both were killed while the newest checkpoint was written.
    (run / "sgd" / "outcome.json").unlink()
    (run / "sgd" / "checkpoints" / "6" / "files.json").unlink()
    assert go("--resume") == written
    first, second = ((tmp_path / f"{index}.log").read_text() for index in (0, 1))
    assert "step 6 in gs://bucket/run/sgd/checkpoints was cut off" in first
    assert "Traceback" not in first + second
    assert "lost" not in first + second

"""Event files and profiles in a bucket: written on the disk, and copied."""

import os
import sys
import types
from pathlib import Path

import pytest
from ravine.training.run import profile, tensorboard

URL = Path("memory://bucket/beside")


class Writer:
    """Writes a line per scalar, which a flush writes to the file."""

    def __init__(self, folder):
        self.file, self.lines = Path(folder, "events"), ""

    def add_scalar(self, name, value, step):
        self.lines += f"{name} {value} {step}\n"

    def flush(self):
        self.file.write_text(self.lines)

    close = flush


def test_events_are_copied_when_asked_and_in_the_end(memory, temporary, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=Writer))
    with tensorboard.events(URL) as (write, copy):
        write({"step": 3, "loss": 2.0})
        copy()
        assert memory.cat_file("/bucket/beside/events") == b"loss 2.0 3\n"
        write({"step": 4, "loss": 1.0})
    assert memory.cat_file("/bucket/beside/events") == b"loss 2.0 3\nloss 1.0 4\n"
    assert not os.listdir(temporary)

    def fails(self, path, value, **kwargs):
        raise RuntimeError("no network")

    monkeypatch.setattr(type(memory), "pipe_file", fails)
    with tensorboard.events(URL) as (write, _):
        write({"step": 5, "loss": 0.5})
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    folder = Path(said.strip().rpartition("What is missing there is in ")[2].rstrip("."))
    assert (folder / "events").read_text() == "loss 0.5 5\n"


@pytest.mark.parametrize("ends", [True, False])
def test_a_profile_is_copied_once_it_is_whole(memory, temporary, monkeypatch, ends):
    monkeypatch.setattr(profile, "START", 1)
    monkeypatch.setattr(profile, "STOP", 2)
    folders = []
    monkeypatch.setattr("jax.profiler.start_trace", folders.append)
    monkeypatch.setattr(
        "jax.profiler.stop_trace", lambda: Path(folders[0], "trace").write_text("ten updates")
    )
    trace = profile.Profile(URL, 0)
    for step in range(4 if ends else 2):
        trace.before(step, 0.0)
    assert memory.exists("/bucket/beside/trace") == ends
    trace.close()
    assert memory.cat_file("/bucket/beside/trace") == b"ten updates"
    assert len(folders) == 1
    assert not os.listdir(temporary)


@pytest.mark.parametrize("fails", ["start_trace", "stop_trace"])
def test_a_profile_that_cannot_be_written_ends_no_run(fails, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise RuntimeError("RESOURCE_EXHAUSTED: vm.xplane.pb; No space left on device\nand more")

    monkeypatch.setattr("jax.profiler.start_trace", lambda folder: None)
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: None)
    monkeypatch.setattr(f"jax.profiler.{fails}", full)
    trace = profile.Profile(tmp_path, 0)
    for step in range(24):
        trace.before(step, 0.0)
    trace.close()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"the profile in {tmp_path} cannot be written (RESOURCE_EXHAUSTED: vm" in said

"""Real processes, joined over loopback: the losses of one process, also when killed and resumed."""

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import ravine
from ravine.training import distributed as processes
from ravine.training import train as loop
from ravine.training.cli import main

from .run_rounding import furthest_loss, rounding
from .short_race import records

WORDS = ["race", "--width", "16", "--layers", "2", "--heads", "2", "--context", "8"]
WORDS += ["--batch-size", "8", "--steps", "8", "--eval-every", "4", "--eval-batches", "2"]
WORDS += ["--optimizers", "muon", "--checkpoint-every", "1"]
MESH = ["--mesh", "data=2,fsdp=2,tensor=2"]
SLURM_PORTS = (1 << 16) - (1 << 12)  # JAX adds the job number to this
LIMIT = 600  # seconds that a launch may take, however busy the machine is


@pytest.fixture(scope="module")
def words(text):
    return [*WORDS, "--data", text]


@pytest.fixture(scope="module")
def assert_close_to_one_process(words, tmp_path_factory):
    """Checks that records equal those of one process with 8 devices, up to the order of sums."""

    def run():
        out = tmp_path_factory.mktemp("alone") / "race"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "optimizer_milliseconds", lambda *args: math.nan)
            assert main([*words, *MESH, "--out", str(out)]) == 0
        return records(out / "muon")

    expected = run()
    tolerance = rounding(run, expected)

    def check(found):
        assert furthest_loss(found, expected) <= tolerance

    return check


def free_port(wanted):
    with socket.socket() as found:
        found.bind(("127.0.0.1", wanted))
        return found.getsockname()[1]


@contextlib.contextmanager
def launched(words, count, devices, logs, cache, port=None, command=("ravine",)):
    """Processes on a free port, or on a given one as SLURM starts them; the context ends them all."""
    slurm, port = port is not None, port or free_port(0)
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(ravine.__file__).parents[1]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # halves the compilation time
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    started = []
    with contextlib.ExitStack() as stack:
        for index in range(count):
            join = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(count)]
            join = [*join, "--process-id", str(index)] if count > 1 else []
            if slurm:
                join = ["--distributed"]
                environment |= {
                    "SLURM_JOB_ID": str(port - SLURM_PORTS),
                    "SLURM_STEP_NODELIST": "127.0.0.1",
                    "SLURM_NTASKS": str(count),
                    "SLURM_PROCID": str(index),
                    "SLURM_LOCALID": str(index),
                }
            join = [*join, "--cpu-devices", str(devices)]
            log = stack.enter_context((logs / f"{index}.log").open("w"))
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", *command, *words, *join],
                    stdout=log,
                    stderr=log,
                    env=environment,
                    cwd=logs,
                )
            )
            stack.callback(kill, started[-1])
        yield started


def kill(process):
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGKILL)
    process.wait()


def finish(started, logs, status=0):
    deadline = time.monotonic() + LIMIT
    for index, process in enumerate(started):
        code = process.wait(max(1.0, deadline - time.monotonic()))
        assert code == status, (logs / f"{index}.log").read_text()[-2000:]


def wait_for(step, started, out, logs):
    """Waits until the run has written the record of this step."""
    metrics, deadline = out / "muon" / "metrics.jsonl", time.monotonic() + LIMIT
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert time.monotonic() < deadline
        assert all(p.poll() is None for p in started), (logs / "0.log").read_text()[-2000:]
        time.sleep(0.01)


def kill_at(step, started, out, logs):
    """Kills all processes once the run has written the record of this step."""
    wait_for(step, started, out, logs)
    for process in started:
        kill(process)
    assert not (out / "muon" / "outcome.json").exists()


@pytest.mark.processes
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_have_the_losses_of_one(count, words, assert_close_to_one_process, tmp_path):
    out = tmp_path / "race"
    words = [*words, *MESH, "--out", str(out)]
    with launched(words, count, 8 // count, tmp_path, tmp_path / "cache") as started:
        finish(started, tmp_path)
    assert_close_to_one_process(records(out / "muon"))
    # One process writes and prints, and all of them write checkpoints.
    assert sorted(path.name for path in out.iterdir()) == [
        "muon",
        "race.json",
        "race.lock",
        "report.html",
    ]
    assert "held-out" not in (tmp_path / "1.log").read_text()
    assert sorted(path.name for path in (out / "muon" / "checkpoints").iterdir()) == ["7", "8"]


@pytest.mark.processes
@pytest.mark.slow
def test_processes_that_slurm_has_started_find_each_other(words, tmp_path):
    def free(port):
        with contextlib.suppress(OSError):
            return free_port(port)

    out, port = (
        tmp_path / "race",
        next(filter(free, range(SLURM_PORTS + os.getpid() % 4000, 1 << 16))),
    )
    words = [*words, "--optimizers", "sgd", "--steps", "2", "--mesh", "data=4", "--out", str(out)]
    with launched(words, 2, 2, tmp_path, tmp_path / "cache", port) as started:
        finish(started, tmp_path)
    assert json.loads((out / "sgd" / "meta.json").read_text())["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(("count", "step"), [(1, 2), (2, 0), (2, 5)])
def test_after_a_kill_the_rest_is_bitwise_that_of_an_uninterrupted_run(
    count, step, words, tmp_path
):
    cache, size = tmp_path / "cache", 8 // count
    whole, out = tmp_path / "whole", tmp_path / "race"
    with launched([*words, *MESH, "--out", str(whole)], count, size, tmp_path, cache) as started:
        finish(started, tmp_path)
    words = [*words, *MESH, "--out", str(out)]
    with launched(words, count, size, tmp_path, cache) as started:
        kill_at(step, started, out, tmp_path)
    with launched([*words, "--resume"], count, size, tmp_path, cache) as started:
        finish(started, tmp_path)
    assert records(out / "muon") == records(whole / "muon")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("count", [1, 2])
def test_a_signal_to_all_processes_ends_all_and_the_run_goes_on_from_there(
    count, number, status, words, tmp_path
):
    """Each may be in another step and wait for a process that is gone, but for at most ten seconds."""
    cache, out = tmp_path / "cache", tmp_path / "race"
    words = [*words, *MESH, "--steps", "2000", "--checkpoint-every", "5", "--out", str(out)]
    with launched(words, count, 8 // count, tmp_path, cache) as started:
        wait_for(7, started, out, tmp_path)
        for process in started:
            process.send_signal(number)
        finish(started, tmp_path, status)
    logs = [(tmp_path / f"{index}.log").read_text() for index in range(count)]
    assert not any("Traceback" in log or "Fatal" in log for log in logs), logs
    assert not (out / "muon" / "outcome.json").exists()
    newest = max(int(path.name) for path in (out / "muon" / "checkpoints").iterdir())
    assert newest > 5 if count == 1 else newest >= 5  # a single process saves the step it was in
    with launched([*words, "--resume"], count, 8 // count, tmp_path, cache) as started:
        wait_for(newest + 3, started, out, tmp_path)


@pytest.mark.slow
def test_killed_again_and_again_on_other_meshes(words, assert_close_to_one_process, tmp_path):
    """The run continues on 8, 4, 2, 1 and 8 devices."""
    out, cache = tmp_path / "race", tmp_path / "cache"
    resume = []
    for step, (mesh, count, size) in enumerate(
        [("fsdp=4,tensor=2", 2, 4), ("fsdp=4", 2, 2), ("data=2", 1, 2), ("data=1", 1, 1)]
    ):
        again = [*words, *resume, "--mesh", mesh, "--out", str(out)]
        with launched(again, count, size, tmp_path, cache) as started:
            kill_at(step + 1, started, out, tmp_path)
        resume = ["--resume"]
    with launched([*words, *resume, *MESH, "--out", str(out)], 2, 4, tmp_path, cache) as started:
        finish(started, tmp_path)
    assert_close_to_one_process(records(out / "muon"))


@pytest.mark.slow
def test_what_the_first_process_refuses_all_refuse(words, tmp_path):
    """Only the first process looks at the folder."""
    (tmp_path / "race").mkdir()
    (tmp_path / "race" / "mine.txt").write_text("mine")
    words = [*words, *MESH, "--out", str(tmp_path / "race")]
    with launched(words, 2, 4, tmp_path, tmp_path / "cache") as started:
        finish(started, tmp_path, status=2)
    for index in range(2):
        assert "not a race's" in (tmp_path / f"{index}.log").read_text()


@pytest.mark.parametrize("texts", [["", ""], ["", "no text here"], ["no text here", ""]])
def test_refusals_of_other_processes_are_reported(texts, monkeypatch):
    monkeypatch.setattr(processes, "_texts", lambda mine: texts)
    told = pytest.raises(ValueError, match=r"^(process 1: )?no text here$")
    with told if any(texts) else contextlib.nullcontext(), processes.unanimous():
        if texts[0]:
            raise ValueError(texts[0])


def test_processes_with_other_flags_are_named(monkeypatch):
    monkeypatch.setattr(processes, "_texts", lambda mine: [mine, "b"])
    with pytest.raises(ValueError, match="process 1 has another configuration than process 0"):
        processes.check_same("configuration", "a")
    processes.check_same("configuration", "b")


def test_one_process_alone_agrees_with_itself():
    assert jax.process_count() == 1
    assert processes.from_first("täxt") == "täxt"

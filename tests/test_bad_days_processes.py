"""Bad days of real processes: signals at any time, full and read-only disks, wrong environments."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ravine
from ravine.training.cli import main
from ravine.training.run import interrupts
from ravine.training.run.folder import claimed

from .short_race import SMALL, records

pytestmark = pytest.mark.processes
WORDS = ["--eval-every", "500", "--eval-batches", "2", *SMALL]
LIMIT = 240  # seconds that a process may take on a busy machine


def command(text, out, *words, optimizers="sgd,soap", steps=3000):
    names = ["--optimizers", optimizers, "--steps", str(steps)]
    return ["race", *WORDS, *names, "--data", str(text), "--out", str(out), *words]


def environment(**changes):
    return {
        **os.environ,
        "PYTHONPATH": str(Path(ravine.__file__).parents[1]),
        "JAX_PLATFORMS": "cpu",
        # With programs from the cache, there would be no compilation to interrupt.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        **changes,
    }


def finished(words, before=(), **changes):
    """A process that ran to completion: status, stdout, stderr."""
    done = subprocess.run(
        [*before, sys.executable, "-m", "ravine", *words],
        env=environment(**changes),
        capture_output=True,
        timeout=LIMIT,
        check=False,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@contextlib.contextmanager
def started(words):
    """A process that has reached its command line; the context kills it at the end."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    arguments = [sys.executable, "-m", "ravine", *words]
    process = subprocess.Popen(arguments, env=environment(), **pipes)
    try:
        catches = Path(f"/proc/{process.pid}/status")
        wait(lambda: 1 << (signal.SIGTERM - 1) & mask(catches), process)
        yield process
    finally:
        process.kill()
        process.communicate()


def mask(status):
    """The signals that a process catches; SIGTERM is one of them once the command line is reached."""
    line = next(line for line in status.read_text().splitlines() if line.startswith("SigCgt"))
    return int(line.split()[1], 16)


def wait(condition, process):
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ended(process):
    out, err = process.communicate(timeout=LIMIT)
    return process.returncode, out.decode(), err.decode()


def assert_kept(out, told, names):
    """Everything that was finished is still there, appears in the report and can be resumed."""
    for name in names:
        assert json.loads((out / name / "outcome.json").read_text())["status"] == "finished"
        assert name in told
        assert name in (out / "report.html").read_text()


def test_ctrl_c_while_compiling_is_no_crash_and_the_folder_is_free_again(text, tmp_path):
    out = tmp_path / "race"
    with started(command(text, out, optimizers="adamw")) as process:
        wait((out / "adamw" / "metrics.jsonl").exists, process)  # compilation starts now
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        status, _, err = ended(process)
    assert status == 130, err
    assert "interrupted" in err
    assert "Traceback" not in err
    with claimed(out, {"optimizers": {}}, overwrite=True):
        assert not (out / "adamw").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24))
def test_signals_at_any_time_end_a_race_with_their_status(seed, text, tmp_path):
    chance = random.Random(seed)
    number = chance.choice(interrupts.SIGNALS)
    out = tmp_path / "race"
    words = ["--checkpoint-every", "50"] if chance.random() < 0.5 else []
    with started(command(text, out, *words, optimizers="sgd,soap,lion", steps=600)) as process:
        time.sleep(20 * chance.random() ** 1.5)
        process.send_signal(number)
        if twice := chance.random() < 0.3:
            time.sleep(chance.random())
            process.send_signal(number)
        status, told, err = ended(process)
    if status == 0:  # it had already finished
        assert "report:" in told
        return
    assert status == 128 + number, (twice, err)
    assert "Traceback" not in err
    names = [path.parent.name for path in out.glob("*/outcome.json")]
    if not twice:
        assert_kept(out, told, names)
    if words and (out / "race.json").exists() and not seed % 4:
        again = command(text, out, *words, "--resume", optimizers="sgd,soap,lion", steps=600)
        assert finished(again)[0] == 0


@pytest.mark.slow
def test_a_killed_race_is_resumed_bitwise_and_a_live_one_is_left_alone(text, tmp_path, capsys):
    out, whole = tmp_path / "race", tmp_path / "whole"
    words = {"optimizers": "sgd,lion", "steps": 300}
    with started(command(text, out, "--checkpoint-every", "20", **words)) as process:
        wait((out / "lion" / "checkpoints" / "100").exists, process)
        process.send_signal(signal.SIGSTOP)  # still alive, and it runs until it is killed
        for flag in ("--overwrite", "--resume"):
            assert main(command(text, out, "--checkpoint-every", "20", flag, **words)) == 2
            assert f"in use by process {process.pid} on " in capsys.readouterr().err
        assert process.poll() is None
        process.kill()
        process.wait()
    assert finished(command(text, out, "--checkpoint-every", "20", "--resume", **words))[0] == 0
    assert finished(command(text, whole, "--checkpoint-every", "20", **words))[0] == 0
    for name in ("sgd", "lion"):
        assert records(out / name) == records(whole / name)


mounts = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="only root mounts file systems"
)


def mounted(where, options):
    """A command prefix that gives the process a small file system of its own."""
    where.mkdir()
    script = f'mount -t tmpfs -o {options} tmpfs "$0" && exec "$@"'
    return ["unshare", "-m", "sh", "-c", script, str(where)]


@pytest.mark.slow
@mounts
@pytest.mark.parametrize("size", ["60k", "140k", "200k", "300k", "420k", "600k"])
@pytest.mark.parametrize(
    "words", [[], ["--checkpoint-every", "20"]], ids=["records", "checkpoints"]
)
def test_a_full_disk_is_reported_in_one_line(size, words, text, tmp_path):
    disk = tmp_path / "disk"
    prefix = mounted(disk, f"size={size}")
    full = command(text, disk / "race", *words, optimizers="sgd,lion", steps=1500)
    status, told, err = finished(full, prefix)
    complaint = [line for line in err.splitlines() if line.startswith("ravine:")]
    assert status in (1, 2), (status, told, err)
    assert len(complaint) == 1
    assert "No space left" in complaint[0] or "cannot be written" in complaint[0]
    assert "Traceback" not in err


@pytest.mark.slow
@mounts
def test_a_read_only_disk_is_refused_in_one_line(text, tmp_path):
    disk = tmp_path / "disk"
    status, _, err = finished(command(text, disk / "race"), mounted(disk, "ro"))
    assert (status, err.count("\n")) == (2, 1), err
    assert "Read-only file system" in err


ENVIRONMENTS = [
    ({"JAX_PLATFORMS": "cuda"}, 2, "no device of JAX_PLATFORMS=cuda"),
    ({"JAX_PLATFORMS": "abacus"}, 2, "JAX_PLATFORMS=abacus"),
    ({"MPLBACKEND": "bogus"}, 0, ""),  # a race does not use Matplotlib
    ({"PYTHONIOENCODING": "ascii"}, 0, ""),
    ({"LC_ALL": "C", "COLUMNS": "20"}, 0, ""),
    ({"HOME": "/nonexistent", "TMPDIR": "/nonexistent"}, 0, ""),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "status", "said"), ENVIRONMENTS, ids=[str(e[0]) for e in ENVIRONMENTS]
)
def test_environments(changes, status, said, text, tmp_path):
    words = command(text, tmp_path / "räce", optimizers="sgd", steps=2)
    found, told, err = finished(words, **changes)
    assert found == status, (told, err)
    assert said in err
    assert "Traceback" not in err
    if status:
        assert err.count("\n") == 1
        assert not (tmp_path / "räce").exists()
    else:
        assert (tmp_path / "räce" / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "reason"),
    [("| head -c 1", "Broken pipe"), ("2>&1 | head -c 1", ""), (">/dev/full", "No space left")],
)
def test_unwritable_output_loses_no_result(where, reason, text, tmp_path):
    words = command(text, tmp_path / "race", optimizers="sgd", steps=20)
    run = f'("{sys.executable}" -m ravine "$@"; echo $? >"$0/status") {where}'
    given = ["sh", "-c", run, str(tmp_path), *words]
    limits = {"timeout": LIMIT, "check": True, "stderr": subprocess.PIPE}
    told = subprocess.run(given, env=environment(), **limits).stderr.decode()
    assert (tmp_path / "status").read_text() == "0\n"
    outcome = json.loads((tmp_path / "race" / "sgd" / "outcome.json").read_text())
    assert outcome["status"] == "finished"
    assert "sgd" in (tmp_path / "race" / "report.html").read_text()
    assert told.count("\n") == (1 if reason else 0)
    assert reason in told


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the checkpoint of step")
def test_a_bit_flipped_anywhere_in_a_checkpoint_never_changes_a_run(text, tmp_path):
    words = ["--checkpoint-every", "10"]
    options = {"optimizers": "sgd", "steps": 30}
    whole = tmp_path / "whole"
    assert main(command(text, whole, *words, **options)) == 0
    expected = (whole / "sgd" / "metrics.jsonl").read_text()
    losses = lambda lines: [json.loads(line).get("loss") for line in lines.splitlines()]
    chance = random.Random(0)
    for trial in range(40):
        out = tmp_path / str(trial)
        shutil.copytree(whole, out)
        (out / "sgd" / "outcome.json").unlink()
        files = [path for path in (out / "sgd" / "checkpoints" / "30").rglob("*") if path.is_file()]
        path = chance.choice(files)
        content = bytearray(path.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        assert main(command(text, out, *words, "--resume", **options)) == 0, path
        assert losses((out / "sgd" / "metrics.jsonl").read_text()) == losses(expected)
        shutil.rmtree(out)

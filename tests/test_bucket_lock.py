"""The lock of a race in a bucket: its signs of life, and how it is taken over when they stop."""

import datetime
import json
import os
import threading
import time

import pytest
from ravine.training.run import bucket_lock
from ravine.training.run.bucket import bucket_folder
from ravine.training.run.outcome import RunFailed

from .object_store import standing_in
from .short_race import SHORT, race, records
from .test_processes import launched

URL = "memory://bucket/run"
LOCK = "/bucket/run/race.lock"
pytestmark = pytest.mark.usefixtures("untimed", "temporary")


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    """A silent lock is watched for a second, in which its holder would write it twenty times."""
    monkeypatch.setattr(bucket_lock, "BEAT", 0.05)
    monkeypatch.setattr(bucket_lock, "WATCHED", 1.0)


def left_by(pid, minutes, **more):
    """The lock of a process on another machine that was heard of so long ago."""
    then = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=minutes)
    holder = {"pid": pid, "host": "node7", "since": "yesterday", "id": f"{pid}"}
    return json.dumps(holder | {"seen": then.isoformat()} | more).encode()


def test_a_lock_is_refreshed_while_it_is_held_and_gone_afterwards(memory):
    with bucket_folder(URL):
        first = json.loads(memory.cat_file(LOCK))
        time.sleep(1)
        later = json.loads(memory.cat_file(LOCK))
        assert first["seen"] < later["seen"]
        assert {**first, "seen": 0} == {**later, "seen": 0}
    time.sleep(0.2)
    assert not memory.exists(LOCK)


def test_a_silent_lock_is_taken_over_and_its_holder_named(memory, capsys):
    memory.pipe_file(LOCK, left_by(4242, minutes=6))
    with bucket_folder(URL):
        assert json.loads(memory.cat_file(LOCK))["pid"] == os.getpid()
    said = capsys.readouterr().err
    assert "process 4242 on node7 since yesterday, last heard of 6 minutes ago" in said
    assert f"the lock of {URL} is taken over" in said
    assert not memory.find("/bucket")


@pytest.mark.parametrize(
    ("left", "said"),
    [
        (
            lambda: left_by(4242, minutes=1),
            "last heard of 6\\d s ago.* remove .*, or try again in 5 minutes",
        ),
        # Its clock is ahead.
        (lambda: left_by(4242, minutes=-60), "last heard of 0 s ago; wait for it"),
        # Locks of earlier versions have no signs of life.
        (
            lambda: left_by(4242, minutes=99, seen=None),
            f"since yesterday; wait .* remove {URL}/race.lock first",
        ),
        (lambda: b"{", "another process; wait for it"),
    ],
)
def test_any_other_lock_is_refused_with_its_holder(memory, left, said):
    lock = left()  # when the test runs, not when it is collected
    memory.pipe_file(LOCK, lock)
    with pytest.raises(ValueError, match=f"{URL} is in use by .*{said}"), bucket_folder(URL):
        pass
    assert memory.cat_file(LOCK) == lock


def test_a_holder_whose_clock_is_behind_is_not_dead(memory, monkeypatch):
    """Its signs of life look ten minutes old, but they change."""
    stop = threading.Event()

    def lives():
        while not stop.wait(0.05):
            memory.pipe_file(LOCK, left_by(4242, minutes=10))

    memory.pipe_file(LOCK, left_by(4242, minutes=10))
    holder = threading.Thread(target=lives)
    holder.start()
    try:
        with pytest.raises(ValueError, match="in use by process 4242 on node7"), bucket_folder(URL):
            pass
    finally:
        stop.set()
        holder.join()
    assert json.loads(memory.cat_file(LOCK))["pid"] == 4242


def test_only_one_of_two_takes_a_lock_over(memory):
    memory.pipe_file(LOCK, left_by(4242, minutes=6))
    entered, refused, everyone = [], [], threading.Barrier(4)

    def enter():
        everyone.wait()
        try:
            with bucket_folder(URL):
                entered.append(1)
                time.sleep(2)
        except ValueError as error:
            refused.append(str(error))

    racers = [threading.Thread(target=enter) for _ in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert (len(entered), len(refused)) == (1, 3)
    assert not memory.find("/bucket")


def test_a_holder_that_comes_back_writes_nothing_more(memory, capsys):
    """As after a laptop slept, or a network was away, for longer than a lock may be silent."""

    def slept():
        with bucket_folder(URL) as bucket:
            (bucket.folder / "race.json").write_text('{"writes": ["race.json"]}')
            bucket.copy()
            memory.pipe_file(LOCK, left_by(7, minutes=0))  # by who took it over
            (bucket.folder / "race.json").write_text("another")
            with pytest.raises(RunFailed, match=f"{URL} was taken over by process 7 on node7"):
                bucket.try_to_copy()
            time.sleep(0.2)

    with pytest.raises(RunFailed, match=r"the results are not all in the bucket .* They are in "):
        slept()
    assert memory.cat_file("/bucket/run/race.json") == b'{"writes": ["race.json"]}'
    assert json.loads(memory.cat_file(LOCK))["pid"] == 7


def test_a_lock_that_was_removed_by_hand_comes_back(memory):
    with bucket_folder(URL) as bucket:
        memory.rm_file(LOCK)
        bucket.copy()
        time.sleep(0.5)
        assert json.loads(memory.cat_file(LOCK))["pid"] == os.getpid()


@pytest.mark.processes
@pytest.mark.filterwarnings(
    "ignore:the checkpoint of step .* was cut off"
)  # at some of all moments
def test_a_race_that_was_killed_goes_on(text, tmp_path, monkeypatch, capsys):
    store, url = tmp_path / "store", "gs://bucket/run"
    run, lock = store / "bucket/run/sgd", store / "bucket/run/race.lock"
    words = ["--optimizers", "sgd", "--schedule", "constant", "--warmup-steps", "1"]
    words += ["--steps", "300", "--eval-every", "150"]
    command = ["ravine.tests.object_store", str(store)]
    whole = ["race", *SHORT, *words, "--checkpoint-every", "2", "--data", text, "--out", url]
    with launched(whole, 1, 1, tmp_path, tmp_path / "cache", command=command) as (killed,):
        while not list(run.glob("checkpoints/*/files.json")):
            assert killed.poll() is None, (tmp_path / "0.log").read_text()
            time.sleep(0.05)
    assert json.loads(lock.read_text())["pid"] == killed.pid
    assert not (run / "outcome.json").exists()
    again = [*words, "--checkpoint-every", "150", "--resume"]
    with standing_in(store):
        assert race(*again, text=text, out=url) == 2
        assert f"{url} is in use by process {killed.pid} on " in capsys.readouterr().err
        monkeypatch.setattr(bucket_lock, "SILENT", 0.0)
        assert race(*again, text=text, out=url) == 0
    assert f"the lock of {url} is taken over" in capsys.readouterr().err
    steps = [record["step"] for record in records(run) if "loss" in record]
    assert steps == list(range(300))
    assert not lock.exists()

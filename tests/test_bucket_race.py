"""A race whose results are in a bucket, using fsspec's in-memory file system."""

import errno
import json
import os
from pathlib import Path

import pytest
from ravine.training.compare.race_config import RaceConfig, check_bucket
from ravine.training.run.bucket import bucket_folder
from ravine.training.run.outcome import RunFailed

from .short_race import race

URL = "memory://bucket/run"
MANIFEST = json.dumps({"writes": ["race.json", "adamw/metrics.jsonl", "adamw/checkpoints/"]})

pytestmark = pytest.mark.usefixtures("temporary")


def names(memory):
    return sorted(path.removeprefix("/bucket/run/") for path in memory.find("/bucket/run"))


def checkpoint(folder, step, content="arrays"):
    made = folder / "adamw" / "checkpoints" / str(step)
    made.mkdir(parents=True, exist_ok=True)
    (made / "d").write_text(content)
    (made / "files.json").write_text(json.dumps(content))


def test_a_copy_follows_its_folder(memory, temporary):
    memory.pipe("/bucket/beside", b"another's")
    with bucket_folder(URL) as bucket:
        (bucket.folder / "race.json").write_text(MANIFEST)
        (bucket.folder / "race.lock").write_text("")
        (bucket.folder / "race.json.tmp").write_text("half")
        checkpoint(bucket.folder, 2)
        (bucket.folder / "adamw/checkpoints/4").mkdir()
        (bucket.folder / "adamw/checkpoints/4/d").write_text("not sealed yet")
        bucket.copy()
        sealed = ["adamw/checkpoints/2/d", "adamw/checkpoints/2/files.json"]
        assert names(memory) == [*sealed, "race.json", "race.lock"]
        (bucket.folder / "adamw/metrics.jsonl").write_text("{}\n")
        (bucket.folder / "adamw/checkpoints/2/d").unlink()
        (bucket.folder / "adamw/checkpoints/2/files.json").unlink()
        checkpoint(bucket.folder, 4)
    sealed = ["adamw/checkpoints/4/d", "adamw/checkpoints/4/files.json"]
    assert names(memory) == [*sealed, "adamw/metrics.jsonl", "race.json"]
    assert memory.cat_file("/bucket/run/adamw/checkpoints/4/d") == b"arrays"
    assert not os.listdir(temporary)


def test_a_seal_goes_first_and_comes_last(memory, monkeypatch):
    done = []
    with bucket_folder(URL) as bucket:
        checkpoint(bucket.folder, 2, "old")
        bucket.copy()
        checkpoint(bucket.folder, 2, "rewritten")
        kind = type(memory)
        put, remove = kind.put_file, kind.rm_file

        def put_file(self, lpath, rpath, **kwargs):
            done.append(f"put {Path(rpath).name}")
            put(self, lpath, rpath, **kwargs)

        def rm_file(self, path):
            done.append(f"remove {Path(path).name}")
            remove(self, path)

        monkeypatch.setattr(kind, "put_file", put_file)
        monkeypatch.setattr(kind, "rm_file", rm_file)
        bucket.copy()
        assert done == ["remove files.json", "put d", "put files.json"]


def test_one_race_at_a_time(memory, temporary):
    with bucket_folder(URL):
        told = f"{URL} is in use by process {os.getpid()} on .* If that process was killed, remove "
        with pytest.raises(ValueError, match=f"{told}{URL}/race.lock first"), bucket_folder(URL):
            pass
        assert names(memory) == ["race.lock"]
    assert names(memory) == []
    assert not os.listdir(temporary)


@pytest.mark.parametrize(
    ("there", "flags", "said"),
    [
        ("race.json", {}, f"{URL} holds another run; give --resume or another --out."),
        ("notes.txt", {}, f"{URL} holds files; give another --out."),
        ("race.json", {"overwrite": True}, f"--overwrite clears no bucket; remove {URL} by hand"),
        ("notes.txt", {"resume": True}, f"{URL} holds no race; --resume needs"),
        ("", {}, f"{URL}: a file; give --out a folder;"),
    ],
)
def test_what_else_is_there_is_refused_and_left(memory, temporary, there, flags, said):
    memory.pipe(f"/bucket/run/{there}".rstrip("/"), MANIFEST.encode())
    with pytest.raises(ValueError, match=said), bucket_folder(URL, **flags):
        pass
    assert list(memory.find("/")) == [f"/bucket/run/{there}".rstrip("/")]
    assert not os.listdir(temporary)


def test_what_goes_on_is_fetched_and_what_is_not_the_races_is_left(memory):
    for name in ("adamw/metrics.jsonl", "adamw/checkpoints/2/d", "notes.txt", "adamw/../../x"):
        memory.pipe(f"/bucket/run/{name}", b"1")
    memory.pipe("/bucket/run/race.json", MANIFEST.encode())
    before = memory.find("/bucket")
    with bucket_folder(URL, resume=True) as bucket:
        here = [file for file in bucket.folder.rglob("*") if file.is_file()]
        here = sorted(file.relative_to(bucket.folder).as_posix() for file in here)
        assert here == ["adamw/checkpoints/2/d", "adamw/metrics.jsonl", "race.json"]
        bucket.copy()
        (bucket.folder / "adamw/metrics.jsonl").unlink()
    assert sorted(memory.find("/bucket")) == sorted(
        path for path in before if not path.endswith("metrics.jsonl")
    )


def test_a_refusal_names_the_url(memory, temporary):
    with pytest.raises(ValueError, match=f"^{URL}/adamw is damaged"), bucket_folder(URL) as bucket:
        raise ValueError(f"{bucket.folder}/adamw is damaged")
    assert not memory.find("/bucket")


def test_a_full_temporary_folder_is_named_with_its_fix(memory, temporary):
    told = f"^{URL}: No space left on device in {temporary}; set TMPDIR to a folder with room"
    with pytest.raises(ValueError, match=told):
        filled()
    assert not memory.find("/bucket")
    assert not os.listdir(temporary)


def filled():
    """A race whose temporary folder is full."""
    with bucket_folder(URL) as bucket:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(bucket.folder / "report.html"))
        raise ValueError(f"{full.filename}: no space; fix that or give another --out.") from full


def test_a_copy_that_fails_is_made_up_for(memory, temporary, monkeypatch, capsys):
    kind = type(memory)

    with bucket_folder(URL) as bucket:
        (bucket.folder / "race.json").write_text(MANIFEST)
        with monkeypatch.context() as patch:
            patch.setattr(kind, "pipe_file", fails)
            bucket.try_to_copy()
        assert f"ravine: not copied: {URL}: RuntimeError: no network;" in capsys.readouterr().err
        bucket.try_to_copy()
        assert "race.json" in names(memory)


def test_what_cannot_be_copied_in_the_end_is_kept(memory, monkeypatch, capsys):
    with pytest.raises(RunFailed, match=r"no network.* They are in .*: copy them"):
        unplugged(monkeypatch, type(memory))
    folder = Path(capsys.readouterr().err.split("They are in ")[1].split(": copy them")[0])
    assert (folder / "race.json").read_text() == MANIFEST
    assert names(memory) == []


def unplugged(monkeypatch, kind):
    """A race that loses its network connection."""
    with bucket_folder(URL) as bucket:
        bucket.copy()
        (bucket.folder / "race.json").write_text(MANIFEST)
        monkeypatch.setattr(kind, "pipe_file", fails)


def fails(self, path, value, **kwargs):
    raise RuntimeError("no network\nand a page of why")


def runs(url, *words, text):
    words = ["--optimizers", "adamw", "--checkpoint-every", "3", *words]
    return race(*words, text=text, out=url)


def test_a_race_in_a_bucket_goes_on_from_there(memory, temporary, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 60)
    text = str(tmp_path / "text.txt")
    assert runs(URL, text=text) == 0
    said = capsys.readouterr().out
    assert f"results: {URL}\n" in said
    assert f"report: {URL}/report.html\n" in said
    whole = names(memory)
    records = memory.cat_file("/bucket/run/adamw/metrics.jsonl")
    assert {"race.json", "report.html", "adamw/meta.json", "adamw/outcome.json"} <= set(whole)
    assert {f"adamw/checkpoints/{step}/files.json" for step in (3, 6)} <= set(whole)
    assert "race.lock" not in whole
    assert not os.listdir(temporary)

    # A branch that changes nothing goes on as the run did, and leaves it alone.
    assert runs(tmp_path / "branch", "--branch-from", f"{URL}@3", text=text) == 0
    assert untimed((tmp_path / "branch/adamw/metrics.jsonl").read_bytes()) == untimed(records)
    meta = json.loads((tmp_path / "branch/adamw/meta.json").read_text())
    assert meta["branched_from"] == {"run": f"{URL}/adamw", "step": 3}
    assert names(memory) == whole
    assert not os.listdir(temporary)
    assert runs(tmp_path / "none", "--branch-from", f"{URL}@4", text=text) == 2
    told = f"the checkpoint of step 4 in {URL}/adamw is not there; those of steps [3, 6] are"
    assert told in capsys.readouterr().err

    # As if the run was killed while it copied its last checkpoint.
    memory.rm("/bucket/run/adamw/outcome.json")
    memory.rm("/bucket/run/adamw/checkpoints/6/files.json")
    with pytest.warns(UserWarning, match="step 6 .* was cut off .* going on from that of step 3"):
        assert runs(URL, "--resume", text=text) == 0
    again = memory.cat_file("/bucket/run/adamw/metrics.jsonl")
    assert untimed(again) == untimed(records)
    assert "adamw/checkpoints/6/files.json" in names(memory)
    assert any(name.startswith("adamw/checkpoints-refused/6.0/") for name in names(memory))
    assert not os.listdir(temporary)


def untimed(records):
    return [
        {name: x for name, x in json.loads(line).items() if name != "seconds"}
        for line in records.splitlines()
    ]


@pytest.mark.parametrize(
    ("config", "flag"),
    [(RaceConfig(out=Path(URL)), "--out"), (RaceConfig(branch_from=f"{URL}@3"), "--branch-from")],
)
def test_several_processes_need_a_bucket_that_orbax_writes(monkeypatch, config, flag):
    check_bucket(config)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(ValueError, match=f"{flag} {URL}.*: several processes .* gs:// only"):
        check_bucket(config)
    check_bucket(RaceConfig(out=Path("gs://bucket/run"), branch_from="gs://bucket/long@3"))

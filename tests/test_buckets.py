"""Text and tokens in buckets, in fsspec's in-memory file system; other uses are refused."""

import errno
import os
import re
import sys
import tempfile
import types
from pathlib import Path

import fsspec
import numpy as np
import pytest
from ravine.training.cli import main
from ravine.training.compare.race import race
from ravine.training.compare.race_config import RaceConfig, check_data
from ravine.training.config import RunConfig
from ravine.training.config_file import printed, read_config
from ravine.training.data.bpe import corpus_of
from ravine.training.data.corpus import load_corpus
from ravine.training.data.shards import write_shard

from .short_race import SHORT


def texts(count):
    return {f"inner/{i:03}.txt": f"file {i} ünïcode ".ljust(999).encode() for i in range(count)}


@pytest.mark.parametrize("count", [2, 90])
def test_a_folder_in_a_bucket_is_the_same_text_as_on_disk(tmp_path, memory, count):
    passed_over = {
        ".hidden.txt": b"no",
        "__pycache__/a.txt": b"no",
        "empty.txt": b"",
        "binary": b"a\0b",
        "race/race.json": b'{"writes": []}',
        "race/adamw/metrics.jsonl": b"{}",
    }
    for name, content in {**texts(count), **passed_over}.items():
        file = tmp_path / "texts" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        memory.pipe(f"/bucket/texts/{name}", content)
    local = load_corpus([tmp_path / "texts"])
    for url in ("memory://bucket/texts", "memory://bucket/texts/", f"file://{tmp_path}/texts"):
        found = load_corpus([Path(url)])
        assert (found.fingerprint, found.description) == (local.fingerprint, local.description)
        np.testing.assert_array_equal(found.train, local.train)
        np.testing.assert_array_equal(found.heldout, local.heldout)


def test_a_file_in_a_bucket_beside_one_on_disk(tmp_path, memory):
    (tmp_path / "a.txt").write_bytes(b"a" * 500)
    memory.pipe("/bucket/b.txt", b"b" * 500)
    both = load_corpus([tmp_path / "a.txt", Path("memory://bucket/b.txt")])
    assert both.train.tobytes() + both.heldout.tobytes() == b"a" * 500 + b"b" * 500


def test_tokens_in_a_bucket_are_those_on_disk_and_leave_nothing_there(
    tmp_path, memory, monkeypatch
):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    content = np.random.default_rng(0).integers(0, 50_000, 2_000).astype("<u2").tobytes()
    (tmp_path / "tokens.bin").write_bytes(content)
    memory.pipe("/bucket/tokens.bin", content)
    memory.pipe("/bucket/held.bin", write_shard(tmp_path / "held.bin", range(99)).read_bytes())
    local, found = (
        load_corpus([path])
        for path in (tmp_path / "tokens.bin", Path("memory://bucket/tokens.bin"))
    )
    assert not os.listdir(tmp_path / "tmp")
    memory.rm("/bucket/tokens.bin")  # data that were already read do not change
    found.check_unchanged()
    for name in ("fingerprint", "description", "vocabulary", "bytes_per_token"):
        assert getattr(found, name) == getattr(local, name)
    np.testing.assert_array_equal(found.train, local.train)
    np.testing.assert_array_equal(found.heldout, local.heldout)
    both = load_corpus([tmp_path / "tokens.bin"], heldout=[Path("memory://bucket/held.bin")])
    assert [path.name for path, _ in both.files] == ["tokens.bin"]
    np.testing.assert_array_equal(both.heldout, np.arange(99))
    with pytest.raises(ValueError, match="memory://bucket/text is no "):
        load_corpus([Path("memory://bucket/tokens.bin"), Path("memory://bucket/text")])


def test_tokens_in_a_bucket_are_not_encoded_again(memory):
    memory.pipe("/bucket/tokens.bin", bytes(4_000))
    data = (Path("memory://bucket/tokens.bin"),)
    with pytest.raises(ValueError, match=r"tokens\.bin holds tokens already"):
        corpus_of(RunConfig(data=data, bpe=300))
    assert corpus_of(RunConfig(data=data, bytes_per_token=4.0)).bytes_per_token == 4.0


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (
            "memory://bucket/missing",
            "memory://bucket/missing: no such file or folder; fix the URL.",
        ),
        ("memory://bucket/missing.bin", "missing.bin: no such file or folder; fix the URL."),
        ("memory://bucket/odd.bin", "memory://bucket/odd.bin: 3 bytes, odd"),
        ("memory://bucket/empty.bin", "memory://bucket/empty.bin: the file is empty"),
        (
            "memory://bucket/folder.bin",
            "memory://bucket/folder.bin: a folder, and a .bin is a file",
        ),
        ("full://bucket/tokens.bin", "tokens.bin: No space left on device in "),
        ("short://bucket/tokens.bin", "tokens.bin: 2 of 4 bytes came"),
        ("memory://bucket/binary", "memory://bucket/binary: not UTF-8 text"),
        ("memory://bucket/empty.txt", "memory://bucket/empty.txt: the file is empty"),
        ("memory://bucket/folder", "memory://bucket/folder: no UTF-8 text"),
        ("nowhere://bucket/a.txt", "nowhere://bucket/a.txt: Protocol not known: nowhere"),
        ("absent://bucket/a.txt", "absent://bucket/a.txt: Install absentfs; pip install"),
        ("broken://bucket/a.txt", "broken://bucket/a.txt: RuntimeError: no credentials; "),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_line(memory, url, said):
    bad = {"odd.bin": b"odd", "empty.bin": b"", "binary": b"a\0b", "empty.txt": b""}
    for name, content in bad.items():
        memory.pipe(f"/bucket/{name}", content)
    for folder in ("folder", "folder.bin"):
        memory.pipe(f"/bucket/{folder}/binary", b"a\0b")
    fsspec.register_implementation("absent", "no.Such", clobber=True, errtxt="Install absentfs")
    for kind in (Broken, Full, Short):
        fsspec.register_implementation(kind.protocol, kind, clobber=True)
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        load_corpus([Path(url)])
    assert "\n" not in str(refused.value)


class Broken(fsspec.AbstractFileSystem):
    """Fails like a bucket that is accessed without credentials."""

    protocol = "broken"

    def info(self, path, **kwargs):
        raise RuntimeError("no credentials\nand a page of why")


class Short(fsspec.AbstractFileSystem):
    """Fails like a connection that closes early."""

    protocol = "short"

    def info(self, path, **kwargs):
        return {"name": path, "type": "file", "size": 4}

    def get_file(self, rpath, lpath, **kwargs):
        Path(lpath).write_bytes(b"ab")


class Full(Short):
    """Fails like a temporary folder on a full disk."""

    protocol = "full"

    def get_file(self, rpath, lpath, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "command",
    [
        "race --tokenizer",
        "sweep --out",
        "speedup --out",
        "sensitivity --out",
        "batch-size --out",
        "study decay --out",
        "study width --out",
        "coordinate-check --out",
        "presets --figure",
        "race --config",
    ],
)
def test_nothing_else_may_lie_in_a_bucket(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    url = "gs://bucket/run" + (".png" if "figure" in command else "")
    assert main([*command.split(), url]) == 2
    said = capsys.readouterr().err
    flag = command.split()[-1]
    assert f"{flag} {url}: only data, profiles, and the --out, " in said
    assert said.count("\n") == 1
    assert not os.listdir(tmp_path)


def test_nor_in_a_program(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--tokenizer gs://bucket/run: only data"):
        race(RaceConfig(run=RunConfig(tokenizer=Path("gs://bucket/run"))))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("flag", ["--out", "--tensorboard", "--profile", "--branch-from"])
def test_a_bucket_that_nothing_opens_is_refused_at_once(tmp_path, monkeypatch, capsys, flag):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorboardX", types.ModuleType("tensorboardX"))
    url = "nowhere://bucket/run" + ("@3" if "from" in flag else "")
    assert main(["race", *SHORT, "--optimizers", "sgd", "--data", __file__, flag, url]) == 2
    said = capsys.readouterr().err
    assert "nowhere://bucket/run" in said
    assert "Protocol not known: nowhere" in said
    assert said.count("\n") == 1
    assert not os.listdir(tmp_path)


def test_a_url_survives_a_printed_configuration(tmp_path):
    config = RaceConfig(run=RunConfig(data=(Path("gs://bucket/text"),)))
    (tmp_path / "config.json").write_text(printed(config))
    assert read_config(tmp_path / "config.json", RaceConfig()) == config
    check_data(RaceConfig(overwrite=True, run=config.run), Path())  # no local folder is cleared

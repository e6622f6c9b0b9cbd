"""Circular paths, paths that go back or through pipes or files: refused, and nothing is created."""

import os
from pathlib import Path

import pytest
from ravine.training.cli import main
from ravine.training.compare.race_config import RaceConfig, check_data, origins_of, out_folder
from ravine.training.config import RunConfig
from ravine.training.data.corpus import load_corpus
from ravine.training.run.bucket import bucket_folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "text.txt").write_text("To be, or not to be. " * 1000)
    return tmp_path


def test_text_that_is_no_file(here):
    os.mkfifo("pipe")
    with pytest.raises(ValueError, match="circle: no such file or directory"):
        load_corpus([Path("circle")])
    for path in ("pipe", "/dev/null"):
        with pytest.raises(ValueError, match=f"{path}: a pipe or a device; write it to a file"):
            load_corpus([Path(path)])


def test_circles_are_left_to_those_that_open_them():
    config = RaceConfig(
        branch_from="circle@3", overwrite=True, run=RunConfig(data=(Path("circle"),))
    )
    check_data(config, Path("circle/out"))
    assert origins_of(config, (), Path("out")) == []


def test_a_folder_behind_one_that_is_not_there_is_not_made(here):
    assert out_folder(RaceConfig(out=Path("new/../.."))) == here.parent
    assert out_folder(RaceConfig(out=Path("new/run"))) == Path("new/run")


def test_a_bucket_without_a_folder():
    for url in ("memory://", "memory:///"):
        with pytest.raises(ValueError, match=f"^{url} names no bucket; "), bucket_folder(url):
            pass


@pytest.mark.parametrize("profile", ["circle", "circle/traces", "text.txt", "text.txt/traces"])
def test_profiles_that_cannot_be_written(profile):
    at = profile.split("/")[0]
    with pytest.raises(
        ValueError, match=f"^profile {profile} cannot be a folder, as {at} is none; "
    ):
        RunConfig(profile=Path(profile))
    assert RunConfig(profile=Path("traces/new")).profile == Path("traces/new")


@pytest.mark.parametrize(
    ("command", "out"),
    [
        ("sweep", "circle"),
        ("speedup", "."),
        ("sensitivity", "text.txt/losses.jsonl"),
        ("coordinate-check", "text.txt/folder"),
        ("study decay", "text.txt/folder"),
    ],
)
def test_results_that_cannot_be_written(here, capsys, command, out):
    assert main([*command.split(), "--data", "text.txt", "--out", out]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"ravine: {out.split('/')[0]}")
    assert "; give another --out." in said
    assert sorted(os.listdir(here)) == ["circle", "text.txt"]

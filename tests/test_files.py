"""Files on a disk that fills up: whole lines, files as they were, no drafts, and the true reason."""

import errno
import os
from pathlib import Path

import pytest
from ravine.training.cli import main
from ravine.training.run.files import Lines, save_figure, write_text


class Full:
    """A file on a disk with room for so many more bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        part, self.room = data[: self.room], self.room - len(data)
        if not part:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(part)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_line_that_does_not_fit_is_not_there(tmp_path):
    file = tmp_path / "lines.jsonl"
    file.write_text("1\n")
    lines = Lines(file)
    lines.write([2])
    lines._file, whole = Full(lines._file, 3), lines._file
    with pytest.raises(OSError, match=r"No space left .*lines\.jsonl"):
        lines.write(list(range(9)))
    lines._file = whole
    lines.write([3])
    lines.close()
    assert file.read_text() == "1\n[2]\n[3]\n"


def fills(*args, **kwargs):
    """As if a library had met a full disk half-way."""
    Path(args[1]).write_bytes(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_does_not_fit_leaves_what_was_there(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figure, file = Figure(), tmp_path / "figure.png"
    save_figure(figure, file, 50)
    assert file.read_bytes().startswith(b"\x89PNG")
    before = file.read_bytes()
    monkeypatch.setattr(Figure, "savefig", fills)
    monkeypatch.setattr(Path, "write_text", lambda file, *args, **kwargs: fills(None, file))
    with pytest.raises(OSError, match=r"No space left .*figure\.png"):
        save_figure(figure, file, 50)
    with pytest.raises(OSError, match=r"No space left .*text"):
        write_text(tmp_path / "text", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]
    assert file.read_bytes() == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_under_a_figure_is_not_blamed_on_the_output(
    number, tmp_path, monkeypatch, capsys
):
    def full(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    assert main(["presets", "--show", "cost", "--figure", str(tmp_path / "out.png")]) == 1
    said = capsys.readouterr().err
    assert f"out.png: {os.strerror(number)}; make room" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("file", ["file/shapes.png", "folder.png"])
def test_a_figure_that_has_no_place(file, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    assert main(["presets", "--show", "cost", "--figure", str(tmp_path / file)]) == 2
    said = capsys.readouterr().err
    assert f"{file}" in said
    assert "; give another --figure." in said
    assert said.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.png"]

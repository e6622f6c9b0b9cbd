"""Commands whose output cannot be written end with one line and a status, not with a traceback."""

import pytest
from ravine.training.cli import main


@pytest.mark.parametrize(
    "words", [["presets"], ["presets", "--help"], ["race", "--help"], ["--help"]], ids=" ".join
)
def test_a_full_disk_behind_standard_output_is_reported_in_one_line(words, monkeypatch, capsys):
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr("sys.stdout", full)
        status = main(words)
    said = capsys.readouterr().err
    assert status == 1
    assert said == "ravine: standard output cannot be written (No space left on device).\n"

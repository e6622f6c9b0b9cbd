"""The command line as a whole: help, version and unknown words."""

import re
import sys
from pathlib import Path

import pytest
from ravine.training.cli import COMMANDS, STUDIES, main


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in COMMANDS)
    assert main([]) == 2


def test_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"ravine \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


@pytest.mark.parametrize(("word", "meant"), [("rase", "race"), ("batchsize", "batch-size")])
def test_an_unknown_command_is_refused_with_the_nearest_one(word, meant, capsys):
    assert main([word]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert meant in told


@pytest.mark.parametrize(
    ("words", "fixed"),
    [
        ("race --optimizers adamw muon --steps 5", "adamw,muon"),
        ("sweep --optimizers=adamw, soap_muon, lion", "adamw,soap_muon,lion"),
        ("speedup muon", "muon"),
    ],
)
def test_names_of_optimizers_between_spaces_get_their_commas(words, fixed, capsys):
    assert main(words.split()) == 2
    told = capsys.readouterr().err
    assert told.endswith(f"; separate optimizers by commas: --optimizers {fixed}.\n")
    assert main(["race", "--optimizers", "adamw", "cake"]) == 2
    assert capsys.readouterr().err == "ravine: Unrecognized options: cake\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("race --step 2", "Unrecognized options: --step, 2; did you mean --steps?"),
        ("race --setps=3", "Unrecognized options: --setps=3; did you mean --steps?"),
        ("race --over-write", "Unrecognized options: --over-write; did you mean --overwrite?"),
        ("plan --modle x", "Unrecognized options: --modle, x; did you mean --model?"),
        ("race --steps 2.5", "--steps must be a whole number, got '2.5'."),
        (
            "presets --parameters 1e30",
            "the rules of thumb are for at most 1e+14 parameters, got 1e+30.",
        ),
        (
            "presets --tokens 1e30",
            "the rules of thumb are for at most 1e+14 parameters, got 5e+28.",
        ),
        ("race --data", "--data names no file; leave it out for Python's own standard library."),
        ("race --data --steps 5", "--data names no file; leave it out for Python's own"),
        ("study decay --steps 5 --data", "--data names no file; leave it out for Python's own"),
        ("plan --compare muon,soap,muon", "'muon' is given twice; name each optimizer once."),
        ("race --config", "--config needs a file."),
        ("race --config=", "--config needs a file."),
        ("race --optimizers SOAP", "unknown optimizer 'SOAP'; did you mean soap or "),
        ("presets LLAMA2-7B", "unknown preset 'LLAMA2-7B'; did you mean llama2-7b or "),
        ("race --ema much", "--ema must be a number, got 'much'."),
        ("race --heads 0", "heads must be at least 1, got 0."),
        ("race --width 16 --heads 20", "width 16 must be an even multiple of heads 20 (RoPE turns"),
        ("race --seeds 0", "seeds must be at least 1, got 0."),
        ("race --seeds 1000000000000", "seeds must be at most 10000, got 1000000000000."),
        ("sweep --trials 1000000000000", "trials must be at most 10000, got 1000000000000."),
        ("speedup --seeds 20000", "seeds must be at most 10000, got 20000."),
        ("sensitivity --seeds 20000", "seeds must be at most 10000, got 20000."),
        ("study width --seeds 20000", "seeds must be at most 10000, got 20000."),
        ("batch-size --seeds 20000", "seeds must be at most 10000, got 20000."),
        (
            "speedup --factors nan 1",
            "factors must be positive and named once each, got [nan, 1.0].",
        ),
        ("race --target-loss nan", "target_loss must be finite and not negative, got nan."),
        ("race --target-loss -1", "target_loss must be finite and not negative, got -1.0."),
        (
            "race --optimizers adamw --learning-rates adamw=1,adamw=2",
            "adamw is given twice; give it once.",
        ),
        ("race --rollback every=2,every=3", "every is given twice; give it once."),
        (
            "race --optimizers adamw --learning-rates adamw",
            "adamw has no value; write adamw=NUMBER.",
        ),
    ],
)
def test_a_refusal_names_the_flag_and_the_fix(words, told, capsys):
    assert main(words.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"ravine: {told}")
    assert said.count("\n") == 1
    assert "default" not in said  # no help texts


def test_an_installation_without_the_trainers_packages_is_told_the_fix(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "ravine.training.batch_size.command", raising=False)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["race"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(
        "ravine: rich is not installed; the commands need pip install 'ravine[tr"
    )
    assert told.count("\n") == 1


@pytest.mark.parametrize("command", ["race", "presets", "study width"])
def test_a_command_needs_no_flags(command, capsys):
    assert main([*command.split(), "--print-config"]) == 0
    assert capsys.readouterr().out.startswith("{")


STUDY = [f"study {name}" for name in STUDIES]


@pytest.mark.parametrize("command", [*sorted(set(COMMANDS) - {"study"}), *STUDY])
def test_every_command_has_help_with_its_defaults(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert "default:" in capsys.readouterr().out


def test_help_on_studies_lists_them(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["study", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in STUDY)


@pytest.mark.parametrize(
    "command", ["batch-size", "coordinate-check", "sensitivity", "speedup", "sweep"]
)
def test_a_kernel_of_attention_that_needs_a_gpu_is_refused_without_one(
    command, tmp_path, text, capsys
):
    long = tmp_path / "long.txt"
    long.write_text(Path(text).read_text() * 20)
    words = [*command.split(), "--attention", "cudnn", "--dtype", "bfloat16", "--data", str(long)]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert (
        "attention cudnn needs an NVIDIA GPU, not cpu; take xla or plain" in capsys.readouterr().err
    )

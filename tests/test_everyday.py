"""What one does with a trainer every day: files of options, hyperparameters, gradient accumulation."""

import json
import tomllib

import pytest
from ravine.training.cli import COMMANDS, main
from ravine.training.compare.entrants import line_up
from ravine.training.compare.race import RaceConfig
from ravine.training.config import RunConfig
from ravine.training.config_file import printed, read_config

SMALL = ["--width", "16", "--layers", "1", "--heads", "2", "--context", "16", "--batch-size", "4"]
SHORT = ["--steps", "6", "--eval-every", "3", "--eval-batches", "2", *SMALL]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {i * i} of a text that says little. " for i in range(400)))
    return str(path)


def race(*words, text, out):
    return main(["race", *SHORT, "--data", text, "--out", str(out), *words])


def records(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in found]


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_printed_is_read_back(command, tmp_path, capsys):
    words = ["--steps", "7", "--set", "muon.b1=0.9"] if command == "race" else []
    assert main([command, *words, "--print-config"]) == 0
    first = capsys.readouterr().out
    (tmp_path / "config.json").write_text(first)
    assert main([command, "--config", str(tmp_path / "config.json"), "--print-config"]) == 0
    assert capsys.readouterr().out == first


def test_flags_override_a_file_and_toml_is_read(tmp_path, capsys):
    file = tmp_path / "race.toml"
    file.write_text('optimizers = "sgd"\n[run]\nsteps = 9\nz_loss = 1\n[run.model]\nwidth = 32\n')
    assert main(["race", f"--config={file}", "--steps", "5", "--print-config"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = tomllib.loads(file.read_text())
    assert found["optimizers"] == expected["optimizers"]
    assert found["run"]["steps"] == 5
    assert found["run"]["z_loss"] == 1.0
    assert found["run"]["model"]["width"] == 32


def test_a_race_is_repeated_from_its_own_record(tmp_path, text):
    assert race("--optimizers", "sgd", text=text, out=tmp_path / "one") == 0
    config = str(tmp_path / "one" / "race.json")
    assert main(["race", "--config", config, "--out", str(tmp_path / "two")]) == 0
    assert records(tmp_path / "two" / "sgd") == records(tmp_path / "one" / "sgd")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "is not JSON"),
        ("[]", "must hold options by name"),
        ('{"stepz": 1}', "no option is called stepz; did you mean steps"),
        ('{"model": {"widht": 1}}', "no option is called model.widht; did you mean width"),
        ('{"model": 3}', "model. must hold options by name"),
        ('{"steps": 1.5}', "steps must be a whole number"),
        ('{"steps": true}', "steps must be a whole number"),
        ('{"skip_spikes": 1}', "skip_spikes must be true or false"),
        ('{"z_loss": "1"}', "z_loss must be a number"),
        ('{"schedule": 1}', "schedule must be a text"),
        ('{"data": "x"}', "data must be a list"),
        ('{"loss": "best"}', "loss must be one of auto, plain, fused"),
        ('{"steps": 0}', "steps must be at least 1"),
    ],
)
def test_files_that_cannot_be_are_refused_by_name(content, problem, tmp_path):
    file = tmp_path / "run.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=problem) as refused:
        read_config(file, RunConfig())
    assert str(refused.value).startswith(str(file))


def test_a_default_configuration_is_a_fixed_point(tmp_path):
    file = tmp_path / "race.json"
    file.write_text(printed(RaceConfig()))
    assert read_config(file, RaceConfig()) == RaceConfig()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--config", "none.json"], "none.json: No such file"),
        (["--config"], "path is empty"),
        (["--config", "a.json", "--config", "b.json"], "given twice"),
        (["--set", "sgd"], "takes OPTIMIZER.HYPERPARAMETER=VALUE"),
        (["--set", "sdg.momentum=0.5"], "'sdg' is no optimizer of this race; did you mean sgd"),
        (["--set", "sgd.momentun=0.5"], "did you mean momentum"),
        (["--set", "sgd.momentum=2"], "momentum"),
        (["--set", "sgd.momentum=fast"], "momentum"),
        (["--set", "sgd.learning_rate=1"], "give --learning-rates sgd=VALUE instead"),
        (["--micro-batches", "3"], "does not divide by 3 micro_batches"),
        (["--micro-batches", "0"], "micro_batches must be at least 1"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(words, expected, tmp_path, text, capsys):
    out = tmp_path / "race"
    assert race("--optimizers", "sgd", *words, text=text, out=out) == 2
    complaint = capsys.readouterr().err
    assert expected in complaint
    assert complaint.count("\n") == 1
    assert not out.exists()


def test_hyperparameters_reach_the_optimizer_and_leave_the_tuned_rest():
    (plain,) = line_up("shampoo")
    words = ["shampoo.refresh.every=20", "shampoo.exponent=null", "shampoo.b1=0.5"]
    (entrant,) = line_up("shampoo", hyperparameters=words)
    told = json.loads(entrant.optimizer.to_json())["hyperparameters"]
    tuned = json.loads(plain.optimizer.to_json())["hyperparameters"]
    assert told == {**tuned, "refresh": {"every": 20}, "exponent": None, "b1": 0.5}
    assert entrant.learning_rate == plain.learning_rate


def test_micro_batches_make_the_same_run(tmp_path, text):
    words = ["--optimizers", "adamw"]
    assert race(*words, text=text, out=tmp_path / "one") == 0
    assert race(*words, "--micro-batches", "2", text=text, out=tmp_path / "two") == 0
    one, two = (records(tmp_path / name / "adamw") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-4)

"""Everyday use of the trainer: option files, hyperparameters, gradient accumulation."""

import json
import sys
import tomllib
import types
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine
from ravine.training.average import averaged, with_ema
from ravine.training.cli import COMMANDS, STUDIES, main
from ravine.training.compare.entrants import line_up
from ravine.training.compare.race_config import RaceConfig
from ravine.training.config import RunConfig
from ravine.training.config_file import printed, read_config
from ravine.training.model import ModelConfig
from ravine.training.run import profile
from ravine.training.samples import continued
from ravine.training.step import init_params

from .run_rounding import furthest_record, rounding
from .short_race import race, records
from .tolerances import UNIT

pytestmark = pytest.mark.usefixtures("untimed")


@pytest.mark.parametrize(
    "command", [*sorted(set(COMMANDS) - {"study"}), *(f"study {name}" for name in STUDIES)]
)
def test_what_is_printed_is_read_back(command, tmp_path, capsys):
    words = ["--steps", "7", "--set", "muon.b1=0.9"] if command == "race" else []
    assert main([*command.split(), *words, "--print-config"]) == 0
    first = capsys.readouterr().out
    (tmp_path / "config.json").write_text(first)
    config = ["--config", str(tmp_path / "config.json")]
    assert main([*command.split(), *config, "--print-config"]) == 0
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
def test_bad_files_are_refused_by_name(content, problem, tmp_path):
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
        (["--config"], "--config needs a file"),
        (["--config", "a.json", "--config", "b.json"], "given twice"),
        (["--set", "sgd"], "takes OPTIMIZER.HYPERPARAMETER=VALUE"),
        (["--set", "sdg.momentum=0.5"], "'sdg' is no optimizer of this race; did you mean sgd"),
        (["--set", "sgd.momentun=0.5"], "did you mean momentum"),
        (["--set", "sgd.momentum=2"], "momentum must lie in [0, 1), got 2"),
        (["--set", "sgd.momentum=fast"], "momentum must be a finite number, got 'fast'"),
        (["--set", "sgd.learning_rate=1"], "give --learning-rates sgd=VALUE instead"),
        (["--micro-batches", "3"], "does not divide by 3 micro_batches"),
        (["--micro-batches", "0"], "micro_batches must be at least 1"),
        (["--tensorboard", "events"], "needs tensorboardX"),
        (["--samples", "5"], "samples must be at most the batch_size of 4"),
        (["--samples", "-1"], "samples must not be negative"),
        (["--ema", "1"], "ema must lie in [0, 1)"),
        (["--profile", __file__], "cannot be a folder"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(
    words, expected, tmp_path, text, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    out = tmp_path / "race"
    assert race("--optimizers", "sgd", *words, text=text, out=out) == 2
    complaint = capsys.readouterr().err
    assert expected in complaint
    assert complaint.count("\n") == 1
    assert not out.exists()


def test_hyperparameters_reach_the_optimizer_and_leave_the_tuned_rest():
    (plain,) = line_up("shampoo")
    words = ["shampoo.refresh.every=20", "shampoo.roots.exponent=-0.5", "shampoo.b1=0.5"]
    (entrant,) = line_up("shampoo", hyperparameters=words)
    told = json.loads(entrant.optimizer.to_json())["hyperparameters"]
    tuned = json.loads(plain.optimizer.to_json())["hyperparameters"]
    assert told == {**tuned, "refresh": {"every": 20}, "roots": {"exponent": -0.5}, "b1": 0.5}
    assert entrant.learning_rate == plain.learning_rate


def test_micro_batches_make_the_same_run(tmp_path, text):
    def run(*words, out=tmp_path / "one"):
        assert race("--optimizers", "adamw", "--overwrite", *words, text=text, out=out) == 0
        return records(out / "adamw")

    one, two = run(), run("--micro-batches", "2", out=tmp_path / "two")
    assert [record.keys() for record in two] == [record.keys() for record in one]
    assert furthest_record(two, one) <= rounding(run, one, furthest_record)


class Writer:
    """Has the interface of tensorboardX's writer."""

    files: typing.ClassVar = {}

    def __init__(self, folder):
        self.scalars = self.files[folder] = []
        self.open = True

    def add_scalar(self, name, value, step):
        assert self.open
        self.scalars.append((name, value, step))

    def close(self):
        self.open = False


def test_everything_beside_a_run_leaves_it_what_it_is(tmp_path, text, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setattr(profile, "START", 1)
    monkeypatch.setattr(profile, "STOP", 2)
    words, out = ["--optimizers", "adamw"], tmp_path / "run"
    assert race(*words, text=text, out=tmp_path / "plain") == 0
    capsys.readouterr()
    beside = ["--ema", "0.5", "--samples", "2", "--skip-spikes"]
    folders = ["--tensorboard", str(tmp_path / "tb"), "--profile", str(tmp_path / "profile")]
    assert race(*words, *beside, *folders, text=text, out=out) == 0

    plain, found = (records(tmp_path / name / "adamw") for name in ("plain", "run"))
    # The same arithmetic in a larger program that may be fused differently: 16 units.
    assert furthest_record(found, plain) <= 16 * UNIT
    ends = [record for record in found if "heldout_loss" in record]
    assert all(abs(r["heldout_loss_ema"] - r["heldout_loss"]) < 0.5 for r in ends)
    assert all(r["heldout_loss_ema"] != r["heldout_loss"] for r in ends)

    lines = (out / "adamw" / "samples.txt").read_text().splitlines()
    assert len(lines) == 2
    assert all(f"adamw: {line[:20]}" in capsys.readouterr().out for line in lines[:1])
    assert list((tmp_path / "profile" / "adamw").rglob("*.xplane.pb"))
    (scalars,) = Writer.files.values()
    assert list(Writer.files) == [str(tmp_path / "tb" / "run" / "adamw")]
    assert [(s, v) for n, v, s in scalars if n == "loss"] == [
        (r["step"], r["loss"]) for r in found if "loss" in r
    ]
    assert race(*words, "--overwrite", text=text, out=out) == 0
    assert not (out / "adamw" / "samples.txt").exists()


def test_an_average_is_that_of_the_parameters_after_each_update():
    tx = with_ema(ravine.adamw(0.1), 0.75)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}
    state, expected = tx.init(params), params
    for step in range(4):
        grads = jax.tree.map(lambda p, step=step: jnp.cos(p + step), params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        expected = jax.tree.map(lambda e, p: 0.75 * e + 0.25 * p, expected, params)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=8 * UNIT)  # four averages of two
    jax.tree.map(close, averaged(state), expected)


def test_samples_go_on_from_their_prompts_and_look_back_only():
    graphdef, params = init_params(ModelConfig(width=16, layers=1, heads=2, context=16), 0)
    prompts = jax.random.randint(jax.random.key(0), (3, 16), 0, 256)
    seed = jnp.uint32(0)
    drawn = continued(graphdef, params, prompts, 4, seed)
    np.testing.assert_array_equal(drawn[:, :4], prompts[:, :4])
    other = prompts.at[:, 4:].set(7)
    np.testing.assert_array_equal(continued(graphdef, params, other, 4, seed), drawn)
    assert not np.array_equal(continued(graphdef, params, prompts, 4, seed + 1), drawn)

"""The benchmarks accept their flags and run at a tiny size without peers; no measurement is checked."""

import runpy
import sys
from pathlib import Path

import jax
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
COMMANDS = runpy.run_path(str(FOLDER / "__main__.py"), run_name="benchmarks")["COMMANDS"]
TINY = {
    "peers": "--without-torch --width 16 --layers 1 --turns 1",
    "train_step": "--without-torch --layers 1 --turns 1 --steps 1",
    "limit": "--width 16 --megabytes 1 --sides 16 32 --repeats 2",
    "gpu": "--small --any-device --without-torch --turns 1",
    "growth": "--only adamw muon --parameters --leaves 1 2 --total 1024",
}


@pytest.fixture
def command(monkeypatch):
    """Runs a subcommand as from the shell; afterwards the benchmark modules are unloaded."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)

    def run(name, *flags):
        monkeypatch.setattr(sys, "argv", ["benchmarks", name, *flags])
        # Optax relies on dtype promotion.
        with jax.numpy_dtype_promotion("standard"), pytest.raises(SystemExit) as ended:
            runpy.run_path(str(FOLDER / "__main__.py"), run_name="__main__")
        return ended.value.code

    yield run
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_lists_its_flags(command, capsys, name):
    assert command(name, "--help") == 0
    assert "-h, --help" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_every_command_runs_small(command, capsys, name):
    page = FOLDER.parent / "docs" / "benchmarks.md"
    before = page.read_bytes()
    assert command(name, *TINY[name].split()) == 0
    assert capsys.readouterr().out.count("| ") > 0
    assert page.read_bytes() == before


def test_every_part_on_a_gpu_has_its_place_on_the_page(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    parts = runpy.run_path(str(FOLDER / "gpu.py"), run_name="gpu")["PARTS"]
    page = (FOLDER.parent / "docs" / "benchmarks.md").read_text()
    assert all(f"<!-- gpu_{part} -->" in page and f"<!-- /gpu_{part} -->" in page for part in parts)


def test_unknown_commands_are_answered_with_the_known_ones(command, capsys):
    assert command("speed") == 2
    assert "train_step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ratio", "bar", "said"),
    [(0.5, 0.6, "0.6, met"), (0.7, 0.6, "0.6, **missed**"), (1, None, "none")],
)
def test_missed_bars_are_named(monkeypatch, ratio, bar, said):
    monkeypatch.syspath_prepend(FOLDER)
    import measure

    assert measure.verdict(ratio, bar) == said


@pytest.mark.parametrize(("name", "most"), [("shampoo", 90), ("muon", 60)])
def test_a_gradient_has_a_short_way(name, most):
    found, _ = runpy.run_path(str(FOLDER / "moves.py"), run_name="moves")["moves"](name)
    assert 10 < sum(found.values()) <= most

"""The command line: `python -m ravine race ...`, `... plan ...` and `... presets ...`."""

import contextlib
import io
import sys
from collections.abc import Sequence
from typing import Any

import jax
import tyro
from rich.console import Console

from .plan import PlanConfig, plan
from .presets_table import PresetsConfig, show_presets
from .race import RaceConfig, race

COMMANDS = {"race": RaceConfig, "plan": PlanConfig, "presets": PresetsConfig}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
      The exit status: 0; 2 for bad input, after one line that says what to mend; 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(__doc__.strip().splitlines()[0] if __doc__ else "")
        print("commands: race, plan, presets (give `python -m ravine race --help` for its flags)")
        return 0 if words else 2
    if words[0] not in COMMANDS:
        return _refuse(f"unknown command {words[0]!r}; commands: {', '.join(COMMANDS)}.")
    try:
        config = _parse(words[0], words[1:])
        if isinstance(config, PlanConfig):
            # The TPU's compiler is here, but no TPU: JAX shall not look for one.
            jax.config.update("jax_platforms", "cpu")
            plan(config, Console(width=None if sys.stdout.isatty() else 110))
        elif isinstance(config, PresetsConfig):
            show_presets(config, Console(width=None if sys.stdout.isatty() else 120))
        else:
            race(config)
    except ValueError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _parse(command: str, words: list[str]) -> Any:
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                COMMANDS[command],
                prog=f"python -m ravine {command}",
                args=words,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise ValueError(_one_line(complaint.getvalue())) from None


def _one_line(boxed: str) -> str:
    """The text of a complaint that tyro drew into a box, up to its pointer to --help."""
    lines = [line.strip("│╭╮╰╯─ ") for line in boxed.splitlines()[1:]]
    text = " ".join(line for line in lines if line)
    return text.split("For full helptext")[0].strip()


def _refuse(message: str) -> int:
    print(f"ravine: {' '.join(message.split())}", file=sys.stderr)
    return 2

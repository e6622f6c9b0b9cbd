"""The command line: `python -m ravine race ...`, `sweep`, `plan`, `presets` and `batch-size`."""

import contextlib
import errno
import io
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ..core.checks import near
from .complaint import in_one_line
from .run.files import FULL
from .run.interrupts import Interrupted, Interrupts, check
from .run.output import Output, say, silence

COMMANDS = {
    "race": "train several optimizers on the same model and text, and compare them",
    "sweep": "tune optimizers with the same number of trials each",
    "speedup": "how many of AdamW's tokens a rival's schedule is worth",
    "sensitivity": "what a learning rate beside the best one costs each optimizer",
    "plan": "what an optimizer costs per chip of a pod, without the pod",
    "presets": "shapes of published models, and suggestions for new ones",
    "batch-size": "the batch beyond which more tokens per step buy few fewer steps",
    "study": "one question in a small experiment: study decay, study width",
    "coordinate-check": "whether activations change as much in a wide or deep model as in a small one",
}
"""Commands, and what each is for."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    SIGINT and SIGTERM are the command's while it runs: what was finished is reported, and where that is
    impossible the process ends.

    Returns:
      The exit status: 0; 1 if every optimizer diverged or the race could not go on; 2 for bad input,
      after one line that names the problem and the fix; 130 after Ctrl-C and 143 after SIGTERM.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Decompositions on CPU: one thread is as fast on an idle machine, ten times as fast on a busy one,
    # and gives the same bits on any number of cores. OpenBLAS reads it when JAX first calls it.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        return _main(words)
    except OSError as error:
        if error.filename is not None or error.errno not in (*FULL, errno.EPIPE):
            raise
        silence(sys.stdout)
        return _refuse(f"standard output cannot be written ({error.strerror}).", 1)


def _main(words: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may be no text at all
            stream.reconfigure(errors="backslashreplace")
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"ravine {metadata.version('ravine')}")
        return 0
    if words[0] not in COMMANDS:
        return _refuse(f"unknown command {words[0]!r}; {near(words[0], COMMANDS)}")
    try:
        with Interrupts():
            status = _run(words[0], words[1:])
            check()
            return status
    except Interrupted as stop:
        say("interrupted")
        return stop.status
    except KeyboardInterrupt:
        say("interrupted")
        return 130


def _help() -> str:
    lines = [f"  {name:<18}{what}" for name, what in COMMANDS.items()]
    last = """ravine COMMAND --help lists its flags with their defaults; ravine --version.
ravine COMMAND ... --print-config prints the configuration as JSON and does nothing else;
ravine COMMAND --config FILE ... starts from one, JSON, TOML or a race.json; flags override it."""
    return "\n".join(
        ["usage: ravine COMMAND [FLAGS]    (or python -m ravine)", "", *lines, "", last]
    )


def _run(command: str, words: list[str]) -> int:
    # JAX and the rest take seconds, in which an interruption is one already.
    try:
        from .batch_size.command import BatchSizeConfig, measure_batch_size
        from .compare.race import race
        from .compare.race_config import RaceConfig
        from .compare.sensitivity import SensitivityConfig, sensitivity
        from .compare.speedup import SpeedupConfig, speedup
        from .compare.sweep import SweepConfig, sweep
        from .config_file import printed
        from .plan.plan import PlanConfig, plan
        from .run.outcome import RunFailed
        from .shapes.table import PresetsConfig, show_presets
        from .studies.decay import DecayStudyConfig, study_decay
        from .studies.width import study_width
        from .studies.width_config import WidthStudyConfig
        from .width.command import CoordinateConfig, coordinate_check
    except ModuleNotFoundError as error:
        return _refuse(
            f"{error.name} is not installed; the commands need pip install 'ravine[train]', or "
            "'.[train]' in a clone."
        )
    except ValueError as error:
        return _refuse(str(error))
    try:
        from rich.console import Console

        measurements: dict[str, tuple[Any, Any]] = {
            "batch-size": (BatchSizeConfig, measure_batch_size),
            "sensitivity": (SensitivityConfig, sensitivity),
            "coordinate-check": (CoordinateConfig, coordinate_check),
            "speedup": (SpeedupConfig, speedup),
            "study decay": (DecayStudyConfig, study_decay),
            "study width": (WidthStudyConfig, study_width),
            "sweep": (SweepConfig, sweep),
        }
        if command == "study":
            command, words = _study(words)
        if "--print-config" in words:
            kinds = {name: kind for name, (kind, _) in measurements.items()}
            kinds |= {"presets": PresetsConfig, "plan": PlanConfig, "race": RaceConfig}
            words = [word for word in words if word != "--print-config"]
            print(printed(_parse(kinds[command], command, words)))
            return 0
        if command == "presets":
            config = _parse(PresetsConfig, command, words)
            with _writing(config.figure, "--figure"):
                show_presets(config, Console(width=None if sys.stdout.isatty() else 120))
            return 0
        if command in measurements:
            kind, act = measurements[command]
            out: Any = Output()
            config = _parse(kind, command, words)
            with _writing(config.out):
                act(config, Console(file=out, width=None if out.isatty() else 120))
            return 0
        if command == "plan":
            import jax

            config = _parse(PlanConfig, command, words)
            # The TPU's compiler is here, but no TPU: JAX must not look for one.
            jax.config.update("jax_platforms", "cpu")
            plan(config, Console(width=None if sys.stdout.isatty() else 110))
            return 0
        outcomes = race(_parse(RaceConfig, command, words))
    except (ValueError, _EmptyPath) as error:
        return _refuse(str(error))
    except RunFailed as error:
        return _refuse(str(error), 1)
    if all(outcome.status == "diverged" for outcome in outcomes):
        return _refuse(
            "every optimizer diverged; lower --learning-rates or lengthen the warm-up.", 1
        )
    return 0


@contextlib.contextmanager
def _writing(out: Path | None, flag: str = "--out") -> Iterator[None]:
    """An `OSError` about a path of the results as a sentence."""
    from .run.outcome import RunFailed

    try:
        yield
    except OSError as error:
        if out is None or not isinstance(error.filename, str):
            raise
        name = error.filename.removesuffix(".tmp")  # of a draft
        file = Path(name)
        if file != out and file not in out.parents and out not in file.parents:
            raise
        if error.errno in FULL:  # after all that had been done
            raise RunFailed(
                f"{name}: {error.strerror}; make room and repeat the command. What was "
                "written before is kept."
            ) from error
        raise ValueError(f"{name}: {error.strerror}; give another {flag}.") from error


STUDIES = {
    "decay": "what weight decay does in a run that sees every token once",
    "width": "how far the best learning rate moves with the width",
}
"""Studies, and what each shows."""


def _study(words: list[str]) -> tuple[str, list[str]]:
    """The command with the name of its study, and the other words."""
    for name in STUDIES:
        if words[:1] == [name]:
            return f"study {name}", words[1:]
    if words[:1] in (["-h"], ["--help"]):
        lines = [f"  study {name:<12}{what}" for name, what in STUDIES.items()]
        print("\n".join(["usage: ravine study NAME [FLAGS]", "", *lines, ""]))
        print("ravine study NAME --help lists its flags with their defaults.")
        raise SystemExit(0)
    known = " or ".join(f"study {name}" for name in STUDIES)
    if not words or words[0].startswith("-"):
        raise ValueError(f"study needs a name; write: {known} [FLAGS].")
    raise ValueError(f"no study {words[0]!r}; write: {known} [FLAGS].")


def _parse(config: Any, command: str, words: list[str]) -> Any:
    import tyro

    from .config_file import read_config
    from .data.buckets import check_local, refuse_bucket

    file, words = _config_file(words)
    for word, following in itertools.pairwise([*words, "--"]):
        if word == "--data" and following.startswith("--"):  # as of a variable that is not set
            raise ValueError(
                "--data names no file; leave it out for Python's own standard library."
            )
    if file is not None:
        refuse_bucket("--config", file)
    base = {} if file is None else {"default": read_config(file, config())}
    complaint = io.StringIO()
    paths = tyro.constructors.ConstructorRegistry()

    @paths.primitive_rule
    def path_of(info: Any) -> Any:
        if info.type is not Path:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=lambda given: _path(given[0]),
            is_instance=lambda value: isinstance(value, Path),
            str_from_instance=lambda value: [str(value)],
        )

    try:
        with contextlib.redirect_stderr(complaint):
            parsed = tyro.cli(
                config,
                prog=f"python -m ravine {command}",
                args=words,
                config=(tyro.conf.OmitArgPrefixes,),
                registry=paths,
                **base,
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise ValueError(in_one_line(complaint.getvalue(), config, words)) from None
    check_local(parsed)
    return parsed


def _config_file(words: list[str]) -> tuple[Path | None, list[str]]:
    """The file that `--config` names, and the other words."""
    file, rest, given = None, [], iter(words)
    for word in given:
        flag, equals, value = word.partition("=")
        if flag != "--config":
            rest.append(word)
            continue
        if file is not None:
            raise ValueError("--config is given twice; name one file.")
        value = value if equals else next(given, "")
        if not value:
            raise ValueError("--config needs a file.")
        file = _path(value)
    return file, rest


def _path(text: str) -> Path:
    if not text.strip():
        raise _EmptyPath(
            "a path is empty and would be the current folder: name it or leave it out."
        )
    return Path(text)


class _EmptyPath(Exception):
    """Not a `ValueError`, of which tyro would make a page."""


def _refuse(message: str, status: int = 2) -> int:
    say(f"ravine: {' '.join(message.split())}")
    return status

"""What the command line's parser complains about, as one line with the fix."""

import dataclasses
import difflib
import re
import typing
from typing import Any

_HELP_TEXTS = (
    "For full helptext",
    "Argument helptext:",
    "Perhaps you meant:",
    "Arguments similar to",
)
_NUMBERS = {
    r"invalid literal for int\(\) with base 10": "a whole number",
    "could not convert string to float": "a number",
}


def in_one_line(boxed: str, config: Any, words: list[str]) -> str:
    """A complaint that tyro drew into a box, with the flags that may have been meant.

    Args:
      boxed: the box, as text.
      config: the dataclass that was parsed.
      words: those that were given.
    """
    return _with_commas(_with_flags(_one_line(boxed), config), config, words)


def _one_line(boxed: str) -> str:
    """The text of a complaint that tyro drew into a box, up to help texts and its pointer to --help."""
    lines = [line.strip("│╭╮╰╯─ ") for line in boxed.splitlines()[1:]]
    text = " ".join(line for line in lines if line.strip("-"))  # boxes without Unicode are dashes
    text = re.split(f"(?:{'|'.join(_HELP_TEXTS)})", text)[0].strip()
    for python, ours in _NUMBERS.items():
        text = re.sub(
            rf"^Error parsing (--[\w-]+): {python}: (.*)$", rf"\1 must be {ours}, got \2.", text
        )
    return re.sub(r"^Error parsing [\w.]+: ", "", text)  # a sentence of ours, behind a class's name


def _with_flags(text: str, config: Any) -> str:
    """A complaint about unknown flags, with the ones that are most like them."""
    kind, unknown, words = text.partition("Unrecognized options:")
    if kind or not unknown:
        return text
    close = {
        match: None
        for word in words.split()
        if word.startswith("--")
        for match in difflib.get_close_matches(word.strip(",").split("=")[0], _flags(config), n=1)
    }
    return f"{text}; did you mean {' and '.join(close)}?" if close else text


def _flags(config: Any) -> list[str]:
    """The flags of a configuration and of those inside it."""
    found = []
    for field in dataclasses.fields(config):
        inner = typing.get_type_hints(config)[field.name]
        if dataclasses.is_dataclass(inner):
            found += _flags(inner)
        else:
            found.append(f"--{field.name.replace('_', '-')}")
    return found


def _with_commas(text: str, config: Any, words: list[str]) -> str:
    """A complaint about stray words, with the fix if there are names of optimizers among them."""
    from ..optimizers.registry import names

    stray = text.partition("Unrecognized options:")[2].replace(",", " ").split()
    stray = [word for word in stray if word in names()]
    if not stray or not hasattr(config, "optimizers"):
        return text
    given = " ".join(words).partition("--optimizers")[2].partition(" --")[0]
    both = dict.fromkeys([*re.split(r"[\s,=]+", given.strip(" ,=")), *stray])
    flag = f"--optimizers {','.join(filter(None, both))}"
    return f"{text}; separate optimizers by commas: {flag}."

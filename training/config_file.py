"""Configurations in files, JSON or TOML: what `--print-config` prints, read back by `--config`."""

import dataclasses
import json
import tomllib
import types
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..core.checks import near

Config = TypeVar("Config")


def printed(config: Any) -> str:
    """All options of a configuration as JSON, nested as its dataclasses are."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str)


def read_config(file: Path, base: Config) -> Config:
    """`base` with the options that a file gives.

    Args:
      file: TOML by its ending, else JSON; or the ``race.json`` of a race, for its configuration.
      base: a dataclass, nested ones included; options the file leaves out are as in it.

    Raises:
      ValueError: for a file that cannot be read, an option that does not exist, or a value of another
        kind.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> from ravine.training.config import RunConfig
      >>> from ravine.training.config_file import read_config
      >>> file = Path(tempfile.mkdtemp()) / "run.toml"
      >>> _ = file.write_text("steps = 20\\n[model]\\nwidth = 32")
      >>> run = read_config(file, RunConfig())
      >>> run.steps, run.model.width, run.model.layers
      (20, 32, 2)
    """
    try:
        text = file.read_text(encoding="utf-8")
        found = tomllib.loads(text) if file.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}; give --config a file that is there.") from None
    except ValueError as error:
        kind = "TOML" if file.suffix == ".toml" else "JSON"
        raise ValueError(f"{file} is not {kind} ({error}); correct it.") from None
    if isinstance(found, dict) and isinstance(found.get("configuration"), dict):
        found = found["configuration"]  # a race.json
    try:
        return filled(base, found)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def filled(base: Config, found: Any, path: str = "") -> Config:
    """`base` with options by name, as JSON has them; `path` begins their names in errors."""
    if not isinstance(found, dict):
        raise ValueError(f"{path or 'the file'} must hold options by name, got {found!r}.")
    hints = get_type_hints(type(base))
    names = [field.name for field in dataclasses.fields(base)]  # pyright: ignore[reportArgumentType]
    for name in found:
        if name not in names:
            raise ValueError(f"no option is called {path}{name}; {near(name, names)}")
    values = {
        name: filled(getattr(base, name), value, f"{path}{name}.")
        if dataclasses.is_dataclass(getattr(base, name))
        else _value(hints[name], value, path + name)
        for name, value in found.items()
    }
    return dataclasses.replace(base, **values)  # pyright: ignore[reportArgumentType]


def _value(hint: Any, value: Any, name: str) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        return _value(next(kind for kind in inner if kind is not type(None)), value, name)
    if origin is Literal:
        if value not in inner:
            raise ValueError(f"{name} must be one of {', '.join(map(str, inner))}, got {value!r}.")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{name} must be a list, got {value!r}.")
        return tuple(_value(inner[0], each, name) for each in value)
    if hint is Path and isinstance(value, str) and value.strip():
        return Path(value)
    if hint is float and type(value) in (int, float):
        return float(value)
    if type(value) is not hint:
        word = {int: "a whole number", float: "a number", bool: "true or false"}.get(hint, "a text")
        raise ValueError(f"{name} must be {word}, got {value!r}.")
    return value

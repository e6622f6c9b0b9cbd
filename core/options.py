"""Options that belong together: small frozen dataclasses, checked where they are made."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

from .arguments import checked_call
from .kinds import OPTIONS

Kind = TypeVar("Kind", bound=type)


@dataclass_transform(frozen_default=True)
def options(called: str) -> Callable[[Kind], Kind]:
    """Makes a class a frozen dataclass whose refusals name a field as ``called.field``.

    A builder takes such an argument as an instance, or as a mapping of its fields (which JSON can hold).

    Example:
      >>> @options("refresh")
      ... class Often:
      ...     every: int = 10
      >>> Often(every=2.5)
      Traceback (most recent call last):
      ...
      ValueError: refresh.every must be a whole number, got 2.5.
    """

    def made(kind: Any) -> Any:
        kind = dataclasses.dataclass(frozen=True, repr=False)(kind)
        kind.__init__ = checked_call(
            kind.__init__, inspect.signature(kind), skipped=1, prefix=f"{called}."
        )
        kind.__repr__ = _short
        OPTIONS.add(kind)
        return kind

    return made


def given(value: Any) -> dict[str, Any]:
    """The fields of options that differ from their defaults.

    Example:
      >>> import ravine
      >>> given(ravine.Refresh(every=20))
      {'every': 20}
    """
    fields = {field.name: field.default for field in dataclasses.fields(value)}
    found = {name: getattr(value, name) for name in fields}
    return {name: each for name, each in found.items() if each is not fields[name]}


def _short(self: Any) -> str:
    """As a user would write it: only what differs from the defaults."""
    words = ", ".join(f"{name}={value!r}" for name, value in given(self).items())
    return f"{type(self).__name__}({words})"

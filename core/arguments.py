"""`checked` refuses arguments that do not match the signature, and names them.

The kinds of values that annotations allow are in :mod:`.kinds`, once for all builders. Each builder
checks which numbers make sense, with :mod:`.checks`.
"""

import functools
import inspect
import re
from collections.abc import Callable, Collection
from typing import Any, TypeVar, cast

from .checks import shown
from .kinds import Kind, hint_of, kind_of
from .renamed import instead

Builder = TypeVar("Builder", bound=Callable[..., Any])


def checked(builder: Builder) -> Builder:
    """A builder, or a class, that refuses arguments of other kinds than its signature has.

    NumPy scalars become Python scalars, which builders may inspect. Of JAX scalars only integers and
    booleans do, since others may be traced at the next call. Dtypes may be given in any way that
    JAX takes, and become ``jnp.dtype``.
    """
    signature = inspect.signature(builder)
    if not isinstance(builder, type):
        return checked_call(builder, signature)
    method = "__new__" if issubclass(builder, tuple) else "__init__"
    setattr(builder, method, checked_call(getattr(builder, method), signature, skipped=1))
    return cast(Any, builder)


def checked_call(
    function: Any, signature: inspect.Signature, skipped: int = 0, prefix: str = ""
) -> Any:
    """`function` with all arguments after the first few checked, and named with a prefix."""

    @functools.cache
    def kinds() -> dict[str, Kind]:
        return {name: kind_of(p.annotation, name) for name, p in signature.parameters.items()}

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args[skipped:], **kwargs)
        except TypeError:
            _refuse_unknown(function.__qualname__, signature, kwargs)
            return function(*args, **kwargs)  # Python names what is missing or too much
        for name, value in bound.arguments.items():
            kind, form = kinds()[name], signature.parameters[name].kind
            if form is inspect.Parameter.VAR_POSITIONAL:
                new: Any = tuple(converted(prefix + name, kind, each) for each in value)
            elif form is inspect.Parameter.VAR_KEYWORD:
                new = {key: converted(key, kind, each) for key, each in value.items()}
            else:
                new = converted(prefix + name, kind, value)
            bound.arguments[name] = new
        return function(*args[:skipped], *bound.args, **bound.kwargs)

    return call


def _refuse_unknown(where: str, signature: inspect.Signature, given: Collection[str]) -> None:
    known = [p.name for p in signature.parameters.values() if p.kind is not p.POSITIONAL_ONLY]
    for name in given:
        if name not in known:
            owner = re.sub(r"\.__(init|new)__$", "", where)
            raise TypeError(f"{owner} has no argument {name!r}; {instead(name, known)}")


def converted(name: str, kind: Kind, value: Any) -> Any:
    """`value`, converted to the kind.

    Raises:
      ValueError: if it is of another kind.
    """
    try:
        return kind.convert(value)
    except (ValueError, TypeError) as error:
        hint = f"; {hint_of(error)}" if hint_of(error) else "."
        raise ValueError(f"{name} must be {kind.words}, got {shown(value)}{hint}") from None

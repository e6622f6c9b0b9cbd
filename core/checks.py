"""Checks of single values: each error is one sentence that names the problem and the fix.

Concrete scalars of any kind are checked alike: Python's, NumPy's, JAX's, and arrays of no axes. Where
there is no number to check (None, a schedule, a traced value), a check passes.
"""

import difflib
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

LARGEST_COUNT = 2**31 - 1
"""Updates are counted in int32."""


def number(name: str, value: Any) -> int | float | None:
    """`value` as a Python number, or None where there is no number to check.

    Raises:
      ValueError: for what is no real number: strings, lists, truth values, arrays with axes.
    """
    if value is None or callable(value):
        return None
    if not isinstance(value, bool):
        if isinstance(value, (int, float)):
            return value
        if isinstance(value, (np.generic, np.ndarray, jax.Array)) and value.ndim == 0:
            is_whole = jnp.issubdtype(value.dtype, jnp.integer)
            if is_whole or jnp.issubdtype(value.dtype, jnp.floating):
                if isinstance(value, jax.Array) and not _is_readable(value):
                    return None
                return int(value) if is_whole else float(value)
    raise ValueError(f"{name} must be a number, got {shown(value)}.")


def _is_readable(value: jax.Array) -> bool:
    return not isinstance(value, jax.core.Tracer) and value.is_fully_addressable


def shown(value: Any) -> str:
    """A value as messages show it: on one line, and shortened."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _check(values: dict[str, Any], is_right: Callable[[float], bool], words: str) -> None:
    for name, value in values.items():
        found = number(name, value)
        if found is not None and not is_right(found):
            raise ValueError(f"{name} must {words}, got {found!r}.")


def check_finite(**values: Any) -> None:
    """Raises unless every value is finite."""
    _check(values, math.isfinite, "be finite")


def check_non_negative(**values: Any) -> None:
    """Raises unless every value is finite and at least zero."""
    _check(values, lambda x: math.isfinite(x) and x >= 0, "be finite and not negative")


def check_positive(**values: Any) -> None:
    """Raises unless every value is finite and more than zero."""
    _check(values, lambda x: math.isfinite(x) and x > 0, "be positive and finite")


def check_ratio(**values: Any) -> None:
    """Raises unless every value lies in [0, 1]."""
    _check(values, lambda x: 0 <= x <= 1, "lie in [0, 1]")


def check_decay_rates(**rates: Any) -> None:
    """Raises unless every share that is kept, as a beta, lies in [0, 1)."""
    _check(rates, lambda x: 0 <= x < 1, "lie in [0, 1)")


def check_some_eps(eps: Any, eps_root: Any) -> None:
    """Raises when nothing keeps the root of zero out of a denominator."""
    check_non_negative(eps=eps, eps_root=eps_root)
    if number("eps", eps) == 0 and number("eps_root", eps_root) == 0:
        raise ValueError(
            "eps and eps_root are both 0, so a parameter whose gradients are all zero would be "
            "updated by 0/0; give eps > 0."
        )


def check_amount(least: int, **values: Any) -> None:
    """Raises unless every value is a whole number of at least `least`."""
    for name, value in values.items():
        found = number(name, value)
        if found is not None and not (isinstance(found, int) and found >= least):
            fix = f"; give int({name})" if isinstance(found, float) else ""
            raise ValueError(
                f"{name} must be a whole number of at least {least}, got {found!r}{fix}."
            )


def check_whole(least: int, **values: Any) -> None:
    """Raises unless every value is a whole number of at least `least` that int32 can count to."""
    check_amount(least, **values)
    for name, value in values.items():
        found = number(name, value)
        if found is not None and found > LARGEST_COUNT:
            raise ValueError(
                f"{name} must be at most {LARGEST_COUNT}, as updates are counted in int32, "
                f"got {found!r}."
            )


def check_known(**values: Any) -> None:
    """Raises for traced values that decide shapes or the program itself."""
    for name, value in values.items():
        if isinstance(value, jax.core.Tracer):
            raise ValueError(
                f"{name} must be known when the optimizer is built, but JAX traces it here; "
                "ravine.inject_hyperparams(builder) leaves such arguments as they are, and "
                f"optax.inject_hyperparams(builder, static_args=[{name!r}, ...]) those that it is told."
            )


def check_name(what: str, name: Any, known: Iterable[str]) -> None:
    """Raises unless `name` is known; the message lists similar names."""
    known = list(known)
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"unknown {what} {shown(name)}; {near(name, known)}")


def near(name: Any, known: Iterable[str]) -> str:
    """``did you mean ...`` for an unknown name, or the list of the known ones."""
    known = list(known)
    lower = {word.lower(): word for word in known}
    found = difflib.get_close_matches(str(name).lower(), lower, n=3, cutoff=0.5)
    close = [lower[word] for word in found]
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}."

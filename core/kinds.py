"""The kinds of values that annotations allow: how each is named in errors, checked and converted."""

import collections.abc
import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from .checks import LARGEST_COUNT, near, number, shown


class Refused(ValueError):
    """A value of another kind; its text, if any, is a hint."""


LARGEST = float(np.finfo(np.float32).max)
"""Numbers beyond are infinite in float32."""

MaybeInfinite = Annotated[float, "may be infinite"]
"""A number of steps that may be infinite, for never."""

OPTIONS: set[type] = set()
"""Classes made by :func:`.options.options`."""


class Kind(NamedTuple):
    """What an argument may be."""

    words: str
    """After ``must be``."""
    convert: Callable[[Any], Any]
    """The value to go on with, or an error: `Refused`, or what the conversion itself raises."""


def hint_of(error: Exception) -> str:
    """The hint that an error carries: the text of a `Refused`; other errors carry none."""
    return str(error) if isinstance(error, Refused) else ""


def kind_of(annotation: Any, name: str) -> Kind:
    """The kind that an annotation stands for; anything where it does not say."""
    if annotation is Any:
        return _any_of([DTYPE, NONE]) if name.endswith("dtype") else ANYTHING
    if annotation in SPECIAL:
        return SPECIAL[annotation]
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        if callable(inside[1]):
            return Kind(inside[2], inside[1])
        return REAL if inside[0] is float else kind_of(inside[0], name)
    if origin in (Union, types.UnionType):
        if set(inside) >= TREE:
            return ANYTHING
        # An array beside a number is a number in an array, as in `optax.ScalarOrSchedule`.
        members = [m for m in inside if not (m is jax.Array and float in inside)]
        return _any_of([kind_of(member, name) for member in members])
    if origin is Literal:
        return _one_of(inside)
    if origin is collections.abc.Mapping:
        return _mapping(kind_of(inside[1], name))
    if annotation is jax.Array and "_" in name and (axes := name.rpartition("_")[2])[0].isupper():
        return _array_of(axes.split("x"))
    if origin in (collections.abc.Sequence, tuple):
        each = inside[0] if len(inside) == 1 or inside[1:] == (...,) else Any
        return _sequence(kind_of(each, name))
    if origin is not None:
        annotation = origin
    if annotation in PLAIN:
        return PLAIN[annotation]
    if annotation in OPTIONS:
        return _options(annotation)
    if isinstance(annotation, type):
        return _instance(annotation)
    return ANYTHING


def _any_of(kinds: Sequence[Kind]) -> Kind:
    if ANYTHING in kinds:
        return ANYTHING
    words = [kind.words for kind in kinds]

    def convert(value: Any) -> Any:
        hints = []
        for kind in kinds:
            try:
                return kind.convert(value)
            except (ValueError, TypeError) as error:
                hints.append(hint_of(error))
        raise Refused(max(hints, key=len))

    return Kind(" or ".join(dict.fromkeys(words)), convert)


def _one_of(names: Sequence[Any]) -> Kind:
    def convert(value: Any) -> Any:
        if isinstance(value, str) and value in names:
            return value
        raise Refused(near(value, names) if isinstance(value, str) else "")

    return Kind(f"one of {', '.join(map(repr, names))}", convert)


def _sequence(each: Kind) -> Kind:
    def convert(value: Any) -> Any:
        is_array = isinstance(value, (np.ndarray, jax.Array)) and value.ndim == 1
        if not is_array and not isinstance(value, (list, tuple, range)):
            raise Refused
        if each is ANYTHING:
            return value
        return tuple(each.convert(element) for element in value)

    return Kind("a sequence" + (f" of which each is {each.words}" if each.words else ""), convert)


def _mapping(each: Kind) -> Kind:
    def convert(value: Any) -> Any:
        if not isinstance(value, collections.abc.Mapping):
            raise Refused
        return {key: each.convert(element) for key, element in value.items()}

    return Kind("a mapping" + (f" to {each.words}" if each.words else ""), convert)


def _array_of(axes: Sequence[str]) -> Kind:
    def convert(value: Any) -> Any:
        if _array(value).ndim != len(axes):
            raise Refused(f"it has shape {value.shape}.")
        return value

    return Kind(f"an array [{', '.join(axes)}]", convert)


def _instance(kind: type) -> Kind:
    if getattr(kind, "_is_protocol", False):  # functions with attributes
        return PLAIN[collections.abc.Callable]

    def convert(value: Any) -> Any:
        # Text and arrays are collections too, but not what is meant.
        is_other = kind is not str and isinstance(value, (str, bytes, np.ndarray, jax.Array))
        if isinstance(value, kind) and not is_other:
            return value
        raise Refused

    return Kind(WORDS.get(kind, f"a {kind.__name__}"), convert)


def _options(kind: type) -> Kind:
    def convert(value: Any) -> Any:
        if isinstance(value, collections.abc.Mapping) and all(isinstance(k, str) for k in value):
            try:
                return kind(**value)
            except (ValueError, TypeError) as error:
                raise Refused(str(error)) from None
        if isinstance(value, kind):
            return value
        if value is None:
            none = _as_first_field(kind, "none")
            raise Refused(f"leave it out, or {none}" if none else "leave it out.")
        raise Refused(_as_first_field(kind, value))

    return Kind(f"ravine.{kind.__name__}(...)", convert)


def _as_first_field(kind: type, value: Any) -> str:
    """How to give a value that the first field of options can have, as ``graft="sgd"``."""
    first = next(iter(inspect.signature(kind).parameters))
    try:
        kind(**{first: value})
    except (ValueError, TypeError):
        return ""
    return f"give ravine.{kind.__name__}({first}={shown(value)})."


def _none(value: Any) -> None:
    if value is not None:
        raise Refused


def _real(value: Any, *, finite: bool = False) -> Any:
    if value is None or callable(value):
        raise Refused
    found = number("it", value)
    if found is not None and finite and not abs(found) <= LARGEST:
        raise Refused
    if found is None or isinstance(value, jax.Array):
        return value
    return float(found) if abs(found) > LARGEST_COUNT else found  # JAX's whole numbers are int32


def _whole(value: Any) -> Any:
    if value is None or callable(value):
        raise Refused
    found = number("it", value)
    if isinstance(found, float) and found.is_integer():
        raise Refused(f"give {int(found)}.")
    if isinstance(found, float) or (found is None and not jnp.issubdtype(value.dtype, jnp.integer)):
        raise Refused
    return value if found is None else found


def _truth(value: Any) -> Any:
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (np.ndarray, jax.Array)) and value.ndim == 0 and value.dtype == bool:
        return value if isinstance(value, jax.core.Tracer) else bool(value)
    raise Refused


def _array(value: Any) -> Any:
    if isinstance(value, (jax.Array, np.ndarray, np.generic)) and value.dtype != object:
        return value
    raise Refused


def _function(value: Any) -> Any:
    if isinstance(value, type):
        raise Refused(f"give an instance, as {value.__name__}()")
    if callable(value):
        return value
    raise Refused


def _precision(value: Any) -> Any:
    if isinstance(value, str) and value not in jax.lax.DotAlgorithmPreset.__members__:
        jax.lax.Precision(value)
    if value is None or isinstance(value, (str, tuple, *_PRECISION_TYPES)):
        return value
    raise Refused


def as_dtype(value: Any) -> Any:
    """A floating-point dtype, given as ``jnp.bfloat16``, ``np.dtype`` or ``"bfloat16"``.

    Raises:
      ValueError: for anything else.
    """
    if isinstance(value, str) and value not in FLOATS:
        raise Refused(near(value, FLOATS))
    is_scalar_type = isinstance(value, type) or isinstance(getattr(value, "dtype", None), np.dtype)
    if not isinstance(value, (str, np.dtype)) and not is_scalar_type:
        raise Refused
    if isinstance(value, (np.generic, np.ndarray, jax.Array)):
        raise Refused("give its dtype.")
    dtype = jax.dtypes.canonicalize_dtype(float) if value is float else jnp.dtype(value)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise Refused
    return dtype


FLOATS = ("float32", "bfloat16", "float16", "float64")
ANYTHING = Kind("", lambda value: value)
NONE = Kind("None", _none)
REAL = Kind("a number", _real)
DTYPE = Kind("a floating-point dtype such as jnp.bfloat16", as_dtype)
_PRECISION_TYPES = (jax.lax.Precision, jax.lax.DotAlgorithm, jax.lax.DotAlgorithmPreset)
TREE = set(get_args(optax.Params))
SPECIAL = {
    optax.Params: ANYTHING,  # a tree
    jax.lax.PrecisionLike: Kind("a precision such as 'highest'", _precision),
}
PLAIN: dict[Any, Kind] = {
    types.NoneType: NONE,
    float: Kind("a finite number", functools.partial(_real, finite=True)),
    int: Kind("a whole number", _whole),
    bool: Kind("True or False", _truth),
    jax.Array: Kind("an array", _array),
    collections.abc.Callable: Kind("a function", _function),
}
WORDS = {
    str: "a string",
    optax.GradientTransformation: "a gradient transformation such as ravine.adamw(1e-3)",
    collections.abc.Collection: "a collection",
}

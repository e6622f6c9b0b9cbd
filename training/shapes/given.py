"""The shape of a model that somebody plans: published, or described as JSON."""

import dataclasses
import json
import typing
from typing import Any

from ...core.arguments import converted
from ...core.checks import near
from ...core.kinds import kind_of
from .parts import Experts, Latent
from .presets import PRESETS
from .shape import ModelShape

_OWN = {"source", "published", "trillions"}
_NEEDED = ("layers", "width", "feed_forward", "heads", "vocabulary", "context")


def given_shape(text: str) -> ModelShape:
    """A published model by its name, or one of these fields, as a JSON object.

    Heads together are as wide as the model, with as many of keys and values, unless given; with `like`,
    everything that is not given is as in that published model.

    Raises:
      ValueError: for unknown names and fields, missing fields, and values that do not fit.

    Example:
      >>> from ravine.training.shapes.given import given_shape
      >>> given_shape("llama2-7b").layers
      32
      >>> given_shape('{"like": "llama2-7b", "layers": 8}').count / 1e9
      1.881214976
      >>> given_shape('{"like": "llama2-7b", "layer": 8}')
      Traceback (most recent call last):
      ...
      ValueError: a model has no 'layer'; did you mean layers or local_layers or latent?
    """
    if not text.lstrip().startswith("{"):
        return _published(text)
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"model must be a name or a JSON object, got {text!r}: {error}.") from None
    like = given.pop("like", None)
    fields = _fields(ModelShape, given)
    if like is not None:
        return dataclasses.replace(_published(str(like)), **{"published": (), **fields})
    if missing := [name for name in _NEEDED if name not in fields]:
        raise ValueError(
            f"model lacks {', '.join(missing)}; give them, or a published model as like."
        )
    usual = {"head_width": fields["width"] // max(1, fields["heads"]), "kv_heads": fields["heads"]}
    return ModelShape(**usual | fields)


def _published(name: str) -> ModelShape:
    if name not in PRESETS:
        raise ValueError(f"unknown model {name!r}; {near(name, PRESETS)}")
    return PRESETS[name]


def _fields(of: type, given: dict[str, Any]) -> dict[str, Any]:
    hints = {k: v for k, v in typing.get_type_hints(of).items() if k not in _OWN}
    found = {}
    for name, value in given.items():
        if name not in hints:
            raise ValueError(f"a model has no {name!r}; {near(name, hints)}")
        inner = {"experts": Experts, "latent": Latent}.get(name)
        if inner is not None and isinstance(value, dict):
            found[name] = inner(**_fields(inner, value))
        else:
            found[name] = converted(name, kind_of(hints[name], name), value)
    return found

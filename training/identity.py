"""The settings that decide a run's results, as JSON that stays the same from version to version."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

LATER: Mapping[str, bool] = {"later": True}
"""Metadata of a field that came later: at its default it is left out, as if it did not exist, so that
trials and checkpoints written before are recognized."""

FREE: Mapping[str, bool] = {"free": True}
"""Metadata of a field that does not change the results of a run: it is always left out."""

EXTENDS: Mapping[str, bool] = {"extends": True}
"""Metadata of a field that may change when a run is resumed: it decides only about what is still to
come, or about the past only through learning rates, which are compared by themselves."""

BUCKET: Mapping[str, bool] = {"bucket": True}
"""Metadata of a field whose path may be one in a bucket."""


def to_json(config: Any, *, resumed: bool = False) -> dict[str, Any]:
    """The fields that decide the results, as JSON values; with `resumed`, those that decided its past.

    Example:
      >>> import dataclasses
      >>> from ravine.training.identity import LATER, to_json
      >>> @dataclasses.dataclass
      ... class Config:
      ...     steps: int = 3
      ...     micro_batches: int = dataclasses.field(default=1, metadata=LATER)
      >>> to_json(Config()), to_json(Config(micro_batches=2))
      ({'steps': 3}, {'steps': 3, 'micro_batches': 2})
    """
    return json.loads(json.dumps(_fields(config, resumed), default=str, allow_nan=False))


def _fields(config: Any, resumed: bool) -> Any:
    if not dataclasses.is_dataclass(config):
        return config
    return {
        field.name: _fields(value, resumed)
        for field in dataclasses.fields(config)
        if "free" not in field.metadata
        and not (resumed and "extends" in field.metadata)
        and (
            (value := getattr(config, field.name)) != field.default or "later" not in field.metadata
        )
    }

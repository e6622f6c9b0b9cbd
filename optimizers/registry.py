"""Optimizers by name: one table that the command line, the tests and the notebooks share."""

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optax

from ..core.arguments import checked, converted
from ..core.checks import near
from ..core.kinds import OPTIONS, kind_of
from ..core.options import given
from ..core.renamed import instead

_BUILDERS: dict[str, Callable[..., optax.GradientTransformation]] = {}


@checked
def register(name: str, builder: Callable[..., optax.GradientTransformation]) -> None:
    """Adds `builder`, whose first argument is the learning rate, under `name`.

    Args:
      name: lower-case name, as the command line takes it.
      builder: a function such as :func:`ravine.adamw`.

    Raises:
      ValueError: if the name is taken, or the builder's first argument is not ``learning_rate``.

    Example:
      >>> import ravine
      >>> ravine.register("adamw", ravine.adamw)
      Traceback (most recent call last):
      ...
      ValueError: an optimizer named 'adamw' is registered already; choose another name.
    """
    if name in _BUILDERS:
        raise ValueError(f"an optimizer named {name!r} is registered already; choose another name.")
    first = next(iter(inspect.signature(builder).parameters), None)
    if first != "learning_rate":
        raise ValueError(
            f"the first argument of the builder of {name!r} must be learning_rate, got {first!r}."
        )
    _BUILDERS[name] = builder


def names() -> tuple[str, ...]:
    """The registered names, in the order of registration.

    Example:
      >>> import ravine
      >>> "adamw" in ravine.names()
      True
    """
    return tuple(_BUILDERS)


@checked
@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """A registered optimizer and the hyperparameters that differ from its defaults.

    Attributes:
      name: a registered name.
      hyperparameters: keyword arguments of the builder, except the learning rate, as a mapping; kept as
        sorted pairs, lists as tuples and dtypes by their names, so that the configuration is hashable
        and equal to the one read back from its JSON.

    Raises:
      ValueError: for an unknown name or hyperparameter, or JSON of something else.
      TypeError: at `to_json` for a value that JSON cannot hold, such as a schedule.

    Example:
      >>> import ravine
      >>> config = ravine.OptimizerConfig("adamw", {"b2": 0.95})
      >>> ravine.OptimizerConfig.from_json(config.to_json()) == config
      True
      >>> tx = config.build(learning_rate=3e-4)
    """

    name: str
    hyperparameters: Any = ()

    def __post_init__(self) -> None:
        if self.name not in _BUILDERS:
            raise ValueError(f"unknown optimizer {self.name!r}; {near(self.name, _BUILDERS)}")
        pairs = dict(self.hyperparameters)
        known = list(inspect.signature(_BUILDERS[self.name]).parameters)[1:]
        for key in pairs:
            if key not in known:
                raise ValueError(
                    f"{self.name} has no hyperparameter {key!r}; {instead(key, known)}"
                )
        plain = {key: self._plain(key, value) for key, value in pairs.items()}
        object.__setattr__(self, "hyperparameters", tuple(sorted(plain.items())))

    def _plain(self, key: str, value: Any) -> Any:
        if isinstance(value, Mapping):  # of the fields of options, as in JSON
            annotation = inspect.signature(_BUILDERS[self.name]).parameters[key].annotation
            return converted(key, kind_of(annotation, key), value)
        return _plain(value)

    def accepts(self, hyperparameter: str) -> bool:
        """Whether the builder has an argument of that name."""
        return hyperparameter in inspect.signature(_BUILDERS[self.name]).parameters

    def value(self, hyperparameter: str) -> Any:
        """A hyperparameter as configured, or the builder's default."""
        default = inspect.signature(_BUILDERS[self.name]).parameters[hyperparameter].default
        return dict(self.hyperparameters).get(hyperparameter, default)

    def build(
        self, learning_rate: optax.ScalarOrSchedule, **overrides: Any
    ) -> optax.GradientTransformation:
        """The optimizer; `overrides` bypass the configuration (masks, which JSON cannot hold)."""
        return _BUILDERS[self.name](learning_rate, **{**dict(self.hyperparameters), **overrides})

    def to_json(self) -> str:
        """A JSON object with `name` and `hyperparameters`."""
        for key, value in self.hyperparameters:
            try:
                json.dumps(value, default=_json)
            except TypeError as error:
                raise TypeError(
                    f"{key}={value!r} of {self.name} has no JSON; give it to build() instead."
                ) from error
        return json.dumps(
            {"name": self.name, "hyperparameters": dict(self.hyperparameters)}, default=_json
        )

    @classmethod
    def from_json(cls, text: str) -> "OptimizerConfig":
        """The inverse of `to_json`."""
        loaded = json.loads(text)
        if not isinstance(loaded, dict) or loaded.keys() != {"name", "hyperparameters"}:
            raise ValueError(
                f"expected a JSON object with name and hyperparameters, got {text[:80]!r}."
            )
        return cls(**loaded)


def _json(value: Any) -> Any:
    if type(value) in OPTIONS:
        return given(value)
    if isinstance(value, np.dtype):  # in options
        return value.name
    raise TypeError(f"no JSON for {value!r}")


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return tuple(map(_plain, value))
    if isinstance(value, np.dtype) or (isinstance(value, type) and hasattr(value, "dtype")):
        return np.dtype(value).name
    return value

"""Where a traced program will run: on the devices of the mesh in use, or else the default ones."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_stood_in_for: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def platform() -> str:
    """As "cpu", "gpu" or "tpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return _stood_in_for.get() or (jax.default_backend() if device is None else device.platform)


@contextlib.contextmanager
def standing_in_for(name: str | None) -> Iterator[None]:
    """Programs are traced as for that platform and compiled for this one; None changes nothing.

    Example:
      >>> from ravine.core.platform import platform, standing_in_for
      >>> with standing_in_for("gpu"):
      ...     print(platform())
      gpu
    """
    token = _stood_in_for.set(name)
    try:
        yield
    finally:
        _stood_in_for.reset(token)


def device_kind() -> str:
    """As "cpu" or "TPU v5 lite"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind

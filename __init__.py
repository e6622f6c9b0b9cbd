"""Ravine: optimizers, schedules and stability devices for training language models in JAX.

Every optimizer is a pure ``optax.GradientTransformation``. The trainer lives in
``ravine.training`` and is imported on demand, since it needs the ``train`` extra.
"""

from . import optimizers, schedules, stability
from .optimizers import *  # noqa: F403

__version__ = "0.1.0.dev0"

__all__ = ["__version__", "optimizers", "schedules", "stability"]
__all__ += optimizers.__all__

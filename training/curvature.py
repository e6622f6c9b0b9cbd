"""Sophia's curvature in the trainer, and for Flax NNX models."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from ..optimizers.links.curvature import filled

HUTCHINSON = ("sophia_h",)
"""Registered optimizers that are given Hutchinson's estimate; Sophia-G is given its own."""


def of_parameters(
    model: nnx.Module, function: Callable[[Any], Any], wrt: Any = nnx.Param
) -> Callable[[Any], Any]:
    """A function of a model as a function of its parameters, as curvature estimators take it.

    Works inside ``nnx.jit``, with batches sharded or not.

    Args:
      model: the model. What is not a parameter in it, as the statistics of ``nnx.BatchNorm`` and the
        keys of ``nnx.Dropout``, has the values that it has now, and does not change.
      function: from a model to logits or to a loss.
      wrt: which variables are parameters, as for ``nnx.Optimizer``.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> from flax import nnx
      >>> from ravine.training.curvature import of_parameters
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, ravine.sophia_g(1e-3, start=0), wrt=nnx.Param)
      >>> inputs, labels = jnp.ones((4, 2)), jnp.zeros(4, int)
      >>> loss = lambda m: ravine.stability.next_token_loss(m(inputs)[None], labels[None])
      >>> grads = nnx.grad(loss)(model)
      >>> logits = of_parameters(model, lambda m: m(inputs))
      >>> _ = optimizer.update(model, grads, curvature=ravine.gauss_newton_bartlett(logits))
    """
    graphdef, own, rest = nnx.split(model, wrt, ...)
    own, rest = nnx.as_pure((own, rest))
    # From values alone, so that batch statistics and keys of dropout change in the copy only.
    return lambda params: function(nnx.merge(graphdef, filled(params, own), rest))

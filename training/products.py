r"""Products of activations and matrices, with the gradient of the matrix as CPUs compute it fastest.

JAX transposes :math:`y = x W` into :math:`(g^\top x)^\top`. XLA:CPU (jaxlib 0.10.2) then copies both
operands into another layout, of which :math:`g` is often the wider one, and multiplies outside of its
fast library. Written as :math:`x^\top g` only :math:`x` is copied, or, where :math:`g` is narrower, only
that: 0.3 to 1.0 of the time (docs/log.md, 2026-11-30).
"""

from typing import Any, TypeVar

import jax
from flax import nnx
from jax import lax

from .sharding import one_device

Model = TypeVar("Model", bound=nnx.Module)
Dimensions = Any  # of lax.dot_general


def fast_products(model: Model) -> Model:
    """The model, its linear layers taking :func:`product` where that is faster: on one CPU device.

    For a training step only: there is no forward mode (``jax.jvp``) through it.
    """
    if one_device() and jax.default_backend() == "cpu":
        model.set_attributes(nnx.Linear, dot_general=product)
    return model


def product(x: jax.Array, kernel: jax.Array, dimensions: Dimensions, **options: Any) -> jax.Array:
    """``jax.lax.dot_general``, of which ``x @ kernel`` has the gradient of above.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from ravine.training.products import product
      >>> loss = lambda kernel: product(jnp.ones((2, 3, 4)), kernel, (((2,), (0,)), ((), ()))).sum()
      >>> jax.grad(loss)(jnp.ones((4, 5)))[0]
      Array([6., 6., 6., 6., 6.], dtype=float32)
    """
    given = {name: value for name, value in options.items() if value is not None}
    plain = (((x.ndim - 1,), (0,)), ((), ()))
    if given or dimensions != plain or kernel.ndim != 2:
        return lax.dot_general(x, kernel, dimensions, **options)
    return _product(x, kernel)


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ kernel


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ kernel, (x, kernel)


def _backward(kept: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    rows = tuple(range(x.ndim - 1))
    of_x = lax.dot_general(grad, kernel, (((x.ndim - 1,), (1,)), ((), ())))
    if kernel.shape[0] <= kernel.shape[1]:
        return of_x, lax.dot_general(x, grad, ((rows, rows), ((), ())))
    # The barriers keep XLA from swapping the factors again, and from computing x, a product of the gate
    # and its input, in the strided order of a copy.
    x_NxD = lax.optimization_barrier(x.reshape(-1, x.shape[-1]))
    grad_FxN = lax.optimization_barrier(grad.reshape(-1, grad.shape[-1]).T)
    return of_x, (grad_FxN @ x_NxD).T


_product.defvjp(_forward, _backward)

"""The scan over layers: how many it unrolls, and what they keep for the backward pass."""

from collections.abc import Callable
from typing import Any

from flax import nnx
from jax.extend.core import Primitive

from .model_config import ModelConfig
from .sharding import one_device


def unrolled(config: ModelConfig) -> int:
    """Layers unrolled; on one device both of two, which take less time than a loop does."""
    return config.layers if config.layers <= 2 and one_device() else config.unroll


def recomputed(call: Callable[..., Any], config: ModelConfig) -> Callable[..., Any]:
    """The call of a layer, of which the backward pass computes again what it does not keep.

    Storing every activation of a scanned layer takes longer than computing it again from products, and
    twice the memory (docs/log.md, 2026-11-29).
    """
    if config.remat:
        return nnx.remat(call)
    if config.attention == "cudnn":  # its kernel is no product, and would run twice
        return call
    # Forward and backward pass are different loops, so nothing here could be merged with its repetition.
    return nnx.remat(call, policy=_kept, prevent_cse=False)


def _kept(primitive: Primitive, *_: Any, **__: Any) -> bool:
    return primitive.name in ("dot_general", "random_bits")

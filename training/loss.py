"""The trainer's loss of a batch: from logits, or, for large vocabularies, without ever holding them.

Left to the compiler, `fused_cross_entropy` under FSDP sums the whole ``[D, V]`` gradient of the head
over all devices in each of its chunks. Inside ``shard_map`` each device adds up its own rows, and the
sum over devices is made once.
"""

import functools
from typing import Any

import jax
from jax.sharding import PartitionSpec

from ..stability import CrossEntropy, fused_cross_entropy
from ..stability.soft_cap import CapForm
from .sharding import ROWS, auto_axes

LARGE = 8192
"""Vocabularies above this take the fused loss by default."""
CHUNK_BYTES = 2**26
"""Of a chunk's float32 logits on one device."""
LEAST_TOKENS = 1024
"""Of a chunk on an accelerator, whatever it takes: products of fewer rows leave it idle."""


def is_large(vocabulary: int) -> bool:
    """Whether a vocabulary takes the fused loss by default, in every command.

    Example:
      >>> from ravine.training.loss import is_large
      >>> is_large(256), is_large(50_304)
      (False, True)
    """
    return vocabulary > LARGE


def chunk_of(columns: int, backend: str) -> int:
    """Tokens per chunk, for a number of columns of the head on one device.

    Example:
      >>> from ravine.training.loss import chunk_of
      >>> chunk_of(32_768, "cpu"), chunk_of(131_072, "tpu")
      (512, 1024)
    """
    tokens = max(64, CHUNK_BYTES // (4 * columns))
    return tokens if backend == "cpu" else max(LEAST_TOKENS, tokens)


def fused_loss(
    hidden_BxTxD: jax.Array,
    kernel_DxV: jax.Array,
    targets_BxT: jax.Array,
    *,
    z_loss: float = 0.0,
    cap: float | None = None,
    cap_form: CapForm = "tanh",
    chunk: int | None = None,
) -> tuple[jax.Array, CrossEntropy]:
    """Mean loss, z-loss included, and its parts for every token, without gradient.

    Under an `Auto` mesh with the trainer's axes every device works on the rows and columns that it has.

    Args:
      hidden_BxTxD: normalised states, cut by rows and context.
      kernel_DxV: of the head, cut in any way.
      targets_BxT: the next tokens.
      z_loss: coefficient of the z-loss.
      cap: of the logits' soft-cap.
      cap_form: its form.
      chunk: tokens worked on at once, by default `chunk_of`.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.training.loss import fused_loss
      >>> loss, _ = fused_loss(jnp.ones((2, 3, 4)), jnp.zeros((4, 256)), jnp.zeros((2, 3), int))
      >>> round(float(loss), 4)  # log 256
      5.5452
    """
    mesh = jax.sharding.get_abstract_mesh()
    options: dict[str, Any] = {"z_loss": z_loss, "cap": cap, "cap_form": cap_form}
    axes = auto_axes(mesh)
    if mesh.size == 1 or not axes:
        options["chunk"] = chunk or chunk_of(kernel_DxV.shape[1], jax.default_backend())
        return fused_cross_entropy(hidden_BxTxD, kernel_DxV, targets_BxT, **options)
    rows = tuple(name for name in ROWS if name in axes)
    context = "context" if "context" in axes else None
    columns = "tensor" if "tensor" in axes else None
    local = kernel_DxV.shape[1] // (mesh.shape[columns] if columns else 1)
    options["chunk"] = chunk or chunk_of(local, jax.default_backend())
    of_device = functools.partial(
        fused_cross_entropy,
        vocabulary_axis=columns,
        token_axes=(*rows, context) if context else rows,
        **options,
    )
    each: Any = PartitionSpec(rows, context)
    specs = PartitionSpec(rows, context, None), PartitionSpec(None, columns), each
    placed = jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=specs,
        out_specs=(PartitionSpec(), CrossEntropy(each, each, each)),
        axis_names=frozenset(axes),
    )
    return placed(hidden_BxTxD, kernel_DxV, targets_BxT)

"""Cross-entropy per token, with its parts kept apart."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..core.arguments import checked
from ..core.arithmetic import wide
from ..core.checks import check_decay_rates, check_non_negative
from ._checks import check_labels
from .log_sum_exp import log_sum_exp
from .soft_cap import soft_cap


class CrossEntropy(NamedTuple):
    """The parts of the loss, per token, in at least float32."""

    loss: jax.Array
    """Negative log-likelihood, in nats: perplexity is the exponential of its mean, without `z_loss`."""
    z_loss: jax.Array
    """The penalty, coefficient included; zero where the coefficient is."""
    log_normalizer: jax.Array
    """Log-sum-exp of the logits that count, cap applied."""


@checked
def cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    *,
    where: jax.Array | None = None,
    z_loss: float = 0.0,
    cap: float | None = None,
    label_smoothing: float = 0.0,
) -> CrossEntropy:
    r"""Cross-entropy from integer labels, with the loss, the z-loss and the log-normaliser separate.

    With :math:`z` the logits, capped, and :math:`n = \log \sum_v e^{z_v}`:

    .. math::
        \ell = n - (1 - \epsilon) z_y - \frac{\epsilon}{V} \sum_v z_v, \qquad
        \ell_z = c\, n^2

    A row in which no entry counts has loss, z-loss and gradient zero. A row whose labelled entry does
    not count has an infinite loss. Under ``jit``, where labels cannot be looked at, a label out of
    range gives the loss NaN: it is not clamped to another token, and not passed over.

    Args:
      logits: ``[..., V]``, floating point; taken to at least float32 first.
      labels: ``[...]``, integers in [0, V).
      where: boolean, broadcasts to `logits`: which entries count, such as the true columns of a padded
        vocabulary; those left out may hold anything.
      z_loss: c; 1e-4 in PaLM and T5X, 1e-5 in OLMo 2.
      cap: of the soft-cap; ``None`` for none. It is applied before `where`.
      label_smoothing: :math:`\epsilon` in [0, 1), over the entries that count.

    Returns:
      A `CrossEntropy` of ``[...]`` arrays; train on the weighted mean of ``loss + z_loss``.

    Raises:
      TypeError: for labels that are no integers.
      ValueError: if shapes do not match, a value is out of range, or, outside of ``jit``, a label is.

    Source: PaLM, 2022, https://arxiv.org/abs/2204.02311 (z-loss); Szegedy et al., 2015,
    https://arxiv.org/abs/1512.00567 (label smoothing).

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.stability import cross_entropy
      >>> found = cross_entropy(jnp.zeros((2, 256)), jnp.array([3, 200]), z_loss=1e-4)
      >>> [round(float(part[0]), 4) for part in found]
      [5.5452, 0.0031, 5.5452]
    """
    check_non_negative(z_loss=z_loss)
    check_decay_rates(label_smoothing=label_smoothing)
    if jnp.shape(labels) != logits.shape[:-1]:
        raise ValueError(
            "logits must have the shape of the labels and one axis more, got "
            f"{logits.shape} and {jnp.shape(labels)}."
        )
    check_labels(labels, logits.shape[-1])
    z = soft_cap(wide(logits), cap)
    counts = jnp.ones_like(z, bool) if where is None else jnp.broadcast_to(where, z.shape)
    normalizer = log_sum_exp(z, counts)
    some = normalizer != -jnp.inf  # also where it is not a number
    normalizer = jnp.where(some, normalizer, 0)

    classes = jax.lax.broadcasted_iota(labels.dtype, z.shape, z.ndim - 1)
    # A comparison, not a gather: its gradient is a select, not a scatter.
    labelled = classes == labels[..., None]
    picked = jnp.sum(jnp.where(labelled, jnp.where(counts, z, -jnp.inf), 0), axis=-1)
    loss = normalizer - picked
    if label_smoothing:
        number = jnp.sum(counts, axis=-1).astype(z.dtype)
        mean = jnp.sum(jnp.where(counts, z, 0), axis=-1) / jnp.where(number > 0, number, 1)
        loss = loss + label_smoothing * (picked - mean)
    in_range = (labels >= 0) & (labels < z.shape[-1])
    loss = jnp.where(some, jnp.where(in_range, loss, jnp.nan), 0)
    return CrossEntropy(loss, z_loss * jnp.square(normalizer), normalizer)

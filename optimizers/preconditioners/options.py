"""Shampoo's options: its factors' statistics, how they are stored and rooted, and the graft."""

from typing import Any, Literal

import jax.numpy as jnp

from ...core.checks import (
    check_amount,
    check_decay_rates,
    check_known,
    check_non_negative,
    number,
)
from ...core.options import options
from ..links.graft import Graft, Magnitude, magnitude
from ..matrix.algebra.roots import Method, PseudoInverse, exponent_fraction
from ..matrix.batch.refresh import Refresh

NARROW_RIDGE = 0.03
"""The least ridge of statistics in 16 bits: for gradients with a spectrum i^-1.5, the most negative
eigenvalue of statistics in bfloat16 is -0.0024 (32 rows) to -0.013 (256) times the largest one."""


@options("roots")
class Roots:
    """How the inverse roots of statistics are computed, and which of them are trusted.

    Attributes:
      method: one from :mod:`ravine.optimizers.matrix.algebra.roots`; ``None`` takes ``Eigh()``.
      exponent: negative; ``None`` takes -1/(2k) for k factors.
      ridge: added to all eigenvalues, relative to the largest one. In float32, singular statistics need
        1e-5.
      absolute_ridge: added to the relative one.
      tolerance: a root :math:`R^q` of A is refused if an element of :math:`A R^p - I` is larger.
      patience: after more refused roots in a row than this, a block takes the graft's step until a root
        is good again.

    Raises:
      ValueError: for values out of range.

    Example:
      >>> import ravine
      >>> tx = ravine.shampoo(1e-3, roots=ravine.Roots(exponent=-0.5, ridge=1e-4))
    """

    method: Method | None = None
    exponent: float | None = None
    ridge: float = 1e-5
    absolute_ridge: float = 0.0
    tolerance: float = 0.1
    patience: int = 3

    def __post_init__(self) -> None:
        for name in ("ridge", "absolute_ridge", "tolerance"):
            check_non_negative(**{f"roots.{name}": getattr(self, name)})
        exponent = number("roots.exponent", self.exponent)
        if exponent is not None:
            exponent_fraction(exponent)
        patience = {"roots.patience": self.patience}
        check_known(**patience)
        check_amount(0, **patience)

    def check_need(self, refresh: Refresh) -> None:
        """Raises for roots of which `misfit` cannot tell whether they need a refresh."""
        if refresh.need is not None and isinstance(self.method, PseudoInverse):
            raise ValueError(
                "refresh.need is not for PseudoInverse, whose roots leave directions out, and so fit no "
                "statistics; take Eigh(), or leave need out."
            )


@options("factors")
class Factors:
    """Which statistics factors keep, and how they are stored.

    Attributes:
      statistics: ``"gram"``, sums of :math:`GG^\\top`, or ``"kl"``, where the gradient is first
        preconditioned along the other axes with their current roots.
      statistics_dtype: dtype in which statistics are stored; ``None`` takes at least float32. Rounding
        to bfloat16 makes eigenvalues negative by up to a hundredth of the largest one, so that roots
        are refused; it needs a ``roots.ridge`` of at least 0.03.
      root_dtype: dtype in which roots are stored; ``None`` takes at least float32. Bfloat16 changes
        them by 0.2 %.
      packed: keep only one triangle of statistics and roots, half the memory.
      max_elements: bound on the elements of the matrices rooted at once, and of packed or narrow
        factors used at once; ``None`` takes 2**21 on CPU and 2**23 elsewhere.

    Raises:
      ValueError: for values out of range.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.shampoo(1e-3, factors=ravine.Factors(packed=True, root_dtype=jnp.bfloat16))
    """

    statistics: Literal["gram", "kl"] = "gram"
    statistics_dtype: Any = None
    root_dtype: Any = None
    packed: bool = False
    max_elements: int | None = None

    def __post_init__(self) -> None:
        most = {"factors.max_elements": self.max_elements}
        check_known(**most)
        check_amount(1, **most)

    def check_ridge(self, ridge: Any) -> None:
        """Raises for statistics with rounding errors larger than the ridge."""
        dtype = self.statistics_dtype
        if dtype is None or jnp.finfo(dtype).bits >= 32 or not isinstance(ridge, (int, float)):
            return
        if ridge < NARROW_RIDGE:
            raise ValueError(
                f"factors.statistics_dtype={jnp.dtype(dtype).name} needs a roots.ridge of at least "
                f"{NARROW_RIDGE}, got {ridge!r}: rounded statistics have negative eigenvalues, and no "
                "roots. Leave them in float32 (factors.packed halves them), and take "
                "factors.root_dtype for the roots."
            )


@options("graft")
class Grafting:
    """Which optimizer's step size Shampoo's direction gets.

    Attributes:
      step: the optimizer: ``"none"``, ``"sgd"``, ``"adagrad"``, ``"rmsprop"``, ``"adam"``, ``"adamw"``
        or ``"sign"``, see :func:`ravine.optimizers.links.graft.magnitude`.
      b2: decay rate of its second moment; ``None`` takes Shampoo's.
      per: one size for each ``"block"``, or for each ``"parameter"``.

    Raises:
      ValueError: for values out of range.

    Example:
      >>> import ravine
      >>> tx = ravine.shampoo(0.02, graft=ravine.Grafting(step="sgd"))
    """

    step: Graft = "adam"
    b2: float | None = None
    per: Literal["block", "parameter"] = "block"

    def __post_init__(self) -> None:
        check_decay_rates(**{"graft.b2": self.b2})

    def magnitude(self, b2: Any, eps: Any) -> Magnitude:
        """The step, given the decay rate `b2` of Shampoo's statistics."""
        return magnitude(self.step, b2 if self.b2 is None else self.b2, eps)


FACTORS, GRAFTING, ROOTS = Factors(), Grafting(), Roots()

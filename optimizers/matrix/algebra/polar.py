"""Polar factors of batches of matrices, and how Newton–Schulz approximates them."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ....core.arguments import checked
from ....core.checks import check_positive, check_whole
from ....core.kinds import OPTIONS
from ....core.platform import platform
from ..mesh.placement import Names
from ..mesh.traffic import Distribution
from .coefficients import Steps, check_coefficients, named_coefficients
from .halves import Halves
from .newton_schulz import Form, Whole, cheapest, iterated

MOST_STEPS = 1000
SMALLEST_HALF = 256
"""Rows of a half worth its products, on CPU: those of 256 rows multiply at 0.93 of the rate of those of
512, those of 128 at 0.8 of it."""


@checked
@dataclasses.dataclass(frozen=True)
class NewtonSchulz:
    r"""How matrices are orthogonalized; call it on a batch.

    Attributes:
      coefficients: a preset (``"keller"``, ``"quintic"``, ``"polar_express"``, ``"cubic"``) or a
        tuple of :math:`(a, b, c)`, one per step.
      steps: how many, for a preset.
      lower: for ``"polar_express"``, the smallest singular value that must come near one.
      dtype: dtype of the products' inputs: float32, bfloat16 or float16, by name or as
        ``jnp.bfloat16``; stored by name. ``None`` takes bfloat16 on GPU and TPU, as Muon's authors
        do, and float32 on CPU and for float64 matrices. Norms and sums are always float32.
      form: ``"standard"``, ``"gram"``, or ``"auto"`` for the one that multiplies less; in bfloat16
        that is the standard form, since eight bits are too few for :math:`R`.
      restarts: steps before which the gram form restarts. With a restart before step 3 it stays within
        1e-5 of the standard form for singular values from 0.01 to 1 in float32 (relative Frobenius
        norm); without any restart within 1e-4, and a sixth faster.
      halvings: how often symmetric products are halved, see :mod:`.newton_schulz`; ``None`` decides by
        size, and on CPU keeps matrices with 512 rows or more in halves, see :mod:`.halves`.
      precision: precision of products in float32, which accelerators would otherwise round to fewer
        bits.
      distribution: how matrices that a mesh cuts are distributed: ``"whole"``, ``"ragged"``,
        ``"gram"``, or ``"auto"`` for the one that sends the fewest bytes, see :mod:`.traffic` (ragged
        on some TPUs only).

    Raises:
      ValueError: for coefficients with a map that does not stay positive and bounded on (0, 1], and
        other values out of range.

    Source: Jordan, 2024, https://kellerjordan.github.io/posts/muon/; gram form: Dao-AILab,
    gram-newton-schulz.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from ravine.optimizers.matrix.algebra.polar import NewtonSchulz
      >>> x = jnp.array([[[3.0, 0.0], [0.0, 4.0]]])
      >>> NewtonSchulz("quintic")(x).round(2)
      Array([[[1.02, 0.  ],
              [0.  , 1.01]]], dtype=float32)
    """

    coefficients: str | Steps = "keller"
    steps: int = 5
    lower: float = 1e-3
    dtype: Any = None
    form: Literal["auto", "standard", "gram"] = "auto"
    restarts: tuple[int, ...] = (3,)
    halvings: int | None = None
    precision: jax.lax.PrecisionLike = "highest"
    distribution: Distribution = "auto"

    def __post_init__(self) -> None:
        if self.dtype is not None:
            dtype = jnp.dtype(self.dtype).name
            if dtype not in ("float32", "bfloat16", "float16"):
                raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}.")
            object.__setattr__(self, "dtype", dtype)
        if not isinstance(self.coefficients, str):  # from JSON they are lists
            steps = tuple(map(tuple, self.coefficients))
            object.__setattr__(self, "coefficients", steps)
        if any(step < 1 for step in self.restarts):
            raise ValueError(f"restarts must be steps of at least 1, got {self.restarts}.")
        check_whole(0, halvings=self.halvings)
        check_whole(1, steps=self.steps)
        check_positive(lower=self.lower)
        object.__setattr__(self, "lower", float(self.lower))
        if self.steps > MOST_STEPS:
            raise ValueError(f"steps must be at most {MOST_STEPS}, got {self.steps}.")
        self.table()

    def table(self) -> Steps:
        """The coefficients of every step."""
        if isinstance(self.coefficients, str):
            return named_coefficients(self.coefficients, self.steps, self.lower)
        return check_coefficients(self.coefficients)

    def gram_sums(self) -> int:
        """How many Gram matrices of the long side are needed if mesh axes cut it."""
        count = len(self.table())
        if self._cut_form() == "standard":
            return count
        return 1 + sum(step < count for step in set(self.restarts))

    def _cut_form(self) -> Form:
        """The form for matrices with a cut long side: the one with the fewest sums."""
        if self.form != "auto":
            return self.form
        return "standard" if self._dtype() == "bfloat16" else "gram"

    def _dtype(self, of: Any = jnp.float32) -> str:
        """The dtype for matrices of this one."""
        if self.dtype is not None:
            return self.dtype
        return "float32" if of == jnp.float64 or platform() == "cpu" else "bfloat16"

    def __call__(self, matrices_KxMxN: jax.Array, summed: Names = ()) -> jax.Array:
        """The approximate polar factors, in the dtype of the matrices; zero for a zero matrix.

        Args:
          matrices_KxMxN: a batch.
          summed: mesh axes that cut the columns, inside `jax.shard_map`; the rows must then be the
            short side.
        """
        rows, columns = matrices_KxMxN.shape[1:]
        if rows > columns and not summed:
            return jnp.swapaxes(self(jnp.swapaxes(matrices_KxMxN, 1, 2)), 1, 2)
        steps, form = self.table(), self._cut_form()
        dtype = self._dtype(matrices_KxMxN.dtype)
        chosen = self.halvings is None and dtype == "float32" and not summed
        halved = chosen and _worth_halving(rows)
        if form == "gram" and self.form == "auto" and not summed:
            depth = 1 if halved else self.halvings
            form = cheapest(rows, columns, steps, self.restarts, depth)
        wide = jnp.float64 if matrices_KxMxN.dtype == jnp.float64 else jnp.float32
        inputs = wide if dtype == "float32" else jnp.dtype(dtype)
        products: Any = (
            Halves(inputs, self.precision)
            if halved
            else Whole(inputs, self.halvings, self.precision, summed)
        )
        found = iterated(
            matrices_KxMxN.astype(wide),
            steps,
            form,
            products,
            restarts=self.restarts,
            summed=summed,
        )
        return found.astype(matrices_KxMxN.dtype)


def _worth_halving(rows: int) -> bool:
    """Whether matrices with so many rows are halved.

    Other platforms keep them whole: there, products of halves were never measured.
    """
    return platform() == "cpu" and rows % 2 == 0 and rows // 2 >= SMALLEST_HALF


OPTIONS.add(NewtonSchulz)
Polar = NewtonSchulz | Callable[[jax.Array], jax.Array] | None
"""What maps a batch of matrices to their polar factors; None for ``NewtonSchulz()``."""


def polar_factor(matrices_KxMxN: jax.Array) -> jax.Array:
    """The polar factors by singular value decomposition: the reference, not for training.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.matrix.algebra.polar import polar_factor
      >>> polar_factor(jnp.array([[[3.0, 0.0], [0.0, 4.0]]]))
      Array([[[1., 0.],
              [0., 1.]]], dtype=float32)
    """
    u, _, vh = jnp.linalg.svd(matrices_KxMxN, full_matrices=False)
    return jnp.matmul(u, vh, precision="highest")

r"""Newton–Schulz iterations towards the polar factor of a batch of matrices.

For :math:`G = U \Sigma V^\top` the polar factor is :math:`U V^\top`: every singular value becomes one.
A step :math:`X \leftarrow aX + b\,XX^\top X + c\,(XX^\top)^2 X` maps each singular value by an odd
polynomial and needs matrix products only. There are two forms of the same arithmetic:

*standard*
    three products per step, two of them with the long side;
*gram*
    the steps act on :math:`R = XX^\top` alone, collecting :math:`Q` with :math:`X_k = Q X_0`; only the
    first and the last product have the long side. Squaring the singular values loses the small ones to
    rounding, so after some steps the iteration *restarts*: :math:`X \leftarrow QX`,
    :math:`R \leftarrow XX^\top`.

Counting symmetric products at their reduced cost, the shape decides which form multiplies less;
`cheapest` computes it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ....core.arguments import checked
from ....core.checks import check_whole
from ....core.kinds import OPTIONS
from ..mesh.exchange import largest, total
from ..mesh.placement import Names
from ..mesh.traffic import Distribution
from .coefficients import Steps, check_coefficients, named_coefficients
from .halves import Halves, worth_halving
from .symmetric import cost_share, halvings, product, symmetric_product

Form = Literal["auto", "standard", "gram"]
MOST_STEPS = 1000


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
        ``jnp.bfloat16``; stored by name. Norms and sums are always float32.
      form: ``"standard"``, ``"gram"``, or ``"auto"`` for the one that multiplies less; in bfloat16
        that is the standard form, since eight bits are too few for :math:`R`.
      restarts: steps before which the gram form restarts. With a restart before step 3 it stays within
        1e-5 of the standard form for singular values from 0.01 to 1 in float32 (relative Frobenius
        norm); without any restart within 1e-4, and a sixth faster.
      halvings: how often symmetric products are halved, see :mod:`.symmetric`; ``None`` decides by
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
    dtype: Any = "float32"
    form: Form = "auto"
    restarts: tuple[int, ...] = (3,)
    halvings: int | None = None
    precision: jax.lax.PrecisionLike = "highest"
    distribution: Distribution = "auto"

    def __post_init__(self) -> None:
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

    def _cut_form(self) -> Literal["standard", "gram"]:
        """The form for matrices with a cut long side: the one with the fewest sums."""
        if self.form != "auto":
            return self.form
        return "standard" if self.dtype == "bfloat16" else "gram"

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
        chosen = self.halvings is None and self.dtype == "float32" and not summed
        halved = chosen and worth_halving(rows)
        if form == "gram" and self.form == "auto" and not summed:
            depth = 1 if halved else self.halvings
            form = cheapest(rows, columns, steps, self.restarts, depth)
        wide = jnp.float64 if matrices_KxMxN.dtype == jnp.float64 else jnp.float32
        dtype = wide if self.dtype == "float32" else jnp.dtype(self.dtype)
        products: Any = (
            Halves(dtype, self.precision)
            if halved
            else _Whole(dtype, self.halvings, self.precision, summed)
        )
        x = products.cut(normalize(matrices_KxMxN.astype(wide), summed).astype(dtype))
        restarts = self.restarts
        x = _gram(x, steps, products, restarts) if form == "gram" else _standard(x, steps, products)
        return products.joined(x).astype(matrices_KxMxN.dtype)


OPTIONS.add(NewtonSchulz)
Polar = NewtonSchulz | Callable[[jax.Array], jax.Array] | None
"""What maps a batch of matrices to their polar factors; None for ``NewtonSchulz()``."""


def normalize(matrices_KxMxN: jax.Array, summed: Names = ()) -> jax.Array:
    """Each matrix divided by its Frobenius norm, at any scale; a zero matrix stays zero.

    The largest element is divided out first, so that squares neither overflow nor vanish. Nothing is
    added to the norm, since that would shrink small matrices.
    """
    here = jnp.max(jnp.abs(matrices_KxMxN), axis=(1, 2), keepdims=True, initial=0)
    maximum = largest(here, summed)
    scaled = matrices_KxMxN / jnp.where(maximum == 0, 1, maximum)
    squares = jnp.sum(jnp.square(scaled), axis=(1, 2), keepdims=True)
    norm = jnp.sqrt(total(squares, summed))
    return scaled / jnp.where(norm == 0, 1, norm)


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


def multiplications(
    form: str,
    rows: int,
    columns: int,
    steps: Steps,
    restarts: tuple[int, ...] = (),
    depth: int | None = None,
) -> float:
    """Multiply-adds for one `[rows, columns]` matrix, rows <= columns.

    Example:
      >>> from ravine.optimizers.matrix.algebra.coefficients import named_coefficients
      >>> from ravine.optimizers.matrix.algebra.polar import multiplications
      >>> steps = named_coefficients("keller", 5)
      >>> [multiplications(form, 1, 4, steps) for form in ("standard", "gram")]
      [45.0, 25.0]
    """

    def symmetric(inner: int) -> float:
        share = cost_share(halvings(rows, inner) if depth is None else depth)
        return share * rows**2 * inner

    count, squares = len(steps), sum(c != 0 for _, _, c in steps)
    small, gram, apply = symmetric(rows), symmetric(columns), float(rows**2 * columns)
    if form == "standard":
        return count * (gram + apply) + squares * small
    starts = [0, *sorted(step for step in set(restarts) if step < count)]
    ends = [*starts[1:], count]
    collects = sum(end - start - 1 for start, end in zip(starts, ends, strict=True))
    # A step squares R and multiplies into Q; all but the last before an end also move R on: Q R Q.
    return len(starts) * (gram + apply) + (squares + 2 * collects) * small + collects * rows**3


def cheapest(
    rows: int, columns: int, steps: Steps, restarts: tuple[int, ...] = (), depth: int | None = None
) -> Literal["standard", "gram"]:
    """The form that multiplies less."""
    costs = {
        form: multiplications(form, rows, columns, steps, restarts, depth)
        for form in ("standard", "gram")
    }
    return "gram" if costs["gram"] < costs["standard"] else "standard"


@dataclasses.dataclass(frozen=True)
class _Whole:
    """Products with inputs rounded to one dtype, and wide results; `Halves` has the same of halves."""

    dtype: Any
    depth: int | None
    precision: Any
    summed: Names

    def cut(self, x: jax.Array) -> jax.Array:
        return x

    def joined(self, x: jax.Array) -> jax.Array:
        return x

    def identity(self, like: jax.Array) -> jax.Array:
        return jnp.eye(like.shape[1], dtype=like.dtype)[None]

    def gram(self, x: jax.Array) -> jax.Array:
        return total(self.symmetric(x, jnp.swapaxes(x, 1, 2)), self.summed)

    def symmetric(self, left: jax.Array, right: jax.Array) -> jax.Array:
        left, right = left.astype(self.dtype), right.astype(self.dtype)
        return symmetric_product(left, right, self.depth, precision=self.precision)

    def full(self, left: jax.Array, right: jax.Array) -> jax.Array:
        return product(left.astype(self.dtype), right.astype(self.dtype), precision=self.precision)

    def congruent(self, q: jax.Array, r: jax.Array) -> jax.Array:
        return self.symmetric(self.full(q, r), jnp.swapaxes(q, 1, 2))


def _standard(x: Any, steps: Steps, products: Any) -> Any:
    """The steps in standard form, on `x` as the products cut it."""
    for a, b, c in steps:
        gram = products.gram(x)
        inner = jax.tree.map(lambda r, b=b: b * r, gram)
        if c:
            square = products.symmetric(gram, gram)
            inner = jax.tree.map(lambda p, s, c=c: p + c * s, inner, square)
        x = jax.tree.map(
            lambda x, y, a=a: (a * x.astype(y.dtype) + y).astype(products.dtype),
            x,
            products.full(inner, x),
        )
        # Otherwise XLA for TPU keeps the wide products of all steps, to add them up in one kernel at
        # the end.
        x = jax.lax.optimization_barrier(x)
    return x


def _gram(x: Any, steps: Steps, products: Any, restarts: tuple[int, ...]) -> Any:
    """The steps in Gram form, on `x` as the products cut it."""
    start = r = products.gram(x)
    eye, q = products.identity(r), None
    for index, (a, b, c) in enumerate(steps):
        p = jax.tree.map(lambda eye, r, a=a, b=b: a * eye + b * r, eye, r)
        if c:
            p = jax.tree.map(lambda p, s, c=c: p + c * s, p, products.symmetric(r, r))
        q = p if q is None else products.symmetric(p, q)
        if index + 1 == len(steps):
            break
        if index + 1 in restarts:
            x = jax.tree.map(lambda y: y.astype(products.dtype), products.full(q, x))
            start, q = products.gram(x), None
            r = start
        else:
            # Not P R P: with rounding, Q and R would drift apart. This way R is the Gram matrix of the
            # current QX, as in the standard form, and the error is two to four times smaller.
            r = products.congruent(q, start)
    assert q is not None
    return products.full(q, x)

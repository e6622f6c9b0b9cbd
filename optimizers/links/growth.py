r"""How the spectral norm of an update grows with the shape of its matrix, direction by direction.

An update of a matrix `[in, out]` changes the activations after it by the same amount at every width if
its spectral norm is proportional to :math:`\sqrt{out / in}`, which is the spectral condition. So the
learning rate of a direction whose spectral norm grows like :math:`\sigma(in, out)` is proportional to
:math:`\sqrt{out / in} / \sigma`. Two limits determine :math:`\sigma`:

``"low"``
    The rank of gradients does not depend on the width: singular values lie far apart, and the largest
    of a sign or Adam step is as large as the norm of the whole matrix. This is the limit of infinite
    width.
``"full"``
    Noise fills the matrix, and a whitened direction has singular values of equal size. This holds for
    batches with many more tokens than the width of the matrix.

Source: Yang, Simon and Bernstein, 2023, https://arxiv.org/abs/2310.17813 (the condition; SGD, Adam);
Qiu et al., 2025, https://arxiv.org/abs/2512.05620, and its code (charliezchen/
scaling-matrix-preconditioning, ``train.py::assign_lr``), for Adam, SGD, Muon, Shampoo, grafts, SOAP and
blocks in the limit ``"low"``. The formulas for ``"full"`` and for KL-Shampoo are derived here.
"""

import math
from collections.abc import Callable
from typing import Literal

from .matrix_scale import Scale, shape_factor

Rank = Literal["low", "full"]
Growth = Callable[[int, int], float]
"""From the rows (in) and columns (out) of a matrix to its update's spectral norm, up to a constant."""


def gradient_growth(fan_in: int, fan_out: int) -> float:
    r"""For the gradient itself (SGD): :math:`\sqrt{in / out}`.

    Inputs have norm :math:`\sqrt{in}`, and gradients at the outputs :math:`1 / \sqrt{out}`.
    """
    return math.sqrt(fan_in / fan_out)


def element_growth(fan_in: int, fan_out: int) -> float:
    r"""For steps with elements of size one, aligned with inputs: :math:`\sqrt{in \cdot out}`.

    Adam and its variants, signs.
    """
    return math.sqrt(fan_in * fan_out)


def norm_growth(rank: Rank) -> Growth:
    r"""For a whitened direction with the Frobenius norm of Adam's step, as with a graft.

    ``"low"``: one singular value carries the whole norm, :math:`\sqrt{in \cdot out}`. ``"full"``: all
    share it, as many as the shorter side is long, :math:`\sqrt{\max(in, out)}`.
    """
    if rank == "low":
        return element_growth
    return lambda fan_in, fan_out: math.sqrt(max(fan_in, fan_out))


def polar_growth(scale: Scale) -> Growth:
    """For an orthogonal matrix times its scale (Muon): the scale."""
    return lambda fan_in, fan_out: shape_factor(scale, fan_in, fan_out)


def roots_growth(exponents: tuple[float, float], size: int | None, bound: float) -> Growth:
    r"""For Shampoo without a graft: :math:`(in / out)^{1/2 - E} (n_{in} n_{out})^E`.

    Args:
      exponents: the exponents of both factors, positive; :math:`E` is the sum of those in use.
      size: the size of blocks; there are :math:`n_{in} n_{out}` of them; None for one block.
      bound: axes longer than this have no factor.
    """

    def growth(fan_in: int, fan_out: int) -> float:
        sides = zip((fan_in, fan_out), exponents, strict=True)
        exponent = sum(e for side, e in sides if side <= bound)
        blocks = count(fan_in, size, bound) * count(fan_out, size, bound)
        return gradient_growth(fan_in, fan_out) ** (1 - 2 * exponent) * blocks**exponent

    return growth


def rows_growth(fan_in: int, fan_out: int) -> float:
    r"""For an orthogonal matrix with single rows as inputs (embeddings), of RMS :math:`\max^{-1/2}`."""
    return math.sqrt(fan_out / fan_in / max(fan_in, fan_out))


def eigenbasis_growth(rank: Rank, size: int | None, bound: float) -> Growth:
    r"""For SOAP.

    ``"low"``: in both eigenbases the gradient has few elements, and Adam scales each to one:
    :math:`\sqrt{n_{in} n_{out}}` for that number of blocks; with a basis on one side only, the whole
    other side takes the place of its blocks. ``"full"``: every element has size one, without structure,
    :math:`\sqrt{in} + \sqrt{out}`.
    """

    def growth(fan_in: int, fan_out: int) -> float:
        if rank == "full":
            return math.sqrt(fan_in) + math.sqrt(fan_out)
        parts = [count(n, size, bound) if n <= bound else n for n in (fan_in, fan_out)]
        return math.sqrt(math.prod(parts))

    return growth


def divergence_growth(fan_in: int, fan_out: int) -> float:
    r"""For KL-Shampoo: :math:`(in \cdot out)^{1/4}`, in both limits for square matrices.

    Its factors are means: along the one direction of a gradient of rank one, with singular value s,
    :math:`\lambda_{in} \lambda_{out} \approx s^2 / \sqrt{in \cdot out}`. Where noise fills the matrix,
    elements have size one, and the largest singular value is :math:`\sqrt{in} + \sqrt{out}`.
    """
    return (fan_in * fan_out) ** 0.25


def count(side: int, size: int | None, bound: float) -> int:
    """The number of blocks along an axis.

    Example:
      >>> from ravine.optimizers.links.growth import count
      >>> count(1024, 256, float("inf"))
      4
    """
    return 1 if size is None or side > bound else max(1, -(-side // size))

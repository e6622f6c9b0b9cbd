r"""How the spectral norm of an update grows with the shape of its matrix, direction by direction.

An update of a matrix `[in, out]` changes the activations behind it by as much at every width if its
spectral norm is proportional to :math:`\sqrt{out / in}`, which is the spectral condition. So the
learning rate of a direction whose spectral norm grows like :math:`\sigma(in, out)` is proportional to
:math:`\sqrt{out / in} / \sigma`. Two limits say what :math:`\sigma` is:

``"low"``
    gradients of a rank that the width does not change: singular values lie far apart, and the step of
    a sign or of Adam has one as large as the whole matrix. The limit of infinite width.
``"full"``
    noise fills the matrix, and what is whitened has singular values of one size. Many more tokens per
    batch than the matrix is wide.

Source: Yang, Simon and Bernstein, 2023, https://arxiv.org/abs/2310.17813 (the condition; SGD, Adam);
Qiu et al., 2025, https://arxiv.org/abs/2512.05620, and its code (charliezchen/
scaling-matrix-preconditioning, ``train.py::assign_lr``), for Adam, SGD, Muon, Shampoo, grafts, SOAP and
blocks in the limit ``"low"``. Those of ``"full"`` and of KL-Shampoo are derived here.
"""

import math
from collections.abc import Callable
from typing import Literal

from .matrix_scale import Scale, shape_factor

Rank = Literal["low", "full"]
Growth = Callable[[int, int], float]
"""From the rows (in) and columns (out) of a matrix to its update's spectral norm, up to a constant."""


def gradient_growth(fan_in: int, fan_out: int) -> float:
    r"""Of the gradient itself (SGD): :math:`\sqrt{in / out}`.

    Inputs have norm :math:`\sqrt{in}`, and what comes back from the loss :math:`1 / \sqrt{out}`.
    """
    return math.sqrt(fan_in / fan_out)


def element_growth(fan_in: int, fan_out: int) -> float:
    r"""Of steps with elements of size one, in line with inputs: :math:`\sqrt{in \cdot out}`.

    Adam and its kin, signs.
    """
    return math.sqrt(fan_in * fan_out)


def norm_growth(rank: Rank) -> Growth:
    r"""Of a whitened direction with the Frobenius norm of Adam's step, as a graft gives it.

    ``"low"``: one singular value has it all, :math:`\sqrt{in \cdot out}`. ``"full"``: as many as the
    shorter side share it, :math:`\sqrt{\max(in, out)}`.
    """
    if rank == "low":
        return element_growth
    return lambda fan_in, fan_out: math.sqrt(max(fan_in, fan_out))


def polar_growth(scale: Scale) -> Growth:
    """Of an orthogonal matrix times its scale (Muon): the scale."""
    return lambda fan_in, fan_out: shape_factor(scale, fan_in, fan_out)


def roots_growth(exponents: tuple[float, float], size: int | None, bound: float) -> Growth:
    r"""Of Shampoo without a graft: :math:`(in / out)^{1/2 - E} (n_{in} n_{out})^E`.

    Args:
      exponents: of both factors, positive; :math:`E` is the sum of those in use.
      size: of blocks, of which there are :math:`n_{in} n_{out}`; None for one.
      bound: axes longer than this have no factor.
    """

    def growth(fan_in: int, fan_out: int) -> float:
        sides = zip((fan_in, fan_out), exponents, strict=True)
        exponent = sum(e for side, e in sides if side <= bound)
        blocks = count(fan_in, size, bound) * count(fan_out, size, bound)
        return gradient_growth(fan_in, fan_out) ** (1 - 2 * exponent) * blocks**exponent

    return growth


def rows_growth(fan_in: int, fan_out: int) -> float:
    r"""Of an orthogonal matrix whose inputs are single rows (embeddings), of RMS :math:`\max^{-1/2}`."""
    return math.sqrt(fan_out / fan_in / max(fan_in, fan_out))


def eigenbasis_growth(rank: Rank, size: int | None, bound: float) -> Growth:
    r"""Of SOAP.

    ``"low"``: in both eigenbases the gradient has few elements, and Adam makes each one:
    :math:`\sqrt{n_{in} n_{out}}` for so many blocks; with a basis on one side only, those and the other
    side, all of it. ``"full"``: every element is one in size, without order among them,
    :math:`\sqrt{in} + \sqrt{out}`.
    """

    def growth(fan_in: int, fan_out: int) -> float:
        if rank == "full":
            return math.sqrt(fan_in) + math.sqrt(fan_out)
        parts = [count(n, size, bound) if n <= bound else n for n in (fan_in, fan_out)]
        return math.sqrt(math.prod(parts))

    return growth


def divergence_growth(fan_in: int, fan_out: int) -> float:
    r"""Of KL-Shampoo: :math:`(in \cdot out)^{1/4}`, in both limits for square matrices.

    Its factors are means: along the one direction of a gradient of rank one, with singular value s,
    :math:`\lambda_{in} \lambda_{out} \approx s^2 / \sqrt{in \cdot out}`. Where noise fills the matrix,
    elements have size one, and singular values :math:`\sqrt{in} + \sqrt{out}`.
    """
    return (fan_in * fan_out) ** 0.25


def count(side: int, size: int | None, bound: float) -> int:
    """Blocks along an axis.

    Example:
      >>> from ravine.optimizers.links.growth import count
      >>> count(1024, 256, float("inf"))
      4
    """
    return 1 if size is None or side > bound else max(1, -(-side // size))

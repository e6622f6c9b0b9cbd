r"""Coefficients of Newton–Schulz iterations, and the test that they must pass.

One step maps every singular value of a matrix by an odd polynomial,
:math:`\sigma \mapsto a\sigma + b\sigma^3 + c\sigma^5`, and a set of steps by their composition. A set
is usable only if the composition stays positive and bounded on (0, 1]: where it turns negative, the
update changes sign along the strongest directions. Some published tables do exactly that when truncated
or cycled, so the check belongs to the table and runs whenever a table is used.
"""

import functools
import math

import numpy as np

Step = tuple[float, float, float]
Steps = tuple[Step, ...]

KELLER: Step = (3.4445, -4.7750, 2.0315)
"""Keller Jordan's quintic, the same in every step. https://kellerjordan.github.io/posts/muon/"""

QUINTIC: Steps = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""YouJiacheng's five steps, tuned one by one. microsoft/dion, ``newton_schulz_triton.py``."""

CUBIC: Steps = (
    (3.3656576, -3.3420992, 0.0),
    (2.5744352, -1.4957376, 0.0),
    (2.5368962, -1.4312570, 0.0),
    (2.4418906, -1.2764040, 0.0),
    (2.2230472, -0.9630650, 0.0),
)
"""Five cubic steps, two products each. https://arxiv.org/abs/2606.00371"""

PRESETS = ("keller", "quintic", "polar_express", "cubic")


def _best_quintic(lower: float, upper: float) -> Step:
    """The odd quintic closest to 1 on [lower, upper] in the maximum norm, by Remez's exchange."""
    if lower / upper >= 1 - 5e-6:
        return (15 / 8 / upper, -10 / 8 / upper**3, 3 / 8 / upper**5)
    inner = np.array([(3 * lower + upper) / 4, (lower + 3 * upper) / 4])
    error = math.inf
    while True:
        points = np.array([lower, inner[0], inner[1], upper])
        signs = np.array([1.0, -1.0, 1.0, -1.0])
        system = np.stack([points, points**3, points**5, signs], axis=1)
        a, b, c, new_error = np.linalg.solve(system, np.ones(4))
        if abs(error - new_error) <= 1e-15:
            return (float(a), float(b), float(c))
        error = new_error
        # The stationary points of the polynomial are the next inner points of the exchange.
        spread = math.sqrt(9 * b * b - 20 * a * c)
        inner = np.sqrt((-3 * b + np.array([-1.0, 1.0]) * spread) / (10 * c))


@functools.cache
def polar_express(
    steps: int = 5,
    lower: float = 1e-3,
    *,
    safety: float = 1e-2,
    cushion: float = 0.02407327424182761,
) -> Steps:
    r"""The optimal composition of quintics for singular values in [`lower`, 1].

    Each step is the best approximation of 1 on the interval into which the previous steps map the
    singular values; `cushion` keeps that interval from being so wide that the approximation dips near
    zero inside, and `safety` divides the arguments of all steps but the last by :math:`1 + s`, so that
    rounding above 1 does not diverge.

    Args:
      steps: how many, at least 1.
      lower: :math:`\ell` in (0, 1), the smallest singular value that must come near 1.
      safety: :math:`s`, not negative.
      cushion: relative lower end of each interval, in (0, 1).

    Returns:
      The coefficients of every step.

    Raises:
      ValueError: for arguments out of range.

    Source: Amsel et al., 2025, https://arxiv.org/abs/2505.16932, algorithm 1 and appendix.

    Example:
      >>> from ravine.optimizers.matrix.algebra.coefficients import polar_express
      >>> [round(x, 3) for x in polar_express()[0]]
      [8.205, -22.902, 16.461]
    """
    if steps < 1 or not 0 < lower < 1 or safety < 0 or not 0 < cushion < 1:
        raise ValueError(
            "polar_express needs steps >= 1, lower and cushion in (0, 1) and safety >= 0, got "
            f"steps={steps}, lower={lower}, cushion={cushion}, safety={safety}."
        )
    low, high, table = lower, 1.0, []
    for _ in range(steps):
        a, b, c = _best_quintic(max(low, cushion * high), high)
        # A cushioned polynomial is centred on the cushioned interval: centre it on the true one.
        at_low, at_high = (a * x + b * x**3 + c * x**5 for x in (low, high))
        centre = 2 / (at_low + at_high)
        a, b, c = centre * a, centre * b, centre * c
        table.append((a, b, c))
        low = a * low + b * low**3 + c * low**5
        high = 2 - low
    guard = 1 + safety
    safe = [(a / guard, b / guard**3, c / guard**5) for a, b, c in table[:-1]]
    return (*safe, table[-1])


def scalar_map(coefficients: Steps, sigma: np.ndarray) -> np.ndarray:
    """The map of the steps on singular values, in float64."""
    sigma = np.asarray(sigma, np.float64)
    for a, b, c in coefficients:
        sigma = sigma * (a + sigma**2 * (b + sigma**2 * c))
    return sigma


def check_coefficients(coefficients: Steps, name: str = "coefficients") -> Steps:
    """`coefficients` as floats, or a `ValueError` if their map leaves (0, 1.5] on (0, 1]."""
    table = tuple((float(a), float(b), float(c)) for a, b, c in coefficients)
    if not table:
        raise ValueError(f"{name} needs at least one step.")
    # Denser towards 1, where the steepest polynomials turn.
    grid = np.concatenate([np.geomspace(1e-8, 1e-2, 2000), np.linspace(1e-2, 1.0, 20001)])
    values = scalar_map(table, grid)
    if not (np.all(np.isfinite(values)) and values.min() > 0 and values.max() <= 1.5):
        worst = grid[np.argmin(np.where(np.isfinite(values), values, -np.inf))]
        if np.all(np.isfinite(values)) and values.min() > 0:
            worst = grid[np.argmax(values)]
        raise ValueError(
            f"{name} with {len(table)} steps maps the singular value {worst:.3g} to "
            f"{scalar_map(table, worst):.3g}, outside (0, 1.5]; take another number of steps."
        )
    return table


@functools.cache
def named_coefficients(preset: str, steps: int, lower: float = 1e-3) -> Steps:
    """The steps of a preset, if it allows that number of steps.

    ====================  ===================================================================
    preset                steps
    ====================  ===================================================================
    ``keller``            any number: one polynomial, repeated
    ``quintic``           5, as tuned
    ``polar_express``     generated for `lower`; with 1e-3, 5 or more
    ``cubic``             5, as tuned
    ====================  ===================================================================

    Args:
      preset: one of `PRESETS`.
      steps: how many.
      lower: for ``polar_express``, the smallest singular value that must come near 1.

    Raises:
      ValueError: for an unknown preset or a number of steps it does not allow.

    Example:
      >>> from ravine.optimizers.matrix.algebra.coefficients import named_coefficients
      >>> len(named_coefficients("keller", 6))
      6
      >>> named_coefficients("quintic", 6)
      Traceback (most recent call last):
      ...
      ValueError: the preset 'quintic' is tuned for 5 steps, got 6; use 5, 'keller' or 'polar_express'.
    """
    if preset == "polar_express":
        return check_coefficients(polar_express(steps, lower), f"polar_express(lower={lower})")
    if preset == "keller":
        if steps < 1:
            raise ValueError(f"the preset 'keller' needs at least 1 step, got {steps}.")
        return check_coefficients((KELLER,) * steps, "keller")
    if preset in ("quintic", "cubic"):
        table = QUINTIC if preset == "quintic" else CUBIC
        if steps != len(table):
            raise ValueError(
                f"the preset {preset!r} is tuned for {len(table)} steps, got {steps}; use "
                f"{len(table)}, 'keller' or 'polar_express'."
            )
        return check_coefficients(table, preset)
    raise ValueError(f"unknown coefficients {preset!r}; known: {', '.join(PRESETS)}.")

"""Schedules for people: a figure, and one line of words."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
import optax

from ..core.arguments import checked
from ..core.checks import check_whole
from ._checks import check_length
from ._schedule import boundaries_of, evaluate, value_at, words_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_BOUNDARIES = 6


@checked
def describe(schedule: optax.Schedule) -> str:
    """What a schedule does, in one line: its phases, and its values where they begin and end.

    Where the value jumps, the value at the count before, which ends a phase, is shown too.

    Args:
      schedule: any schedule; one from another library is described by its name only.

    Example:
      >>> import ravine
      >>> from ravine.schedules import cosine, describe, warmup
      >>> describe(warmup(cosine(1e-3, 900, 0.1), 100))
      'linear warm-up, then cosine: 1e-05 at 0, 0.001 at 99, 0.001 at 100, 0.0001 at 1000'
    """
    marks = boundaries_of(schedule)
    shown = marks if len(marks) <= MOST_BOUNDARIES else (*marks[: MOST_BOUNDARIES - 1], marks[-1])
    counts = sorted({*shown, *(mark - 1 for mark in shown if _jumps_at(schedule, mark))})
    parts = [f"{value_at(schedule, count):.4g} at {count}" for count in counts]
    if len(shown) < len(marks):
        parts.insert(-1, "...")
    return f"{words_of(schedule)}: {', '.join(parts)}"


def _jumps_at(schedule: optax.Schedule, mark: int) -> bool:
    """Whether the value changes by far more into this count than just before and after."""
    if mark < 1:
        return False
    values = [value_at(schedule, max(mark + offset, 0)) for offset in (-2, -1, 0, 1)]
    before, jump, after = (abs(b - a) for a, b in itertools.pairwise(values))
    return jump > 3 * max(before, after)


@checked
def plot(*schedules: optax.Schedule, steps: int, labels: Sequence[str] | None = None) -> "Figure":
    """A figure of schedules over a run.

    Args:
      schedules: at least one.
      steps: the length of the run; values from count 0 to this one are drawn, at most 2,000.
      labels: one for each; by default what :func:`describe` says in words.

    Returns:
      A matplotlib figure, which a notebook shows and ``figure.savefig`` writes.

    Raises:
      ValueError: if there is no schedule or step, or not as many labels.

    Example:
      >>> import ravine
      >>> from ravine.schedules import cosine, linear, plot
      >>> figure = plot(cosine(1e-3, 100), linear(1e-3, 100), steps=100)
      >>> [line.get_label() for line in figure.axes[0].lines]
      ['cosine', 'linear']
    """
    from matplotlib.figure import Figure  # an optional dependency: schedules do not need figures

    check_whole(1, steps=steps)
    if not schedules:
        raise ValueError("nothing to plot; give at least one schedule.")
    names = list(labels) if labels is not None else [words_of(schedule) for schedule in schedules]
    check_length("labels", names, len(schedules), "one for each schedule")
    counts = np.unique(np.linspace(0, steps, 2001).astype(np.int32))
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for schedule, name in zip(schedules, names, strict=True):
        axes.plot(counts, np.asarray(evaluate(schedule, jnp.asarray(counts))), label=name)
    axes.set(xlabel="updates made", ylabel="value", xlim=(0, steps))
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure

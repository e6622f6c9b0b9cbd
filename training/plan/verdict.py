"""Whether a plan fits a chip, by how much, and if not, the first change that makes it fit."""

import dataclasses
import math

from .by_hand import Work
from .chips import Chip
from .cost import STAGED, Plan


def spare(plan: Plan, chip: Chip) -> float:
    """Bytes left of a chip's memory; negative where there are too few."""
    return chip.memory - plan.memory


def verdict(plan: Plan, chip: Chip, work: Work | None = None) -> str:
    """In words: fits, by how much, or what to change.

    Example:
      >>> from ravine.training.plan.chips import CHIPS
      >>> from ravine.training.plan.cost import Plan
      >>> from ravine.training.plan.verdict import verdict
      >>> verdict(Plan("adamw", parameters=4 * 10**9, state=8 * 10**9), CHIPS["v5e"])
      'fits in 16 GB with 4.00 GB to spare'
      >>> verdict(Plan("adamw", parameters=9 * 10**9, state=18 * 10**9), CHIPS["v5e"])
      'does not fit in 16 GB, by 11.00 GB; shard over 2 times as many chips'
    """
    size, left = f"{chip.memory / 1e9:.0f} GB", spare(plan, chip)
    if left >= 0:
        return f"fits in {size} with {readable(left)} to spare"
    return f"does not fit in {size}, by {readable(-left)}; {_change(plan, chip, work)}"


def _change(plan: Plan, chip: Chip, work: Work | None) -> str:
    rows = work.sequences if work else 0
    if work and plan.activations > plan.temporary:
        for count in range(work.micro_batches + 1, rows + 1):
            if rows % count == 0:
                tried = dataclasses.replace(work, micro_batches=count)
                gradients = plan.parameters + round(tried.accumulators(plan.parameters))
                less = dataclasses.replace(
                    plan, activations=sum(tried.activations().values()), gradients=gradients
                )
                if spare(less, chip) >= 0:
                    return f"with --micro-batches {count} it does"
        if not work.fused_loss:
            tried = dataclasses.replace(work, fused_loss=True)
            less = dataclasses.replace(plan, activations=sum(tried.activations().values()))
            if spare(less, chip) >= 0:
                return "with --fused-loss it does"
    temporary = plan.temporary + round(STAGED * plan.state)
    moved = dataclasses.replace(plan, on_host=True, host=plan.state, temporary=temporary)
    if not plan.on_host and spare(moved, chip) >= 0:
        return "with --state-on-host it does"
    return f"shard over {math.ceil(plan.memory / chip.memory)} times as many chips"


def readable(size: float) -> str:
    """Bytes, as ``1.50 GB``.

    Example:
      >>> readable(1.5e9), readable(2e6), readable(3.2e12)
      ('1.50 GB', '2.00 MB', '3.20 TB')
    """
    if abs(size) >= 1e12:
        return f"{size / 1e12:.2f} TB"
    if size == 0:
        return "0"
    return f"{size / 1e9:.2f} GB" if abs(size) >= 1e8 else f"{size / 1e6:.2f} MB"


def thousands(number: float) -> str:
    """Four digits.

    Example:
      >>> thousands(411_400), thousands(12_345_678)
      ('411.4k', '12.35M')
    """
    return f"{number / 1e6:,.4g}M" if number >= 1e6 else f"{number / 1e3:,.4g}k"


def milliseconds(seconds: float) -> str:
    """Three digits.

    Example:
      >>> milliseconds(0.0123), milliseconds(1.5), milliseconds(0), milliseconds(1e-6)
      ('12.3', '1,500', '0', '<0.01')
    """
    value = 1000 * seconds
    if value < 0.01:
        return "<0.01" if value else "0"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

"""The rows of a study of widths: which learning rate of an optimizer is swept."""

import dataclasses
from typing import Any

from ...optimizers.registry import OptimizerConfig
from ..compare.entrants import Entrant, line_up
from ..config import check_learning_rate
from ..words import parse_numbers


@dataclasses.dataclass(frozen=True)
class Line:
    """An optimizer, and the rate of it that is swept: all of it, or that of its matrices."""

    entrant: Entrant
    fallback_rate: float | None = None
    """Peak learning rate that the fallback keeps; None if it is swept too."""

    @property
    def name(self) -> str:
        """As tables and figures show it."""
        kept = "" if self.fallback_rate is None else f", fallback {self.fallback_rate:.3g}"
        return self.entrant.name + kept

    @property
    def told(self) -> dict[str, Any]:
        """What its rows say besides the optimizer's name."""
        return {} if self.fallback_rate is None else {"fallback_rate": self.fallback_rate}

    def kinds(self, control: bool) -> tuple[bool, ...]:
        """Whether the rule is used, in turn; the control has one rate, so none for a fallback apart."""
        return (True, False) if control and self.fallback_rate is None else (True,)

    def at(self, factor: float) -> Entrant:
        """The optimizer at a multiple of its tuned rate.

        Example:
          >>> from ravine.training.compare.entrants import line_up
          >>> from ravine.training.studies.width_lines import Line
          >>> (muon,) = line_up("muon", "muon=0.5")
          >>> tried = Line(muon, fallback_rate=0.5).at(2.0)
          >>> tried.learning_rate, tried.optimizer.value("fallback")
          (1.0, Fallback(ratio=0.5))
        """
        rate, optimizer = self.entrant.learning_rate * factor, self.entrant.optimizer
        if self.fallback_rate is not None:
            given = {
                **dict(optimizer.hyperparameters),
                "fallback": {"ratio": self.fallback_rate / rate},
            }
            optimizer = OptimizerConfig(optimizer.name, given)
        return dataclasses.replace(self.entrant, optimizer=optimizer, learning_rate=rate)


def lines_of(optimizers: str, fallback_rates: str) -> tuple[Line, ...]:
    """A line for each optimizer, and after it one for its matrices alone if its fallback has a rate.

    Args:
      optimizers: names, separated by commas.
      fallback_rates: ``name=value`` pairs, separated by commas.

    Raises:
      ValueError: for unknown names, optimizers without a fallback, and rates that are not positive.
    """
    entrants = {entrant.name: entrant for entrant in line_up(optimizers)}
    rates = parse_numbers(fallback_rates, list(entrants), "optimizer of this study")
    for name, rate in rates.items():
        if not entrants[name].optimizer.accepts("fallback"):
            raise ValueError(
                f"{name} has no fallback: all parameters are its own; leave it out of fallback_rates."
            )
        check_learning_rate(f"{name}'s fallback", rate)
    lines = []
    for name, entrant in entrants.items():
        lines.append(Line(entrant))
        if name in rates:
            lines.append(Line(entrant, rates[name]))
    return tuple(lines)

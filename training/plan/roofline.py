r"""Estimated times of a step: the roofline of what was counted, at the rates that chips reach.

=============  =======================================================================================
update         parameters, gradients and state are read once, parameters and state written once, and each
               product takes the longer of its arithmetic and its operands' way from and to memory
exchanges      the optimizer's collectives, one after the other, by `ravine.training.plan.network`
at times       what a step takes longer that refreshes all roots or bases
model          forward and backward pass, with what is recomputed, by `ravine.training.plan.model_time`
exposed        the model's communication beyond what the model's arithmetic hides
step           update + exchanges + model + exposed
=============  =======================================================================================

Products and attention reach the share of the peak that was measured of them (`plan/chips.py`); memory
and links are taken at their published rates. What a run loses besides is left out: docs/pods.md
compares estimates with public runs.
"""

import dataclasses
from collections.abc import Iterable, Mapping

from .collectives import Collective
from .flops import Product
from .network import Network

ASSUMPTIONS = (
    "Times are estimates: products at {reached:.0%} of the published peak{attention}, memory and links "
    "at their published rates; model {remat}, its communication hidden behind its arithmetic where "
    "that is longer, the optimizer's not hidden; element-wise work fused into one pass over "
    "parameters, gradients and state; decompositions at {decompositions:.0%} of the float32 rate."
)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of a step and of its parts; `model` and `exposed` are 0 where the model was not asked
    for."""

    update: float = 0.0
    exchanges: float = 0.0
    at_times: float = 0.0
    model: float = 0.0
    exposed: float = 0.0
    tokens: int = 0
    """Of a step."""
    useful: float = 0.0
    """Seconds at the peak for the model's operations without what is recomputed."""

    @property
    def optimizer(self) -> float:
        """Seconds of the optimizer in a step that refreshes nothing."""
        return self.update + self.exchanges

    @property
    def step(self) -> float:
        """Seconds of a step that refreshes nothing."""
        return self.optimizer + self.model + self.exposed

    @property
    def share(self) -> float:
        """Of the optimizer in a step."""
        return self.optimizer / self.step if self.step else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Over all chips."""
        return self.tokens / self.step if self.step else 0.0

    @property
    def mfu(self) -> float:
        """Share of the peak that the model's operations take, recomputed ones left out."""
        return self.useful / self.step if self.step else 0.0


def seconds_of(network: Network, products: Mapping[Product, float]) -> float:
    """Of products, each times how often it runs.

    Example:
      >>> from ravine.training.plan.chips import CHIPS
      >>> from ravine.training.plan.flops import Product
      >>> from ravine.training.plan.network import Network
      >>> from ravine.training.plan.roofline import seconds_of
      >>> chip = Network.of(CHIPS["h100"], range(1))
      >>> seconds_of(chip, {Product("bfloat16", 0.8 * 989e9, 1e6): 2.0})  # two of a millisecond
      0.002
    """
    return sum(count * network.chip.seconds(*product) for product, count in products.items())


def sent_in(network: Network, found: Iterable[Collective]) -> float:
    """Seconds of collectives, one after the other."""
    return sum(c.times * network.seconds(c) for c in found)


def passed_over(network: Network, parameters: int, gradients: int, state: int) -> float:
    """Seconds of one pass over what an update reads and writes."""
    return (2 * parameters + gradients + 2 * state) / network.chip.bandwidth

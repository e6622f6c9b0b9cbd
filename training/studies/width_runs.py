"""The runs of a study of widths: by the rules for width, and with one rate for all parameters."""

import dataclasses
import functools
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import optax
from rich.console import Console

from ...optimizers.links.growth import Rank
from ...optimizers.registry import OptimizerConfig
from ...optimizers.roles import RAVINE_RULES, decide, mask_by_role
from ...optimizers.width import scale_by_width, width_rule
from ..compare.entrants import DECAYED, Entrant
from ..compare.kept import Kept
from ..compare.runs import Runs
from ..data.corpus import Corpus
from ..model_config import ModelConfig
from ..step import init_params
from ..width.coordinates import at_width
from .width_config import WidthStudyConfig
from .width_lines import Line


class WidthRuns:
    """Held-out losses at widths and learning rates.

    Args:
      config: of the study.
      corpus: the text.
      kept: where losses are kept.
      console: told of every run made.
    """

    def __init__(self, config: WidthStudyConfig, corpus: Corpus, kept: Kept, console: Console):
        self._config, self._corpus = config, corpus
        self._kept, self._console = kept, console
        self._until = time.monotonic() + 60 * config.minutes if config.minutes else math.inf

    def losses(self, line: Line, ruled: bool, width: int, factor: float) -> list[float]:
        """At the end of a schedule, one per seed; infinite where a run diverged.

        Raises:
          Late: if one would have to be made after the time for that.
        """
        # With a fallback apart, decay is to be independent of both rates at the first width too.
        apart = line.fallback_rate is not None
        runs = self._runs(width, apart or (ruled and width > self._config.widths[0]))
        tried, length = line.at(factor), self._config.length
        return [runs.loss(tried, seed, length, **line.told) for seed in range(self._config.seeds)]

    @functools.lru_cache(2)  # noqa: B019 - as long-lived as its command
    def _runs(self, width: int, scaled: bool) -> Runs:
        config = self._config
        base, model = (self._model(w) for w in (config.widths[0], width))
        more: dict[str, Any] = {}
        if scaled:
            more["update"] = _Scaled(base, config.rank)
            more["decides"] = lambda entrant: _factors(entrant, model, base, config.rank)
        run = dataclasses.replace(config.run, model=model)
        return Runs(run, self._corpus, self._kept, self._console, until=self._until, **more)

    def _model(self, width: int) -> ModelConfig:
        base = dataclasses.replace(self._config.run.model, vocabulary=self._corpus.vocabulary)
        return at_width(at_width(base, self._config.widths[0]), width)


@dataclasses.dataclass(frozen=True)
class _Scaled:
    """Updates multiplied by a rule for width, with a decay that is not."""

    base: ModelConfig
    rank: Rank | None

    def __call__(
        self, optimizer: OptimizerConfig, rate: Any, numbers: Mapping[str, Any], decay: Any
    ) -> optax.GradientTransformation:
        decays = optimizer.accepts("weight_decay")
        more = {"weight_decay": 0.0} if decays else {}
        base = jax.eval_shape(lambda: init_params(self.base, 0)[1])
        links = [
            optimizer.build(rate, **numbers, **more),
            scale_by_width(width_rule(optimizer, rank=self.rank), base, rules=RAVINE_RULES),
        ]
        if decays:
            links.append(optax.add_decayed_weights(-decay * rate, mask_by_role(DECAYED)))
        return optax.chain(*links)


def _factors(
    entrant: Entrant, model: ModelConfig, base: ModelConfig, rank: Rank | None
) -> list[float]:
    """What the rule multiplies rates by, so that another rule asks for runs of its own."""
    new, old = (jax.eval_shape(lambda m=m: init_params(m, 0)[1]) for m in (model, base))
    rule = width_rule(entrant.optimizer, rank=rank)
    shapes = [leaf.shape for leaf in jax.tree.leaves(old)]
    pairs = zip(decide(new, RAVINE_RULES), shapes, strict=True)
    return [round(rule.factor(found, shape), 6) for found, shape in pairs]

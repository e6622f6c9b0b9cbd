"""The runs of a study of widths: by the rules for width, and with one rate for all parameters."""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Mapping
from typing import Any, Self

import jax
import optax
from rich.console import Console

from ...optimizers.links.growth import Rank
from ...optimizers.registry import OptimizerConfig
from ...optimizers.roles import RAVINE_RULES, decide, mask_by_role
from ...optimizers.width import scale_by_width, width_rule
from ..compare.entrants import DECAYED, Entrant
from ..compare.kept import Kept, digest
from ..compare.space import Point
from ..compare.trial import Trials
from ..config import RunConfig
from ..data.corpus import Corpus, load_corpus
from ..identity import to_json
from ..model import ModelConfig
from ..run import interrupts
from ..step import init_params
from ..width.coordinates import at_width
from .optimum import Late
from .width_config import WidthStudyConfig


class _Scaled(Trials):
    """Trials whose updates are multiplied by a rule for width, with a decay that is not."""

    def __init__(self, run: RunConfig, corpus: Corpus, base: ModelConfig, rank: Rank | None):
        super().__init__(run, corpus)
        self._base = jax.eval_shape(lambda: init_params(base, run.seed)[1])
        self._rank: Rank | None = rank

    def _update(
        self, rest: OptimizerConfig, rate: Any, numbers: Mapping[str, Any], decay: Any
    ) -> optax.GradientTransformation:
        more = {"weight_decay": 0.0} if rest.accepts("weight_decay") else {}
        rule = width_rule(rest, rank=self._rank)
        return optax.chain(
            rest.build(rate, **numbers, **more),
            scale_by_width(rule, self._base, rules=RAVINE_RULES),
            optax.add_decayed_weights(-decay * rate, mask_by_role(DECAYED)),
        )


class WidthRuns:
    """Held-out losses at widths and learning rates; a context.

    Args:
      config: of the study.
      console: told of every run made.

    Raises:
      ValueError: for a text or a file of runs that cannot be used.
    """

    def __init__(self, config: WidthStudyConfig, console: Console):
        self._config, self._console = config, console
        self._end = time.monotonic() + 60 * config.minutes if config.minutes else math.inf
        self._corpus = load_corpus(config.run.data)
        told = to_json(dataclasses.replace(config.run, data=()))
        self._task = digest([told, self._corpus.fingerprint, config.length, config.widths[0]])
        self._kept = Kept(config.out / "runs.jsonl", text=self._corpus.description)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._kept.__exit__()

    def losses(self, entrant: Entrant, ruled: bool, width: int, factor: float) -> list[float]:
        """Held-out, at the end, one per seed; infinite where a run diverged.

        Raises:
          Late: if one would have to be made.
        """
        seeds = range(self._config.seeds)
        return [self._loss(entrant, ruled, width, factor, repeat) for repeat in seeds]

    def _loss(self, entrant: Entrant, ruled: bool, width: int, factor: float, repeat: int) -> float:
        interrupts.check()
        config, scaled = self._config, ruled and width > self._config.widths[0]
        hyperparameters = json.loads(entrant.optimizer.to_json())["hyperparameters"]
        rule = self._factors(entrant, width) if scaled else None
        decides = [
            hyperparameters,
            entrant.learning_rate,
            entrant.weight_decay,
            entrant.warmup,
            rule,
        ]
        key = (self._task, entrant.name, digest(decides), width, round(factor, 4), repeat)
        if key not in self._kept:
            if time.monotonic() > self._end:
                raise Late
            warmup = 0.1 if entrant.warmup is None else entrant.warmup
            rate = entrant.learning_rate * factor
            point = Point(rate, entrant.weight_decay, warmup, entrant.optimizer)
            loss = self._trials(width, scaled, repeat).loss(point, config.length)
            row = {"optimizer": entrant.name, "rule": scaled, "width": width}
            row |= {"learning_rate": rate, "factor": factor, "seed": config.run.seed + repeat}
            self._kept.add(key, loss, **row, steps=config.length)
            name = f"{entrant.name}, {'by the rule' if scaled else 'one rate'}"
            self._console.print(
                f"{name:<22} {width:>5} wide, rate x {factor:<6.3g} seed {repeat}: {loss:.4f} nats",
                highlight=False,
            )
        return self._kept[key]

    def _model(self, width: int) -> ModelConfig:
        base = dataclasses.replace(self._config.run.model, vocabulary=self._corpus.vocabulary)
        return at_width(at_width(base, self._config.widths[0]), width)

    def _factors(self, entrant: Entrant, width: int) -> list[float]:
        """What the rule multiplies rates by, so that another rule asks for runs of its own."""
        new, old = (
            jax.eval_shape(lambda w=w: init_params(self._model(w), 0)[1])
            for w in (width, self._config.widths[0])
        )
        rule = width_rule(entrant.optimizer, rank=self._config.rank)
        shapes = [leaf.shape for leaf in jax.tree.leaves(old)]
        pairs = zip(decide(new, RAVINE_RULES), shapes, strict=True)
        return [round(rule.factor(found, shape), 6) for found, shape in pairs]

    @functools.lru_cache(4)  # noqa: B019 - as long-lived as its command
    def _trials(self, width: int, scaled: bool, repeat: int) -> Trials:
        seed = self._config.run.seed + repeat
        run = dataclasses.replace(self._config.run, seed=seed, model=self._model(width))
        if not scaled:
            return Trials(run, self._corpus)
        return _Scaled(run, self._corpus, self._model(self._config.widths[0]), self._config.rank)

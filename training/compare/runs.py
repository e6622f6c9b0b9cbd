"""Whole runs whose losses are kept in a file: what was measured once is read, not run again."""

import contextlib
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from ..config import RunConfig
from ..data.bpe import corpus_of
from ..data.corpus import Corpus
from ..identity import to_json
from ..run import interrupts
from .entrants import Entrant
from .kept import Kept, digest
from .space import Point
from .trial import UNTOLD, Trials, Update, decayed


class Late(Exception):
    """A run would have to be made, after the time for that is over."""


class Runs:
    """Held-out losses at the end of schedules.

    Args:
      run: model, batch and first seed.
      corpus: the text.
      kept: where losses are kept.
      console: told of every run made.
      update: makes optimizers, see `Trials`.
      decides: JSON values that decide an entrant's runs besides its own, in their keys.
      until: the time, as ``time.monotonic()``, after which no run begins.
    """

    def __init__(
        self,
        run: RunConfig,
        corpus: Corpus,
        kept: Kept,
        console: Console,
        *,
        update: Update = decayed,
        decides: Callable[[Entrant], list[Any]] = lambda entrant: [],
        until: float = math.inf,
    ):
        model = dataclasses.replace(run.model, vocabulary=corpus.vocabulary)
        self._run, self._corpus = dataclasses.replace(run, model=model), corpus
        self._kept, self._console, self._until = kept, console, until
        self._update, self._decides = update, decides
        fields = to_json(dataclasses.replace(self._run, **UNTOLD))
        self._task = digest([fields, corpus.fingerprint])

    def loss(self, entrant: Entrant, repeat: int, steps: int, **told: float) -> float:
        """Of an entrant, with the seed so far behind the first; infinite if it diverged.

        Args:
          entrant: which.
          repeat: how far its seed is behind the first.
          steps: of its schedule.
          told: numbers that its line says too, such as another learning rate of the entrant.

        Raises:
          Late: if it would have to be made after the time for that.
        """
        interrupts.check()
        decided = [
            entrant.optimizer.to_json(),
            entrant.learning_rate,
            entrant.weight_decay,
            entrant.warmup,
            *self._decides(entrant),
        ]
        key = (self._task, entrant.name, repeat, steps, digest(decided))
        if key not in self._kept:
            if time.monotonic() > self._until:
                raise Late
            warmup = 0.1 if entrant.warmup is None else entrant.warmup
            point = Point(entrant.learning_rate, entrant.weight_decay, warmup, entrant.optimizer)
            loss = self._trials(repeat).loss(point, steps)
            width = self._run.model.width
            row = {"optimizer": entrant.name, "width": width, "steps": steps}
            row |= {"learning_rate": entrant.learning_rate, "seed": self._run.seed + repeat} | told
            self._kept.add(key, loss, **row)
            what = f"{entrant.name:<12} {width:>4} wide, rate {entrant.learning_rate:<8.3g}"
            what += "".join(
                f", {name.replace('_', ' ')} {value:.3g}," for name, value in told.items()
            )
            self._console.print(f"{what} {steps:>6} steps: {loss:.4f} nats", highlight=False)
        return self._kept[key]

    @functools.cache  # noqa: B019 - as long-lived as its command
    def _trials(self, repeat: int) -> Trials:
        if repeat:
            return self._trials(0).with_seed(self._run.seed + repeat)
        return Trials(self._run, self._corpus, self._update)


@contextlib.contextmanager
def kept_losses(run: RunConfig, out: Path) -> Iterator[tuple[Corpus, Kept]]:
    """The text for races, and the losses in a file.

    Raises:
      ValueError: for a text or a file that cannot be used.
    """
    corpus = corpus_of(run).for_races()
    with Kept(out, text=corpus.description, command=" ".join(sys.argv[1:])) as kept:
        yield corpus, kept

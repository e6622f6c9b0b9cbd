"""Whole runs whose losses are kept in a file: what was measured once is read, not run again."""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any, Self

from rich.console import Console

from ..config import RunConfig
from ..data.bpe import corpus_of
from ..identity import to_json
from ..run import interrupts
from .entrants import Entrant
from .kept import Kept, digest
from .space import Point
from .trial import Trials


class Runs:
    """Held-out losses at the end of schedules, on the text for races; a context.

    Args:
      run: model, text, batch and first seed.
      out: strict JSON lines, a run each; a damaged line is refused by its number.
      console: told of every run made.

    Raises:
      ValueError: for a text or a file of runs that cannot be used.
    """

    def __init__(self, run: RunConfig, out: Path, console: Console):
        self._corpus = corpus_of(run).for_races()
        model = dataclasses.replace(run.model, vocabulary=self._corpus.vocabulary)
        self._run, self._console = dataclasses.replace(run, model=model), console
        fields = to_json(dataclasses.replace(self._run, data=()))
        self._task = digest([fields, self._corpus.fingerprint])
        words = " ".join(sys.argv[1:])
        self._kept = Kept(out, text=self._corpus.description, command=words)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._kept.__exit__()

    def loss(self, entrant: Entrant, repeat: int, steps: int) -> float:
        """Of an entrant, with the seed so far behind the first; infinite if it diverged."""
        interrupts.check()
        told = [
            entrant.optimizer.to_json(),
            entrant.learning_rate,
            entrant.weight_decay,
            entrant.warmup,
        ]
        key = (self._task, entrant.name, repeat, steps, digest(told))
        if key not in self._kept:
            warmup = 0.1 if entrant.warmup is None else entrant.warmup
            point = Point(entrant.learning_rate, entrant.weight_decay, warmup, entrant.optimizer)
            loss = self._trials(repeat).loss(point, steps)
            self._kept.add(key, loss)
            what = f"{entrant.name:<12} rate {entrant.learning_rate:<8.3g}"
            self._console.print(f"{what} {steps:>6} steps: {loss:.4f} nats")
        return self._kept[key]

    @functools.cache  # noqa: B019 - as long-lived as its command
    def _trials(self, repeat: int) -> Trials:
        seeded = dataclasses.replace(self._run, seed=self._run.seed + repeat)
        return Trials(seeded, self._corpus)

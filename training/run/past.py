"""What a run has behind it: what decided it, and what must be the same where it goes on."""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from ..batch_schedule import CONSTANT, rule_of
from ..config import RunConfig
from ..data.corpus import Corpus
from ..identity import to_json
from ..metrics import Rates
from .outcome import Outcome


def rates_of(run: RunConfig, outcome: Outcome) -> Rates:
    """The learning rates of all updates."""
    schedule = run.learning_rate(outcome.learning_rate, rule_of(outcome.name))
    return Rates(schedule, run.updates)


def identity_of(run: RunConfig, outcome: Outcome, corpus: Corpus) -> dict[str, Any]:
    """What a checkpoint must agree with, as JSON values."""
    return {
        "optimizer": outcome.name,
        "hyperparameters": outcome.hyperparameters,
        "learning_rate": outcome.learning_rate,
        "run": to_json(run, resumed=True),
        "text": corpus.fingerprint,  # a position in the data means nothing in another text
    }


def past_of(run: RunConfig, rates: Rates) -> Callable[[int], dict[str, Any]]:
    """From a step to what of the configuration has decided the updates before it."""

    def past(step: int) -> dict[str, Any]:
        found = {"learning rates before": _digest(rates.before(step))}
        if run.batches == CONSTANT:
            return found
        phases = np.asarray(run.batch_sizes.phases(step), np.int64).reshape(-1, 2)
        sizes = np.repeat(*phases.T)
        if (sizes != run.batch_size).any():
            found["batch sizes before"] = _digest(sizes)
        return found

    return past


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()[:16]

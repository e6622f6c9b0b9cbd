"""Roll-back: after a spike that stays, return to before it and go on with later data.

The policy of PaLM, which met about twenty spikes: restart some hundred steps before the spike and
leave out the batches around it; the same batches did no harm from another state. Single bad steps
are better left to `ravine.stability.skip_step`, which needs no host.
"""

import collections
import dataclasses
import math
import statistics
from typing import Any

import jax
import jax.numpy as jnp

from .words import parse_numbers


@dataclasses.dataclass(frozen=True)
class RollbackPolicy:
    """When to return, and where to."""

    every: int = 100
    """Updates between two snapshots."""
    keep: int = 3
    """Snapshots held, each a copy of parameters and optimizer state where they lie."""
    margin: int = 50
    """Updates that a snapshot must be older than the first bad one."""
    deviations: float = 6.0
    """A loss is bad if it is this many standard deviations above the window's mean, or not finite."""
    window: int = 128
    """Good losses that a loss is compared with; at least half as many must be there."""
    patience: int = 5
    """Bad losses in a row before the run returns; one that is not finite does at once."""
    skip_batches: int = 100
    """Batches left out after a return, beyond those that had been seen."""
    limit: int = 20
    """Returns before the run is given up."""

    @classmethod
    def parse(cls, text: str) -> "RollbackPolicy":
        """The policy in words: ``every=50, margin=20``, or ``default``.

        Raises:
          ValueError: for other names, or values out of range.

        Example:
          >>> from ravine.training.rollback import RollbackPolicy
          >>> RollbackPolicy.parse("every=50, deviations=4.5").every
          50
        """
        fields = {field.name: field.default for field in dataclasses.fields(cls)}
        words = "" if text.strip() == "default" else text
        numbers = parse_numbers(words, fields, "field of RollbackPolicy")
        given: dict[str, Any] = dict(numbers)
        for name, value in numbers.items():
            if isinstance(fields[name], int):
                if not value.is_integer():
                    raise ValueError(f"{name} must be a whole number, got {value}.")
                given[name] = int(value)
        return cls(**given)

    def __post_init__(self) -> None:
        for name in ("every", "keep", "window", "patience", "limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("margin", "skip_batches"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if not (math.isfinite(self.deviations) and self.deviations > 0):
            raise ValueError(f"deviations must be positive and finite, got {self.deviations}.")


class GaveUp(RuntimeError):
    """Why a run cannot return."""


@dataclasses.dataclass(frozen=True)
class Return:
    """The point from which a run continues."""

    state: Any
    """A fresh copy of the snapshot, which may be donated."""
    step: int
    """Updates made by then."""
    skip_batches: int
    """Batches to leave out; the data otherwise go on where they are."""


class Rollback:
    """Watches the losses of a run, keeps snapshots, and says when to return.

    Args:
      policy: the rule.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.training.rollback import Rollback, RollbackPolicy
      >>> rollback = Rollback(RollbackPolicy(every=1, margin=0, skip_batches=2))
      >>> state = jnp.float32(1.0)
      >>> rollback.observe(0, state, loss=2.0)  # nothing to do
      >>> back = rollback.observe(1, state, loss=float("nan"))
      >>> back.step, back.skip_batches
      (0, 2)
    """

    def __init__(self, policy: RollbackPolicy):
        self.policy = policy
        self.returns = 0
        self._snapshots: collections.deque[tuple[int, Any]] = collections.deque(maxlen=policy.keep)
        self._losses: collections.deque[float] = collections.deque(
            maxlen=policy.window
        )  # good ones
        self._bad_since: int | None = None
        self._returned_to = -1

    @property
    def snapshots(self) -> dict[int, Any]:
        """The snapshots held, by the updates made before each."""
        return dict(self._snapshots)

    def get_state(self) -> dict[str, Any]:
        """All but the snapshots themselves, as JSON values: what a run that goes on must know."""
        return {
            "returns": self.returns,
            "losses": list(self._losses),
            "bad_since": self._bad_since,
            "returned_to": self._returned_to,
            "snapshots": [step for step, _ in self._snapshots],
        }

    def set_state(self, state: dict[str, Any], snapshots: dict[int, Any]) -> None:
        """Goes on where `get_state` was taken, with the snapshots held then."""
        self.returns, self._returned_to = state["returns"], state["returned_to"]
        self._bad_since = state["bad_since"]
        self._losses.clear()
        self._losses.extend(state["losses"])
        self._snapshots.clear()
        self._snapshots.extend((step, snapshots[step]) for step in state["snapshots"])

    def observe(self, step: int, state: Any, loss: float) -> Return | None:
        """To be called with the state before update number `step` and that update's loss.

        Where updates donate the state, call it with the loss of the state before the update is made,
        or give the state after it and ``step + 1``: what counts is that both go together.

        Returns:
          Where to go on, or None to go on as before.

        Raises:
          GaveUp: if there is no snapshot to return to, or after too many returns.
        """
        if self._is_bad(loss):
            self._bad_since = step if self._bad_since is None else self._bad_since
            if math.isfinite(loss) and step - self._bad_since + 1 < self.policy.patience:
                return None
            return self._go_back(step, loss)
        self._bad_since = None
        self._losses.append(loss)
        if step % self.policy.every == 0:
            self._snapshots.append((step, _copied(state)))
        return None

    def _is_bad(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        if len(self._losses) < max(2, self.policy.window // 2):
            return False
        mean = statistics.fmean(self._losses)
        deviation = max(statistics.pstdev(self._losses), 0.01 * abs(mean))
        return loss > mean + self.policy.deviations * deviation

    def _go_back(self, step: int, loss: float) -> Return:
        self.returns += 1
        if self.returns > self.policy.limit:
            raise GaveUp(
                f"loss {loss} at update {step} after {self.policy.limit} returns; "
                "lower the learning rate."
            )
        first = step if self._bad_since is None else self._bad_since
        # An earlier return point is old enough: there is no need to go further back each time.
        newest = max(first - self.policy.margin, self._returned_to)
        while self._snapshots and self._snapshots[-1][0] > newest:
            self._snapshots.pop()
        if not self._snapshots:
            raise GaveUp(
                f"loss {loss} at update {step}, and no snapshot {self.policy.margin} updates before "
                f"update {first}; keep more snapshots or a smaller margin."
            )
        at, snapshot = self._snapshots[-1]
        self._bad_since, self._returned_to = None, at
        return Return(_copied(snapshot), at, self.policy.skip_batches)


@jax.jit
def _copied(state: Any) -> Any:
    return jax.tree.map(jnp.copy, state)

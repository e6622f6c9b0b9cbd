"""What to rescale with the batch size: the rule for each optimizer."""

import dataclasses
from typing import Any

from ...optimizers.registry import OptimizerConfig
from ...schedules.scaling import scale_beta, scale_eps, scale_learning_rate, scale_weight_decay
from ..batch_schedule import rule_of


@dataclasses.dataclass(frozen=True)
class Rescaled:
    """An optimizer at another batch size."""

    optimizer: OptimizerConfig
    learning_rate: float
    weight_decay: float


def rescaled(
    optimizer: OptimizerConfig,
    learning_rate: float,
    weight_decay: float,
    batch_ratio: float,
    *,
    betas: bool = True,
) -> Rescaled:
    r"""Learning rate, decay rates of the moments, epsilon and weight decay at another batch size.

    With :math:`\kappa` the ratio of batch sizes: the learning rate by its rule,
    `ravine.training.batch_schedule.rule_of`; decay rates :math:`\beta^\kappa`, the same half-life in
    tokens; :math:`\epsilon / \sqrt\kappa`; and the coupled weight decay such that the average over
    updates reaches back as many tokens as before.

    Args:
      optimizer: name and hyperparameters; only decay rates and epsilon given there are rescaled,
        besides the defaults of ``b1``, ``b2`` and ``eps``.
      learning_rate: its peak.
      weight_decay: coupled, 0 for none.
      batch_ratio: new batch size over old.
      betas: whether decay rates are rescaled.

    Raises:
      ValueError: for values that are not positive.

    Example:
      >>> from ravine.optimizers.registry import OptimizerConfig
      >>> from ravine.training.batch_size.rescale import rescaled
      >>> four = rescaled(OptimizerConfig("adamw"), 1e-3, 0.1, 4)
      >>> four.learning_rate, four.weight_decay
      (0.002, 0.2)
      >>> {name: round(value, 12) for name, value in four.optimizer.hyperparameters}
      {'b1': 0.6561, 'b2': 0.996005996001, 'eps': 5e-09}
    """
    rule = rule_of(optimizer.name)
    values: dict[str, Any] = dict(optimizer.hyperparameters)
    for name, value in _numbers(optimizer).items():
        if name == "eps":
            values[name] = scale_eps(value, batch_ratio)
        elif betas:
            values[name] = scale_beta(value, batch_ratio)
    decay = weight_decay
    if weight_decay and rule == "sqrt":  # by the linear rule the product follows by itself
        decay = scale_weight_decay(weight_decay, batch_ratio)
    return Rescaled(
        OptimizerConfig(optimizer.name, values),
        scale_learning_rate(learning_rate, batch_ratio, rule=rule),
        decay,
    )


def _numbers(optimizer: OptimizerConfig) -> dict[str, float]:
    """Decay rates and epsilon, as given or by default, where they are positive numbers."""
    found = {}
    for name in ("b1", "b2", "b3", "eps"):
        if optimizer.accepts(name):
            value = optimizer.value(name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
                found[name] = value
    return found

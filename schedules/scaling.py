r"""What to adjust when the batch, the number of tokens or the width changes.

Ratios are new over old: :math:`\kappa = B' / B`.
"""

import math

from ..core.arguments import checked
from ..core.checks import check_name, check_positive


@checked
def scale_learning_rate(learning_rate: float, batch_ratio: float, rule: str = "sqrt") -> float:
    r"""The learning rate of another batch size.

    .. math:: \eta' = \eta \sqrt{\kappa} \text{ (Adam and its kin)}, \qquad
        \eta' = \eta \kappa \text{ (SGD)}

    Args:
      learning_rate: :math:`\eta`, tuned at the old batch.
      batch_ratio: :math:`\kappa`, which must leave the batch below the critical one.
      rule: ``"sqrt"`` or ``"linear"``.

    Raises:
      ValueError: for values that are not positive or an unknown rule.

    Source: square root: Malladi et al., 2022, https://arxiv.org/abs/2205.10287; linear: Goyal et
    al., 2017, https://arxiv.org/abs/1706.02677.

    Example:
      >>> import ravine
      >>> ravine.schedules.scale_learning_rate(1e-3, 4)
      0.002
    """
    check_positive(learning_rate=learning_rate, batch_ratio=batch_ratio)
    check_name("rule", rule, ("sqrt", "linear"))
    return learning_rate * (math.sqrt(batch_ratio) if rule == "sqrt" else batch_ratio)


@checked
def scale_beta(beta: float, batch_ratio: float, rule: str = "half_life") -> float:
    r"""The decay rate of a moment at another batch size.

    .. math:: \beta' = \beta^\kappa \text{ (the same half-life in tokens)}, \qquad
        1 - \beta' = \kappa (1 - \beta) \text{ (its first order)}

    Args:
      beta: in (0, 1).
      batch_ratio: :math:`\kappa`.
      rule: ``"half_life"`` or ``"sde"``.

    Raises:
      ValueError: for values out of range, also where ``"sde"`` leads below 0.

    Source: half-life: Marek et al., 2025, https://arxiv.org/abs/2507.07101; SDE: Malladi et al.,
    2022, https://arxiv.org/abs/2205.10287.

    Example:
      >>> import ravine
      >>> round(ravine.schedules.scale_beta(0.95, 0.5), 4)
      0.9747
    """
    check_positive(beta=beta, batch_ratio=batch_ratio)
    check_name("rule", rule, ("half_life", "sde"))
    if beta >= 1:
        raise ValueError(f"beta must lie between 0 and 1, got {beta!r}.")
    if rule == "half_life":
        return beta**batch_ratio
    scaled = 1.0 - batch_ratio * (1.0 - beta)
    if scaled < 0:
        raise ValueError(
            f"the SDE rule takes beta {beta} to {scaled:.3g} at a batch ratio of {batch_ratio}; it "
            'holds for small 1 - beta only: use rule="half_life".'
        )
    return scaled


@checked
def scale_eps(eps: float, batch_ratio: float) -> float:
    r"""Adam's epsilon at another batch size: :math:`\epsilon' = \epsilon / \sqrt{\kappa}`.

    Args:
      eps: :math:`\epsilon`.
      batch_ratio: :math:`\kappa`.

    Raises:
      ValueError: for values that are not positive.

    Source: Malladi et al., 2022, https://arxiv.org/abs/2205.10287, square root rule: where noise
    rules, gradients shrink like :math:`1 / \sqrt{\kappa}`.

    Example:
      >>> import ravine
      >>> ravine.schedules.scale_eps(1e-8, 4)
      5e-09
    """
    check_positive(eps=eps, batch_ratio=batch_ratio)
    return eps / math.sqrt(batch_ratio)


@checked
def scale_weight_decay(
    weight_decay: float, batch_ratio: float = 1.0, token_ratio: float = 1.0
) -> float:
    r"""The coupled weight decay that keeps the time scale as a share of the run.

    .. math:: \lambda' = \lambda \, \sqrt{\kappa} \, D / D'

    It holds :math:`\tau = B / (\eta \lambda D)` where the learning rate follows
    :math:`\sqrt{\kappa}`.

    Args:
      weight_decay: :math:`\lambda`.
      batch_ratio: :math:`\kappa`.
      token_ratio: :math:`D' / D`, tokens of the run.

    Raises:
      ValueError: for values that are not positive.

    Source: Wang and Aitchison, 2024, https://arxiv.org/abs/2405.13698; karpathy/nanochat.

    Example:
      >>> import ravine
      >>> ravine.schedules.scale_weight_decay(0.1, batch_ratio=4, token_ratio=2)
      0.1
    """
    check_positive(weight_decay=weight_decay, batch_ratio=batch_ratio, token_ratio=token_ratio)
    return weight_decay * math.sqrt(batch_ratio) / token_ratio


@checked
def scale_with_width(
    learning_rate: float, weight_decay: float, width_ratio: float
) -> tuple[float, float]:
    r"""Learning rate and coupled weight decay of hidden matrices at another width, for Adam.

    .. math:: \eta' = \eta / m, \qquad \lambda' = \lambda m

    Their product, the share that an update removes, stays. Embeddings, gains and biases keep
    theirs. :func:`ravine.scale_by_width` has the rule of every optimizer, parameter by parameter.

    Args:
      learning_rate: :math:`\eta`.
      weight_decay: :math:`\lambda`, not negative.
      width_ratio: :math:`m`, new width over old.

    Raises:
      ValueError: for values out of range.

    Source: Yang et al. (muP), 2022, https://arxiv.org/abs/2203.03466, table 8; the weight decay:
    Wang and Aitchison, 2024, https://arxiv.org/abs/2405.13698.

    Example:
      >>> import ravine
      >>> ravine.schedules.scale_with_width(0.01, 0.1, 2)
      (0.005, 0.2)
    """
    check_positive(learning_rate=learning_rate, width_ratio=width_ratio)
    if weight_decay != 0:
        check_positive(weight_decay=weight_decay)
    return learning_rate / width_ratio, weight_decay * width_ratio


@checked
def time_scale(learning_rate: float, weight_decay: float, steps: int = 1) -> float:
    r"""How far back AdamW's average of updates reaches, :math:`1 / (\eta \lambda T)`.

    Args:
      learning_rate: :math:`\eta`.
      weight_decay: :math:`\lambda`, coupled.
      steps: :math:`T` for a share of the run; 1 for updates.

    Raises:
      ValueError: for values that are not positive.

    Source: Wang and Aitchison, 2024, https://arxiv.org/abs/2405.13698.

    Example:
      >>> import ravine
      >>> round(ravine.schedules.time_scale(1e-3, 0.1))
      10000
    """
    check_positive(learning_rate=learning_rate, weight_decay=weight_decay, steps=steps)
    return 1.0 / (learning_rate * weight_decay * steps)

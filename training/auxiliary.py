"""AdamW for what is not a matrix of a layer, with learning rates of its own.

Recipes for optimizers of matrices often tune the rest apart: one learning rate for the embedding, one
for the head, one for norms and biases, and another schedule.
"""

import dataclasses
import math
from collections.abc import Callable

import optax

from ..optimizers.adam import adamw
from ..optimizers.combine import combine_by_role
from ..optimizers.links.fixed_norm import keep_parameter_norm, scale_by_parameter_norm
from ..optimizers.roles import RAVINE_RULES, Role

_PARTS: dict[Role, str] = {
    "matrix": "matrices",
    "embedding": "embedding",
    "head": "head",
    "norm": "vectors",
    "bias": "vectors",
}


@dataclasses.dataclass(frozen=True)
class AuxiliaryConfig:
    """AdamW beside the optimizer, which is left the matrices of layers; off without its three rates."""

    embedding_rate: float = 0.0
    """Peak learning rate of an AdamW for the embedding; 0 leaves it to the optimizer. All three rates
    are given, or none."""
    head_rate: float = 0.0
    """Of that for the head."""
    vector_rate: float = 0.0
    """Of that for the scales of norms and for biases."""
    rest_b1: float = 0.9
    """Decay rate of these AdamWs' first moments."""
    rest_b2: float = 0.95
    """Of their second moments."""
    rest_eps: float = 1e-8
    """Their epsilon."""
    rest_weight_decay: float = 0.0
    """Their weight decay, of all they have, times the learning rate."""
    rest_schedule: str = ""
    """Their schedule over the steps of the run; by default the run's own."""
    rest_schedule_options: str = ""
    """Arguments of that schedule."""
    fixed_norm: bool = False
    """Matrices of layers keep the norms they start with (hyperball): learning rates are angles, and
    they have no weight decay. It needs the three rates."""

    def __post_init__(self) -> None:
        rates = (self.embedding_rate, self.head_rate, self.vector_rate)
        for value in (*rates, self.rest_eps, self.rest_weight_decay):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(
                    "embedding_rate, head_rate, vector_rate, rest_eps and rest_weight_decay must be "
                    f"finite and not negative, got {value}."
                )
        if any(rates) and not all(rates):
            raise ValueError(
                "embedding_rate, head_rate and vector_rate go together; give all three, or none."
            )
        changed = any(getattr(self, f.name) != f.default for f in dataclasses.fields(self))
        if changed and not self.given:
            raise ValueError(
                "rest_... and fixed_norm go with embedding_rate, head_rate and vector_rate; give them."
            )
        if self.rest_schedule_options and not self.rest_schedule:
            raise ValueError("rest_schedule_options are those of a rest_schedule; name it too.")
        if self.given:
            self._adamw(self.head_rate)

    @property
    def given(self) -> bool:
        """Whether there are such AdamWs."""
        return self.embedding_rate > 0

    def beside(
        self, matrices: optax.GradientTransformation, schedule: Callable[[float], optax.Schedule]
    ) -> optax.GradientTransformation:
        """An optimizer for the matrices of layers, and these for all else.

        Args:
          matrices: with its learning rate.
          schedule: from a peak to learning rates.

        Example:
          >>> import jax.numpy as jnp, optax, ravine
          >>> from ravine.training.auxiliary import AuxiliaryConfig
          >>> rest = AuxiliaryConfig(embedding_rate=0.5, head_rate=0.25, vector_rate=0.125)
          >>> tx = rest.beside(ravine.sgd(1.0), optax.constant_schedule)
          >>> tree = {"head/kernel": jnp.ones((2, 2)), "a/kernel": jnp.ones((2, 2))}
          >>> tree |= {"embed/embedding": jnp.ones((2, 2)), "norm/scale": jnp.ones(2)}
          >>> updates, _ = tx.update(tree, tx.init(tree), tree)
          >>> {name: round(float(x.max()), 3) for name, x in sorted(updates.items())}
          {'a/kernel': -1.0, 'embed/embedding': -0.5, 'head/kernel': -0.25, 'norm/scale': -0.125}
        """
        parts = {
            "matrices": matrices,
            "embedding": self._adamw(schedule(self.embedding_rate)),
            "head": self._adamw(schedule(self.head_rate)),
            "vectors": self._adamw(schedule(self.vector_rate)),
        }
        return combine_by_role(parts, _PARTS, RAVINE_RULES)

    def _adamw(self, rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
        return adamw(
            rate, self.rest_b1, self.rest_b2, self.rest_eps, weight_decay=self.rest_weight_decay
        )


NO_AUXILIARY = AuxiliaryConfig()


def on_spheres(
    tx: optax.GradientTransformation, rates: optax.Schedule
) -> optax.GradientTransformation:
    """`tx`, of learning rate one and without decay, as angles on the spheres that matrices start on."""
    return optax.chain(
        tx, scale_by_parameter_norm(), optax.scale_by_schedule(rates), keep_parameter_norm()
    )

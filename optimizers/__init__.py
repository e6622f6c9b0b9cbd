"""One algorithm a file: `scale_by_x` is the direction, `x` the full chain."""

from .adagrad import ScaleByAdagradState, adagrad, scale_by_adagrad
from .adam import ScaleByAdamState, adam, adamw, scale_by_adam
from .decay import AddDecayedWeightsState, add_decayed_weights
from .learning_rate import ScaleByLearningRateState, scale_by_learning_rate
from .lion import ScaleByLionState, lion, scale_by_lion
from .registry import OptimizerConfig, names, register
from .rmsprop import ScaleByRmspropState, rmsprop, scale_by_rmsprop
from .sgd import ScaleByMomentumState, scale_by_momentum, sgd

for _builder in (sgd, adagrad, rmsprop, adam, adamw, lion):
    register(_builder.__name__, _builder)

__all__ = [
    "AddDecayedWeightsState",
    "OptimizerConfig",
    "ScaleByAdagradState",
    "ScaleByAdamState",
    "ScaleByLearningRateState",
    "ScaleByLionState",
    "ScaleByMomentumState",
    "ScaleByRmspropState",
    "adagrad",
    "adam",
    "adamw",
    "add_decayed_weights",
    "lion",
    "names",
    "register",
    "rmsprop",
    "scale_by_adagrad",
    "scale_by_adam",
    "scale_by_learning_rate",
    "scale_by_lion",
    "scale_by_momentum",
    "scale_by_rmsprop",
    "sgd",
]

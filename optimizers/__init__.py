"""One algorithm a file: `scale_by_x` is the direction, `x` the full chain."""

from .adagrad import ScaleByAdagradState, adagrad, scale_by_adagrad
from .adam import ScaleByAdamState, adam, adamw, scale_by_adam
from .decay import AddDecayedWeightsState, add_cautious_decay, add_decayed_weights
from .fixed_norm import KeepParameterNormState, keep_parameter_norm, scale_by_parameter_norm
from .graft import GraftState, graft
from .kl_shampoo import ScaleByKLShampooState, kl_shampoo, scale_by_kl_shampoo
from .learning_rate import ScaleByLearningRateState, scale_by_learning_rate
from .lion import ScaleByLionState, lion, scale_by_lion
from .matrix_scale import scale_by_matrix_shape
from .mesh import on_mesh, split_state, state_shardings
from .momentum import (
    ScaleByEmaMomentumState,
    ScaleByMomentumState,
    scale_by_ema_momentum,
    scale_by_momentum,
)
from .muon import adamuon, muon, normuon, scale_by_muon
from .neuron_norm import (
    ScaleByElementRmsState,
    ScaleByNeuronRmsState,
    equilibrate,
    renormalize,
    scale_by_element_rms,
    scale_by_neuron_rms,
)
from .orthogonal import orthogonalize
from .registry import OptimizerConfig, names, register
from .rmsprop import ScaleByRmspropState, rmsprop, scale_by_rmsprop
from .sgd import sgd
from .shampoo import ScaleByShampooState, scale_by_shampoo, shampoo
from .soap import ScaleBySoapState, scale_by_soap, soap, soap_muon

for _builder in (
    sgd,
    adagrad,
    rmsprop,
    adam,
    adamw,
    lion,
    muon,
    normuon,
    adamuon,
    shampoo,
    soap,
    soap_muon,
    kl_shampoo,
):
    register(_builder.__name__, _builder)

__all__ = [
    "AddDecayedWeightsState",
    "GraftState",
    "KeepParameterNormState",
    "OptimizerConfig",
    "ScaleByAdagradState",
    "ScaleByAdamState",
    "ScaleByElementRmsState",
    "ScaleByEmaMomentumState",
    "ScaleByKLShampooState",
    "ScaleByLearningRateState",
    "ScaleByLionState",
    "ScaleByMomentumState",
    "ScaleByNeuronRmsState",
    "ScaleByRmspropState",
    "ScaleByShampooState",
    "ScaleBySoapState",
    "adagrad",
    "adam",
    "adamuon",
    "adamw",
    "add_cautious_decay",
    "add_decayed_weights",
    "equilibrate",
    "graft",
    "keep_parameter_norm",
    "kl_shampoo",
    "lion",
    "muon",
    "names",
    "normuon",
    "on_mesh",
    "orthogonalize",
    "register",
    "renormalize",
    "rmsprop",
    "scale_by_adagrad",
    "scale_by_adam",
    "scale_by_element_rms",
    "scale_by_ema_momentum",
    "scale_by_kl_shampoo",
    "scale_by_learning_rate",
    "scale_by_lion",
    "scale_by_matrix_shape",
    "scale_by_momentum",
    "scale_by_muon",
    "scale_by_neuron_rms",
    "scale_by_parameter_norm",
    "scale_by_rmsprop",
    "scale_by_shampoo",
    "scale_by_soap",
    "sgd",
    "shampoo",
    "soap",
    "soap_muon",
    "split_state",
    "state_shardings",
]

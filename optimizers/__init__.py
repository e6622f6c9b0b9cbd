"""One algorithm per file: `scale_by_x` is the direction, `x` the full chain."""

from .adagrad import ScaleByAdagradState, adagrad, scale_by_adagrad
from .adam import ScaleByAdamState, adam, adamw, scale_by_adam
from .adan import (
    ScaleByAdanState,
    adan,
    adan_restart_condition,
    restart_adan,
    scale_by_adan,
)
from .ademamix import ScaleByAdemamixState, ademamix, scale_by_ademamix
from .by_role import Fallback
from .cautious import cautious, cautious_adamw, cautious_lion
from .combine import combine_by_role
from .explain import explain
from .inject import inject_hyperparams
from .kl_shampoo import ScaleByKLShampooState, kl_shampoo, scale_by_kl_shampoo
from .links.accumulate import AccumulateState, accumulate
from .links.curvature import gauss_newton_bartlett, hutchinson
from .links.decay import AddDecayedWeightsState, add_cautious_decay, add_decayed_weights, with_decay
from .links.fixed_norm import KeepParameterNormState, keep_parameter_norm, scale_by_parameter_norm
from .links.graft import GraftState, graft
from .links.learning_rate import ScaleByLearningRateState, scale_by_learning_rate
from .links.matrix_scale import scale_by_matrix_shape
from .links.momentum import (
    ScaleByEmaMomentumState,
    ScaleByMomentumState,
    scale_by_ema_momentum,
    scale_by_momentum,
)
from .links.neuron_norm import (
    ScaleByElementRmsState,
    ScaleByNeuronRmsState,
    equilibrate,
    renormalize,
    scale_by_element_rms,
    scale_by_neuron_rms,
)
from .links.orthogonal import orthogonalize
from .links.telemetry import TelemetryState, telemetry, with_telemetry
from .lion import ScaleByLionState, lion, scale_by_lion
from .mars import ReduceVarianceState, mars, reduce_variance
from .matrix.algebra.polar import NewtonSchulz
from .matrix.batch.refresh import Refresh
from .matrix.mesh.shardings import on_mesh, split_state, state_shardings
from .matrix.shape.blocks import Blocks
from .matrix.shape.layout import MatrixAxes
from .muon import adamuon, muon, normuon, scale_by_muon
from .nadam import nadam, nadamw
from .preconditioners.options import Factors, Grafting, Roots
from .preconditioners.root_failures import RefusedRoot, root_failures
from .registry import OptimizerConfig, names, register
from .rmsprop import ScaleByRmspropState, rmsprop, scale_by_rmsprop
from .roles import (
    COMMON_RULES,
    EQUINOX_RULES,
    HAIKU_RULES,
    HUGGING_FACE_RULES,
    LINEN_RULES,
    MAXTEXT_RULES,
    NNX_RULES,
    Rule,
    role_table,
)
from .schedule_free import (
    ScheduleFreeState,
    schedule_free,
    schedule_free_adamw,
    schedule_free_eval_params,
    schedule_free_sgd,
)
from .sgd import sgd
from .shampoo import ScaleByShampooState, scale_by_shampoo, shampoo
from .soap import ScaleBySoapState, scale_by_soap, soap
from .soap_muon import soap_muon
from .sophia import ScaleBySophiaState, scale_by_sophia, sophia_g, sophia_h
from .width import WidthRule, scale_by_width, width_rule

for _builder in (
    sgd,
    adagrad,
    rmsprop,
    adam,
    adamw,
    nadam,
    nadamw,
    lion,
    adan,
    ademamix,
    mars,
    sophia_g,
    sophia_h,
    cautious_adamw,
    cautious_lion,
    schedule_free_sgd,
    schedule_free_adamw,
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
    "COMMON_RULES",
    "EQUINOX_RULES",
    "HAIKU_RULES",
    "HUGGING_FACE_RULES",
    "LINEN_RULES",
    "MAXTEXT_RULES",
    "NNX_RULES",
    "AccumulateState",
    "AddDecayedWeightsState",
    "Blocks",
    "Factors",
    "Fallback",
    "GraftState",
    "Grafting",
    "KeepParameterNormState",
    "MatrixAxes",
    "NewtonSchulz",
    "OptimizerConfig",
    "ReduceVarianceState",
    "Refresh",
    "RefusedRoot",
    "Roots",
    "Rule",
    "ScaleByAdagradState",
    "ScaleByAdamState",
    "ScaleByAdanState",
    "ScaleByAdemamixState",
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
    "ScaleBySophiaState",
    "ScheduleFreeState",
    "TelemetryState",
    "WidthRule",
    "accumulate",
    "adagrad",
    "adam",
    "adamuon",
    "adamw",
    "adan",
    "adan_restart_condition",
    "add_cautious_decay",
    "add_decayed_weights",
    "ademamix",
    "cautious",
    "cautious_adamw",
    "cautious_lion",
    "combine_by_role",
    "equilibrate",
    "explain",
    "gauss_newton_bartlett",
    "graft",
    "hutchinson",
    "inject_hyperparams",
    "keep_parameter_norm",
    "kl_shampoo",
    "lion",
    "mars",
    "muon",
    "nadam",
    "nadamw",
    "names",
    "normuon",
    "on_mesh",
    "orthogonalize",
    "reduce_variance",
    "register",
    "renormalize",
    "restart_adan",
    "rmsprop",
    "role_table",
    "root_failures",
    "scale_by_adagrad",
    "scale_by_adam",
    "scale_by_adan",
    "scale_by_ademamix",
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
    "scale_by_sophia",
    "scale_by_width",
    "schedule_free",
    "schedule_free_adamw",
    "schedule_free_eval_params",
    "schedule_free_sgd",
    "sgd",
    "shampoo",
    "soap",
    "soap_muon",
    "sophia_g",
    "sophia_h",
    "split_state",
    "state_shardings",
    "telemetry",
    "width_rule",
    "with_decay",
    "with_telemetry",
]

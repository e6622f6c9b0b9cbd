"""Devices that keep large runs alive: losses, attention devices, clipping, guards, monitors."""

from ._layers import Stacked
from .adaptive_clipping import AdaGCState, adagc, clip_adaptively
from .attention import (
    AttentionOutput,
    attention,
    attention_logits,
    max_logits,
    qk_norm,
    rms_normalize,
    safe_softmax,
)
from .clipping import clip_by_block_rms, clip_by_global_norm
from .cross_entropy import CrossEntropy, cross_entropy
from .fused_cross_entropy import fused_cross_entropy
from .guarded_step import Guarded, GuardedStep, guarded_step
from .guards import FiniteGateState, SkipStepState, finite_gate, skip_step
from .log_sum_exp import log_sum_exp
from .logit_statistics import logit_statistics
from .losses import document_weights, next_token_loss, token_mean
from .monitors import MonitorState, monitored, with_monitors
from .noise_scale import (
    MicroBatches,
    NoiseScaleState,
    gathered,
    noise_scale,
    squared_norms,
    with_noise_scale,
)
from .qk_clip import HeadWeights, qk_clip
from .sigma_reparam import SigmaState, SigmaWeights, sigma_reparam, sigma_weights
from .soft_cap import soft_cap
from .spam import SpamState, spam
from .unit_norm import keep_unit_norm, unit_norm
from .update_clipping import ClipUpdateNormState, clip_update_norm, with_update_clipping
from .zclip import ZClipState, zclip

__all__ = [
    "AdaGCState",
    "AttentionOutput",
    "ClipUpdateNormState",
    "CrossEntropy",
    "FiniteGateState",
    "Guarded",
    "GuardedStep",
    "HeadWeights",
    "MicroBatches",
    "MonitorState",
    "NoiseScaleState",
    "SigmaState",
    "SigmaWeights",
    "SkipStepState",
    "SpamState",
    "Stacked",
    "ZClipState",
    "adagc",
    "attention",
    "attention_logits",
    "clip_adaptively",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "clip_update_norm",
    "cross_entropy",
    "document_weights",
    "finite_gate",
    "fused_cross_entropy",
    "gathered",
    "guarded_step",
    "keep_unit_norm",
    "log_sum_exp",
    "logit_statistics",
    "max_logits",
    "monitored",
    "next_token_loss",
    "noise_scale",
    "qk_clip",
    "qk_norm",
    "rms_normalize",
    "safe_softmax",
    "sigma_reparam",
    "sigma_weights",
    "skip_step",
    "soft_cap",
    "spam",
    "squared_norms",
    "token_mean",
    "unit_norm",
    "with_monitors",
    "with_noise_scale",
    "with_update_clipping",
    "zclip",
]

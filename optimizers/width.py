r"""Learning rates at another width and depth: tuning transferred from a small model to a large one."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import optax

from ..core.arguments import checked
from ..core.arithmetic import cast, wide
from ..core.checks import check_positive
from ..core.paths import paths_of
from ..core.transformation import transformation
from .links.growth import (
    Growth,
    Rank,
    divergence_growth,
    eigenbasis_growth,
    element_growth,
    gradient_growth,
    norm_growth,
    polar_growth,
    roots_growth,
    rows_growth,
)
from .matrix.shape.blocks import UNCUT_BOUND, Blocks
from .registry import OptimizerConfig
from .roles import MATRIX_ROLES, Decided, Rules, decide

GRADIENT = ("sgd", "schedule_free_sgd")
ELEMENTS = (
    *("adam", "adamw", "nadam", "nadamw", "adan", "ademamix", "mars", "adagrad", "rmsprop", "lion"),
    *("sophia_g", "sophia_h", "cautious_adamw", "cautious_lion", "schedule_free_adamw"),
)
POLAR = ("muon", "normuon", "soap_muon")


@checked
@dataclasses.dataclass(frozen=True)
class WidthRule:
    """How the learning rates of an optimizer follow the shapes of its parameters; by `width_rule`.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> from ravine.optimizers.roles import decide
      >>> (found,) = decide({"dense": {"kernel": jnp.ones((64, 64))}})
      >>> ravine.width_rule("adamw").factor(found, (16, 16))
      0.25
    """

    growth: Growth
    """Growth of the direction for parameters with one of `roles`."""
    roles: tuple[str, ...] | None
    """None for all. Other parameters follow AdamW's rule, as its fallback does."""
    depth: float
    """Exponent of the number of layers, for the matrices that the direction takes."""
    embedding: Growth | None = None
    """Growth of the direction for embeddings, if it is not `growth`."""

    def factor(self, found: Decided, base: Sequence[int], depth_ratio: float = 1.0) -> float:
        """The multiplier for the learning rate of a parameter, given its shape in the base model."""
        taken = self.roles is None or found.role in self.roles
        growth = self.growth if taken else element_growth
        if taken and found.role == "embedding":
            growth = self.embedding or growth
        new, old = (_sides(found._replace(shape=tuple(shape))) for shape in (found.shape, base))
        ratio = _rate(growth, *new) / _rate(growth, *old)
        return ratio * (depth_ratio**self.depth if taken and found.role in MATRIX_ROLES else 1.0)


def _sides(found: Decided) -> tuple[int, int]:
    if found.role in ("norm", "bias", "other") or found.axes is None:
        return 1, max(1, found.shape[-1] if found.shape else 1)  # a gain multiplies its one input
    return found.layout().pieces[0][1:]


def _rate(growth: Growth, fan_in: int, fan_out: int) -> float:
    return math.sqrt(fan_out / fan_in) / growth(fan_in, fan_out)


@checked
def width_rule(optimizer: str | OptimizerConfig, *, rank: Rank | None = None) -> WidthRule:
    r"""The width and depth rule of an optimizer, by its name and hyperparameters.

    The update of a matrix `[in, out]` should have a spectral norm proportional to :math:`\sqrt{out /
    in}` at every width. The learning rate is multiplied as follows when both sides grow by m (hidden
    matrices), or only the inputs do (a head), and when the model has L times as many layers:

    =================================  ==================  ===================  ===============
    direction                          hidden              head                 layers
    =================================  ==================  ===================  ===============
    SGD                                1                   1/m                  L
    Adam and its kin, Lion             1/m                 1/m                  1
    Muon, all scales but the next      1                   (AdamW's)            1
    Muon ``"moonlight"``               :math:`m^{-1/2}`    (AdamW's)            1
    Shampoo with a graft, low          1/m                 1/m                  1
    Shampoo with a graft, full         :math:`m^{-1/2}`    by its longer side   1
    Shampoo, no graft, exponents' sum  1                   :math:`m^{E-1}`      :math:`L^{1-2E}`
    SOAP, full                         :math:`m^{-1/2}`    by its longer side   1
    SOAP, low                          1                   :math:`m^{-1/2}`     1
    KL-Shampoo                         :math:`m^{-1/2}`    :math:`m^{-3/4}`     1
    =================================  ==================  ===================  ===============

    "By its longer side": :math:`m^{-1/2}` while the vocabulary is larger than the width, then 1/m.
    With n times as many blocks, the rate of Shampoo without a graft is also multiplied by
    :math:`n^{-E}`, and that of SOAP (low) by :math:`n^{-1/2}`. Gains and embeddings keep their rates,
    except that SGD's are multiplied by m, and those for embeddings by up to :math:`m^{1/2}` with SOAP
    (low) and Shampoo without a graft. The column of layers holds where branches are multiplied by 1/L
    before they are added to the residual stream.

    Args:
      optimizer: a registered name, or a configuration, if hyperparameters differ from the defaults.
      rank: which limit holds for whitened directions. ``"low"`` is that of infinite width at a fixed
        batch, the paper's; ``"full"`` is that of noise that fills the matrix. ``None`` takes what the
        coordinate check found nearer: ``"low"`` for Shampoo with a graft, ``"full"`` for the rest.

    Raises:
      ValueError: for an optimizer that has no rule.

    Source: as :mod:`ravine.optimizers.links.growth`.

    Example:
      >>> import ravine
      >>> from ravine.optimizers.width import width_rule
      >>> width_rule("muon").depth
      0.0
    """
    config = OptimizerConfig(optimizer) if isinstance(optimizer, str) else optimizer
    name = config.name
    roles = tuple(config.value("roles")) if config.accepts("roles") else None
    grafted = name == "shampoo" and config.value("graft").step != "none"
    rank = rank or ("low" if grafted else "full")
    if name in GRADIENT:
        return WidthRule(gradient_growth, roles, 1.0)
    if name in ELEMENTS:
        return WidthRule(element_growth, roles, 0.0)
    if name in POLAR:
        return WidthRule(polar_growth(config.value("scale")), roles, 0.0)
    if name == "adamuon":  # orthogonal, then an RMS of 0.2
        return WidthRule(norm_growth("full"), roles, 0.0)
    if name == "kl_shampoo":
        return WidthRule(divergence_growth, roles, 0.0, element_growth)
    if name == "soap":
        growth = eigenbasis_growth(rank, *_cut(config.value("blocks")))
        return WidthRule(growth, roles, 0.0, element_growth if rank == "full" else None)
    if name == "shampoo":
        return _shampoo(config, roles, rank)
    raise ValueError(
        f"optimizer {name!r} has no width rule; make a WidthRule(growth, roles, depth) from how its "
        "update grows."
    )


def _shampoo(config: OptimizerConfig, roles: tuple[str, ...] | None, rank: Rank) -> WidthRule:
    graft = config.value("graft").step
    if graft == "sgd":
        return WidthRule(gradient_growth, roles, 1.0)
    if graft != "none":
        return WidthRule(norm_growth(rank), roles, 0.0, element_growth)
    exponent = -(config.value("roots").exponent or -0.25)
    growth = roots_growth((exponent, exponent), *_cut(config.value("blocks")))
    return WidthRule(growth, roles, 1 - 4 * exponent, rows_growth if rank == "full" else None)


def _cut(blocks: Blocks) -> tuple[int | None, float]:
    bound = UNCUT_BOUND if blocks.size is None else math.inf
    return blocks.size, bound if blocks.bound is None else blocks.bound


@checked
def scale_by_width(
    rule: str | OptimizerConfig | WidthRule,
    base: Any,
    *,
    rank: Rank | None = None,
    depth_ratio: float = 1.0,
    rules: Rules | None = None,
) -> optax.GradientTransformation:
    r"""Multiplies every update by the factor of its optimizer's width rule, relative to a base model.

    Chained after an optimizer that was tuned on the base model, it transfers the tuning to another
    width. At the base width it changes nothing. Weight decay inside the optimizer is multiplied too, so
    leave it out there and chain independent decay after it: ``ravine.add_decayed_weights(share,
    form="independent")``, with a share per step proportional to 1/width for equal tokens per parameter
    (compute-optimal), and an unchanged share for equal steps.

    Args:
      rule: a registered name, a configuration, or the result of :func:`width_rule`.
      base: parameters of the base model, or their shapes, as a tree like the parameters.
      rank: as for :func:`width_rule`.
      depth_ratio: number of layers divided by that of the base model; branches must be multiplied by
        its inverse.
      rules: role rules; by default ``ravine.COMMON_RULES``.

    Raises:
      ValueError: for an optimizer without a rule, and at `init` if the base model has other parameters.

    Source: as :mod:`ravine.optimizers.links.growth`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, ravine
      >>> shapes = lambda width: {"dense": {"kernel": jnp.ones((width, width))}}
      >>> tx = optax.chain(ravine.adam(0.01), ravine.scale_by_width("adam", shapes(4)))
      >>> params = shapes(16)
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> round(float(updates["dense"]["kernel"][0, 0]), 6)  # a quarter of 0.01
      -0.0025
    """
    check_positive(depth_ratio=depth_ratio)
    found_rule = rule if isinstance(rule, WidthRule) else width_rule(rule, rank=rank)
    base_shapes = [leaf.shape for leaf in jax.tree.leaves(base)]
    shapes = dict(zip(paths_of(base), base_shapes, strict=True))

    def factors(tree: Any) -> list[float]:
        decided = decide(tree, rules, ("matrix", "embedding", "head", "convolution"))
        for found in decided:
            if len(shapes.get(found.path, ())) != len(found.shape) or found.path not in shapes:
                raise ValueError(
                    f"the base model has no parameter {found.path!r} with {len(found.shape)} axes; "
                    "give scale_by_width the parameters of the same model at the base width."
                )
        return [found_rule.factor(found, shapes[found.path], depth_ratio) for found in decided]

    def init(params: optax.Params) -> optax.EmptyState:
        factors(params)
        return optax.EmptyState()

    def update(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del params
        leaves, structure = jax.tree.flatten(updates)
        scaled = [cast(f * wide(u), u.dtype) for f, u in zip(factors(updates), leaves, strict=True)]
        return jax.tree.unflatten(structure, scaled), state

    def describe(params: optax.Params) -> dict[str, list[str]]:
        return {"how": [f"times {factor:.3g} for its width" for factor in factors(params)]}

    return transformation(init, update, describe)

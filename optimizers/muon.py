"""Muon: momentum, orthogonalized.

The pipeline is ``momentum → pre → orthogonalize → post → scale``, then decay and learning rate, each a
transformation of its own. Its descendants differ in ``pre`` and ``post``:

==============  ==================================  ==============================================
name            pre                                 post
==============  ==================================  ==============================================
Muon
NorMuon                                             `scale_by_neuron_rms`
AdaMuon         sign                                `scale_by_element_rms`, `renormalize(rms=0.2)`
MuonEq          `equilibrate`
Muon+                                               `renormalize`
==============  ==================================  ==============================================

and MuonH puts `scale_by_parameter_norm` and `keep_parameter_norm` around the learning rate.
"""

from collections.abc import Callable, Collection
from typing import Any

import jax.numpy as jnp
import optax

from ..core.arguments import checked
from ..core.arithmetic import sign
from ..core.checks import check_decay_rates
from ..core.own_norm import NoOwnNorm, OwnNorm, with_norm
from .by_role import FALLBACK, Fallback, by_role
from .links.decay import Mask, add_cautious_decay
from .links.matrix_scale import Scale, scale_by_matrix_shape
from .links.momentum import scale_by_ema_momentum
from .links.neuron_norm import renormalize, scale_by_element_rms, scale_by_neuron_rms
from .links.orthogonal import orthogonalize
from .links.polar_norm import polar_norms
from .matrix.algebra.polar import Polar
from .matrix.shape.matrices import DEFAULT_AXES, Axes
from .roles import MATRIX_ROLES, Role, Rules

Link = optax.GradientTransformation | Callable[[Axes], optax.GradientTransformation]

KELLER_FALLBACK_RATIO = 3e-4 / 0.02
"""AdamW's learning rate divided by Muon's, in Keller Jordan's ``muon.py``."""


@checked
def scale_by_muon(
    b1: float = 0.95,
    *,
    nesterov: bool = True,
    polar: Polar = None,
    scale: Scale = "keller",
    pre: optax.GradientTransformation | None = None,
    post: optax.GradientTransformation | None = None,
    axes: Axes = DEFAULT_AXES,
    mu_dtype: Any = None,
    max_elements: int | None = None,
) -> optax.GradientTransformation:
    r"""The direction of Muon, for trees whose leaves are all matrices.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        u_t = s \, \operatorname{polar}(\beta_1 m_t + (1 - \beta_1) g_t)

    with :math:`s` the factor of :func:`scale_by_matrix_shape`, and :math:`m_t` instead of the sum
    without the look-ahead. The heavy ball gives the same directions, see :func:`scale_by_ema_momentum`.

    Args:
      b1: :math:`\beta_1` in [0, 1).
      nesterov: look-ahead momentum.
      polar: maps a batch of matrices to their polar factors; by default ``NewtonSchulz()``.
      scale: ``"keller"``, ``"moonlight"``, ``"spectral"`` or ``"none"``.
      pre: a transformation between momentum and orthogonalization.
      post: a transformation between orthogonalization and scale.
      axes: which axes of a leaf are rows (in) and columns (out); by default the last two.
      mu_dtype: dtype of the momentum; by default at least float32.
      max_elements: bound on the elements worked on at once, see ``matrix/batch/batches.py``.

    Raises:
      ValueError: for values out of range, or at `init` for a leaf that is not a matrix.

    Source: Jordan, 2024, https://kellerjordan.github.io/posts/muon/; KellerJordan/Muon, ``muon.py``.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.scale_by_muon()
      >>> updates, _ = tx.update(jnp.diag(jnp.array([3e-5, 4e-5])), tx.init(jnp.zeros((2, 2))))
      >>> [round(float(x), 2) for x in jnp.diag(updates)]
      [0.72, 1.12]
    """
    tx = optax.chain(
        scale_by_ema_momentum(b1, nesterov=nesterov, mu_dtype=mu_dtype),
        pre or optax.identity(),
        orthogonalize(polar, axes=axes, max_elements=max_elements),
        post or optax.identity(),
        scale_by_matrix_shape(scale, axes=axes),
    )

    def norms(grads: optax.Updates, state: Any) -> dict[str, OwnNorm]:
        if pre is not None or post is not None:
            raise NoOwnNorm(
                "Muon with a pre or a post, as NorMuon and AdaMuon have, has no norm of its own: its "
                "step is no symmetric P times the momentum."
            )
        return polar_norms(grads, state[0].mu, axes, max_elements)

    return with_norm(tx, "scale_by_muon", norms)


@checked
def muon(
    learning_rate: optax.ScalarOrSchedule = 0.02,
    b1: float = 0.95,
    *,
    nesterov: bool = True,
    polar: Polar = None,
    scale: Scale = "keller",
    pre: optax.GradientTransformation | None = None,
    post: Link | None = None,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Mask | None = None,
    cautious: bool = False,
    rules: Rules | None = None,
    roles: Collection[Role] = MATRIX_ROLES,
    fallback: optax.GradientTransformation | Fallback = FALLBACK,
    max_elements: int | None = None,
) -> optax.GradientTransformation:
    r"""Muon for matrices, another optimizer for everything else.

    For training transformers to a better loss on the same tokens, with less state than AdamW. Every
    singular value of a matrix's update is near one, so that rare directions learn as fast as common
    ones.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        u_t = s \, \operatorname{polar}(\beta_1 m_t + (1 - \beta_1) g_t) \\
        \theta_t &= \theta_{t-1} - \eta_t \, (u_t + \lambda \theta_{t-1})

    with :math:`s` the factor of :func:`scale_by_matrix_shape`, and the polar factor computed by a few
    Newton–Schulz steps. A parameter's role decides whether it is a matrix; a parameter that no rule
    covers is refused. :func:`explain` shows which parameter gets which optimizer.

    State: 4 bytes per parameter of a matrix and 8 per other parameter, 4.2 on average for LLaMA-2 7B.
    Starting rates: with ``scale="moonlight"`` AdamW's or a few times it, with ``scale="keller"`` 0.02.

    Args:
      learning_rate: a number or a schedule.
      b1: decay rate of the momentum, in [0, 1).
      nesterov: look-ahead momentum.
      polar: maps a batch of matrices to their polar factors; by default ``NewtonSchulz()``.
      scale: the factor for a matrix's shape. With ``"moonlight"`` one learning rate suits Muon and
        AdamW.
      pre: a transformation between momentum and orthogonalization.
      post: a transformation between orthogonalization and scale, or a function that makes one from the
        axes.
      mu_dtype: dtype of the momentum; by default at least float32.
      weight_decay: :math:`\lambda`, multiplied by the learning rate; also that of the default
        fallback.
      weight_decay_mask: which parameters decay, see :func:`add_decayed_weights`.
      cautious: decay matrices only where decay and update agree, see :func:`add_cautious_decay`.
      rules: role rules; by default ``ravine.COMMON_RULES``.
      roles: the roles that Muon takes.
      fallback: the optimizer of all other parameters: complete with its learning rate, or AdamW with
        the options of :class:`ravine.Fallback`. Its ratio is 1 by default with ``scale="moonlight"``,
        as in Moonlight, and 0.015 otherwise, Keller Jordan's.
      max_elements: bound on the elements worked on at once, see ``matrix/batch/batches.py``.

    Returns:
      An ``optax.GradientTransformation``; its update needs ``params``.

    Raises:
      ValueError: for values out of range, and at `init` for parameters that no rule covers or that were
        assigned to it but are not matrices.

    Source: as :func:`scale_by_muon`; Liu et al., 2025, https://arxiv.org/abs/2502.16982 (decay and
    the ``"moonlight"`` scale).

    Example:
      >>> import jax.numpy as jnp, optax, ravine
      >>> params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
      >>> tx = ravine.muon(0.02, weight_decay=0.1)
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     grads = params  # of half the sum of squares
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(params["dense"]["kernel"].max() < 1)
      True
    """

    def direction(axes: Axes) -> optax.GradientTransformation:
        return scale_by_muon(
            b1,
            nesterov=nesterov,
            polar=polar,
            scale=scale,
            pre=pre,
            post=post(axes) if callable(post) else post,
            axes=axes,
            mu_dtype=mu_dtype,
            max_elements=max_elements,
        )

    return by_role(
        "muon",
        direction,
        learning_rate,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        rules=rules,
        roles=roles,
        fallback=fallback,
        decay=add_cautious_decay(weight_decay, weight_decay_mask) if cautious else None,
        fallback_ratio=1.0 if scale == "moonlight" else KELLER_FALLBACK_RATIO,
        fallback_mu_dtype=mu_dtype,
    )


@checked
def normuon(
    learning_rate: optax.ScalarOrSchedule = 0.02,
    b1: float = 0.95,
    b2: float = 0.95,
    *,
    nesterov: bool = True,
    polar: Polar = None,
    scale: Scale = "keller",
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Mask | None = None,
    cautious: bool = False,
    rules: Rules | None = None,
    roles: Collection[Role] = MATRIX_ROLES,
    fallback: optax.GradientTransformation | Fallback = FALLBACK,
    max_elements: int | None = None,
) -> optax.GradientTransformation:
    r"""NorMuon: Muon with updates of equal size for all neurons of a matrix.

    For runs in which Muon already works. After orthogonalization each neuron is divided by the running
    root mean square of its updates: ``muon(..., post=scale_by_neuron_rms(b2))``.

    State: that of :func:`muon`, and 4 bytes per neuron. Starting rates: as for :func:`muon`.

    Args:
      learning_rate: a number or a schedule.
      b1: decay rate of the momentum.
      b2: decay rate of the neurons' second moment.
      nesterov, polar, scale, mu_dtype, weight_decay, weight_decay_mask: as for :func:`muon`.
      cautious, rules, roles, fallback, max_elements: as for :func:`muon`.

    Returns:
      An ``optax.GradientTransformation``; its update needs ``params``.

    Source: as :func:`scale_by_neuron_rms`.

    Example:
      >>> import ravine
      >>> tx = ravine.normuon(0.02, weight_decay=0.1)
    """
    return muon(
        learning_rate,
        b1,
        nesterov=nesterov,
        polar=polar,
        scale=scale,
        post=lambda axes: scale_by_neuron_rms(b2, axes=axes),
        mu_dtype=mu_dtype,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        cautious=cautious,
        rules=rules,
        roles=roles,
        fallback=fallback,
        max_elements=max_elements,
    )


@checked
def adamuon(
    learning_rate: optax.ScalarOrSchedule = 0.02,
    b1: float = 0.95,
    *,
    nesterov: bool = True,
    polar: Polar = None,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Mask | None = None,
    cautious: bool = False,
    rules: Rules | None = None,
    roles: Collection[Role] = MATRIX_ROLES,
    fallback: optax.GradientTransformation | Fallback = FALLBACK,
    max_elements: int | None = None,
) -> optax.GradientTransformation:
    r"""AdaMuon: Muon on the sign of the momentum, with element-wise second moments and an RMS of 0.2.

    For runs in which Muon already works, with as much state as AdamW. Updates have the size of AdamW's,
    so AdamW's learning rates fit.

    State: 8 bytes per parameter. Starting rates: AdamW's, or a few times it.

    Args:
      learning_rate: a number or a schedule.
      b1: decay rate of the momentum and of the second moments.
      fallback: as for :func:`muon`, with a ratio of 1 by default.
      nesterov, polar, mu_dtype, weight_decay, weight_decay_mask, cautious: as for :func:`muon`.
      rules, roles, max_elements: as for :func:`muon`; the scale is ``"none"``.

    Returns:
      An ``optax.GradientTransformation``; its update needs ``params``.

    Source: Si et al., 2025, https://arxiv.org/abs/2507.11005; Chongjie-Si/AdaMuon, ``adamuon.py``.

    Example:
      >>> import ravine
      >>> tx = ravine.adamuon(0.02, weight_decay=0.1)
    """
    check_decay_rates(b1=b1)
    if isinstance(fallback, Fallback):
        fallback = fallback.with_ratio(1.0)
    return muon(
        learning_rate,
        b1,
        nesterov=nesterov,
        polar=polar,
        scale="none",
        pre=optax.stateless_with_tree_map(lambda u, _: sign(jnp.asarray(u))),
        post=lambda axes: optax.chain(scale_by_element_rms(b1), renormalize(0.2, axes=axes)),
        mu_dtype=mu_dtype,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        cautious=cautious,
        rules=rules,
        roles=roles,
        fallback=fallback,
        max_elements=max_elements,
    )

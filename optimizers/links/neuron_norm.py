"""Second moments and normalisations that Muon's descendants add around the orthogonalization.

Matrices are `[L, M, N]`: M inputs (rows), N outputs (columns). Papers that write matrices as out x in
call a row what is a column here, so axes are named by their contents: neurons are outputs.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ...core.arguments import checked
from ...core.arithmetic import cast_like, ema, lerp, wide, wide_zeros_like
from ...core.checks import check_decay_rates, check_non_negative
from ...core.leaves import at_leaves, from_leaves
from ...core.transformation import transformation
from ..matrix.shape.matrices import (
    DEFAULT_AXES,
    Axes,
    frobenius,
    joined,
    layouts_of,
    safe_divide,
    split,
    stateless_on_matrices,
)

Neurons = Literal["out", "in", "auto"]


def _reduced_axis(neurons: Neurons, shape: tuple[int, ...]) -> int:
    """The axis of `[L, M, N]` to average over, so that one value per neuron remains."""
    if neurons == "auto":
        neurons = "out" if shape[2] >= shape[1] else "in"
    return 1 if neurons == "out" else 2


def _per_neuron(reduce: Any, piece: jax.Array, neurons: Neurons) -> jax.Array:
    return reduce(piece, axis=_reduced_axis(neurons, piece.shape), keepdims=True)


class ScaleByNeuronRmsState(NamedTuple):
    """State of `scale_by_neuron_rms`."""

    nu: Any  # like params, a tuple of [L, 1, N] or [L, M, 1] per leaf: mean square of each neuron


@checked
def scale_by_neuron_rms(
    b2: float = 0.95,
    eps: float = 1e-10,
    *,
    neurons: Neurons = "out",
    axes: Axes = DEFAULT_AXES,
    nu_dtype: Any = None,
) -> optax.GradientTransformation:
    r"""Evens out the size of neurons' updates, keeping each matrix's norm (NorMuon).

    .. math::
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) \operatorname{mean}_{in} O_t^2, \qquad
        \hat O_t = O_t / (\sqrt{v_t} + \epsilon) \\
        u_t &= \hat O_t \, \lVert O_t \rVert_F / \lVert \hat O_t \rVert_F

    The start of :math:`v` is not corrected: the factor is the same for all neurons of a matrix and
    cancels in the second line.

    Args:
      b2: :math:`\beta_2` in [0, 1).
      eps: added to the root.
      neurons: ``"out"``: one value per output (the paper); ``"in"``: one per input; ``"auto"``: along
        the longer side (modded-nanogpt).
      axes: which axes of a leaf are rows (in) and columns (out).
      nu_dtype: dtype of the moments; by default at least float32.

    Raises:
      ValueError: for values out of range, or a leaf that is not a matrix.

    Source: Li et al., 2025, https://arxiv.org/abs/2510.05491; zichongli5/NorMuon, ``normuon.py``.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.scale_by_neuron_rms()
      >>> updates, _ = tx.update(jnp.diag(jnp.array([3.0, 4.0])), tx.init(jnp.zeros((2, 2))))
      >>> [round(float(x), 3) for x in jnp.diag(updates)]  # as large together as before
      [3.536, 3.536]
    """
    check_decay_rates(b2=b2)
    check_non_negative(eps=eps)

    def init(params: optax.Params) -> ScaleByNeuronRmsState:
        # Made from the parameters, to inherit an explicit sharding.
        leaves = split(wide_zeros_like(params, nu_dtype), layouts_of(params, axes))
        moments = [tuple(_per_neuron(jnp.sum, piece, neurons) for piece in leaf) for leaf in leaves]
        return ScaleByNeuronRmsState(at_leaves(params, moments))

    def update(
        updates: optax.Updates, state: ScaleByNeuronRmsState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByNeuronRmsState]:
        del params
        layouts = layouts_of(updates, axes)
        directions, moments = [], []
        for pieces, old in zip(
            split(updates, layouts), from_leaves(updates, state.nu), strict=True
        ):
            pairs = [neuron_rms(piece, nu) for piece, nu in zip(pieces, old, strict=True)]
            directions.append([direction for direction, _ in pairs])
            moments.append(tuple(nu for _, nu in pairs))
        nu = at_leaves(updates, moments)
        return joined(directions, updates, layouts), ScaleByNeuronRmsState(nu)

    def neuron_rms(piece: jax.Array, nu: jax.Array) -> tuple[jax.Array, jax.Array]:
        if piece.size == 0:
            return piece, nu
        x = wide(piece)
        square = _per_neuron(jnp.mean, jnp.square(x), neurons)
        new = lerp(square, nu, b2)
        even = x / (jnp.sqrt(new.astype(x.dtype)) + eps)
        direction = even * safe_divide(frobenius(x), frobenius(even))
        return direction.astype(piece.dtype), new.astype(nu.dtype)

    return transformation(init, update)


class ScaleByElementRmsState(NamedTuple):
    """State of `scale_by_element_rms`."""

    nu: optax.Updates  # like params, nu_dtype: mean of squared updates


@checked
def scale_by_element_rms(
    b2: float = 0.95, eps: float = 1e-8, *, nu_dtype: Any = None
) -> optax.GradientTransformation:
    r"""Divides every element by its own running root mean square (AdaMuon's second moment).

    .. math:: v_t = \beta_2 v_{t-1} + (1 - \beta_2) O_t^2, \qquad u_t = O_t / (\sqrt{v_t} + \epsilon)

    Args:
      b2: :math:`\beta_2` in [0, 1).
      eps: added outside the root.
      nu_dtype: dtype of the moments; by default at least float32.

    Raises:
      ValueError: for values out of range.

    Source: Si et al., 2025, https://arxiv.org/abs/2507.11005; Chongjie-Si/AdaMuon, ``adamuon.py``.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.scale_by_element_rms(0.75)
      >>> tx.update(jnp.array([3.0, 0.0]), tx.init(jnp.zeros(2)))[0]
      Array([2., 0.], dtype=float32)
    """
    check_decay_rates(b2=b2)
    check_non_negative(eps=eps)

    def init(params: optax.Params) -> ScaleByElementRmsState:
        return ScaleByElementRmsState(wide_zeros_like(params, nu_dtype))

    def update(
        updates: optax.Updates, state: ScaleByElementRmsState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByElementRmsState]:
        del params
        nu = ema(updates, state.nu, b2, jnp.square)
        direction = jax.tree.map(lambda o, v: o.astype(v.dtype) / (jnp.sqrt(v) + eps), updates, nu)
        return cast_like(direction, updates), ScaleByElementRmsState(cast_like(nu, state.nu))

    return transformation(init, update)


@checked
def equilibrate(
    *, neurons: Neurons = "out", axes: Axes = DEFAULT_AXES
) -> optax.GradientTransformation:
    """Divides every neuron's weights by their norm, before the orthogonalization (MuonEq).

    Args:
      neurons: ``"out"``, ``"in"``, or ``"auto"`` for those along the longer side.
      axes: which axes of a leaf are rows (in) and columns (out).

    Raises:
      ValueError: for other neurons, or a leaf that is not a matrix.

    Source: https://arxiv.org/abs/2603.28254.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.equilibrate()
      >>> tx.update(jnp.array([[3.0, 1.0], [4.0, 0.0]]), tx.init(jnp.zeros((2, 2))))[0]
      Array([[0.6, 1. ],
             [0.8, 0. ]], dtype=float32)
    """

    def even(piece: jax.Array) -> jax.Array:
        x = wide(piece)
        square = _per_neuron(jnp.sum, jnp.square(x), neurons)
        return safe_divide(x, jnp.sqrt(square)).astype(piece.dtype)

    return stateless_on_matrices(even, axes)


@checked
def renormalize(
    rms: float | None = None, *, axes: Axes = DEFAULT_AXES
) -> optax.GradientTransformation:
    r"""Rescales every matrix to a fixed norm or RMS.

    Args:
      rms: root mean square of the elements; ``None`` takes the Frobenius norm of an orthogonal
        matrix, :math:`\sqrt{\min(M, N)}` (Muon+).
      axes: which axes of a leaf are rows and columns.

    Raises:
      ValueError: for an `rms` that is negative or not finite, or a leaf that is not a matrix.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.renormalize(rms=0.2)
      >>> tx.update(jnp.ones((2, 2)), tx.init(jnp.zeros((2, 2))))[0]
      Array([[0.2, 0.2],
             [0.2, 0.2]], dtype=float32)
    """
    check_non_negative(rms=rms)

    def renormalized(piece: jax.Array) -> jax.Array:
        x = wide(piece)
        rows, columns = piece.shape[1:]
        target = min(rows, columns) ** 0.5 if rms is None else rms * (rows * columns) ** 0.5
        return (safe_divide(x, frobenius(x)) * target).astype(piece.dtype)

    return stateless_on_matrices(renormalized, axes)

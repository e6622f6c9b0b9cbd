"""Gradient noise scale: how large a batch is worth its tokens, measured while training."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..core import mapped
from ..core.arguments import checked
from ..core.arithmetic import lerp, wide
from ..core.checks import check_ratio
from ..core.own_norm import OwnNorm
from ..core.paths import path_string
from ..core.transformation import states_of, with_extra_args
from ..core.tree_checks import check_params_given
from ..optimizers.own_norms import own_norms
from ..optimizers.roles import Rules, complete, known_roles
from ._moments import moment_leaves

PRECONDITIONED = "preconditioned/"


class MicroBatches(NamedTuple):
    """What the micro-batches of one step reveal about the noise in its gradient."""

    squares: Mapping[
        str, jax.Array
    ]  # float32 [n]: `squared_norms` of each micro-batch's mean gradient
    weights: (
        jax.Array
    )  # float32 [n]: tokens (or examples) in each; all 0 where nothing was measured


class NoiseScaleState(NamedTuple):
    """State of `with_noise_scale`."""

    squares: Mapping[
        str, jax.Array
    ]  # float32 scalars: means of estimates of |G|^2, may be negative
    traces: Mapping[
        str, jax.Array
    ]  # likewise: of the trace of the covariance of one token's gradient
    inner: Any  # the inner optimizer's

    @property
    def preconditioned(self) -> bool:
        """Whether micro-batches are to be measured in the optimizer's own norm too."""
        return any(name.startswith(PRECONDITIONED) for name in self.squares)


@checked
def squared_norms(
    grads: optax.Updates,
    opt_state: Any = None,
    rules: Rules | None = None,
    *,
    tx: optax.GradientTransformation | None = None,
) -> dict[str, jax.Array]:
    r"""Squared norms of a gradient by role: what noise scales are made of.

    With an optimizer and its state, also ``preconditioned/role``: :math:`\langle g, P g \rangle` in the
    norm that the optimizer itself has. For a matrix of Shampoo that is
    :math:`\operatorname{tr}(G^\top L^{-1/4} G R^{-1/4})` with the roots it holds; of SOAP and KL-Shampoo
    :math:`1 / (\sqrt v + \epsilon)` and :math:`1 / (\sqrt{\lambda_a \lambda_b^\top} + \epsilon)` in
    their eigenbases; of Muon :math:`\operatorname{tr}(G^\top (M M^\top)^{-1/2} G)` with the momentum,
    which takes an eigendecomposition of every matrix each time. For every other parameter whose second
    moment the state holds under the name ``nu``, in the parameter's shape, it is
    :math:`\sum_j p_j g_j^2` with :math:`p_j \propto 1 / \sqrt{v_j}`. The mean eigenvalue of P is 1, over
    all matrices and over all others.

    Args:
      grads: a tree of gradients.
      opt_state: the optimizer's state before the update, for the preconditioned norms.
      rules: role rules, see :func:`ravine.optimizers.roles.assign_roles`.
      tx: the optimizer that the state is of, whole; its options are part of the norm.

    Returns:
      Names to float32 scalars.

    Raises:
      ValueError: for a state without its optimizer, or one of another; for an optimizer for matrices
        that has no norm of its own: NorMuon, AdaMuon, SOAP-Muon.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.stability import squared_norms
      >>> grads = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.ones(2)}
      >>> {name: float(square) for name, square in squared_norms(grads).items()}
      {'bias': 2.0, 'matrix': 36.0}
    """
    roles = jax.tree.leaves(known_roles(grads, rules))
    paths = jax.tree_util.tree_leaves_with_path(grads)
    moments = {path_string(path): nu for path, nu in moment_leaves(opt_state, "nu")}
    if (tx is None) != (opt_state is None):
        raise ValueError(
            "squared_norms needs tx and opt_state together: a norm takes the state, and the options of "
            "its optimizer; give both, or none for plain norms."
        )
    own = {} if tx is None else own_norms(tx, grads, opt_state)
    found: dict[str, jax.Array] = {}
    sums = {kind: (jnp.zeros([], jnp.float32), 0) for kind in (True, False)}
    preconditioned: list[tuple[str, bool, jax.Array]] = []
    for (path, leaf), role in zip(paths, roles, strict=True):
        square = jnp.square(wide(leaf)).astype(jnp.float32)
        _add(found, role, jnp.sum(square))
        name = path_string(path)
        nu, norm = moments.get(name), own.get(name)
        if norm is None and nu is not None and jnp.shape(nu) == leaf.shape:
            nu = wide(nu).astype(jnp.float32)
            scale = jnp.where(nu > 0, jax.lax.rsqrt(jnp.where(nu > 0, nu, 1)), 0)
            norm = OwnNorm(jnp.sum(scale * square), jnp.sum(scale))
        if norm is not None:
            norm = OwnNorm(*(x.astype(jnp.float32) for x in norm))
            is_matrix = name in own
            trace, size = sums[is_matrix]
            sums[is_matrix] = trace + norm.trace, size + leaf.size
            preconditioned.append((role, is_matrix, norm.square))
    for role, is_matrix, square in preconditioned:
        trace, size = sums[is_matrix]
        by = jnp.where(trace > 0, trace / size, 1)
        _add(found, PRECONDITIONED + role, square / by)
    return dict(sorted(found.items()))


def gathered(
    squares: Mapping[str, jax.Array], weight: jax.Array | float, axis_name: str
) -> MicroBatches:
    """The gradient of each device as a micro-batch of its own, inside ``jax.shard_map``.

    Args:
      squares: `squared_norms` of the gradient of this device's rows, before the mean over devices.
      weight: tokens (or examples) on this device.
      axis_name: the mesh axis, or axes, over which the batch is split.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> from ravine.stability import gathered, squared_norms
      >>> mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
      >>> grads = jnp.array([[1.0, 0.0], [0.0, 2.0]])  # a row is the gradient of a device
      >>> grads = jax.device_put(grads, NamedSharding(mesh, P("data")))
      >>> f = lambda g: gathered(squared_norms({"kernel": g}), 4.0, "data")
      >>> micro = jax.jit(jax.shard_map(f, mesh=mesh, out_specs=P(), check_vma=False))(grads)
      >>> micro.squares["matrix"].tolist(), micro.weights.tolist()
      ([1.0, 4.0], [4.0, 4.0])
    """
    gather = lambda x: jax.lax.all_gather(jnp.asarray(x, jnp.float32), axis_name)
    return MicroBatches({name: gather(x) for name, x in squares.items()}, gather(weight))


@checked
def with_noise_scale(
    tx: optax.GradientTransformation,
    rules: Rules | None = None,
    *,
    decay: float = 0.99,
    preconditioned: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""`tx`, with the gradient noise scale in its state, for :func:`noise_scale` to read.

    Let :math:`G` be the true gradient and :math:`\Sigma` the covariance of the gradient of one token,
    treated as independent of the others. The batch at which the noise in a step is as large as the
    signal, below which a batch twice as large nearly halves the number of steps, is

    .. math:: B = \frac{\operatorname{tr} \Sigma}{|G|^2}.

    The n micro-batches of a step, of :math:`w_i` tokens and mean gradients :math:`g_i`, and the
    gradient of all, :math:`\bar g = \sum_i w_i g_i / W`, :math:`W = \sum_i w_i`, give unbiased estimates

    .. math:: S = \frac{\sum_i w_i |g_i|^2 - W |\bar g|^2}{n - 1}, \qquad
        A = |\bar g|^2 - S / W

    of :math:`\operatorname{tr} \Sigma` and :math:`|G|^2`. Both are averaged over steps before they are
    divided, because the mean of ratios is biased. Preconditioned ones are in the optimizer's own norm,
    see :func:`squared_norms`; they are unbiased too, since the norm is of the state before the step.

    Give the update ``micro_batches=``, of :func:`micro_batch_value_and_grad` with
    ``measure=squared_norms`` or of :func:`gathered`; without, or where all weights are 0, the estimates
    stay. Put this outside of clipping: it needs the gradient that the micro-batches average to.
    Updates are those of `tx`.

    Args:
      tx: the whole optimizer.
      rules: role rules, the same as for `squared_norms`.
      decay: of the averages over measured steps, in [0, 1).
      preconditioned: also measure in the optimizer's own norm.

    Raises:
      ValueError: for a decay out of range, fewer than two micro-batches, squares of other roles than the
        model has, or an update without parameters; at `init` for an optimizer for matrices that has no
        norm of its own, unless `preconditioned` is false.

    Source: McCandlish et al., 2018, https://arxiv.org/abs/1812.06162, appendix A, for micro-batches of
    any sizes.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> from ravine.stability import noise_scale, squared_norms, with_noise_scale
      >>> from ravine.training.gradients import micro_batch_value_and_grad
      >>> params = {"kernel": jnp.zeros((1, 1))}
      >>> batch = jnp.array([1.0, 3.0, 1.0, 3.0])  # G = -2, and a variance of 4 / 3
      >>> loss = lambda p, x: jnp.mean((p["kernel"][0, 0] - x) ** 2) / 2
      >>> tx = with_noise_scale(ravine.sgd(0.1))
      >>> state = tx.init(params)
      >>> loss_and_grads = micro_batch_value_and_grad(
      ...     loss, 4, tokens=len, measure=lambda g: squared_norms(g, state, tx=tx))
      >>> _, grads, micro = loss_and_grads(params, batch)
      >>> _, state = tx.update(grads, state, params, micro_batches=micro)
      >>> round(float(noise_scale(state)["noise_scale"]), 3)  # (4 / 3) / (4 - 1 / 3)
      0.364
    """
    check_ratio(decay=decay)
    if decay == 1:
        raise ValueError("decay must be below 1: at 1 no measurement ever enters the averages.")
    inner = optax.with_extra_args_support(tx)
    complete(rules)

    def measure(grads: optax.Updates, inner_state: Any) -> dict[str, jax.Array]:
        if not preconditioned:
            return squared_norms(grads, rules=rules)
        return squared_norms(grads, inner_state, rules, tx=inner)

    def init(params: optax.Params) -> NoiseScaleState:
        inner_state = inner.init(params)
        has_leaves = bool(jax.tree.leaves(params))
        names = jax.eval_shape(measure, params, inner_state) if has_leaves else {}
        zeros = lambda: {name: jnp.zeros([], jnp.float32) for name in names}
        return NoiseScaleState(zeros(), zeros(), inner_state)

    def update(
        updates: optax.Updates,
        state: NoiseScaleState,
        params: optax.Params | None = None,
        *,
        micro_batches: MicroBatches | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, NoiseScaleState]:
        check_params_given(params, "with_noise_scale")
        squares, traces = state.squares, state.traces
        if micro_batches is not None:
            _check(micro_batches, squares)
            micro = micro_batches

            def taken_in() -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
                squares, traces = {}, {}
                for name, square in measure(updates, state.inner).items():
                    found, usable = _estimates(micro, name, square)
                    means = state.squares[name], state.traces[name]
                    squares[name], traces[name] = (
                        jnp.where(usable, lerp(new, mean, decay), mean)
                        for new, mean in zip(found, means, strict=True)
                    )
                return squares, traces

            # No pass over the gradient at steps without a measurement.
            squares, traces = mapped.cond(
                jnp.any(micro.weights > 0),
                taken_in,
                lambda: (dict(state.squares), dict(state.traces)),
            )
        done, inner_state = inner.update(updates, state.inner, params, **extra)
        return done, NoiseScaleState(squares, traces, inner_state)

    return with_extra_args(init, update)


def noise_scale(opt_state: Any) -> dict[str, jax.Array]:
    """The noise scales in a state, in the unit of the weights (tokens, or examples).

    Args:
      opt_state: an optimizer's state, or ``optimizer.opt_state`` of a ``flax.nnx.Optimizer``.

    Returns:
      ``noise_scale`` of all parameters together, ``noise_scale/role``, and both as
      ``preconditioned_noise_scale`` where the state has second moments. 0 before anything was measured;
      infinity where the gradient is lost in the noise: more steps have to be averaged.

    Raises:
      ValueError: unless there is exactly one `with_noise_scale` in the state.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> from ravine.stability import noise_scale, with_noise_scale
      >>> tx = with_noise_scale(ravine.sgd(0.1))
      >>> {name: float(x) for name, x in noise_scale(tx.init({"bias": jnp.ones(2)})).items()}
      {'noise_scale': 0.0, 'noise_scale/bias': 0.0}
    """
    found = states_of(NoiseScaleState, opt_state)
    if len(found) != 1:
        raise ValueError(
            f"this state holds {len(found)} with_noise_scale, not one; wrap the whole optimizer in it."
        )
    squares = {name: jnp.asarray(x[...]) for name, x in found[0].squares.items()}
    traces = {name: jnp.asarray(x[...]) for name, x in found[0].traces.items()}
    scales: dict[str, jax.Array] = {}
    for prefix, title in (("", "noise_scale"), (PRECONDITIONED, "preconditioned_noise_scale")):
        names = [n for n in squares if n.startswith(PRECONDITIONED) == bool(prefix)]
        if names:
            total = lambda tree, names=names: jnp.sum(jnp.stack([tree[n] for n in names]))
            scales[title] = _ratio(total(traces), total(squares))
        for name in names:
            scales[f"{title}/{name.removeprefix(prefix)}"] = _ratio(traces[name], squares[name])
    return dict(sorted(scales.items()))


def _add(sums: dict[str, jax.Array], name: str, value: jax.Array) -> None:
    sums[name] = sums[name] + value if name in sums else value


def _ratio(trace: jax.Array, square: jax.Array) -> jax.Array:
    lost = jnp.where(trace > 0, jnp.inf, 0).astype(jnp.float32)
    return jnp.where(square > 0, jnp.maximum(trace, 0) / jnp.where(square > 0, square, 1), lost)


def _check(micro: MicroBatches, names: Mapping[str, Any]) -> None:
    n = jnp.size(micro.weights)
    if n < 2:
        raise ValueError(
            f"a noise scale needs at least two micro-batches per step, got {n}; split the batch further."
        )
    if set(micro.squares) != set(names):
        raise ValueError(
            f"the micro-batches were measured as {sorted(micro.squares)}, but this model has "
            f"{sorted(names)}; give squared_norms the same rules, and, unless preconditioned=False, "
            "the optimizer and its state."
        )


def _estimates(
    micro: MicroBatches, name: str, whole: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Unbiased |G|^2 and tr Sigma of one step, and whether they may be used."""
    weights, squares = micro.weights, micro.squares[name]
    counted = weights > 0
    n, total = jnp.sum(counted), jnp.sum(jnp.where(counted, weights, 0))
    spread = jnp.sum(jnp.where(counted, weights * squares, 0)) - total * whole
    trace = spread / jnp.maximum(n - 1, 1).astype(jnp.float32)
    square = whole - trace / jnp.where(total > 0, total, 1)
    usable = (n > 1) & jnp.isfinite(trace) & jnp.isfinite(square)
    return (square, trace), usable

"""One training step, in the functional form the trainer uses and in the form of `nnx.Optimizer`."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ..core.transformation import states_of
from ..optimizers.links.curvature import gauss_newton_bartlett, hutchinson
from ..optimizers.roles import RAVINE_RULES
from ..stability import (
    Guarded,
    NoiseScaleState,
    cross_entropy,
    guarded_step,
    logit_statistics,
    next_token_loss,
    squared_norms,
    token_mean,
)
from .dropout import dropout_key
from .gradients import micro_batch_value_and_grad, sampled_value_and_grad
from .loss import fused_loss
from .model import Transformer, check_attention
from .model_config import ModelConfig
from .products import fast_products
from .staged import staged_value_and_grad

Batch = Any  # int32 [B, T + 1]: inputs are [:, :-1], targets [:, 1:]


class TrainState(NamedTuple):
    """Everything a step changes."""

    step: Any  # int32 scalar, updates made so far
    params: Any  # pure dictionary of arrays
    opt_state: Any


def loss_of(model: Transformer, batch: Batch, fused: bool = False) -> jax.Array:
    """Mean next-token loss of a batch, in nats."""
    if fused:
        return _fused(model, model.hidden(batch[:, :-1])[0], batch[:, 1:])
    return next_token_loss(model(batch[:, :-1]), batch[:, 1:])


def init_params(config: ModelConfig, seed: int) -> tuple[nnx.GraphDef, Any]:
    """The model's static half and its parameters as a pure dictionary of arrays.

    Raises:
      ValueError: for a kernel of attention that these devices do not have.
    """
    check_attention(config)
    return model_graph(config), parameters(config, jax.random.key(seed))


@functools.lru_cache(maxsize=8)
def model_graph(config: ModelConfig) -> nnx.GraphDef:
    """The model's static half."""
    return nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))


@functools.partial(jax.jit, static_argnums=0)  # one program instead of a hundred small ones
def parameters(config: ModelConfig, key: jax.Array) -> Any:
    """The model's initial parameters as a pure dictionary of arrays."""
    return nnx.to_pure_dict(nnx.state(Transformer(config, rngs=nnx.Rngs(key)), nnx.Param))


def init_state(params: Any, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros([], jnp.int32), params, tx.init(params))


def abstract_state(config: ModelConfig, tx: optax.GradientTransformation, dtype: Any) -> TrainState:
    """Shapes of the state before the first step, of parameters in a dtype."""

    def start() -> TrainState:
        params = jax.tree.map(lambda x: x.astype(dtype), parameters(config, jax.random.key(0)))
        return init_state(params, tx)

    return jax.eval_shape(start)


def make_loss(graphdef: nnx.GraphDef, fused: bool = False) -> Callable[[Any, Batch], jax.Array]:
    """`loss(params, batch)`, pure; `fused` holds no logits, see `ravine.training.loss`."""
    return lambda params, batch: loss_of(nnx.merge(graphdef, params), batch, fused)


@functools.partial(jax.jit, static_argnums=(0, 3))
def mean_loss(
    graphdef: nnx.GraphDef, params: Any, batches_NxBxT1: jax.Array, fused: bool = False
) -> jax.Array:
    """Mean loss over several batches, one after the other."""
    loss = make_loss(graphdef, fused)
    return jnp.mean(jax.lax.map(lambda batch: loss(params, batch), batches_NxBxT1))


def _trained_loss(
    graphdef: nnx.GraphDef,
    z_loss: float,
    sampled: jax.Array | None,
    attention_logits: bool,
    fused: bool,
    count: jax.Array,
) -> Callable[[Any, Batch], tuple[jax.Array, Any]]:
    """`loss(params, batch)` with the z-loss; and largest attention logits `[L, H]`, and what logits say.

    The former only with `attention_logits`; the latter only where `sampled` is true, and nothing where
    it is None.
    """

    def loss(params: Any, batch: Batch) -> tuple[jax.Array, Any]:
        model = fast_products(nnx.merge(graphdef, params))
        key = dropout_key(count, batch) if model.config.dropout else None
        hidden, highest_LxH = model.hidden(
            batch[:, :-1], measured=attention_logits, dropout_key=key
        )
        if fused:
            return _fused(model, hidden, batch[:, 1:], z_loss), (highest_LxH, {})
        logits = model.logits(hidden)
        said = {} if sampled is None else logit_statistics(logits, sampled=sampled)
        return _of_logits(logits, batch[:, 1:], z_loss), (highest_LxH, said)

    return loss


def _head_loss(
    model: Transformer, hidden: jax.Array, targets: jax.Array, z_loss: float, fused: bool
) -> jax.Array:
    if fused:
        return _fused(model, hidden, targets, z_loss)
    return _of_logits(model.logits(hidden), targets, z_loss)


def _of_logits(logits: jax.Array, targets: jax.Array, z_loss: float) -> jax.Array:
    parts = cross_entropy(logits, targets, z_loss=z_loss)
    return token_mean(parts.loss + parts.z_loss)


def _fused(
    model: Transformer, hidden: jax.Array, targets: jax.Array, z_loss: float = 0.0
) -> jax.Array:
    hidden, kernel = model.before_head(hidden)
    cap, form = model.config.final_soft_cap, model.config.soft_cap_form
    found = fused_loss(hidden, kernel, targets, z_loss=z_loss, cap=cap, cap_form=form)
    return found[0].astype(jnp.float32)


MEASURED = ("entropy", "log_normalizer", "max_attention_logit", "max_logit")
"""The measurements that a step passes to monitors."""


def unmeasured(config: ModelConfig) -> dict[str, Any]:
    """The extra arguments that `make_train_step` passes, as if the model measured nothing."""
    return {
        "loss": jnp.float32(1),
        "curvature": lambda params, key: params,
        "max_logits": jnp.zeros((config.layers, config.heads)),
        "measured": dict.fromkeys(MEASURED, jnp.float32(0)),
    }


def make_train_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    micro_batches: int = 1,
    *,
    z_loss: float = 0.0,
    monitor_every: int = 0,
    attention_logits: bool = True,
    fused: bool = False,
    noise_scale_every: int = 0,
    staged: bool = False,
    by_hutchinson: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """`step(state, batch) -> state, metrics`: jit it with ``donate_argnums=0``.

    Optimizers that take ``curvature=``, as Sophia, are given the Gauss-Newton-Bartlett estimator on the
    first of the micro-batches, or Hutchinson's with `by_hutchinson`; all are given ``loss=``, as guards
    need it, and, with `attention_logits`, ``max_logits=``, as QK-clip does. With `monitor_every`, the
    optimizer is to be one `with_monitors` of that period, which is given `MEASURED`. `fused` takes the
    loss without holding logits, which monitors need. With `noise_scale_every`, the optimizer holds one
    `with_noise_scale`, which is told every so many steps. `staged` passes the micro-batches through the
    stages of the mesh, see `ravine.training.staged`, and measures nothing.

    Raises:
      ValueError: for a fused loss with monitors, a noise scale of one micro-batch beside attention
        logits, or stages with anything that is measured, or with dropout.
    """
    if fused and monitor_every:
        raise ValueError(
            "monitors need logits, which the fused loss never holds; use one of the two."
        )
    if staged and (attention_logits or monitor_every or noise_scale_every):
        raise ValueError(
            "a staged step measures nothing; leave out attention_logits, monitor_every and "
            "noise_scale_every."
        )
    attention_logits = attention_logits or bool(monitor_every)
    if noise_scale_every and micro_batches == 1 and attention_logits:
        raise ValueError("a noise scale beside attention logits needs at least two micro_batches.")
    tx = optax.with_extra_args_support(tx)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        sampled = state.step % monitor_every == 0 if monitor_every else None
        trained = _trained_loss(graphdef, z_loss, sampled, attention_logits, fused, state.step)
        if noise_scale_every:
            (noise,) = states_of(NoiseScaleState, state.opt_state)
            own = {"opt_state": state.opt_state, "tx": tx} if noise.preconditioned else {}
            loss_and_grads = sampled_value_and_grad(
                trained,
                micro_batches,
                state.step % noise_scale_every == 0,
                lambda grads: squared_norms(grads, rules=RAVINE_RULES, **own),
                lambda batch: float(batch[:, 1:].size),
            )
        elif staged:
            head = functools.partial(_head_loss, z_loss=z_loss, fused=fused)
            loss_and_grads = staged_value_and_grad(graphdef, micro_batches, head)
        else:
            loss_and_grads = micro_batch_value_and_grad(trained, micro_batches, has_aux=True)
        (loss, (highest_NxLxH, said)), grads, *micro = loss_and_grads(state.params, batch)
        inputs = batch[::micro_batches, :-1]

        def logits(params: Any) -> jax.Array:
            if staged:
                raise ValueError(
                    "an estimate of the curvature passes through all layers at once, which a staged "
                    "step has not; leave out the stages."
                )
            return nnx.merge(graphdef, params)(inputs)

        if by_hutchinson:
            plain = lambda params: next_token_loss(logits(params), batch[::micro_batches, 1:])
            curvature = hutchinson(plain, params=state.params)
        else:
            curvature = gauss_newton_bartlett(logits, params=state.params)
        extra = {"loss": loss, "curvature": curvature}
        if micro:
            extra["micro_batches"] = micro[0]
        if attention_logits:
            extra["max_logits"] = jnp.max(highest_NxLxH, axis=0)
        if monitor_every:
            extra["measured"] = {
                "entropy": jnp.mean(said["entropy"]),
                "log_normalizer": jnp.mean(said["log_normalizer"]),
                "max_attention_logit": jnp.max(highest_NxLxH),
                "max_logit": jnp.max(said["max_logit"]),
            }
        if isinstance(tx, Guarded):
            params, opt_state, update_norm = guarded_step(
                tx, grads, state.opt_state, state.params, **extra
            )
        else:
            updates, opt_state = tx.update(grads, state.opt_state, state.params, **extra)
            params = optax.apply_updates(state.params, updates)
            update_norm = optax.tree.norm(updates)
        metrics = {
            "loss": loss,
            "gradient_norm": optax.tree.norm(grads),
            "update_norm": update_norm,
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


@nnx.jit
def nnx_train_step(model: Transformer, optimizer: nnx.Optimizer, batch: Batch) -> jax.Array:
    """The same step on mutable Flax objects; returns the loss.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> from flax import nnx
      >>> from ravine.training.model import ModelConfig, Transformer
      >>> from ravine.training.step import nnx_train_step
      >>> model = Transformer(ModelConfig(width=16, layers=1), rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, ravine.adamw(1e-3), wrt=nnx.Param)
      >>> loss = nnx_train_step(model, optimizer, jnp.zeros((2, 9), int))
    """
    loss, grads = nnx.value_and_grad(loss_of)(model, batch)
    optimizer.update(model, grads)
    return loss

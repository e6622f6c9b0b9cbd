"""The coordinate check: how much activations change in a few steps, at several widths or depths.

Under the right rule the change of every activation is of one size at all of them; a wrong one shows as
a power of the width or of the depth, from the first steps on and without tuning anything.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ...optimizers.links.growth import Rank
from ...optimizers.matrix.batch.refresh import Refresh
from ...optimizers.registry import OptimizerConfig
from ...optimizers.roles import RAVINE_RULES, decide
from ...optimizers.width import width_rule
from ..loss import is_large
from ..model import Transformer
from ..model_config import ModelConfig
from ..run import interrupts
from ..step import init_params, make_loss

UPDATES = "update of matrices"
"""The row of the spectral norms of hidden matrices' changes, relative to the activations'."""


def at_width(model: ModelConfig, width: int) -> ModelConfig:
    """The model with another width, heads as wide as before, and matrices of the same ratio of sides.

    Raises:
      ValueError: for a width that does not have whole heads, or a head that is the embedding.

    Example:
      >>> from ravine.training.model import ModelConfig
      >>> from ravine.training.width.coordinates import at_width
      >>> wide = at_width(ModelConfig(width=64, heads=4), 256)
      >>> wide.heads, wide.hidden
      (16, 768)
    """
    if model.tied:
        raise ValueError("rules for width do not cover a tied head; leave --tied out.")
    if width % model.head_width or (model.hidden * width) % model.width:
        raise ValueError(
            f"width {width} must be a multiple of the width of a head, {model.head_width}, and of "
            "what keeps the feed-forward ratio; take multiples of the base width."
        )
    heads = width // model.head_width
    kv_heads = heads * model.key_value_heads // model.heads if model.kv_heads else 0
    hidden = model.hidden * width // model.width
    return dataclasses.replace(
        model, width=width, heads=heads, kv_heads=kv_heads, feed_forward=hidden
    )


def at_depth(model: ModelConfig, layers: int) -> ModelConfig:
    """The model with more layers, its branches scaled by the base model's number over theirs.

    Raises:
      ValueError: for a number that is not a multiple of the base model's.

    Example:
      >>> from ravine.training.model import ModelConfig
      >>> from ravine.training.width.coordinates import at_depth
      >>> at_depth(ModelConfig(layers=2), 8).branch_scale
      0.25
    """
    if layers < model.layers or layers % model.layers:
        raise ValueError(f"{layers} layers must be a multiple of the base model's {model.layers}.")
    scale = model.branch_scale * model.layers / layers
    return dataclasses.replace(model, layers=layers, branch_scale=scale)


def activations(
    graphdef: nnx.GraphDef, params: Any, tokens_BxT: jax.Array, layers: int = 0
) -> dict[str, jax.Array]:
    """The stream behind the embedding and every layer, and the logits.

    Args:
      graphdef: of the model.
      params: its parameters.
      tokens_BxT: the input.
      layers: of the base model, if a deeper one is looked at where the base model's layers end.
    """
    model: Transformer = nnx.merge(graphdef, params)
    stream = jnp.take(model.embed.embedding[...], tokens_BxT, axis=0)
    found = {"embedding": stream}
    structure, stacked = nnx.split(model.layers)
    every = model.config.layers // (layers or model.config.layers)
    for index in range(model.config.layers):
        layer = nnx.merge(structure, jax.tree.map(lambda x, i=index: x[i], stacked))
        stream = layer(stream)[0]
        if (index + 1) % every == 0:
            found[f"layer {(index + 1) // every}"] = stream
    return found | {"logits": model.logits(model.final_norm(stream))}


def changes(
    optimizer: OptimizerConfig,
    learning_rate: float,
    model: ModelConfig,
    width: int,
    batches: Sequence[Any],
    *,
    layers: int = 0,
    rule: Iterable[bool] = (False, True),
    rank: Rank | None = None,
    seed: int = 0,
) -> dict[bool, dict[str, float]]:
    """The RMS of every activation's change after one step per batch, without and with the rule.

    Args:
      optimizer: which.
      learning_rate: constant, of the model as it is, the base.
      model: the base model.
      width: the width to check.
      batches: tokens `[B, T + 1]`; activations are measured on the first.
      layers: the depth to check, a multiple of the base model's; 0 for the base model's.
      rule: False for the base model's rate everywhere, and branches that are not scaled for their
        number; True for :func:`width_rule`, and branches that are.
      rank: as for :func:`width_rule`.
      seed: of the parameters.
    """
    layers = layers or model.layers
    wide, chosen = at_width(model, width), width_rule(optimizer, rank=rank)
    configs = {True: at_depth(wide, layers), False: dataclasses.replace(wide, layers=layers)}
    shapes = [
        leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(lambda: init_params(model, seed)[1]))
    ]
    tx = _transformation(optimizer, learning_rate)
    done: dict[bool, dict[str, float]] = {}
    programs: dict[ModelConfig, tuple[Any, ...]] = {}
    for with_rule in rule:
        config = configs[with_rule]
        if config not in programs:
            programs[config] = _programs(config, tx, batches[0], model.layers, seed)
        start, before, step, look = programs[config]
        decided = decide(start, RAVINE_RULES)
        ratio = layers / model.layers
        pairs = zip(decided, shapes, strict=True)
        factors = [chosen.factor(found, old, ratio) if with_rule else 1.0 for found, old in pairs]
        tree = jax.tree.unflatten(jax.tree.structure(start), [jnp.float32(f) for f in factors])
        now, state = start, tx.init(start)
        for batch in batches:
            interrupts.check()
            now, state = step(now, state, batch, tree)
        after = look(now)
        row = {name: float(_rms(after[name] - before[name])) for name in before}
        done[with_rule] = row | {UPDATES: _spectral(start, now, decided)}
    return done


def _transformation(
    optimizer: OptimizerConfig, learning_rate: float
) -> optax.GradientTransformation:
    overrides: dict[str, Any] = {"weight_decay": 0.0} if optimizer.accepts("weight_decay") else {}
    if optimizer.accepts("refresh"):  # else the first steps are the graft's
        overrides["refresh"] = Refresh(every=1)
    return optimizer.build(learning_rate, **overrides)


def _programs(
    config: ModelConfig, tx: optax.GradientTransformation, first: Any, layers: int, seed: int
) -> tuple[Any, ...]:
    """Parameters, their activations, the step and the look, for a model."""
    graphdef, params = init_params(config, seed)
    loss = make_loss(graphdef, is_large(config.vocabulary))
    look = jax.jit(lambda p: activations(graphdef, p, first[:, :-1], layers))

    @jax.jit
    def step(params: Any, state: Any, batch: Any, factors: Any) -> tuple[Any, Any]:
        grads = jax.grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, jax.tree.map(jnp.multiply, updates, factors)), state

    return params, look(params), step, look


def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x)))


def _spectral(start: Any, end: Any, decided: Any) -> float:
    """The geometric mean of hidden matrices' spectral norms of change over sqrt(out / in)."""
    sizes = []
    for old, new, found in zip(jax.tree.leaves(start), jax.tree.leaves(end), decided, strict=True):
        if found.role == "matrix":
            change_LxMxN = np.asarray(new) - np.asarray(old)
            norms = np.linalg.norm(change_LxMxN, ord=2, axis=(-2, -1))
            rows, columns = change_LxMxN.shape[-2:]
            sizes.append(np.mean(np.log(np.maximum(norms * (rows / columns) ** 0.5, 1e-30))))
    return float(np.exp(np.mean(sizes)))


def slope(sizes: Mapping[int, float]) -> float:
    """The power of the width, or depth, that fits sizes best; 0 if they do not depend on it.

    Example:
      >>> from ravine.training.width.coordinates import slope
      >>> round(slope({64: 1.0, 128: 2.0, 256: 4.0}), 6)
      1.0
    """
    widths, values = np.log(list(sizes)), np.log(list(sizes.values()))
    return float(np.polyfit(widths, values, 1)[0])

"""A trial: one short training run whose hyperparameters are arguments of a program compiled once."""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ...optimizers.registry import OptimizerConfig
from ...optimizers.roles import mask_by_role
from ...stability import clip_by_global_norm
from ..config import COSINE, RunConfig
from ..curvature import HUTCHINSON
from ..data.batches import heldout_batches, train_batches
from ..data.corpus import Corpus
from ..model_config import ModelConfig
from ..run import interrupts
from ..schedule_free import evaluated, with_own_schedule
from ..step import TrainState, init_params, init_state, make_train_step, mean_loss, model_graph
from .entrants import DECAYED
from .space import Point

LOOK = 50
"""Steps between two checks whether a trial has diverged."""
REMEMBERED = 4
"""How many optimizers' programs are kept for the next trials like theirs."""

Update = Callable[[OptimizerConfig, Any, Mapping[str, Any], Any], optax.GradientTransformation]
"""``update(optimizer, rate, numbers, decay)`` makes what follows clipping; hashable."""


def decayed(
    optimizer: OptimizerConfig, rate: Any, numbers: Mapping[str, Any], decay: Any
) -> optax.GradientTransformation:
    """The optimizer with its decay rates `numbers` and its weight decay."""
    given = dict(numbers)
    if optimizer.accepts("weight_decay"):
        given |= {"weight_decay": decay, "weight_decay_mask": mask_by_role(DECAYED)}
    return optimizer.build(rate, **given)


class Trials:
    """Runs trials of one model on one text.

    Numbers (learning rate, decay rates, weight decay) are arguments of the compiled step, so that all
    trials of an optimizer share it; other hyperparameters are compiled in.

    Args:
      run: model, batch size, clipping, evaluation and seed of the trials.
      corpus: the text; all of its held-out tokens count.
      update: makes the optimizer from its configuration and numbers.
    """

    def __init__(self, run: RunConfig, corpus: Corpus, update: Update = decayed):
        self._run, self._corpus, self._update = run, corpus, update
        self._sizes: Any = {"batch_size": run.batch_size, "context": run.model.context}
        batches = heldout_batches(corpus, batches=run.eval_batches, **self._sizes)
        self._heldout = jnp.asarray(batches)
        self._seed(run.seed)

    def with_seed(self, seed: int) -> "Trials":
        """These trials with another seed, and the same programs."""
        other = copy.copy(self)
        other._seed(seed)
        return other

    def _seed(self, seed: int) -> None:
        self._graphdef, self._start = init_params(self._run.model, seed)
        order: Any = {"order": self._run.order}
        self._batches = lambda: train_batches(self._corpus, seed=seed, **order, **self._sizes)

    def loss(self, point: Point, steps: int) -> float:
        """Held-out loss at the end of a whole schedule of this many steps; infinite if it diverged."""
        numbers, rest = _split(point.optimizer)
        numbers["weight_decay"] = point.weight_decay / point.learning_rate
        numbers = {name: jnp.float32(value) for name, value in numbers.items()}
        run = self._run
        init, step = _programs(run.model, run.clip_norm, run.fused, self._update, rest)
        state, batches = init(self._start, numbers), self._batches()
        for done, rate in enumerate(self._rates(point, steps), 1):
            interrupts.check()
            state, metrics = step(state, next(batches), jnp.float32(rate), numbers)
            if done % LOOK == 0 and not math.isfinite(float(metrics["loss"])):
                return math.inf
        loss = float(mean_loss(self._graphdef, evaluated(state), self._heldout, run.fused))
        return loss if math.isfinite(loss) else math.inf

    def _rates(self, point: Point, steps: int) -> np.ndarray:
        run = RunConfig(steps=steps, model=self._run.model)
        warmup = run.default_warmup(round(point.warmup * steps))
        run = dataclasses.replace(run, warmup_steps=warmup)
        run = with_own_schedule(run, point.optimizer.name)
        schedule = run.learning_rate(point.learning_rate)
        return np.asarray(schedule(jnp.arange(steps)))


@functools.lru_cache(maxsize=REMEMBERED)
def _programs(
    model: ModelConfig, clip_norm: float, fused: bool, update: Update, rest: OptimizerConfig
) -> tuple[Callable[..., TrainState], Callable[..., Any]]:
    """``init(params, numbers)`` and ``step(state, batch, rate, numbers)``, jitted."""

    def build(rate: Any, numbers: dict[str, Any]) -> optax.GradientTransformation:
        given = dict(numbers)
        tx = update(rest, rate, given, given.pop("weight_decay"))
        return optax.chain(clip_by_global_norm(clip_norm), tx) if clip_norm else tx

    def init(params: Any, numbers: dict[str, Any]) -> TrainState:
        return init_state(params, build(jnp.float32(0), numbers))

    def step(state: TrainState, batch: Any, rate: Any, numbers: dict[str, Any]) -> Any:
        tx = build(rate, numbers)
        options = {
            "attention_logits": False,
            "fused": fused,
            "by_hutchinson": rest.name in HUTCHINSON,
        }
        return make_train_step(model_graph(model), tx, **options)(state, batch)

    return jax.jit(init), jax.jit(step, donate_argnums=0)


USED = {"model", "batch_size", "seed", "clip_norm", "eval_batches", "data", "loss"}
USED |= {"bpe", "tokenizer", "bytes_per_token", "heldout_data", "order"}
"""The settings of a run that trials use."""

UNTOLD: dict[str, Any] = {"schedule": COSINE, "data": (), "heldout_data": ()}
"""What of a run does not decide a trial, each at one value, so that kept trials are recognized."""


def check_used(run: RunConfig) -> None:
    """Refuses settings of a race that trials would ignore.

    Raises:
      ValueError: for any that is not at its default, by their flags.
    """
    plain = RunConfig()
    ignored = [
        "--" + field.name.replace("_", "-")
        for field in dataclasses.fields(run)
        if field.name not in USED
        and "free" not in field.metadata
        and getattr(run, field.name) != getattr(plain, field.name)
    ]
    if ignored:
        raise ValueError(
            f"only a race uses {', '.join(ignored)}; leave out what this command would ignore."
        )


def _split(optimizer: OptimizerConfig) -> tuple[dict[str, Any], OptimizerConfig]:
    """Decay rates, and the configuration without them."""
    values = dict(optimizer.hyperparameters)
    numbers = {name: values.pop(name) for name in ("b1", "b2", "b3", "momentum") if name in values}
    return numbers, OptimizerConfig(optimizer.name, values)

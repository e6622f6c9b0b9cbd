"""Training at any batch size and learning rate, one program for each size."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ...optimizers.roles import mask_by_role
from ...stability import clip_by_global_norm, noise_scale, squared_norms, with_noise_scale
from ..compare.entrants import DECAYED, line_up
from ..config import check_learning_rate
from ..curvature import HUTCHINSON
from ..data.batches import heldout_batches, train_batches
from ..data.corpus import Corpus
from ..gradients import micro_batch_value_and_grad
from ..loss import is_large
from ..schedule_free import evaluated
from ..step import TrainState, init_params, init_state, make_loss, make_train_step, mean_loss
from .config import MICRO_BATCHES, BatchSizeConfig
from .rescale import Rescaled, rescaled

NOISE_BATCHES = 32
"""Over so many the noise scale is averaged."""


class Trainer:
    """Steps of any batch size and learning rate on one kind of state."""

    def __init__(self, config: BatchSizeConfig, corpus: Corpus):
        (entrant,) = (
            line_up(config.optimizer, f"{config.optimizer}={config.learning_rate}")
            if (config.learning_rate)
            else line_up(config.optimizer)
        )
        self.config, self.corpus = config, corpus
        self.optimizer, self.rate = entrant.optimizer, entrant.learning_rate
        check_learning_rate(config.optimizer, self.rate)
        self.fused = is_large(config.model.vocabulary)
        self.graphdef, self.start = init_params(config.model, config.seed)
        self.heldout = jnp.asarray(
            heldout_batches(
                corpus,
                batch_size=config.batch_size,
                context=config.model.context,
                batches=config.eval_batches,
            )
        )

    def at(self, batch_size: int) -> Rescaled:
        """The optimizer at a batch size."""
        ratio = batch_size / self.config.batch_size
        decay = self.config.weight_decay / self.rate
        return rescaled(self.optimizer, self.rate, decay, ratio)

    def transformation(self, batch_size: int, rate: Any) -> optax.GradientTransformation:
        """The chain with a learning rate, which may be traced."""
        here = self.at(batch_size)
        overrides: dict[str, Any] = {}
        if here.optimizer.accepts("weight_decay"):
            overrides = {
                "weight_decay": here.weight_decay,
                "weight_decay_mask": mask_by_role(DECAYED),
            }
        tx = here.optimizer.build(rate, **overrides)
        clip = self.config.clip_norm
        return optax.chain(clip_by_global_norm(clip), tx) if clip else tx

    @functools.cache  # noqa: B019 - one trainer a command
    def step(self, batch_size: int) -> Any:
        """``step(state, batch, rate)``, compiled once per batch size."""

        def step(state: TrainState, batch: Any, rate: jax.Array) -> Any:
            tx = self.transformation(batch_size, rate)
            options = {
                "attention_logits": False,
                "fused": self.fused,
                "by_hutchinson": self.optimizer.name in HUTCHINSON,
            }
            return make_train_step(self.graphdef, tx, **options)(state, batch)

        return jax.jit(step, donate_argnums=0)

    def fresh(self) -> TrainState:
        """The state before the first step."""
        tx = self.transformation(self.config.batch_size, self.rate)
        return jax.jit(lambda params: init_state(params, tx))(self.start)

    def batches(self, batch_size: int, seed: int) -> Iterator[Any]:
        """Training data in an order of its own."""
        return train_batches(
            self.corpus, batch_size=batch_size, context=self.config.model.context, seed=seed
        )

    def loss(self, state: TrainState) -> float:
        """Held-out loss."""
        return float(mean_loss(self.graphdef, evaluated(state), self.heldout, self.fused))

    def noise(self, state: TrainState, seed: int) -> float:
        """The noise scale at these parameters, in tokens."""
        context = self.config.model.context
        measure = micro_batch_value_and_grad(
            make_loss(self.graphdef, self.fused),
            MICRO_BATCHES,
            tokens=lambda batch: batch.shape[0] * context,
            measure=squared_norms,
        )
        # Every batch counts alike, as near as matters over so few.
        tx = with_noise_scale(optax.set_to_zero(), decay=0.999)

        @jax.jit
        def add(found: Any, params: Any, batch: Any) -> Any:
            _, grads, micro = measure(params, batch)
            return tx.update(grads, found, params, micro_batches=micro)[1]

        found, batches = tx.init(state.params), self.batches(self.config.batch_size, seed)
        for _ in range(NOISE_BATCHES):
            found = add(found, state.params, next(batches))
        return float(noise_scale(found)["noise_scale"])

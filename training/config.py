"""The configuration of a run: typed, frozen, checked before anything is written."""

import dataclasses
import functools
import math
import os
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import optax

from .. import schedules
from ..schedules import BatchSizes
from .auxiliary import NO_AUXILIARY, AuxiliaryConfig
from .batch_schedule import CONSTANT, BatchSchedule, Rule
from .identity import BUCKET, EXTENDS, FREE, LATER
from .loss import is_large
from .model_config import ModelConfig
from .rollback import RollbackPolicy

COSINE = "cosine"
"""The schedule of optimizers that have none of their own."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The configuration that all optimizers of a race share."""

    steps: int = dataclasses.field(default=700, metadata=EXTENDS)
    """Updates made; with a batch schedule, those that batch_size would make of the same data."""
    batch_size: int = 16
    """Sequences per step, over all hosts."""
    batches: BatchSchedule = dataclasses.field(default=CONSTANT, metadata={**LATER, **EXTENDS})
    micro_batches: int = dataclasses.field(default=1, metadata=LATER)
    """Parts of a batch that are processed one after the other, in the memory of one; their
    gradients are added."""
    schedule: str | None = dataclasses.field(default=None, metadata=EXTENDS)
    """Name of the schedule, any of ravine.schedules.schedule_names(). By default the optimizer's own:
    Schedule-Free optimizers warm up and stay at the peak, all others follow a cosine. With
    schedule_options or end_ratio, the default is a cosine for all."""
    schedule_options: str = dataclasses.field(default="", metadata=EXTENDS)
    """Arguments of the schedule: name=value, separated by commas, such as
    decay_steps=60, shape=1-sqrt."""
    schedule_steps: int = dataclasses.field(default=0, metadata=EXTENDS)
    """Updates the schedule covers, warm-up included; 0 means as many as steps."""
    warmup_steps: int | None = dataclasses.field(default=None, metadata=EXTENDS)
    """Updates of linear warm-up, fewer than the schedule has; by default what was tuned for the
    optimizer, else 20, but at most a tenth of the schedule."""
    end_ratio: float | None = dataclasses.field(default=None, metadata=EXTENDS)
    """Learning rate at the end of the schedule, relative to its peak; by default the schedule's
    own, which is 0 where it can be."""
    clip_norm: float = 1.0
    """Global norm to which gradients are clipped; 0 switches clipping off."""
    skip_spikes: bool = False
    """Skip steps whose loss or gradient norm is far above the last ones, or not finite, see
    ravine.stability.skip_step."""
    qk_clip: float = 0.0
    """Bound on attention logits after a step, see ravine.stability.qk_clip; 0 switches it off.
    Kimi K2 takes 100."""
    rollback: str = ""
    """Return to a snapshot from before a loss spike that stays, and skip its data: fields of
    ravine.training.rollback.RollbackPolicy, name=value, separated by commas, such as
    every=50, margin=20; "default" for its own."""
    monitor_every: int = 0
    """Updates between two samples of ravine.stability.with_monitors, which go into metrics.jsonl; 0
    for none."""
    noise_scale_every: int = dataclasses.field(default=0, metadata=LATER)
    """Updates between two measurements of the gradient noise scale, in tokens, which go into
    metrics.jsonl, for Muon, Shampoo, SOAP and KL-Shampoo also in the norm of their own steps (others
    have none); 0 for none."""
    z_loss: float = 0.0
    """Coefficient of the z-loss, which the training loss includes and the held-out loss does not.
    PaLM takes 1e-4."""
    loss: Literal["auto", "plain", "fused"] = dataclasses.field(default="auto", metadata=LATER)
    """Fused never holds logits, which monitors need; auto takes it for vocabularies above 8192."""
    weight_decay: float | None = None
    """Share of every matrix that a step at the peak learning rate removes: the coefficient handed to
    the optimizer is this divided by its learning rate. By default what was tuned, else 3e-4."""
    auxiliary: AuxiliaryConfig = dataclasses.field(default=NO_AUXILIARY, metadata=LATER)
    eval_every: int = dataclasses.field(default=50, metadata=EXTENDS)
    """Updates between two evaluations on held-out text."""
    eval_batches: int = 32
    """Held-out batches of every evaluation."""
    seed: int = 0
    """Of the initial parameters and the order of the data."""
    data: tuple[Path, ...] = dataclasses.field(default=(), metadata=EXTENDS)
    """Text files or folders, or uint16 .bin files, gs:// and s3:// too; by default this Python's own
    standard library."""
    heldout_data: tuple[Path, ...] = dataclasses.field(default=(), metadata={**LATER, **EXTENDS})
    """With data in .bin files, those that are held out: evaluations take them from the first token on,
    and nothing is split off the others."""
    order: Literal["shuffled", "stored"] = dataclasses.field(default="shuffled", metadata=LATER)
    """Of training windows: shuffled by the seed, or as stored, of each .bin whole batches only."""
    bpe: int = dataclasses.field(default=0, metadata=LATER)
    """Size of a byte-pair encoding that is trained on the training text; 0 for bytes. It needs
    tokenizers."""
    tokenizer: Path | None = dataclasses.field(default=None, metadata={**LATER, **EXTENDS})
    """A tokenizer.json of Hugging Face's to encode the text with, instead."""
    bytes_per_token: float = dataclasses.field(default=0.0, metadata={**LATER, **EXTENDS})
    """Of a .bin, whose tokenizer is not known: bytes of text per token, so that losses are reported in
    bits per byte too; 0 for unknown."""
    checkpoint_every: int = dataclasses.field(default=0, metadata=EXTENDS)
    """Updates between two checkpoints; 0 keeps that of the end, or of a signal, alone."""
    keep_checkpoints: int = dataclasses.field(default=2, metadata=FREE)
    """Checkpoints kept, the newest ones; 0 for all, as cooldowns may branch off any (--branch-from)."""
    log_every: int = dataclasses.field(default=10, metadata=FREE)
    """Updates whose metrics are fetched and written to metrics.jsonl together; none are lost."""
    read_threads: int = dataclasses.field(default=0, metadata=FREE)
    """Threads that read batches ahead, for a .bin on a slow disk; with 0, a batch is read while the
    device works on the one before."""
    ema: float = dataclasses.field(default=0.0, metadata=LATER)
    """Decay of a moving average of the parameters that is evaluated beside them; 0 for none."""
    samples: int = dataclasses.field(default=0, metadata=FREE)
    """Continuations of held-out text drawn at the end of every run, into samples.txt."""
    profile: Path | None = dataclasses.field(default=None, metadata={**FREE, **BUCKET})
    """Folder for JAX's profile of ten updates of every run, the eleventh and those after it; gs:// and
    s3:// too."""
    # Five tokens per parameter in 700 steps. Layers in one piece take a seventh less time on CPU.
    model: ModelConfig = dataclasses.field(
        default_factory=lambda: ModelConfig(width=64, layers=2, unroll=2)
    )

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "eval_every", "eval_batches", "log_every", "micro_batches")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        whole = ("schedule_steps", "warmup_steps", "checkpoint_every", "monitor_every", "seed")
        for name in (*whole, "read_threads", "noise_scale_every", "samples", "keep_checkpoints"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        for name in ("steps", "schedule_steps", "warmup_steps"):
            if (getattr(self, name) or 0) >= 2**31:
                raise ValueError(
                    f"{name} must be below 2**31, steps are counted in int32; got {getattr(self, name)}."
                )
        if self.warmup_steps is not None and self.warmup_steps >= self.horizon:
            raise ValueError(
                f"warmup_steps must be fewer than the {self.horizon} updates of the schedule, got "
                f"{self.warmup_steps}."
            )
        if self.seed >= 2**32:
            raise ValueError(f"seed must be below 2**32, got {self.seed}.")
        for name in ("clip_norm", "weight_decay", "qk_clip", "z_loss"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and not negative, got {value}.")
        if self.samples > self.batch_size:
            raise ValueError(
                f"samples must be at most the batch_size of {self.batch_size}, got {self.samples}."
            )
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must lie in [0, 1), 0.999 is common; got {self.ema}.")
        if self.profile is not None:
            ways = (self.profile, *self.profile.parents)
            there = next((path for path in ways if os.path.lexists(path)), None)
            if there is not None and not there.is_dir():
                raise ValueError(
                    f"profile {self.profile} cannot be a folder, as {there} is none; give another."
                )
        if self.bpe and not 256 < self.bpe <= 1 << 20:
            raise ValueError(
                f"bpe must be above 256, the bytes, and at most 2**20, got {self.bpe}."
            )
        if self.bpe and self.tokenizer is not None:
            raise ValueError("bpe trains an encoding and tokenizer names one; give one of them.")
        if not (math.isfinite(self.bytes_per_token) and self.bytes_per_token >= 0):
            raise ValueError(
                f"bytes_per_token must be finite and not negative, got {self.bytes_per_token}."
            )
        schedules.parse_options(self.schedule_name, self.schedule_options)
        if rest := self.auxiliary.rest_schedule:
            schedules.parse_options(rest, self.auxiliary.rest_schedule_options)
        self.rollback_policy()
        if self.loss == "fused" and self.monitor_every:
            raise ValueError(
                "monitors need logits, which a fused loss never holds; take --loss plain."
            )
        if (
            self.noise_scale_every
            and self.micro_batches == 1
            and (self.qk_clip or self.monitor_every)
        ):
            raise ValueError(
                "noise_scale_every beside monitors or qk_clip needs --micro-batches 2 or more."
            )
        if self.qk_clip and self.model.qk_norm:
            raise ValueError(
                "qk_clip does nothing under the model's qk_norm; switch one of them off."
            )
        given = None not in (self.model.init_output, self.model.init_down)
        if self.auxiliary.fixed_norm and self.model.zero_outputs and not given:
            raise ValueError(
                "fixed_norm keeps matrices of zeros zero; give init_output and init_down, or leave "
                "zero_outputs out."
            )
        if self.end_ratio is not None and not 0 <= self.end_ratio <= 1:
            raise ValueError(f"end_ratio must lie in [0, 1], got {self.end_ratio}.")
        if self.schedule_steps and self.steps > self.schedule_steps:
            raise ValueError(
                f"steps {self.steps} is more than the {self.schedule_steps} updates the schedule "
                "covers; raise --schedule-steps or lower --steps."
            )
        if self.batches != CONSTANT and self.read_threads:
            raise ValueError("read_threads do nothing under a batch schedule; leave them out.")
        if (
            self.batches.batch_schedule == "ramp"
        ):  # a Seesaw evaluates its schedule, which wakes JAX
            self.batches.sizes(self.batch_size, self.steps, lambda count: count)

    @property
    def fused(self) -> bool:
        """Whether the loss never holds logits."""
        large = is_large(self.model.vocabulary) and not self.monitor_every
        return self.loss == "fused" or (self.loss == "auto" and large)

    @property
    def schedule_name(self) -> str:
        """The schedule of an optimizer that has none of its own."""
        return self.schedule or COSINE

    @property
    def horizon(self) -> int:
        """Updates the schedule covers."""
        return self.schedule_steps or self.steps

    @property
    def warmup(self) -> int:
        """Warm-up updates."""
        return self.default_warmup(20) if self.warmup_steps is None else self.warmup_steps

    def default_warmup(self, updates: int) -> int:
        """A warm-up that nobody asked for: a run shorter than ten of it takes a tenth of itself."""
        return min(updates, self.horizon // 10)

    def rollback_policy(self) -> RollbackPolicy | None:
        """When the run returns, and where to."""
        return RollbackPolicy.parse(self.rollback) if self.rollback else None

    @functools.cached_property
    def batch_sizes(self) -> BatchSizes:
        """Sequences of every update."""
        if self.batches == CONSTANT:
            return BatchSizes((self.batch_size,))
        return self.batches.sizes(self.batch_size, self.horizon, self._reference(1.0))

    @functools.cached_property
    def updates(self) -> int:
        """Updates made in the end; those of the data that `steps` of `batch_size` see."""
        return self.batch_sizes.count_at(self.steps * self.batch_size)

    @property
    def sizes_used(self) -> tuple[int, ...]:
        """The sizes of batches that the run comes to, in their order."""
        return tuple(size for size, _ in self.batch_sizes.phases(self.updates))

    def micro_batches_of(self, size: int, parts: int) -> int:
        """Micro-batches of a batch of this size, of which none is larger than those of `batch_size`.

        Raises:
          ValueError: for a size that `parts` of a mesh do not divide.
        """
        most = self.batch_size // self.micro_batches
        for count in range(1, size // parts + 1):
            if size % (count * parts) == 0 and size <= most * count:
                return count
        raise ValueError(
            f"a batch of {size} does not divide by the {parts} part(s) of the mesh, or by "
            f"{self.micro_batches} micro_batches; change batch_size or its schedule."
        )

    def learning_rate(self, peak: float, rule: Rule | None = None) -> optax.Schedule:
        """The schedule with the given peak, by the rule that an optimizer has for other batches.

        Raises:
          ValueError: for a batch schedule without a rule, or a Seesaw of a schedule whose shape depends
            on its peak.
        """
        reference = self._reference(peak)
        if self.batches == CONSTANT:
            return reference
        if rule is None:
            raise ValueError("learning rates of a batch schedule need a rule; give rule_of(name).")
        if self.batches.batch_schedule != "seesaw":
            return self.batches.rates(self.batch_size, self.horizon, reference, rule)
        # Its batches are cut where the schedule of peak 1 falls, and so its rates are too.
        unit, counts = self._reference(1.0), jnp.arange(self.horizon)
        found, expected = (np.asarray(values(counts)) for values in (reference, unit))
        if not np.allclose(found, peak * expected, rtol=1e-4, atol=1e-6 * peak):
            raise ValueError(
                "a Seesaw needs a schedule that is proportional to its peak, which "
                f"{self.schedule_name} is not; take another schedule, or a ramp."
            )
        rates = self.batches.rates(self.batch_size, self.horizon, unit, rule)
        return schedules.product(rates, schedules.constant(peak))

    def _reference(self, peak: float) -> optax.Schedule:
        return schedules.for_run(
            self.schedule_name,
            peak,
            self.horizon,
            warmup_steps=self.warmup,
            end_ratio=self.end_ratio,
            batch_size=self.batch_size,
            context=self.model.context,
            options=schedules.parse_options(self.schedule_name, self.schedule_options),
        )


def check_learning_rate(name: str, value: float) -> float:
    """`value`, or a `ValueError` that names the optimizer."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"the learning rate of {name} must be positive and finite, got {value}.")
    return value


MOST_REPEATS = 10_000


def check_repeats(**counts: int) -> None:
    """Raises unless there is at least one run of each and fewer than anybody can wait for."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}.")
        if count > MOST_REPEATS:
            raise ValueError(f"{name} must be at most {MOST_REPEATS}, got {count}.")


def decisive(told: dict[str, Any]) -> dict[str, Any]:
    """Of a `RunConfig` in JSON, what decided the past of its run."""
    extends = {f.name for f in dataclasses.fields(RunConfig) if "extends" in f.metadata}
    return {name: value for name, value in told.items() if name not in extends}

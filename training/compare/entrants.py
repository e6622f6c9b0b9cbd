"""The committed table of tuned learning rates, and how a line-up is read from it."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

import jax.numpy as jnp
import optax

from ...core.checks import near
from ...optimizers.own_norms import NoOwnNorm
from ...optimizers.registry import OptimizerConfig
from ...optimizers.roles import RAVINE_RULES, mask_by_role
from ...stability import clip_by_global_norm, qk_clip, skip_step, with_monitors, with_noise_scale
from ..auxiliary import on_spheres
from ..average import with_ema
from ..batch_schedule import rule_of
from ..config import RunConfig, check_learning_rate
from ..model_config import ModelConfig
from ..schedule_free import with_own_schedule
from ..step import MEASURED, abstract_state
from ..words import parse_numbers

UNBUILT: dict[str, Any] = {
    "seed": 0,
    "data": (),
    "heldout_data": (),
    "order": "shuffled",
    "eval_every": 1,
    "checkpoint_every": 0,
    **{f.name: f.default for f in dataclasses.fields(RunConfig) if "free" in f.metadata},
}
"""Settings of a run on which its optimizer does not depend, each at one value."""

DECAYED = ("matrix", "embedding", "head")


@dataclasses.dataclass(frozen=True)
class Entrant:
    """One optimizer of a race: its configuration, its peak learning rate, and what was tuned with it."""

    optimizer: OptimizerConfig
    learning_rate: float
    weight_decay: float = 3e-4
    """Share of every matrix that a step at the peak removes, unless the run sets it."""
    warmup: float | None = None
    """Share of the steps, unless the run sets it."""
    trials: int = 0
    """Of the sweep that tuned it."""
    repeat: int = 0
    """Which of several runs it is: added to the run's seed."""

    def __post_init__(self) -> None:
        check_learning_rate(self.optimizer.name, self.learning_rate)

    @property
    def name(self) -> str:
        """The optimizer's registered name."""
        return self.optimizer.name

    @property
    def label(self) -> str:
        """Its folder: the name, and from the second run on which it is."""
        return f"{self.name}-{self.repeat + 1}" if self.repeat else self.name

    def adapted(self, run: RunConfig) -> RunConfig:
        """The run with this entrant's seed, and its decay, warm-up and schedule where none are given."""
        changes: dict[str, Any] = {"seed": run.seed + self.repeat}
        if run.weight_decay is None:
            changes["weight_decay"] = self.weight_decay
        if run.warmup_steps is None and self.warmup is not None:
            changes["warmup_steps"] = run.default_warmup(round(self.warmup * run.horizon))
        return with_own_schedule(dataclasses.replace(run, **changes), self.name)

    def build(self, run: RunConfig) -> optax.GradientTransformation:
        """Clipping, the optimizer as the run has it, QK-clip; a guard and monitors around them.

        It is the same object for runs that differ only in settings that it does not depend on, such as
        the seed: they share their programs.
        """
        run = dataclasses.replace(self.adapted(run), **UNBUILT)
        return _built(dataclasses.replace(self, trials=0, repeat=0), run)


@functools.lru_cache(maxsize=32)
def _built(entrant: Entrant, run: RunConfig) -> optax.GradientTransformation:
    overrides: dict[str, Any] = {}
    if entrant.optimizer.accepts("weight_decay"):
        overrides["weight_decay"] = (run.weight_decay or 0.0) / entrant.learning_rate
        overrides["weight_decay_mask"] = mask_by_role(DECAYED)
    rates = run.learning_rate(entrant.learning_rate, rule_of(entrant.name))
    rest = run.auxiliary
    if rest.fixed_norm:
        overrides["weight_decay"] = 0.0
    tx = entrant.optimizer.build(1.0 if rest.fixed_norm else rates, **overrides)
    if rest.fixed_norm:
        tx = on_spheres(tx, rates)
    if rest.given:
        tx = rest.beside(tx, _rest_schedule(run))
    before = [clip_by_global_norm(run.clip_norm)] if run.clip_norm else []
    after = [qk_clip(run.qk_clip, run.model.head_weights)] if run.qk_clip else []
    if before or after:
        tx = optax.chain(*before, tx, *after)
    if run.ema:
        tx = with_ema(tx, run.ema)
    if run.noise_scale_every:
        tx = _with_noise_scale(tx, run.model)
    if run.skip_spikes:
        tx = skip_step(tx)
    if run.monitor_every:
        every = run.monitor_every
        tx = with_monitors(tx, RAVINE_RULES, every=every, measured=MEASURED)
    return tx


def _rest_schedule(run: RunConfig) -> Callable[[float], optax.Schedule]:
    """From a peak to the learning rates of what the optimizer does not take."""
    if name := run.auxiliary.rest_schedule:
        options = run.auxiliary.rest_schedule_options
        run = dataclasses.replace(run, schedule=name, schedule_options=options, schedule_steps=0)
    return lambda peak: run.learning_rate(peak, rule_of("adamw"))


def _with_noise_scale(
    tx: optax.GradientTransformation, model: ModelConfig
) -> optax.GradientTransformation:
    """With preconditioned noise scales too, where the optimizer has a norm of its own."""
    measured = with_noise_scale(tx, RAVINE_RULES)
    try:
        abstract_state(model, measured, jnp.float32)
    except NoOwnNorm:
        return with_noise_scale(tx, RAVINE_RULES, preconditioned=False)
    return measured


def tuned_table() -> dict[str, Any]:
    """The committed table: name -> learning rate, hyperparameters and every trial behind them."""
    text = (
        resources.files("ravine.training.compare")
        .joinpath("tuned.json")
        .read_text(encoding="utf-8")
    )
    return json.loads(text)


def line_up(
    names: str, learning_rates: str = "", hyperparameters: Sequence[str] = ()
) -> tuple[Entrant, ...]:
    """Entrants from the command line's words.

    Args:
      names: registered names, separated by commas.
      learning_rates: ``name=value`` pairs, separated by commas, that replace tuned values.
      hyperparameters: ``name.hyperparameter=value`` each, nested ones with more points, which replace
        tuned values and defaults; values as in JSON, other words are texts.

    Raises:
      ValueError: for unknown or repeated names, learning rates that are not positive and finite, or
        hyperparameters that do not exist or cannot be.

    Example:
      >>> from ravine.training.compare.entrants import line_up
      >>> [entrant.learning_rate for entrant in line_up("adamw,lion", "adamw=0.5,lion=0.25")]
      [0.5, 0.25]
      >>> (entrant,) = line_up("shampoo", hyperparameters=["shampoo.refresh.every=20"])
      >>> entrant.optimizer.value("refresh").every
      20
    """
    tuned = tuned_table()["optimizers"]
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise ValueError(f"no optimizer given; known: {', '.join(tuned)}.")
    repeated = {name for name in wanted if wanted.count(name) > 1}
    if repeated:
        raise ValueError(f"{sorted(repeated)[0]!r} is given twice; name each optimizer once.")
    replaced = parse_numbers(learning_rates, wanted, "optimizer of this race")
    given = _given(hyperparameters, wanted)
    entrants = []
    for name in wanted:
        row = tuned.get(name, {})
        config = OptimizerConfig(name, _merged(row.get("hyperparameters", {}), given[name]))
        if name not in tuned and name not in replaced:
            raise ValueError(
                f"{name} has no tuned learning rate; give --learning-rates {name}=VALUE."
            )
        rate = replaced[name] if name in replaced else row["learning_rate"]
        more = {key: row[key] for key in ("weight_decay", "warmup") if key in row}
        entrants.append(Entrant(config, rate, trials=row.get("trials", 0), **more))
    return tuple(entrants)


def _given(words: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Nested hyperparameters by optimizer, from ``shampoo.refresh.every=20``."""
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for word in words:
        path, equals, text = word.partition("=")
        name, *keys = path.strip().split(".")
        if not (equals and keys and all(keys)):
            raise ValueError(
                f"--set takes OPTIMIZER.HYPERPARAMETER=VALUE, as shampoo.refresh.every=20; got {word!r}."
            )
        if name not in found:
            raise ValueError(f"--set: {name!r} is no optimizer of this race; {near(name, names)}")
        if keys in (["learning_rate"], ["weight_decay"]):
            flag = {"learning_rate": f"--learning-rates {name}=VALUE"}.get(
                keys[0], "--weight-decay"
            )
            raise ValueError(
                f"--set {name}.{keys[0]}: give {flag} instead, which the schedule follows."
            )
        try:
            value = json.loads(text)
        except ValueError:
            value = {"None": None, "True": True, "False": False}.get(text.strip(), text.strip())
        inner: Any = value
        for key in reversed(keys):
            inner = {key: inner}
        found[name] = _merged(found[name], inner)
    return found


def _merged(old: Any, new: Any) -> Any:
    """Mappings one over the other, inner ones likewise."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return new
    return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}

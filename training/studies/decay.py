r"""The effect of weight decay in a run that sees every token once: `python -m ravine study decay`.

Decay keeps weights small, and an update turns a small weight further than a large one. So a run with
decay :math:`\lambda` has another *effective* learning rate, :math:`\eta_t / \lVert \theta_t \rVert`,
than one without. If that is all it does, a run without decay, whose rate is multiplied by
:math:`\lVert \theta_t \rVert / \lVert \theta^\lambda_t \rVert` at every step, ends where the decayed one
ends; and if decay does not regularise, the gap between training and held-out loss stays.

Source: D'Angelo et al., 2023, https://arxiv.org/abs/2310.04415.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.table import Table

from ... import schedules
from ...optimizers.adam import adamw
from ...optimizers.roles import RAVINE_RULES, assign_roles, mask_by_role
from ...stability import clip_by_global_norm
from ..data.batches import heldout_batches, train_batches
from ..data.corpus import Corpus, load_corpus
from ..loss import is_large
from ..model_config import ModelConfig
from ..run import interrupts
from ..run.files import write_json
from ..step import init_params, make_loss, mean_loss
from .picture import draw_decay

LAST = 20
"""Updates whose training losses are averaged at the end: a share of 1/20 of the run."""


@dataclasses.dataclass(frozen=True)
class DecayStudyConfig:
    """Shows what weight decay does where every token is seen about once.

    AdamW with decay; without; without, at the learning rate that turns weights as far at every step;
    and the first two with parameters and activations in bfloat16. Prints training and held-out loss
    at the end of the schedule.
    """

    steps: int = 400
    """Updates of each run, a whole cosine schedule."""
    learning_rate: float = 0.02
    """Peak."""
    weight_decay: float = 0.3
    """Coupled: a step removes this times its learning rate of every matrix."""
    batch_size: int = 16
    """Sequences per step."""
    eval_batches: int = 16
    """Held-out batches, and as many of the last training batches."""
    bfloat16: bool = True
    """Also run with parameters in bfloat16."""
    seed: int = 0
    """Of parameters and data."""
    data: tuple[Path, ...] = ()
    """Text files or a uint16 .bin; by default this Python's own standard library."""
    out: Path = Path("runs/study-decay")
    """Folder for decay.json and decay.png."""
    model: ModelConfig = dataclasses.field(
        default_factory=lambda: ModelConfig(width=64, layers=2, unroll=2)
    )

    def __post_init__(self) -> None:
        # The first update is warm-up, the second the whole decay of the rate.
        for name, least in (("steps", 2), ("batch_size", 1), ("eval_batches", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        for name in ("learning_rate", "weight_decay"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be finite and positive, got {value}.")
        if self.model.dtype != "float32":
            raise ValueError(
                "this study trains in float32, and then in bfloat16; leave out --dtype (and "
                "--attention cudnn, which has no float32)."
            )


class DecayRun(NamedTuple):
    """One run of the study."""

    losses: list[float]
    """Of every step's batch, before its update."""
    norms: list[float]
    """Of all matrices together, before every update."""
    train: float
    """Mean of the last losses."""
    heldout: float


def study_decay(config: DecayStudyConfig, console: Console) -> dict[str, DecayRun]:
    """Runs the study, prints its table, and writes the numbers and the figure.

    Raises:
      ValueError: for a text that cannot be used.
    """
    corpus = load_corpus(config.data)
    config.out.mkdir(parents=True, exist_ok=True)
    plain = _run(config, corpus, 0.0)
    decayed = _run(config, corpus, config.weight_decay)
    runs = {
        "with decay": decayed,
        "without": plain,
        "without, rate matched": _run(config, corpus, 0.0, norms=decayed.norms),
    }
    if config.bfloat16:
        runs["with decay, bfloat16"] = _run(config, corpus, config.weight_decay, dtype="bfloat16")
        runs["without, bfloat16"] = _run(config, corpus, 0.0, dtype="bfloat16")
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("AdamW", "train", "held-out", "gap", "norm of matrices", "largest rise"):
        table.add_column(column, justify="left" if column == "AdamW" else "right")
    for name, run in runs.items():
        gap = run.heldout - run.train
        cells = (f"{x:.3f}" for x in (run.train, run.heldout, gap))
        table.add_row(name, *cells, f"{run.norms[-1]:.1f}", f"{largest_rise(run.losses):.2f}")
    console.print(table)
    tokens = config.steps * config.batch_size * config.model.context
    console.print(
        f"losses in nats per token, train: mean over the last {_last(config.steps)} batches; "
        f"{tokens:,} of {len(corpus.train):,} training tokens seen",
        highlight=False,
    )
    write_json(config.out / "decay.json", {name: run._asdict() for name, run in runs.items()})
    draw_decay(config.out / "decay.png", runs)
    return runs


def largest_rise(losses: list[float], window: int = 5) -> float:
    """How far the mean of a few losses rises above the lowest before it: instability, after the start.

    Example:
      >>> from ravine.training.studies.decay import largest_rise
      >>> largest_rise([3.0, 2.0, 1.0, 4.0, 1.0], window=1), largest_rise([1.0, 3.0])
      (3.0, 0.0)
    """
    window = min(window, len(losses))
    means = np.convolve(losses, np.ones(window) / window, "valid")
    return float(np.max(means - np.minimum.accumulate(means)))


def _last(steps: int) -> int:
    return max(1, steps // LAST)


def _run(
    config: DecayStudyConfig,
    corpus: Corpus,
    weight_decay: float,
    *,
    norms: list[float] | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> DecayRun:
    model = dataclasses.replace(config.model, vocabulary=corpus.vocabulary, dtype=dtype)
    graphdef, params = init_params(model, config.seed)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    sizes: Any = {"batch_size": config.batch_size, "context": model.context}
    batches = train_batches(corpus, seed=config.seed, **sizes)
    warmup = max(1, config.steps // 20)
    rate = schedules.warmup(
        schedules.cosine(config.learning_rate, steps=config.steps - warmup), steps=warmup
    )
    rates = np.asarray(rate(jnp.arange(config.steps)))
    tx = optax.chain(
        clip_by_global_norm(1.0),
        adamw(
            1.0,
            b2=0.95,
            weight_decay=weight_decay,
            weight_decay_mask=mask_by_role(["matrix"], RAVINE_RULES),
        ),
    )
    roles = assign_roles(params, RAVINE_RULES)
    fused = is_large(model.vocabulary)
    loss = make_loss(graphdef, fused)

    @jax.jit
    def step(params: Any, state: Any, batch: Any, rate: Any, wanted: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        norm = _norm(params, roles)
        matched = rate * jnp.where(wanted > 0, norm / wanted, 1)

        def moved(p: jax.Array, u: jax.Array, role: str) -> jax.Array:
            by = matched if role == "matrix" else rate
            return p + (by * u.astype(jnp.float32)).astype(p.dtype)

        return jax.tree.map(moved, params, updates, roles), state, value, norm

    state, seen, sizes_of = tx.init(params), [], []
    for index in range(config.steps):
        interrupts.check()
        wanted = jnp.float32(0 if norms is None else norms[index])
        params, state, value, norm = step(
            params, state, next(batches), jnp.float32(rates[index]), wanted
        )
        seen.append(value)
        sizes_of.append(norm)
    losses = [float(x) for x in seen]
    heldout = jnp.asarray(heldout_batches(corpus, batches=config.eval_batches, **sizes))
    return DecayRun(
        losses,
        [float(x) for x in sizes_of],
        float(np.mean(losses[-_last(config.steps) :])),
        float(mean_loss(graphdef, params, heldout, fused)),
    )


def _norm(params: Any, roles: Any) -> jax.Array:
    """The norm of all matrices of layers together."""
    squares = jax.tree.map(
        lambda p, role: (
            jnp.sum(jnp.square(p.astype(jnp.float32))) if role == "matrix" else jnp.float32(0)
        ),
        params,
        roles,
    )
    return jnp.sqrt(sum(jax.tree.leaves(squares), start=jnp.float32(0)))

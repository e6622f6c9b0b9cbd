r"""How far the best learning rate moves with the width: `python -m ravine study width`.

The model of the race at several widths, heads as wide at all of them, and at every width learning rates
around the best. With the rules for width (`ravine.width_rule`) rates are those of the base model, and
what each parameter's is multiplied by follows from its shape; the best rate is then to be the same at
all widths. The control has one rate for all parameters of all widths.

Rates are a factor of 2 apart until worse ones lie on both sides of the best, and then a factor of
root 2; a parabola in the logarithm of the rate through those next to the best says where the best is.

Source: Yang et al., 2022, https://arxiv.org/abs/2203.03466 (transfer of the best rate); Qiu et al.,
2025, https://arxiv.org/abs/2512.05620, for matrix optimizers.
"""

import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.table import Table

from ...optimizers.links.growth import Rank
from ...optimizers.registry import OptimizerConfig
from ...optimizers.roles import RAVINE_RULES, decide, mask_by_role
from ...optimizers.width import scale_by_width, width_rule
from ..compare.entrants import DECAYED, Entrant, line_up
from ..compare.space import Point
from ..compare.trial import Trials
from ..config import RunConfig
from ..data.corpus import Corpus, load_corpus
from ..identity import to_json
from ..model import ModelConfig
from ..run import interrupts
from ..run.files import Lines, write_json
from ..run.meta import provenance
from ..step import init_params
from ..width.coordinates import at_width
from .optimum import Optimum, optimum
from .picture import draw_width

Key = tuple[str, bool, int]
"""An optimizer, whether the rule is used, and a width."""
Found = dict[Key, dict[float, list[float]]]
"""Losses by factor of the tuned rate, one per seed."""

Z = 1.645
"""Standard errors on either side of an interval of 90 %."""
REACH = 6
"""Doublings that a search goes up or down at most."""


@dataclasses.dataclass(frozen=True)
class WidthStudyConfig:
    """Shows how far the best learning rate moves with the width, by the rules and without them.

    Trains the model at every width and at learning rates around the best, prints where it is, and by
    what factor it moves from the first width to the last. Every run is a line of runs.jsonl; a study
    that was stopped goes on with what is missing. Takes an hour or more at the defaults.
    """

    optimizers: str = "adamw,muon,soap,shampoo"
    """Names, separated by commas; tuned ones."""
    widths: tuple[int, ...] = (64, 128, 256)
    """Two or more, rising; the first is the base model's."""
    length: int = 200
    """Updates of every run, a whole schedule."""
    seeds: int = 1
    """Runs of each learning rate."""
    control: bool = True
    """Also with one learning rate for all parameters at all widths."""
    rank: Rank | None = None
    """Which limit the rules take for whitened directions; by default each optimizer's own."""
    minutes: float = 0.0
    """Begin no run after so many minutes, and report what is there; 0 for no bound."""
    run: RunConfig = dataclasses.field(
        default_factory=lambda: RunConfig(seed=2000, eval_batches=32)
    )
    """Model, text, batch and first seed."""
    out: Path = Path("runs/study-width")
    """Folder for runs.jsonl, width.json and width.png."""

    def __post_init__(self) -> None:
        if len(self.widths) < 2 or list(self.widths) != sorted(set(self.widths)):
            raise ValueError(f"widths must be two or more that rise, got {list(self.widths)}.")
        for name in ("length", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not (math.isfinite(self.minutes) and self.minutes >= 0):
            raise ValueError(f"minutes must be finite and not negative, got {self.minutes}.")
        base = at_width(self.run.model, self.widths[0])
        for width in self.widths:
            at_width(base, width)
        for entrant in line_up(self.optimizers):
            width_rule(entrant.optimizer, rank=self.rank)


class _Scaled(Trials):
    """Trials whose updates are multiplied by a rule for width, with a decay that is not."""

    def __init__(self, run: RunConfig, corpus: Corpus, base: ModelConfig, rank: Rank | None):
        super().__init__(run, corpus)
        self._base = jax.eval_shape(lambda: init_params(base, run.seed)[1])
        self._rank: Rank | None = rank

    def _update(
        self, rest: OptimizerConfig, rate: Any, numbers: Mapping[str, Any], decay: Any
    ) -> optax.GradientTransformation:
        more = {"weight_decay": 0.0} if rest.accepts("weight_decay") else {}
        rule = width_rule(rest, rank=self._rank)
        return optax.chain(
            rest.build(rate, **numbers, **more),
            scale_by_width(rule, self._base, rules=RAVINE_RULES),
            optax.add_decayed_weights(-decay * rate, mask_by_role(DECAYED)),
        )


class Late(Exception):
    """The time for new runs is over."""


class _Runs:
    """Losses that are kept in a file."""

    def __init__(self, config: WidthStudyConfig, console: Console):
        self._config, self._console = config, console
        self._end = time.monotonic() + 60 * config.minutes if config.minutes else math.inf
        self._corpus = load_corpus(config.run.data)
        config.out.mkdir(parents=True, exist_ok=True)
        file = config.out / "runs.jsonl"
        self._known = _read(file)
        told = to_json(dataclasses.replace(config.run, data=()))
        self._task = _digest([told, self._corpus.fingerprint, config.length, config.widths[0]])
        self._source = {**provenance(), "text": self._corpus.description}
        self._lines = Lines(file)

    def losses(self, entrant: Entrant, ruled: bool, width: int, factor: float) -> list[float]:
        """Held-out, at the end, one per seed; infinite where a run diverged.

        Raises:
          Late: if one would have to be made.
        """
        seeds = range(self._config.seeds)
        return [self._loss(entrant, ruled, width, factor, repeat) for repeat in seeds]

    def _loss(self, entrant: Entrant, ruled: bool, width: int, factor: float, repeat: int) -> float:
        interrupts.check()
        config, scaled = self._config, ruled and width > self._config.widths[0]
        hyperparameters = json.loads(entrant.optimizer.to_json())["hyperparameters"]
        rule = self._factors(entrant, width) if scaled else None
        decides = [
            hyperparameters,
            entrant.learning_rate,
            entrant.weight_decay,
            entrant.warmup,
            rule,
        ]
        key = (self._task, entrant.name, _digest(decides), width, round(factor, 4), repeat)
        if key not in self._known:
            if time.monotonic() > self._end:
                raise Late
            warmup = 0.1 if entrant.warmup is None else entrant.warmup
            rate = entrant.learning_rate * factor
            point = Point(rate, entrant.weight_decay, warmup, entrant.optimizer)
            loss = self._trials(width, scaled, repeat).loss(point, config.length)
            row = {"key": key, "optimizer": entrant.name, "rule": scaled, "width": width}
            row |= {"learning_rate": rate, "factor": factor, "seed": config.run.seed + repeat}
            row |= {"steps": config.length, "heldout_loss": loss, **self._source}
            self._lines.write(row)
            self._known[key] = loss
            name = f"{entrant.name}, {'by the rule' if scaled else 'one rate'}"
            self._console.print(
                f"{name:<22} {width:>5} wide, rate x {factor:<6.3g} seed {repeat}: {loss:.4f} nats",
                highlight=False,
            )
        return self._known[key]

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()

    def _model(self, width: int) -> ModelConfig:
        base = dataclasses.replace(self._config.run.model, vocabulary=self._corpus.vocabulary)
        return at_width(at_width(base, self._config.widths[0]), width)

    def _factors(self, entrant: Entrant, width: int) -> list[float]:
        """What the rule multiplies rates by, so that another rule asks for runs of its own."""
        new, old = (
            jax.eval_shape(lambda w=w: init_params(self._model(w), 0)[1])
            for w in (width, self._config.widths[0])
        )
        rule = width_rule(entrant.optimizer, rank=self._config.rank)
        shapes = [leaf.shape for leaf in jax.tree.leaves(old)]
        pairs = zip(decide(new, RAVINE_RULES), shapes, strict=True)
        return [round(rule.factor(found, shape), 6) for found, shape in pairs]

    @functools.lru_cache(4)  # noqa: B019 - as long-lived as its command
    def _trials(self, width: int, scaled: bool, repeat: int) -> Trials:
        seed = self._config.run.seed + repeat
        run = dataclasses.replace(self._config.run, seed=seed, model=self._model(width))
        if not scaled:
            return Trials(run, self._corpus)
        return _Scaled(run, self._corpus, self._model(self._config.widths[0]), self._config.rank)


def study_width(config: WidthStudyConfig, console: Console) -> dict[Key, Optimum]:
    """Makes the runs that are missing, prints the table, and writes the numbers and the figure.

    Raises:
      ValueError: for a text or a file of runs that cannot be used.
    """
    found: Found = {}
    runs = _Runs(config, console)
    entrants = line_up(config.optimizers)
    try:
        for ruled in (True, False) if config.control else (True,):
            for width in config.widths:
                for entrant in entrants:
                    if width == config.widths[0] and not ruled:
                        found[entrant.name, ruled, width] = found[entrant.name, True, width]
                        continue
                    mine = found.setdefault((entrant.name, ruled, width), {})
                    before = [w for w in config.widths if w < width][-1:]
                    known = found[entrant.name, ruled, before[0]] if before else {}
                    search(
                        functools.partial(runs.losses, entrant, ruled, width),
                        mine,
                        min(known, key=lambda f, k=known: float(np.mean(k[f])), default=1.0),
                    )
                    jax.clear_caches()
    finally:
        runs.close()
    best = {key: optimum(losses) for key, losses in found.items() if losses}
    rates = {entrant.name: entrant.learning_rate for entrant in entrants}
    console.print(_table(config, rates, best))
    write_json(config.out / "width.json", _told(config, rates, found, best))
    draw_width(config.out / "width.png", rates, found, best)
    return best


def search(
    measure: Callable[[float], list[float]], found: dict[float, list[float]], start: float
) -> None:
    """Factors of 2 from the start until worse ones are on both sides, then root 2 beside the best.

    Args:
      measure: from a factor to the losses of the seeds.
      found: where they go.
      start: the first factor, a power of root 2.
    """
    mean = lambda half: float(np.mean(found[2 ** (half / 2)]))

    def tried(half: int) -> bool:
        if 2 ** (half / 2) not in found:
            found[2 ** (half / 2)] = measure(2 ** (half / 2))
        return True

    best = round(2 * math.log2(start))
    try:
        tried(best)
        for step in (2, -2):
            for _ in range(REACH):
                if not (tried(best + step) and mean(best + step) < mean(best)):
                    break
                best += step
        for step in (1, -1):
            if tried(best + step) and mean(best + step) < mean(best):
                best += step
                break
        for half in (best - 2, best - 1, best + 1, best + 2):
            tried(half)
    except Late:
        pass


def moved(best: Mapping[Key, Optimum], name: str, ruled: bool) -> tuple[float, float]:
    """By what power of two the best rate moves from the first width to the last, and its error."""
    mine = sorted(key for key in best if key[:2] == (name, ruled))
    first, last = best[mine[0]], best[mine[-1]]
    return last.log2 - first.log2, math.hypot(first.error, last.error)


def _table(
    config: WidthStudyConfig, rates: Mapping[str, float], best: Mapping[Key, Optimum]
) -> Table:
    caption = (
        "best learning rates of the base model by a parabola, with standard errors in percent; >: the "
        "best one tried is an end of the search. Moved: from the first width to the last, with an "
        "interval of 90 %"
    )
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    table.add_column("optimizer")
    table.add_column("rates")
    for width in config.widths:
        table.add_column(f"{width} wide", justify="right")
    table.add_column("moved", justify="right")
    table.add_column("below root 2")
    for name, rate in rates.items():
        for ruled in (True, False) if config.control else (True,):
            cells = [_cell(rate, best.get((name, ruled, width))) for width in config.widths]
            row = [name, "by the rule" if ruled else "one for all", *cells]
            ends = [
                best.get((name, ruled, width)) for width in (config.widths[0], config.widths[-1])
            ]
            if all(end is not None and end.inside for end in ends):
                by, error = moved(best, name, ruled)
                low, high = by - Z * error, by + Z * error
                row.append(f"x {2**by:.2f} ({2**low:.2f} to {2**high:.2f})")
                sure = "yes" if max(-low, high) < 0.5 else "probably"
                row.append(sure if abs(by) < 0.5 else "no")
            table.add_row(*row)
    return table


def _cell(rate: float, at: Optimum | None) -> str:
    if at is None:
        return "-"
    told = f"{rate * 2**at.log2:.3g}"
    if not at.inside:
        return f"> {told}"
    return told if math.isinf(at.error) else f"{told} ± {100 * (2**at.error - 1):.0f}"


def _told(
    config: WidthStudyConfig,
    rates: Mapping[str, float],
    found: Found,
    best: Mapping[Key, Optimum],
) -> dict[str, Any]:
    rows = []
    for (name, ruled, width), losses in found.items():
        if losses:
            runs = {f"{rates[name] * factor:.5g}": losses[factor] for factor in sorted(losses)}
            at = best[name, ruled, width]
            row = {"optimizer": name, "rule": ruled, "width": width, "losses": runs}
            rows.append(row | {"best_rate": rates[name] * 2**at.log2, **at._asdict()})
    return {"config": to_json(config), "best": rows}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def _read(file: Path) -> dict[tuple[Any, ...], float]:
    known = {}
    for number, line in enumerate(file.read_text().splitlines() if file.exists() else [], 1):
        try:
            row = json.loads(line)
            loss = row["heldout_loss"]
            known[tuple(row["key"])] = math.inf if loss is None else loss
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{file} is damaged in line {number}; remove that line, and its run is made again."
            ) from None
    return known

"""The command `python -m ravine coordinate-check`: activations' change over widths or depths."""

import dataclasses
import math
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table

from ..compare.entrants import Entrant, line_up
from ..config import check_learning_rate
from ..data.batches import train_batches
from ..data.corpus import load_corpus
from ..identity import to_json
from ..model_config import ModelConfig
from ..run.files import write_json
from .coordinates import at_depth, at_width, changes, slope
from .picture import draw

Sizes = dict[str, dict[int, float]]
"""Of each activation, its change by width or depth."""


@dataclasses.dataclass(frozen=True)
class CoordinateConfig:
    """Checks that activations change as much in a wide or deep model as in a small one.

    A few steps at the tuned rate, at several widths, without the rule for width and with it: what
    stays with the width has a slope near 0. The first width is the base model's, at which both are the
    same. With --depths, at several depths. Takes minutes.
    """

    optimizers: str = "adamw,muon,shampoo,soap"
    """Names, separated by commas."""
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Two or more, rising; heads are as wide as at the first."""
    depths: tuple[int, ...] = ()
    """Numbers of layers in place of widths, multiples of the first; all at the model's width."""
    steps: int = 3
    """Updates, each on a batch of its own."""
    batch_size: int = 16
    """Sequences per step."""
    rank: Literal["low", "full"] | None = None
    """Which limit the rules take for whitened directions, see ravine.optimizers.width.width_rule; by
    default each optimizer's own."""
    learning_rates: str = ""
    """Rates at the first width, name=value, separated by commas, in place of the tuned ones."""
    rate_factor: float = 0.1
    """Of the learning rate: changes that are small are in proportion to it."""
    seed: int = 0
    """Of the parameters and the data."""
    data: tuple[Path, ...] = ()
    """Text files or a uint16 .bin; by default this Python's own standard library."""
    out: Path = Path("runs/coordinate-check")
    """Folder for changes.json and coordinate_check.png."""
    model: ModelConfig = dataclasses.field(
        default_factory=lambda: ModelConfig(width=64, layers=2, unroll=2)
    )
    """The base model; its width is the first of the widths."""

    def __post_init__(self) -> None:
        if self.depths and self.widths != CoordinateConfig.widths:
            raise ValueError("widths or depths are compared, not both; leave one of them out.")
        if self.depths:
            self._check_depths()
        elif len(self.widths) < 2 or list(self.widths) != sorted(set(self.widths)):
            raise ValueError(f"widths must be two or more that rise, got {list(self.widths)}.")
        elif self.model.width != self.widths[0]:
            object.__setattr__(self, "model", at_width(self.model, self.widths[0]))
        for width in () if self.depths else self.widths:
            at_width(self.model, width)
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not (math.isfinite(self.rate_factor) and self.rate_factor > 0):
            raise ValueError(f"rate_factor must be finite and positive, got {self.rate_factor}.")
        for entrant in self.line_up():
            check_learning_rate(entrant.name, entrant.learning_rate)

    def _check_depths(self) -> None:
        depths = self.depths
        if len(depths) < 2 or list(depths) != sorted(set(depths)) or depths[0] < 1:
            raise ValueError(f"depths must be two or more that rise, got {list(depths)}.")
        base = dataclasses.replace(self.model, layers=depths[0])
        object.__setattr__(self, "model", base)
        for layers in depths:
            at_depth(base, layers)

    @property
    def sizes(self) -> tuple[int, ...]:
        """What is compared: depths if there are any, else widths."""
        return self.depths or self.widths

    def line_up(self) -> tuple[Entrant, ...]:
        """The optimizers with their rates."""
        return line_up(self.optimizers, self.learning_rates)


def coordinate_check(config: CoordinateConfig, console: Console) -> dict[str, dict[bool, Sizes]]:
    """Measures, prints tables, and writes the numbers and the figure.

    Raises:
      ValueError: for a text that cannot be used.
    """
    corpus = load_corpus(config.data)
    model = dataclasses.replace(config.model, vocabulary=corpus.vocabulary)
    stream = train_batches(
        corpus, batch_size=config.batch_size, context=model.context, seed=config.seed
    )
    batches = [next(stream) for _ in range(config.steps)]
    config.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[bool, Sizes]] = {}
    for entrant in config.line_up():
        mine: dict[bool, Sizes] = {False: {}, True: {}}
        for size in config.sizes:
            each = changes(
                *(entrant.optimizer, entrant.learning_rate * config.rate_factor),
                *(model, model.width if config.depths else size, batches),
                layers=size if config.depths else 0,
                rank=config.rank,
                seed=config.seed,
            )
            for with_rule, row in each.items():
                for name, change in row.items():
                    mine[with_rule].setdefault(name, {})[size] = change
        found[entrant.name] = mine
        for with_rule, sizes in mine.items():
            console.print(_table(config, entrant, with_rule, sizes))
        _write(config, found)
    return found


def _write(config: CoordinateConfig, found: dict[str, dict[bool, Sizes]]) -> None:
    told = {name: {str(key): sizes for key, sizes in both.items()} for name, both in found.items()}
    write_json(config.out / "changes.json", {"config": to_json(config), "rms_of_change": told})
    draw(config.out / "coordinate_check.png", found, "layers" if config.depths else "width")


def _table(config: CoordinateConfig, entrant: Entrant, with_rule: bool, sizes: Sizes) -> Table:
    what, unit = ("depth", "layers") if config.depths else ("width", "wide")
    title = f"{entrant.name}, rate {entrant.learning_rate * config.rate_factor:.3g}"
    title += f", by its rule for {what}" if with_rule else f" at every {what}"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("RMS of the change of")
    for size in next(iter(sizes.values())):
        table.add_column(f"{size} {unit}", justify="right")
    table.add_column("slope", justify="right")
    for name, by_size in sizes.items():
        deep = config.depths and name.startswith("layer")
        place = f"{name} of {config.depths[0]}, or as deep" if deep else name
        cells = [f"{size:.3g}" for size in by_size.values()]
        table.add_row(place, *cells, f"{slope(by_size):+.2f}")
    return table

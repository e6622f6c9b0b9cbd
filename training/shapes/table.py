"""`python -m ravine presets`: published shapes, what follows from them, and shapes for a new model."""

import dataclasses
import fnmatch
from pathlib import Path
from typing import Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from ...core.checks import check_amount, near
from .parts import PARTS
from .picture import draw
from .presets import PRESETS
from .rules import TOKENS_PER_PARAMETER, suggest
from .shape import ModelShape

COURSE_NOTES = {
    "GPT-3": "gpt3-175b",
    "T5": "t5-11b",
    "T5 v1.1": "t5-1.1-xxl",
    "LaMDA": "lamda-137b",
    "PaLM": "palm-540b",
    "LLaMA 2": "llama2-70b",
}
"""The models of the notes' table of head widths (Stanford CS336), by its names."""


@dataclasses.dataclass(frozen=True)
class PresetsConfig:
    """Print the shapes of published transformers, or suggest one for a new model."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Which, by name or pattern, such as 'llama*'; all without any."""
    show: Literal["all", "shape", "cost", "parts"] = "all"
    """Ratios; arithmetic and memory per token; parameters by part."""
    context: int = 0
    """Tokens per sequence for the arithmetic of attention; 0 means those of pre-training."""
    course_notes: bool = False
    """The table of the course notes, heads x head width / d, and what is wrong in copies of it."""
    parameters: float | None = None
    """Suggest a shape with this many parameters."""
    tokens: float | None = None
    """Suggest a shape for this many tokens of pre-training."""
    devices: int = 1
    """Devices that each matrix of the suggested shape is sharded over."""
    figure: Path | None = None
    """Also draw the shapes into this file; its ending decides the format, such as .png or .svg."""

    def __post_init__(self) -> None:
        check_amount(0, context=self.context)
        suggested = self.parameters is not None or self.tokens is not None
        if self.names and (suggested or self.course_notes):
            raise ValueError(
                f"names ({', '.join(self.names)}) choose presets to print; leave them out with "
                "--parameters, --tokens or --course-notes."
            )
        if self.figure is not None and (suggested or self.course_notes):
            raise ValueError(
                "a figure shows presets; leave out --parameters, --tokens, --course-notes."
            )
        if self.figure is not None and self.figure.suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"figure {self.figure} must end in .png, .svg or .pdf.")
        if self.devices != 1 and not suggested:
            raise ValueError(
                "devices are those of a suggestion; give --parameters or --tokens too."
            )


def show_presets(config: PresetsConfig, console: Console | None = None) -> None:
    """Prints what the configuration asks for.

    Raises:
      ValueError: for unknown presets, and what `suggest` refuses.
    """
    console = console or Console()
    if config.course_notes:
        for line in _course_notes(console):
            console.print(line)
    elif config.parameters is not None or config.tokens is not None:
        for line in suggest(config.parameters, config.tokens, config.devices).lines():
            console.print(line)
    else:
        shapes = matching(config.names)
        tables = {"shape": _ratios, "cost": _costs, "parts": _parts}
        for name, table in tables.items():
            if config.show in ("all", name):
                console.print(table(shapes, config.context))
                console.print(_LEGENDS[name])
        if config.figure is not None:
            draw(config.figure, shapes)


def matching(patterns: tuple[str, ...]) -> dict[str, ModelShape]:
    """The presets that names, or patterns such as ``llama*``, select; all without any.

    Raises:
      ValueError: for a pattern that selects none, with the names near it.

    Example:
      >>> from ravine.training.shapes.table import matching
      >>> list(matching(("palm*", "gpt2")))
      ['gpt2', 'palm-8b', 'palm-62b', 'palm-540b']
    """
    for pattern in patterns:
        if not fnmatch.filter(PRESETS, pattern):
            raise ValueError(f"unknown preset {pattern!r}; {near(pattern, PRESETS)}")
    return {
        name: shape
        for name, shape in PRESETS.items()
        if not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    }


_LEGENDS = {
    "shape": "L layers (encoder+decoder) of width d; heads of width k, kv of them for keys and values; "
    "d_ff with experts: those one token uses (routed+shared) of all x their width.",
    "cost": "Operations per token of a training step: 6N of the active parameters, and exactly, with "
    "attention at sequences of the context. Cache of keys and values per token, 2 bytes an element.",
    "parts": "Shared experts count as feed-forward; a tied head as the embedding.",
}


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _ratios(shapes: dict[str, ModelShape], context: int) -> Table:
    del context
    table = _table("L", "d", "heads", "kv", "k", "d_ff", "act.", "d_ff / d", "heads k / d", "d / L")
    for name, s in shapes.items():
        layers = f"{s.encoder_layers}+{s.layers}" if s.encoder_layers else str(s.layers)
        kv = "latent" if s.latent else str(s.kv_heads)
        wide = str(s.feed_forward)
        if s.experts:
            shared = f"+{s.experts.shared}" if s.experts.shared else ""
            wide = f"{s.experts.per_token}{shared} of {s.experts.count} x {s.experts.width}"
        ratios = (s.feed_forward_ratio, s.head_ratio, s.aspect_ratio)
        table.add_row(
            name,
            *(layers, str(s.width), str(s.heads), kv, str(s.head_width), wide, s.activation),
            *(f"{x:.{digits}f}" for x, digits in zip(ratios, (2, 3, 1), strict=True)),
        )
    return table


def _costs(shapes: dict[str, ModelShape], context: int) -> Table:
    table = _table(
        "parameters",
        "active",
        "context",
        "6N GFLOP",
        "exact",
        "/ 6N",
        "cache kB",
        f"tokens, {TOKENS_PER_PARAMETER} each",
        "trained on",
    )
    for name, s in shapes.items():
        six, exact = 6 * s.active, s.flops(context or None)
        table.add_row(
            name,
            *(_count(s.count), _count(s.active), f"{context or s.context:,}"),
            *(f"{six / 1e9:,.4g}", f"{exact / 1e9:,.4g}", f"{exact / six:.3f}"),
            f"{s.cache_bytes() / 1e3:,.1f}",
            _count(TOKENS_PER_PARAMETER * s.active),
            _count(s.trillions * 1e12) if s.trillions else "-",
        )
    return table


def _parts(shapes: dict[str, ModelShape], context: int) -> Table:
    del context
    table = _table(*(part.replace("_", " ") for part in PARTS), "all")
    for name, s in shapes.items():
        found = s.by_part()
        table.add_row(
            name,
            *(_count(found[part]) if part in found else "-" for part in PARTS),
            _count(s.count),
        )
    return table


def _count(number: float) -> str:
    """``6.74B``: three digits and a unit.

    Example:
      >>> _count(6_738_415_616), _count(999_999), _count(15e12)
      ('6.74B', '1.00M', '15.0T')
    """
    rounded = float(f"{number:.3g}")
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if rounded >= size:
            scaled = rounded / size
            return f"{scaled:.{3 - len(str(int(scaled)))}f}{unit}"
    return f"{rounded:.0f}"


def _course_notes(console: Console) -> list[str]:
    table = _table("heads", "head width", "d", "heads x head width / d", "d_ff / d")
    for words, name in COURSE_NOTES.items():
        s = PRESETS[name]
        table.add_row(
            words,
            *(str(x) for x in (s.heads, s.head_width, s.width)),
            f"{s.head_ratio:.3g}",
            f"{s.feed_forward_ratio:.3g}",
        )
    console.print(table)
    palm, llama = PRESETS["palm-540b"], PRESETS["llama1-65b"]
    wrong = dataclasses.replace(palm, head_width=258)
    return [
        f"PaLM: {palm.heads} x {palm.head_width} / {palm.width} = {palm.head_ratio:.3f}. Copies with "
        f"head width 258 and ratio 1.48 are wrong twice: 258 would give {wrong.count / 1e9:.2f} billion "
        f"parameters instead of the paper's {palm.published[0].billions} (256 gives "
        f"{palm.count / 1e9:.2f}), and {palm.width} / ({palm.heads} x 258) = "
        f"{1 / wrong.head_ratio:.3f} is the ratio upside down.",
        f"LLaMA: a feed-forward ratio of 2.68 belongs to LLaMA 1 65B ({llama.feed_forward} / "
        f"{llama.width} = {llama.feed_forward_ratio:.4f}); LLaMA 2 70B has "
        f"{PRESETS['llama2-70b'].feed_forward_ratio}.",
    ]

"""Rules of thumb for the shape of a new transformer, and which published models break each.

None is a law: half of the table breaks one or another, and trains. They are where to start from.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

from ...core.checks import check_amount, check_positive
from .parts import Activation
from .presets import PRESETS
from .shape import ModelShape

TOKENS_PER_PARAMETER = 20
"""Where a training budget buys the least loss: Hoffmann et al., 2022, https://arxiv.org/abs/2203.15556."""
ASPECT = 128
"""Width over layers to aim for: that of GPT-3, PaLM 8B, LLaMA 7B and 13B, LLaMA 3 8B and OLMo 2 7B."""
ASPECTS = (50, 200)
BYTES_PER_PARAMETER = 16
"""Of Adam in mixed precision: parameter and gradient in bfloat16, float32 copy and two moments."""


TIED_BELOW = 4e9
MOST_PARAMETERS = 1e14


class ShapeRule(NamedTuple):
    """A rule of thumb about a shape."""

    name: str
    value: Callable[[ModelShape], float]
    holds: Callable[[ModelShape], bool]
    applies: Callable[[ModelShape], bool] = lambda shape: True
    """Others neither keep it nor break it."""


def _wanted_ratio(shape: ModelShape) -> float:
    return 8 / 3 if shape.gated else 4.0


def _tokens_per_parameter(shape: ModelShape) -> float:
    return shape.trillions * 1e12 / shape.active


RULES = (
    ShapeRule(
        "d_ff / d is 4, or 8/3 with a gate (to 5 %)",
        lambda s: s.feed_forward_ratio,
        lambda s: abs(s.feed_forward_ratio / _wanted_ratio(s) - 1) <= 0.05,
        lambda s: s.experts is None,
    ),
    ShapeRule(
        "heads x head width is d",
        lambda s: s.head_ratio,
        lambda s: s.heads * s.head_width == s.width,
    ),
    ShapeRule(
        "heads are 64 to 128 wide", lambda s: s.head_width, lambda s: 64 <= s.head_width <= 128
    ),
    ShapeRule(
        f"d / layers is {ASPECTS[0]} to {ASPECTS[1]}",
        lambda s: s.aspect_ratio,
        lambda s: ASPECTS[0] <= s.aspect_ratio <= ASPECTS[1],
    ),
    ShapeRule(
        "the vocabulary is a multiple of 128",
        lambda s: s.vocabulary,
        lambda s: s.vocabulary % 128 == 0,
    ),
    ShapeRule(
        f"{TOKENS_PER_PARAMETER} tokens per active parameter (to a factor of 2)",
        _tokens_per_parameter,
        lambda s: 0.5 <= _tokens_per_parameter(s) / TOKENS_PER_PARAMETER <= 2,
        lambda s: s.trillions > 0,
    ),
)
"""The rules that `suggest` follows."""


def breakers(rule: ShapeRule) -> list[str]:
    """The published models that break a rule.

    Example:
      >>> from ravine.training.shapes.rules import RULES, breakers
      >>> breakers(RULES[1])[:4]
      ['t5-3b', 't5-11b', 't5-1.1-small', 'lamda-137b']
    """
    return [
        name
        for name, shape in PRESETS.items()
        if name != "ravine" and rule.applies(shape) and not rule.holds(shape)
    ]


def feed_forward_width(
    width: int, *, gated: bool = False, ratio: float | None = None, multiple: int = 1
) -> int:
    r"""Feed-forward width :math:`r\,d`, rounded up to a multiple.

    Args:
      width: `d`.
      gated: SwiGLU or GEGLU, of three matrices: two thirds of 4, so that parameters stay those of two.
      ratio: `r`; by default 4, or 8/3 if gated. T5-11B takes 64, T5 v1.1 2.5, LaMDA and Gemma 2 27B 8.
      multiple: usually 256 if gated.

    Raises:
      ValueError: for arguments that are not positive.

    Example:
      >>> from ravine.training.shapes.rules import feed_forward_width
      >>> feed_forward_width(12288)  # GPT-3
      49152
      >>> feed_forward_width(4096, gated=True, multiple=256)  # LLaMA 7B
      11008
      >>> feed_forward_width(1024, ratio=64)  # T5-11B
      65536
    """
    check_amount(1, width=width, multiple=multiple)
    check_positive(ratio=ratio)
    if ratio is None:
        exact = math.ceil(8 * width / 3) if gated else 4 * width
    else:
        exact = math.ceil(ratio * width - 1e-9)
    return padded(exact, multiple)


def padded(size: int, multiple: int = 128) -> int:
    """`size`, as of a vocabulary, rounded up to a multiple.

    Example:
      >>> from ravine.training.shapes.rules import padded
      >>> padded(50257), padded(100278)  # GPT-2, OLMo 2
      (50304, 100352)
    """
    check_amount(1, size=size, multiple=multiple)
    return -(-size // multiple) * multiple


def head_count(width: int, head_width: int = 128) -> int:
    """Heads that together are as wide as the model.

    Raises:
      ValueError: where the head width does not divide the width.

    Example:
      >>> from ravine.training.shapes.rules import head_count
      >>> head_count(12288), head_count(1600, 64)  # GPT-3, GPT-2 XL
      (96, 25)
    """
    check_amount(1, width=width, head_width=head_width)
    if width % head_width:
        below = width // head_width * head_width
        fix = " or ".join(str(x) for x in (below, below + head_width) if x)
        raise ValueError(f"heads of width {head_width} do not divide width {width}; make it {fix}.")
    return width // head_width


def layer_count(width: int, aspect: float = ASPECT) -> int:
    """Layers of a model with that ratio of width to layers.

    Example:
      >>> from ravine.training.shapes.rules import layer_count
      >>> layer_count(4096, 128), layer_count(12288, 128)  # LLaMA 7B, GPT-3
      (32, 96)
    """
    check_amount(1, width=width)
    check_positive(aspect=aspect)
    return max(1, round(width / aspect))


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A shape that keeps the rules of thumb, and how far."""

    shape: ModelShape
    tokens: float
    devices: int

    def lines(self) -> list[str]:
        """The shape, and the models that break each of the rules."""
        s = self.shape
        memory = BYTES_PER_PARAMETER * s.count / self.devices / 1e9
        found = [
            f"{s.count / 1e9:.3g} billion parameters: {s.layers} layers of width {s.width}, "
            f"{s.heads} heads of {s.head_width} ({s.kv_heads} of keys and values), feed-forward "
            f"{s.feed_forward} ({s.activation}), vocabulary {s.vocabulary}",
            f"{self.tokens / 1e9:,.3g} billion tokens, {self.tokens / s.count:.1f} per parameter, "
            f"{s.flops() * self.tokens:.2e} FLOP at sequences of {s.context}",
            f"{memory:,.2f} GB per device of {self.devices} for parameters, gradients and Adam "
            f"({BYTES_PER_PARAMETER} bytes per parameter); activations come on top",
        ]
        for rule in RULES:
            kept = "kept" if rule.holds(s) else "broken"
            others = breakers(rule)
            found.append(
                f"{rule.name}: {kept} ({_plain(rule.value(s))}); "
                f"broken by {', '.join(others) if others else 'none'}"
            )
        return found


def suggest(
    parameters: float | None = None,
    tokens: float | None = None,
    devices: int = 1,
    *,
    vocabulary: int = 32_000,
    context: int = 2048,
    activation: Activation = "swiglu",
    tied: bool | None = None,
) -> Suggestion:
    r"""A decoder by the rules of thumb.

    Of all widths it takes the one whose number of parameters is close to what is asked for, with
    `d` / layers close to 128 as far as rounding allows:
    :math:`|\log(N/N^*)| + 0.1\,|\log(d/(128 L))|` is least.

    Args:
      parameters: wanted, embeddings included; by default tokens / 20.
      tokens: of pre-training; by default 20 per parameter.
      devices: over how many each matrix is sharded; they divide widths and vocabulary.
      vocabulary: tokens, padded to a multiple of 128 and of `devices`.
      context: tokens per sequence, for the arithmetic of attention.
      activation: a gated one has a feed-forward part of 8/3 d, others 4 d.
      tied: whether the head is the embedding; by default below 4 billion parameters, where the two
        weigh most, as in LLaMA 3.2 and Qwen 3.

    Raises:
      ValueError: for neither parameters nor tokens, arguments that are not positive, more parameters
        than a hundred trillion, or where no shape comes within a tenth of their number.

    Example:
      >>> from ravine.training.shapes.rules import suggest
      >>> found = suggest(parameters=7e9, devices=64)
      >>> shape = found.shape
      >>> shape.width, shape.layers, shape.heads, shape.feed_forward
      (4096, 33, 32, 11008)
      >>> print(found.lines()[1])
      139 billion tokens, 20.0 per parameter, 5.90e+21 FLOP at sequences of 2048
    """
    if parameters is None and tokens is None:
        raise ValueError("give parameters or tokens, or both.")
    check_positive(parameters=parameters, tokens=tokens)
    check_amount(1, devices=devices, vocabulary=vocabulary, context=context)
    wanted = parameters if parameters is not None else (tokens or 0) / TOKENS_PER_PARAMETER
    if wanted > MOST_PARAMETERS:
        raise ValueError(
            f"the rules of thumb are for at most {MOST_PARAMETERS:.0e} parameters, got {wanted:.3g}."
        )
    rows = padded(vocabulary, math.lcm(128, devices))
    rest = _Rest(rows, context, activation, wanted < TIED_BELOW if tied is None else tied)
    shapes = [_filled(width, wanted, devices, rest) for width in _widths(wanted, devices)]
    best = min(shapes, key=lambda shape: _distance(shape, wanted), default=None)
    if best is None or abs(best.count / wanted - 1) > 0.1:
        closest = "" if best is None else f"; the closest has {best.count:.3g}"
        raise ValueError(
            f"no shape of about {wanted:.3g} parameters has a vocabulary of {rows} and divides over "
            f"{devices} device{'s' * (devices > 1)}{closest}; lower vocabulary or devices, or "
            "ask for more parameters."
        )
    budget = tokens if tokens is not None else TOKENS_PER_PARAMETER * best.count
    return Suggestion(dataclasses.replace(best, trillions=budget / 1e12), budget, devices)


def _plain(value: float) -> str:
    return f"{value:.0f}" if value == int(value) or value >= 100 else f"{value:.3g}"


class _Rest(NamedTuple):
    """The settings that do not depend on the width."""

    vocabulary: int
    context: int
    activation: Activation
    tied: bool


def _widths(wanted: float, devices: int) -> list[int]:
    """Multiples of 64 below 1024, of 128 below 2048, then of 512, whose first layer is not too much."""
    largest = math.isqrt(int(wanted / 6)) + 1
    return [
        width
        for width in range(64, largest + 1, 64)
        if width % (64 if width < 1024 else 128 if width < 2048 else 512) == 0
        and width % devices == 0
    ]


def _filled(width: int, wanted: float, devices: int, rest: _Rest) -> ModelShape:
    """The shape of this width with the layers that come closest to the parameters wanted."""
    head_width = 128 if width >= 1024 else 64
    heads = head_count(width, head_width)
    gated = rest.activation in ("swiglu", "geglu")
    multiple = math.lcm(256 if width >= 1024 else 64, devices)
    one = ModelShape(
        layers=1,
        width=width,
        feed_forward=feed_forward_width(width, gated=gated, multiple=multiple),
        heads=heads,
        head_width=head_width,
        kv_heads=heads,
        **rest._asdict(),
    )
    two = dataclasses.replace(one, layers=2)
    per_layer = two.count - one.count
    return dataclasses.replace(one, layers=max(1, 1 + round((wanted - one.count) / per_layer)))


def _distance(shape: ModelShape, wanted: float) -> float:
    size, aspect = shape.count / wanted, shape.aspect_ratio / ASPECT
    return abs(math.log(size)) + 0.1 * abs(math.log(aspect))

"""The parts of a transformer's shape: parts, mixtures of experts, latent attention, counts."""

import dataclasses
from typing import Literal, NamedTuple, get_args

from ...core.checks import check_amount

Activation = Literal["swiglu", "geglu", "gelu", "relu"]
Part = Literal[
    "embedding", "positions", "attention", "feed_forward", "experts", "router", "norms", "head"
]
PARTS: tuple[Part, ...] = get_args(Part)
"""Where parameters are; biases belong to their matrix."""
EMBEDDINGS: tuple[Part, ...] = ("embedding", "positions", "head")

_PART_OF_WORD: tuple[tuple[str, Part], ...] = (
    ("embed/", "embedding"),
    ("positions/", "positions"),
    ("norm", "norms"),
    ("router/", "router"),
    ("/experts/", "experts"),
    ("attention/", "attention"),
    ("head/", "head"),
    ("", "feed_forward"),
)


class Count(NamedTuple):
    """A number of parameters as it was published."""

    billions: float
    active: bool = False
    """Of the parameters that one token uses, instead of all."""
    without: tuple[Part, ...] = ()
    """Parts, of `PARTS`, that it leaves out."""


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the feed-forward part."""

    count: int
    per_token: int
    """Routed experts that one token uses."""
    width: int
    """Feed-forward width of one expert."""
    shared: int = 0
    """Experts that every token uses; they count as feed-forward parameters."""
    dense_layers: int = 0
    """First layers that have a dense feed-forward part instead."""
    router_bias: bool = False

    def __post_init__(self) -> None:
        check_amount(1, count=self.count, per_token=self.per_token, width=self.width)
        check_amount(0, shared=self.shared, dense_layers=self.dense_layers)
        if self.per_token > self.count:
            raise ValueError(
                f"per_token {self.per_token} is more than the {self.count} experts; give at most "
                f"{self.count}."
            )


@dataclasses.dataclass(frozen=True)
class Latent:
    """Multi-head latent attention: low-rank queries, and keys and values from one cached vector.

    Source: DeepSeek-AI, 2024, https://arxiv.org/abs/2405.04434, section 2.1.
    """

    query_rank: int = 1536
    key_value_rank: int = 512
    rotary_width: int = 64
    """Coordinates per head with rotary positions, beside the head width; all heads share the key's."""


def part_of(name: str) -> Part:
    """The part that a parameter belongs to, by its path.

    Example:
      >>> from ravine.training.shapes.parts import part_of
      >>> part_of("layers/attention/query_norm/scale"), part_of("layers/shared_expert/up/kernel")
      ('norms', 'feed_forward')
    """
    return next(part for word, part in _PART_OF_WORD if word in name)

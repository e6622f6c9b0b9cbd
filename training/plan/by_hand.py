r"""The cost of a train step without its optimizer, by arithmetic that can be redone on paper.

Nothing is compiled here. Sizes are of one chip; :math:`n` are the tokens of one micro-batch in one
shard of rows and context, :math:`D` the width, :math:`H K` heads times their width, :math:`G` heads
of keys and values, :math:`F` the feed-forward width that a token meets, :math:`V` the vocabulary,
:math:`t` the mesh's tensor axis. Activations take two bytes an element, logits and their gradients
four each.

=================  ==================================================================================
kept per layer     full: :math:`n D`, the layer's input. products: also queries, keys, values and all
                   other outputs of products, :math:`n (3 D + (H + 2 G) K / t + g F / t)`, with g 2 for
                   gated feed-forward parts, else 1. none: :math:`n ((2 + m) D + (2 H + 2 G) K / t +
                   (g + 1) F / t)`, m norms per layer; queries, keys, values, the attention's output and
                   every input of a norm, of a product and of an activation function
at work            one layer's values, as none keeps them, recomputed or not, and once more for
                   gradients; of c parts of a sequence also the others' keys and values and their
                   gradients, :math:`2 (c - 1) n \cdot 2 G K / t`
logits             :math:`8 n V / t`; with a fused loss a 64th
=================  ==================================================================================

Attention's scores are not kept, as by a fused kernel. Of p pipeline stages each has 1/p of the layers.
By 1F1B the first stage keeps the inputs of p micro-batches, if there are as many, and the last one has
the logits: what counts is the stage that needs more.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import numpy as np

from ..shapes.parts import part_of
from ..shapes.shape import ModelShape
from .collectives import Collective

Remat = Literal["full", "products", "none"]
ELEMENT = 2
"""Bytes of an activation, parameter or gradient, in bfloat16."""


@dataclasses.dataclass(frozen=True)
class Work:
    """A model, the mesh it is on and what one step takes."""

    shape: ModelShape
    sizes: Mapping[str, int]
    """Of the mesh's axes."""
    tokens: int
    """Of a step, over all chips."""
    remat: Remat = "full"
    micro_batches: int = 1
    fused_loss: bool = False

    def size(self, *axes: str) -> int:
        """Chips along some axes of the mesh."""
        return math.prod(self.sizes.get(axis, 1) for axis in axes)

    @property
    def chips(self) -> int:
        """Of the mesh."""
        return math.prod(self.sizes.values())

    @property
    def rows(self) -> float:
        """Tokens of one micro-batch in one shard of the rows and the context."""
        parts = self.size("data", "fsdp", "expert", "context") * self.micro_batches
        return self.tokens / parts

    @property
    def sequences(self) -> int:
        """Of a step, in one shard of the rows."""
        return self.tokens // self.shape.context // self.size("data", "fsdp", "expert")

    @property
    def layers(self) -> float:
        """Of one pipeline stage."""
        return (self.shape.layers + self.shape.encoder_layers) / self.size("stage")

    def operations(self, *, recomputed: bool = True) -> float:
        """Of one chip: forward, backward, and what is recomputed, which MFU leaves out.

        Recomputing a layer is another forward pass, a third of the rest.
        """
        again = 4 / 3 if recomputed and self.remat == "full" else 1.0
        return again * self.shape.flops() * self.tokens / self.chips

    def activations(self) -> dict[str, float]:
        """Bytes of what is kept for the backward pass, of the layer at work, and of logits.

        Example:
          >>> from ravine.training.plan.by_hand import Work
          >>> from ravine.training.shapes.presets import PRESETS
          >>> llama = Work(PRESETS["llama2-7b"], {"fsdp": 4}, tokens=4 * 4096)
          >>> llama.activations()["kept"] == 32 * 4096 * 4096 * 2  # layers, tokens, width, bytes
          True
          >>> llama.activations()["logits"] == 8 * 4096 * 32000
          True
        """
        none = self.layer("none")
        kept = self.layers * (none if self.remat == "none" else self.layer(self.remat))
        logits = 8 * self.rows * self.shape.vocabulary / self.size("tensor")
        found = {
            "kept": kept,
            "at work": (none if self.remat == "none" else 2 * none) + 2 * self.gathered(),
            "logits": logits / 64 if self.fused_loss else logits,
        }
        first = min(self.size("stage"), self.micro_batches) * kept
        if first > kept + found["logits"]:
            return found | {"kept": first, "logits": 0.0}
        return found

    def layer(self, remat: Remat) -> float:
        """Bytes of one micro-batch that one layer keeps."""
        shape, tensor = self.shape, self.size("tensor")
        inner, keys = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
        used = shape.experts and (shape.experts.per_token + shape.experts.shared)
        hidden = used * shape.experts.width if shape.experts and used else shape.feed_forward
        into = 2 if shape.gated else 1
        elements = {
            "full": shape.width,
            "products": 3 * shape.width + (inner + 2 * keys + into * hidden) / tensor,
            "none": (2 + shape.norms) * shape.width
            + (2 * inner + 2 * keys + (into + 1) * hidden) / tensor,
        }
        return ELEMENT * self.rows * elements[remat]

    def gathered(self) -> float:
        """Bytes of one layer's keys and values of the other parts of a sequence."""
        return (self.size("context") - 1) * self._keys_and_values()

    def _keys_and_values(self) -> float:
        """Bytes of one micro-batch's in one layer."""
        elements = 2 * self.shape.kv_heads * self.shape.head_width
        return ELEMENT * self.rows * elements / self.size("tensor")

    def accumulators(self, parameters: int) -> float:
        """Bytes of float32 sums of gradients, beside the gradients of one micro-batch."""
        return 4 * parameters / ELEMENT if self.micro_batches > 1 else 0.0

    def exchanges(self) -> list[Collective]:
        """What the model communicates in a step: FSDP, copies, tensor axis, context, stages, experts.

        Every matrix is gathered twice in each micro-batch, forward and backward, and its gradient
        scattered once. Copies add up their gradients once per step. The tensor axis adds up the
        stream twice per layer forward, twice backward and, with recomputing, once more; and once each
        behind the embedding and before the head. The context axis gathers keys and values of whole
        sequences forward and backward, and scatters their gradients. A stage sends the stream on,
        and its gradient back, all at the pace of the slowest way between two of them; embedding and
        head, which every stage has a copy of, add up their gradients over the stages. Experts are sent
        their tokens and send them back, forward, backward and recomputed.
        """
        shape, layers, count = self.shape, self.layers, self.micro_batches
        stream = ELEMENT * self.rows * shape.width
        again = self.remat == "full"
        dense = experts = ends = 0.0
        for name, x in shape.parameters().items():
            size = ELEMENT * x.size / self.size("tensor")
            size /= self.size("stage") if "layers/" in name else 1
            if part_of(name) == "experts":
                experts += size / self.size("expert")
            elif not name.endswith(("scale", "bias")):
                dense += size
                ends += 0.0 if "layers/" in name else size
        found = []
        for size, copies in (
            (dense, ("data", "expert", "context")),
            (experts, ("data", "context")),
        ):
            part = size / self.size("fsdp")
            found += [self._collective("all-gather", size, count, "fsdp")] * 2
            found.append(self._collective("reduce-scatter", part, count, "fsdp"))
            found.append(self._collective("all-reduce", part, 1, *copies))
        sums = round(layers * (5 if again else 4)) + 2
        found.append(self._collective("all-reduce", stream, sums * count, "tensor"))
        own = self._keys_and_values()
        whole, times = own * self.size("context"), round(layers) * count
        found += [self._collective("all-gather", whole, times, "context")] * 2
        found.append(self._collective("reduce-scatter", own, times, "context"))
        if self.size("stage") > 1:
            group = self._collective("collective-permute", stream, 1, "stage").group
            found.append(
                Collective("collective-permute", round(stream), stream, 2 * count, group=group)
            )
            part = ends / self.size("fsdp")
            found.append(self._collective("all-reduce", part, 1, "stage"))
        if shape.experts:
            sent = stream * shape.experts.per_token
            mixed = (shape.layers - shape.experts.dense_layers) / self.size("stage")
            times = round(mixed * (6 if again else 4))
            found.append(self._collective("all-to-all", sent, times * count, "expert"))
        return [c for c in found if c.sent]

    def _collective(self, kind: str, size: float, times: int, *axes: str) -> Collective:
        names = list(self.sizes)
        at = np.arange(self.chips).reshape(tuple(self.sizes.values()))
        group = at[tuple(slice(None) if name in axes else 0 for name in names)].ravel()
        count = len(group)
        share = {"all-reduce": 2 * (count - 1) / count, "reduce-scatter": count - 1}
        sent = share.get(kind, (count - 1) / count) * size
        return Collective(kind, round(size), sent, times, group=tuple(group.tolist()))


def against_stages(shape: ModelShape, stages: int) -> str:
    """Why a model cannot be cut into so many pipeline stages; nothing where it can.

    Stages have equally many layers of one stack. With an encoder every micro-batch would pass through
    them twice, and dense first layers would make one of them longer.

    Example:
      >>> from ravine.training.plan.by_hand import against_stages
      >>> from ravine.training.shapes.presets import PRESETS
      >>> against_stages(PRESETS["llama2-70b"], 8)
      ''
      >>> against_stages(PRESETS["llama2-70b"], 3)
      '3 stages do not divide 80 layers; take a divisor of them.'
      >>> against_stages(PRESETS["t5-11b"], 2)
      'stages cut one stack of layers, and this model has another, of its encoder; leave out stage.'
    """
    dense = shape.experts.dense_layers if shape.experts else 0
    other = "of its encoder" if shape.encoder_layers else "of dense layers" if dense else ""
    if stages > 1 and other:
        return (
            f"stages cut one stack of layers, and this model has another, {other}; leave out stage."
        )
    if shape.layers % stages:
        return f"{stages} stages do not divide {shape.layers} layers; take a divisor of them."
    return ""

r"""How long the model's part of a step takes a chip, by hand.

==========  ==========================================================================================
products    operations outside of attention, and again those recomputed, at the share of the peak that
            large products reach
attention   at the share that its kernel reaches. It multiplies 2 matrices forward and, since scores are
            not kept, 5 backward, which MFU takes for 4; and 2 more where it is recomputed. Of c parts
            of a causal sequence the last sees :math:`(2 c - 1) / c` times the mean number of keys, and
            the others wait for it
passes      everything else is bound by memory. Per token and layer forward,
            :math:`4 m D + (2 (H + G) K + (g + 1) F) / t` elements of two bytes: a norm, fused with the
            sum before it, reads two streams and writes two, positions turn queries and keys, and the
            activation function has g inputs. Twice that backward, and once more where recomputed.
            Float32 logits are read or written four times
bubble      :math:`(p - 1) / (m + p - 1)` of the time, of p pipeline stages and m micro-batches
==========  ==========================================================================================

Letters are those of `ravine.training.plan.by_hand`, m in the third row the norms of a layer.
"""

import dataclasses

from ..pipeline import bubble
from .by_hand import ELEMENT, Work
from .chips import Chip


def model_seconds(work: Work, chip: Chip) -> float:
    """Of forward and backward pass, without communication.

    Example:
      >>> from ravine.training.plan.by_hand import Work
      >>> from ravine.training.plan.chips import CHIPS
      >>> from ravine.training.plan.model_time import model_seconds
      >>> from ravine.training.shapes.presets import PRESETS
      >>> work = Work(PRESETS["llama3-8b"], {"fsdp": 8}, tokens=8 * 2 * 8192)
      >>> f"{model_seconds(work, CHIPS['h100']):.2f}"
      '1.82'
    """
    rate = chip.products["bfloat16"]
    attention = work.shape.attention_flops() * work.tokens / work.chips
    products = work.operations(recomputed=False) - attention
    again = work.remat == "full"
    kernel = attention * imbalance(work) * (3.5 if work.remat == "none" else 4.5) / 3
    seconds = products * (4 / 3 if again else 1.0) / (rate * chip.reached)
    seconds += kernel / (rate * chip.attention) + passes(work) / chip.bandwidth
    return seconds / (1 - waiting(work))


def imbalance(work: Work) -> float:
    """Operations of attention on the chip with the end of a sequence, over the mean of all chips.

    Layers that see a window count less, and encoders, whose queries all see as much, not at all.

    Example:
      >>> from ravine.training.plan.by_hand import Work
      >>> from ravine.training.plan.model_time import imbalance
      >>> from ravine.training.shapes.presets import PRESETS
      >>> work = Work(PRESETS["llama3-8b"], {"context": 8}, tokens=8192)
      >>> f"{imbalance(work):.3f}", (2 * 8 - 1) / 8
      ('1.875', 1.875)
    """
    shape, parts = work.shape, work.size("context")
    if parts == 1:
        return 1.0
    decoder = dataclasses.replace(shape, encoder_layers=0)
    before = shape.context - shape.context // parts
    earlier = decoder.attention_flops(before) * before
    last = parts * (1 - earlier / (decoder.attention_flops() * shape.context))
    # With an encoder, operations are per token of both sides.
    sides = 2 if shape.encoder_layers else 1
    return 1 + (last - 1) * decoder.attention_flops() / (sides * shape.attention_flops())


def waiting(work: Work) -> float:
    """The share of the model's time that a stage waits: the bubble."""
    return bubble(work.size("stage"), work.micro_batches)


def passes(work: Work) -> float:
    """Bytes that go from and to memory beside the products.

    Example:
      >>> from ravine.training.plan.by_hand import Work
      >>> from ravine.training.plan.model_time import passes
      >>> from ravine.training.shapes.presets import PRESETS
      >>> work = Work(PRESETS["llama2-7b"], {"fsdp": 1}, tokens=4096, remat="none", fused_loss=True)
      >>> passes(work) == 3 * 32 * 4096 * 2 * (8 * 4096 + 2 * 2 * 32 * 128 + 3 * 11008)
      True
    """
    shape, tensor = work.shape, work.size("tensor")
    heads = 2 * (shape.heads + shape.kv_heads) * shape.head_width
    used = shape.experts and (shape.experts.per_token + shape.experts.shared)
    hidden = used * shape.experts.width if shape.experts and used else shape.feed_forward
    inner = heads + (3 if shape.gated else 2) * hidden
    each = ELEMENT * (4 * shape.norms * shape.width + inner / tensor)
    tokens = work.rows * work.micro_batches
    layers = work.layers * each * (3 if work.remat == "none" else 4)
    logits = 0 if work.fused_loss else 4 * 4 * shape.vocabulary / tensor
    return tokens * (layers + logits)

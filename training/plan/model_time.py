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
bubble      of p pipeline stages and m micro-batches the last stage works longest, since it has the head.
            It waits until p - 1 others have passed a micro-batch forward, and they pass the last one
            backward: :math:`t + (p - 1) t' / m`, with t the seconds that the last stage works and t'
            those of the others; :math:`(p - 1) / (m + p - 1)` of the whole where the two are equal
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
    before = (work.size("stage") - 1) / work.micro_batches
    return busy(work, chip) + before * busy(work, chip, head=False)


def exposed_seconds(work: Work, chip: Chip, sending: float) -> float:
    """Of the model's communication, what its arithmetic does not hide.

    Of a pipeline, whose stages also wait for what others send, as much longer as the bubble makes it.

    Example:
      >>> from ravine.training.plan.by_hand import Work
      >>> from ravine.training.plan.chips import CHIPS
      >>> from ravine.training.plan.model_time import busy, exposed_seconds
      >>> from ravine.training.shapes.presets import PRESETS
      >>> work = Work(PRESETS["llama3-8b"], {"stage": 2}, 3 * 8192, micro_batches=3)
      >>> round(exposed_seconds(work, CHIPS["h100"], busy(work, CHIPS["h100"]) + 0.3), 3)
      0.4
      >>> exposed_seconds(work, CHIPS["h100"], 0.1)
      0.0
    """
    waiting = bubble(work.size("stage"), work.micro_batches)
    return max(0.0, sending - busy(work, chip)) / (1 - waiting)


def busy(work: Work, chip: Chip, *, head: bool = True) -> float:
    """Seconds of a step in which a chip works on the model, of the last pipeline stage or of another.

    Args:
      work: the model's part.
      chip: the chip.
      head: whether it has the head, as every chip without a pipeline.
    """
    rate = chip.products["bfloat16"]
    attention = work.shape.attention_flops() * work.tokens / work.chips
    products = work.operations(recomputed=False) - attention
    # All chips' mean has a share of the head, of which the last stage has all and the others nothing.
    share = 6 * work.shape.width * work.shape.vocabulary * work.tokens / work.chips
    products += (work.size("stage") - 1) * share if head else -share
    again = work.remat == "full"
    kernel = attention * imbalance(work) * (3.5 if work.remat == "none" else 4.5) / 3
    seconds = products * (4 / 3 if again else 1.0) / (rate * chip.reached)
    return seconds + kernel / (rate * chip.attention) + passes(work, head=head) / chip.bandwidth


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


def passes(work: Work, *, head: bool = True) -> float:
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
    logits = 0 if work.fused_loss or not head else 4 * 4 * shape.vocabulary / tensor
    return tokens * (layers + logits)


def passes_of_step(work: Work) -> float:
    """The same of a compiled step, whose stages share the head and work in the bubble, for nothing.

    Example:
      >>> from ravine.training.plan.by_hand import Work
      >>> from ravine.training.plan.model_time import passes, passes_of_step
      >>> from ravine.training.shapes.presets import PRESETS
      >>> work = Work(PRESETS["llama2-7b"], {"stage": 2}, 4 * 4096, micro_batches=4)
      >>> layers = passes(work, head=False)
      >>> passes_of_step(work) == 5 / 4 * layers + 4 * 4 * 32000 * 4 * 4096 / 2  # logits in float32
      True
    """
    stages, layers = work.size("stage"), passes(work, head=False)
    ticks = work.micro_batches + stages - 1
    return layers * ticks / work.micro_batches + (passes(work) - layers) / stages

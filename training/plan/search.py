"""Which mesh: all that divide a model and its batch, by hand, without compiling any.

Parameters are counted as they would be sharded, the state as so many times the parameters as it has
over all, activations and communication by `by_hand`, time by `roofline`. Of each mesh, the fewest
micro-batches are taken with which it fits; of a pipeline, whose bubble shrinks with them, those with
which it is fastest, to three digits.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..pipeline import bubble
from ..shapes.shape import ModelShape
from ..sharding import parameter_spec
from .by_hand import ELEMENT, Work, against_stages
from .cost import STAGED
from .model_time import exposed_seconds, model_seconds
from .network import Network
from .roofline import passed_over, sent_in


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh, and what a step of an element-wise optimizer takes on it."""

    work: Work
    memory: float
    """Bytes of one chip."""
    seconds: float
    """Of a step."""
    sending: float
    """Seconds of the model's communication, hidden or not."""
    fits: bool

    @property
    def rounded(self) -> float:
        """Seconds, to three digits."""
        return float(f"{self.seconds:.3g}")

    @property
    def order(self) -> tuple[bool, float, float, float]:
        """Those that fit first, then the fastest to three digits, then those that send least."""
        return not self.fits, self.rounded, self.sending, self.memory

    @property
    def waiting(self) -> float:
        """The share of its time that a pipeline stage waits for equal others; 0 without stages."""
        return bubble(self.work.size("stage"), self.work.micro_batches)

    @property
    def mesh(self) -> str:
        """As ``--mesh`` takes it, axes of one device left out.

        Example:
          >>> from ravine.training.plan.by_hand import Work
          >>> from ravine.training.plan.search import Candidate
          >>> from ravine.training.shapes.presets import PRESETS
          >>> work = Work(PRESETS["llama2-7b"], {"data": 1, "fsdp": 8, "tensor": 2}, tokens=8 * 4096)
          >>> Candidate(work, 0.0, 0.0, 0.0, fits=True).mesh
          'fsdp=8,tensor=2'
        """
        found = [f"{name}={size}" for name, size in self.work.sizes.items() if size > 1]
        return ",".join(found) or "fsdp=1"


def candidates(
    work: Work,
    state_ratio: float,
    network_of: Callable[[Mapping[str, int]], Network],
    slices: int,
    *,
    host_ratio: float = 0.0,
    stages: Sequence[int] = (1,),
) -> list[Candidate]:
    """All meshes that divide, in their order.

    Args:
      work: the model and its batch, on any mesh of as many chips.
      state_ratio: bytes of the optimizer's state on the chip, times those of the parameters.
      network_of: from sizes of axes to the network.
      slices: that divide the first axis, data or stage.
      host_ratio: as `state_ratio`, of a state in the memory of the host.
      stages: numbers of pipeline stages to try, as of `stages_of`.

    Raises:
      ValueError: if none divides.
    """
    sequences = work.tokens // work.shape.context
    found = []
    for sizes in _sizes(work.chips, work.shape, sequences, slices, stages):
        network = network_of(sizes)
        placed = dataclasses.replace(work, sizes=sizes, micro_batches=1)
        found.append(_candidate(placed, state_ratio, network, host_ratio))
    if not found:
        raise ValueError(
            f"no mesh of {work.chips} chips divides the model and its {sequences} sequences; give "
            f"another --batch, as {work.chips * work.shape.context}."
        )
    return sorted(found, key=lambda candidate: candidate.order)


def stages_of(shape: ModelShape, chips: int) -> list[int]:
    """Numbers of pipeline stages that divide a model's layers, and the chips; at least 1.

    Example:
      >>> from ravine.training.plan.search import stages_of
      >>> from ravine.training.shapes.presets import PRESETS
      >>> stages_of(PRESETS["llama2-70b"], 512), stages_of(PRESETS["t5-11b"], 512)
      ([1, 2, 4, 8, 16], [1])
    """
    return [n for n in range(1, chips + 1) if chips % n == 0 and not against_stages(shape, n)]


def _sizes(
    chips: int, shape: ModelShape, sequences: int, slices: int, stages: Sequence[int]
) -> Iterator[dict[str, int]]:
    divisors = [n for n in range(1, chips + 1) if chips % n == 0]
    experts = shape.experts.count if shape.experts else 1
    of_experts = [n for n in divisors if experts % n == 0]
    parts = [n for n in divisors if shape.context % n == 0]
    axes = (stages, divisors, of_experts, parts, divisors)
    for stage, data, expert, context, tensor in itertools.product(*axes):
        others = stage * data * expert * context * tensor
        if chips % others:
            continue
        fsdp = chips // others
        whole = (shape.heads, shape.vocabulary, shape.feed_forward)
        divides = all(n % tensor == 0 for n in whole) and shape.width % (fsdp * tensor) == 0
        if divides and sequences % (data * fsdp * expert) == 0:
            sizes = {"fsdp": fsdp, "expert": expert, "context": context, "tensor": tensor}
            # Slices are joined along the first axis: their network has the streams or the gradients.
            if stage % slices == 0:
                yield {"stage": stage, "data": data} | sizes
            if slices > 1 and data % slices == 0:
                yield {"data": data, "stage": stage} | sizes


def _candidate(work: Work, state_ratio: float, network: Network, host_ratio: float) -> Candidate:
    sizes = dict(work.sizes)
    parameters = sum(
        ELEMENT * math.prod(x.shape) // _parts(parameter_spec(name, x.shape, sizes), sizes)
        for name, x in work.shape.parameters().items()
    )
    state, hosted = state_ratio * parameters, host_ratio * parameters
    rows = work.sequences
    counts = [n for n in range(1, rows + 1) if rows % n == 0]
    tried = [dataclasses.replace(work, micro_batches=count) for count in counts]
    needs = [
        2 * parameters
        + one.accumulators(parameters)
        + state
        + max(sum(one.activations().values()), STAGED * hosted)
        for one in tried
    ]
    fitting = [at for at, need in enumerate(needs) if need <= network.chip.memory] or [-1]
    if work.size("stage") == 1:  # more micro-batches are not faster
        fitting = fitting[:1]
    updated = passed_over(network, parameters, parameters, round(state + hosted))
    updated += 2 * hosted / network.chip.host
    made = [_timed(tried[at], needs[at], updated, network) for at in fitting]
    return min(made, key=lambda one: (one.rounded, one.work.micro_batches))


def _timed(work: Work, memory: float, updated: float, network: Network) -> Candidate:
    model = model_seconds(work, network.chip)
    sending = sent_in(network, work.exchanges())
    exposed = exposed_seconds(work, network.chip, sending)
    fits = memory <= network.chip.memory
    return Candidate(work, memory, updated + model + exposed, sending, fits)


def _parts(spec: Iterable[Any], sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[axis] for axis in spec if axis is not None)

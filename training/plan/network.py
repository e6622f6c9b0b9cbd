r"""How long a collective takes on the networks between chips.

A group of devices lies along some dimensions of a torus, or in some nodes. Let :math:`V` be the
bytes that all of a group have together, :math:`k` its members within a slice (of TPUs) or a node
(of GPUs), :math:`s` the slices or nodes, :math:`W` a link in one direction, :math:`N` the network
of one chip beyond.

======================  =================================================================================
gather, scatter         :math:`\frac{V (k-1)}{k\,W_\Sigma} + \frac{V (s-1)}{k\,s\,N}`
all-reduce              twice that
all-to-all, of v each   :math:`\max_d v k_d / (8 W)` on rings, :math:`/ (4 W)` on lines: what crosses the
                        middle of dimension d; :math:`v (k-1) / (k W)` behind a switch; and
                        :math:`v (s-1) / (s\,N)` beyond
permute                 :math:`v / W` to a chip of the slice or node, :math:`v / N` beyond
======================  =================================================================================

:math:`W_\Sigma` adds up the links: two for every dimension of the torus that closes to a ring
within the group, one for a dimension that does not. Latency is left out, and so are links shared
with other groups.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from .chips import Chip
from .collectives import Collective


@dataclasses.dataclass(frozen=True)
class Network:
    """Where the devices of a mesh are."""

    chip: Chip
    places: tuple[tuple[int, ...], ...]
    """By position in the mesh: the slice or node, then coordinates in its torus."""

    @classmethod
    def of(cls, chip: Chip, devices: Sequence[Any]) -> "Network":
        """That of the devices of a mesh, in its order; GPUs are numbered node by node.

        Example:
          >>> from ravine.training.plan.chips import CHIPS
          >>> from ravine.training.plan.network import Network
          >>> Network.of(CHIPS["h100"], range(16)).places[9]
          (1,)
        """
        if chip.node:
            return cls(chip, tuple((at // chip.node,) for at in range(len(devices))))
        return cls(chip, tuple((getattr(x, "slice_index", 0) or 0, *x.coords) for x in devices))

    def seconds(self, found: Collective) -> float:
        """Of one collective, each time it runs."""
        group = [self.places[at] for at in found.group if at < len(self.places)]
        beyond = len({place[0] for place in group})
        within = max(1, len(group) // max(1, beyond))
        if len(group) < 2:
            return 0.0
        if found.kind == "collective-permute":
            return found.sent / (self.chip.network if beyond > 1 else self.chip.link)
        if found.kind.endswith("all-to-all"):
            inner = self._middle(group, found.bytes, within)
            return inner + found.bytes * (beyond - 1) / beyond / self.chip.network
        size = found.bytes * (len(group) if found.kind == "reduce-scatter" else 1)
        each = size * (within - 1) / within / self._links(group)
        each += size / within * (beyond - 1) / beyond / self.chip.network
        return 2 * each if found.kind == "all-reduce" else each

    def _dimensions(self, group: list[tuple[int, ...]]) -> list[tuple[int, bool]]:
        """Sizes of a torus' dimensions along a group, and whether each closes to a ring there."""
        found = []
        axes = range(1, len(self.places[0]))
        whole = {axis: 1 + max(place[axis] for place in self.places) for axis in axes}
        closes = {axis: size % self.chip.wraps == 0 for axis, size in whole.items()}
        if self.chip.cubes and not all(closes.values()):
            closes = dict.fromkeys(closes, False)
        for axis in axes:
            along = len({place[axis] for place in group})
            if along > 1:
                found.append((along, along == whole[axis] and closes[axis]))
        return found

    def _links(self, group: list[tuple[int, ...]]) -> float:
        """Bytes a second that one chip of a group sends at once."""
        if self.chip.node:
            return self.chip.link
        # Two devices of one chip send over its links too.
        return self.chip.link * max(1, sum(1 + ring for _, ring in self._dimensions(group)))

    def _middle(self, group: list[tuple[int, ...]], size: float, within: int) -> float:
        """Seconds for what an all-to-all sends within a slice or node."""
        if self.chip.node:
            return size * (within - 1) / within / self.chip.link
        crossing = [k / (8 if ring else 4) for k, ring in self._dimensions(group)]
        return size * max(crossing, default=0.5) / self.chip.link

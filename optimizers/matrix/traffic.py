"""What it costs to orthogonalize matrices that a mesh cuts, and the way that costs least.

*whole*
    every matrix is brought to one device, and back; where there are fewer matrices than devices,
    all are exchanged as if there were one for each;
*gram*
    some mesh axes go on cutting the long side of the matrices, and the sums over it, their Gram
    matrices, are added up over those axes: better for few and long matrices.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Literal, Protocol, get_args, runtime_checkable

import jax

from .placement import Names

Distribution = Literal["auto", "whole", "gram"]
DISTRIBUTIONS = get_args(Distribution)


@runtime_checkable
class OnShards(Protocol):
    """A method that also works where mesh axes cut the long side of the matrices."""

    distribution: Distribution

    def gram_sums(self) -> int:
        """How many Gram matrices of the long side it needs."""
        ...

    def __call__(self, matrices_KxMxN: jax.Array, summed: Names = ()) -> jax.Array:
        """The result for parts of the columns, the other parts being along `summed`."""
        ...


def bytes_sent(
    count: int, rows: int, columns: int, exchanging: int, cutting: int, sums: int, itemsize: int
) -> float:
    r"""Bytes that a device sends, to have `count` matrices `[rows, columns]` worked on.

    With e devices among which whole matrices (or their shards) are dealt, k of them to each, and c
    that go on cutting their columns,

    .. math:: 2 k \frac{mn}{c} \Bigl(1 - \frac1e\Bigr) s
        + \text{sums} \cdot 2 \Bigl(1 - \frac1c\Bigr) k m^2 \cdot 4,
        \qquad k = \lceil \text{count} / e \rceil

    the exchange in and out, and the sums of Gram matrices in float32.

    Args:
      count: matrices.
      rows: m, at most `columns`.
      columns: n.
      exchanging: e.
      cutting: c.
      sums: Gram matrices that are needed of every matrix.
      itemsize: s, bytes of an element.

    Example:
      >>> from ravine.optimizers.matrix.traffic import bytes_sent
      >>> whole = bytes_sent(1, 64, 4096, exchanging=8, cutting=1, sums=2, itemsize=4)
      >>> gram = bytes_sent(1, 64, 4096, exchanging=1, cutting=8, sums=2, itemsize=4)
      >>> whole, gram  # one long matrix on eight devices
      (1835008.0, 57344.0)
    """
    dealt = math.ceil(count / exchanging)
    exchange = 2 * dealt * rows * columns / cutting * (1 - 1 / exchanging) * itemsize
    return exchange + sums * 2 * (1 - 1 / cutting) * dealt * rows**2 * 4


def columns_to_cut(
    method: Callable[[jax.Array], jax.Array] | OnShards,
    batch: jax.Array,
    rows: Names,
    columns: Names,
    sizes: Mapping[str, int],
) -> Names:
    """The mesh axes that shall go on cutting columns; none for whole matrices.

    Args:
      method: what is done with the matrices; whole ones, unless it is `OnShards`.
      batch: this device's tiles `[K, m, n]`.
      rows: mesh axes that cut rows.
      columns: those that cut columns.
      sizes: of mesh axes.
    """
    if not isinstance(method, OnShards) or method.distribution == "whole" or not columns:
        return ()
    parts = lambda names: math.prod(sizes[name] for name in names)
    count, m, n = batch.shape
    every = parts(rows) * parts(columns)

    def cost(kept: Names) -> float:
        return bytes_sent(
            count,
            m * parts(rows),
            n * parts(columns),
            every // parts(kept),
            parts(kept),
            method.gram_sums(),
            batch.dtype.itemsize,
        )

    some = [
        kept
        for length in range(0 if method.distribution == "auto" else 1, len(columns) + 1)
        for kept in itertools.combinations(columns, length)
    ]
    return min(some, key=cost)

"""What it costs to orthogonalize matrices that a mesh cuts, and the way that costs least.

*whole*
    every matrix is brought to one device, and back; where their number does not divide by that of the
    devices, as many are exchanged as if it did;
*ragged*
    the same without those that are not there, by another collective;
*gram*
    some mesh axes go on cutting the long side of the matrices, and the sums over it, their Gram
    matrices, are added up over those axes: better for few and long matrices.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, Protocol, get_args, runtime_checkable

import jax

from .dealing import is_native
from .placement import Names

Distribution = Literal["auto", "whole", "ragged", "gram"]
DISTRIBUTIONS = get_args(Distribution)
RAGGED_OVERHEAD = 1.1
"""How much more a byte costs in a ragged exchange, by assumption: that the usual collective is preferred
where it sends little more."""


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
    count: int,
    rows: int,
    columns: int,
    exchanging: int,
    cutting: int,
    sums: int,
    itemsize: int,
    *,
    ragged: bool = False,
) -> float:
    r"""Bytes that a device sends on average, to have `count` matrices `[rows, columns]` worked on.

    With e devices among which whole matrices (or their shards) are dealt, k of them to each, and c
    that go on cutting their columns,

    .. math:: 2 k \frac{mn}{c} \Bigl(1 - \frac1e\Bigr) s
        + \text{sums} \cdot 2 \Bigl(1 - \frac1c\Bigr) k m^2 \cdot 4,
        \qquad k = \lceil \text{count} / e \rceil

    the exchange in and out, and the sums of Gram matrices in float32. A ragged exchange is of
    :math:`\text{count} / e` matrices.

    Args:
      count: matrices.
      rows: m, at most `columns`.
      columns: n.
      exchanging: e.
      cutting: c.
      sums: Gram matrices that are needed of every matrix.
      itemsize: s, bytes of an element.
      ragged: whether only matrices that there are are exchanged.

    Example:
      >>> from ravine.optimizers.matrix.mesh.traffic import bytes_sent
      >>> whole = bytes_sent(1, 64, 4096, exchanging=8, cutting=1, sums=2, itemsize=4)
      >>> gram = bytes_sent(1, 64, 4096, exchanging=1, cutting=8, sums=2, itemsize=4)
      >>> whole, gram  # one long matrix on eight devices
      (1835008.0, 57344.0)
    """
    dealt = math.ceil(count / exchanging)
    sent = count / exchanging if ragged else dealt
    exchange = 2 * sent * rows * columns / cutting * (1 - 1 / exchanging) * itemsize
    return exchange + sums * 2 * (1 - 1 / cutting) * dealt * rows**2 * 4


class Way(NamedTuple):
    """How matrices are worked on."""

    kept: Names = ()
    """Mesh axes that go on cutting columns; none for whole matrices."""
    ragged: bool = False
    """Whether the others exchange only matrices that there are."""


def cheapest(
    method: Callable[[jax.Array], jax.Array] | OnShards,
    batch: jax.Array,
    rows: Names,
    columns: Names,
    sizes: Mapping[str, int],
) -> Way:
    """The way that sends the fewest bytes, of those that the method allows.

    Args:
      method: what is done with the matrices; whole ones, unless it is `OnShards`.
      batch: this device's tiles `[K, m, n]`.
      rows: mesh axes that cut rows.
      columns: those that cut columns.
      sizes: of mesh axes.
    """
    wanted = method.distribution if isinstance(method, OnShards) else "auto"
    parts = lambda names: math.prod(sizes[name] for name in names)
    count, m, n = batch.shape
    every = parts(rows) * parts(columns)

    def cost(way: Way) -> float:
        overhead = RAGGED_OVERHEAD if way.ragged else 1
        return overhead * bytes_sent(
            count,
            m * parts(rows),
            n * parts(columns),
            every // parts(way.kept),
            parts(way.kept),
            method.gram_sums() if isinstance(method, OnShards) else 0,
            batch.dtype.itemsize,
            ragged=way.ragged,
        )

    if wanted == "whole":
        return Way()
    if wanted == "ragged":
        return Way(ragged=True)
    fewest, most = int(wanted == "gram" and bool(columns)), len(columns)
    if not isinstance(method, OnShards):
        most = 0
    deals = (False, True) if is_native() else (False,)
    ways = [
        Way(kept, ragged)
        for length in range(fewest, most + 1)
        for kept in itertools.combinations(columns, length)
        for ragged in deals
    ]
    return min(ways, key=cost)

"""The cost of orthogonalizing matrices that a mesh cuts, and the cheapest way to do it.

*whole*
    every matrix is brought to one device, and back; their number is padded to a multiple of the device
    count;
*ragged*
    the same without padding, by another collective;
*gram*
    some mesh axes keep cutting the long side of the matrices, and the sums over it, their Gram
    matrices, are added up over those axes: better for few and long matrices.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import jax

from .dealing import is_native
from .placement import Names

Distribution = Literal["auto", "whole", "ragged", "gram"]
RAGGED_OVERHEAD = 1.1
"""How much more a byte is assumed to cost in a ragged exchange, so that the usual collective is
preferred where it sends little more."""


@runtime_checkable
class OnShards(Protocol):
    """A method that also works if mesh axes cut the long side of the matrices."""

    distribution: Distribution

    def gram_sums(self) -> int:
        """How many Gram matrices of the long side it needs."""
        ...

    def __call__(self, matrices_KxMxN: jax.Array, summed: Names = ()) -> jax.Array:
        """The result for one part of the columns, with the other parts along the mesh axes `summed`."""
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
    r"""Bytes that a device sends on average to process `count` matrices `[rows, columns]`.

    With e devices to which whole matrices (or their shards) are dealt, k to each, and c devices that
    keep cutting their columns,

    .. math:: 2 k \frac{mn}{c} \Bigl(1 - \frac1e\Bigr) s
        + \text{sums} \cdot 2 \Bigl(1 - \frac1c\Bigr) k m^2 \cdot 4,
        \qquad k = \lceil \text{count} / e \rceil

    the exchange in and out, plus the sums of Gram matrices in float32. In a ragged exchange k is
    :math:`\text{count} / e`.

    Args:
      count: the number of matrices.
      rows: m, at most `columns`.
      columns: n.
      exchanging: e, devices that exchange whole matrices.
      cutting: c, devices that keep cutting columns.
      sums: the number of Gram matrices needed for every matrix.
      itemsize: s, bytes per element.
      ragged: whether the exchange has no padding.

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
    """How matrices are processed."""

    kept: Names = ()
    """Mesh axes that keep cutting columns; none for whole matrices."""
    ragged: bool = False
    """Whether the others exchange matrices without padding."""


def cheapest(
    method: Callable[[jax.Array], jax.Array] | OnShards,
    batch: jax.Array,
    rows: Names,
    columns: Names,
    sizes: Mapping[str, int],
) -> Way:
    """The way that sends the fewest bytes, among those that the method allows.

    Args:
      method: the function of the matrices; it needs whole ones, unless it is `OnShards`.
      batch: this device's tiles `[K, m, n]`.
      rows: mesh axes that cut rows.
      columns: mesh axes that cut columns.
      sizes: sizes of mesh axes.
    """
    if not rows and not columns:
        return Way()
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

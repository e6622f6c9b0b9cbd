"""How symmetric matrices are stored: in which dtype, and whether as one triangle."""

import dataclasses
from typing import Any

import jax

from ...core.arithmetic import cast
from ..matrix.algebra.packing import pack, unpack


@dataclasses.dataclass(frozen=True)
class Storage:
    """The form in which symmetric matrices are kept in the state."""

    dtype: Any = None
    packed: bool = False

    @property
    def growth(self) -> int:
        """The growth in memory when a stored matrix is loaded."""
        return 2 if self.packed else 1

    def keep(self, matrices: jax.Array) -> jax.Array:
        """Converts matrices to the stored form."""
        kept = pack(matrices) if self.packed else matrices
        return kept if self.dtype is None else kept.astype(self.dtype)

    def load(self, kept: jax.Array, size: int, dtype: Any) -> jax.Array:
        """Converts to matrices in the dtype that they are used in."""
        kept = cast(kept, dtype)
        return unpack(kept, size) if self.packed else kept

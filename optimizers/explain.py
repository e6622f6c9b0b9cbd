"""Explanations: what an optimizer does to every parameter, read from the optimizer itself."""

import dataclasses
from typing import Any

from ..core.arguments import checked
from ..core.text_table import text_table
from .probe import probe
from .roles import MATRIX_ROLES, Rules, decide, matrices


@dataclasses.dataclass(frozen=True)
class Explained:
    """What an optimizer does to one parameter; texts are empty where they do not apply."""

    path: str
    shape: tuple[int, ...]
    role: str
    matrices: str
    """How its axes are read as matrices."""
    optimizer: str
    """``muon``, or the transformations of a chain; for other libraries, the names of their states."""
    how: str
    """Factors of its blocks, or how it is orthogonalized."""
    learning_rate: str
    decay: str
    state_bytes: int


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A row for every parameter; printed, a table."""

    rows: tuple[Explained, ...]
    shared_bytes: int
    """Of state that belongs to no parameter, such as counts."""

    def __str__(self) -> str:
        fields = [field.name for field in dataclasses.fields(Explained)]
        headings = [name.replace("_", " ") for name in fields]
        cells = [[_text(getattr(row, name)) for name in fields] for row in self.rows]
        total = sum(row.state_bytes for row in self.rows) + self.shared_bytes
        tail = f"state: {total:,} bytes, {self.shared_bytes:,} of them shared"
        return f"{text_table([headings, *cells])}\n{tail}"


@checked
def explain(tx: Any, params: Any, rules: Rules | None = None) -> Explanation:
    """What `tx` does to every parameter: a table, found by calling its `init` on shapes.

    It sees through ``optax.chain``, ``partition``, ``masked``, `with_telemetry` and any other wrapper
    that calls the `init` of what it wraps. For transformations from other libraries it lists what their
    states hold.

    Args:
      tx: any Optax transformation.
      params: a tree of arrays, or of their shapes; for NNX, ``nnx.state(model, nnx.Param)``.
      rules: for the roles of parameters where the optimizer has no rules of its own.

    Returns:
      An object with ``rows`` that prints as a table.

    Raises:
      ValueError: as `init` does.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> params = {"up": {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)}}
      >>> explanation = ravine.explain(ravine.shampoo(1e-3, blocks={"size": 4}), params)
      >>> [(row.path, row.role, row.optimizer) for row in explanation.rows]
      [('up/bias', 'bias', 'adam'), ('up/kernel', 'matrix', 'shampoo')]
      >>> explanation.rows[1].how
      '4 blocks of 4x3, factors of 4, 3'
    """
    found, shared = probe(tx, params)
    rows = []
    for d in decide(params, rules, lenient=True):
        says = found[d.path].says
        rows.append(
            Explained(
                d.path,
                d.shape,
                says.get("role", d.role or "other"),
                says.get("matrices", matrices(d) if d.role in MATRIX_ROLES else "-"),
                found[d.path].optimizer,
                says.get("how", ""),
                says.get("learning rate", ""),
                says.get("decay", ""),
                found[d.path].bytes,
            )
        )
    return Explanation(tuple(rows), shared)


def _text(value: Any) -> str:
    return f"{value:,}" if type(value) is int else str(value) or "-"

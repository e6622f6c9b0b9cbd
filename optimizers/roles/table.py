"""A table of roles to print."""

from typing import Any

from ...core.arguments import checked
from ...core.text_table import text_table
from ..probe import probe
from .deciding import Decided, decide
from .rules import MATRIX_ROLES, Rules


@checked
def role_table(params: Any, rules: Rules | None = None, tx: Any = None) -> str:
    """A table to print: the role of each parameter, and what an optimizer does to it.

    :func:`ravine.explain` shows more about an optimizer.

    Args:
      params: a tree of arrays, or of their shapes.
      rules: as for `assign_roles`.
      tx: an optimizer, for the columns ``optimizer`` and ``decay``, read from the optimizer itself.

    Raises:
      ValueError: as `assign_roles`.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> params = {"kernel": jnp.ones((3, 2, 5)), "scale": jnp.ones((3, 2))}
      >>> tx = ravine.muon(0.02, weight_decay=0.1)
      >>> print(ravine.role_table(params, tx=tx))
      path    shape      role    matrices                      optimizer  decay
      kernel  (3, 2, 5)  matrix  [batch 3, rows 2, columns 5]  muon       0.1
      scale   (3, 2)     norm    -                             adam       0.1
    """
    table = [("path", "shape", "role", "matrices", "optimizer", "decay")]
    found = {} if tx is None else probe(tx, params)[0]
    for d in decide(params, rules):
        optimizer, decay = "-", "-"
        if d.path in found:
            optimizer = found[d.path].optimizer
            decay = found[d.path].says.get("decay", "no")
        seen_as = matrices(d) if d.role in MATRIX_ROLES else "-"
        table.append((d.path, str(d.shape), str(d.role), seen_as, optimizer, decay))
    return text_table(table)


def matrices(d: Decided) -> str:
    """The matrices in a parameter, as text.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.roles import decide, matrices
      >>> matrices(decide({"kernel": jnp.ones((2, 5))})[0])
      '[batch 1, rows 2, columns 5]'
    """
    if d.axes is None:
        return "? (say which axes are rows and columns)"
    pieces = d.layout().pieces
    return " + ".join(f"[batch {b}, rows {m}, columns {n}]" for b, m, n in pieces)

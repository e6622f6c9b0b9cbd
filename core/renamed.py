"""What arguments were called before: whoever gives an old name is told the new one.

Versions before 1.0 deprecate nothing, they refuse; `CHANGELOG.md` has the names as a table.
"""

from collections.abc import Iterable

from .checks import near

BEFORE: dict[str, tuple[str, ...]] = {
    "block": ("blocks=ravine.Blocks(size=...)",),
    "every": ("refresh=ravine.Refresh(every=...)",),
    "fallback_learning_rate": ("fallback=ravine.Fallback(learning_rate=...)",),
    "limit": ("blocks=ravine.Blocks(bound=...)",),
    "matrix_roles": ("roles=...",),
    "method": ("root=...", "polar=..."),
    "shampoo_roles": ("roles=...",),
    "sides": ("blocks=ravine.Blocks(sides=...)",),
    "soap_roles": ("roles=...",),
    "staggered": ("refresh=ravine.Refresh(staggered=...)",),
    "start": ("refresh=ravine.Refresh(start=...)",),
}
"""An old name, and what to write now: the first of which the function has the argument."""


def instead(name: str, known: Iterable[str]) -> str:
    """What to give for an argument that a function with the known ones does not have.

    Example:
      >>> from ravine.core.renamed import instead
      >>> instead("matrix_roles", ["roles", "rules"])
      'give roles=...'
      >>> instead("beta", ["b1", "b2", "beta2"])
      'did you mean beta2?'
    """
    known = list(known)
    for now in BEFORE.get(name, ()):
        if now.partition("=")[0] in known:
            return f"give {now}"
    return near(name, known)

"""Old names of arguments: the error for an old name gives the new one.

Versions before 1.0 do not deprecate; they refuse; `CHANGELOG.md` has the names as a table.
"""

from collections.abc import Iterable

from .checks import near

BEFORE: dict[str, tuple[str, ...]] = {
    "absolute_ridge": ("roots=ravine.Roots(absolute_ridge=...)",),
    "block": ("blocks=ravine.Blocks(size=...)",),
    "every": ("refresh=ravine.Refresh(every=...)",),
    "exponent": ("roots=ravine.Roots(exponent=...)",),
    "fallback_learning_rate": ("fallback=ravine.Fallback(learning_rate=...)",),
    "graft_b2": ("graft=ravine.Grafting(b2=...)",),
    "graft_eps": ("eps=...",),
    "graft_per": ("graft=ravine.Grafting(per=...)",),
    "limit": ("blocks=ravine.Blocks(bound=...)",),
    "matrix_roles": ("roles=...",),
    "max_elements": ("factors=ravine.Factors(max_elements=...)",),
    "method": ("roots=ravine.Roots(method=...)", "polar=..."),
    "packed": ("factors=ravine.Factors(packed=...)",),
    "patience": ("roots=ravine.Roots(patience=...)",),
    "ridge": ("roots=ravine.Roots(ridge=...)",),
    "root": ("roots=ravine.Roots(method=...)",),
    "root_dtype": ("factors=ravine.Factors(root_dtype=...)",),
    "shampoo_roles": ("roles=...",),
    "sides": ("blocks=ravine.Blocks(sides=...)",),
    "soap_roles": ("roles=...",),
    "staggered": ("refresh=ravine.Refresh(staggered=...)",),
    "start": ("refresh=ravine.Refresh(start=...)",),
    "statistics": ("factors=ravine.Factors(statistics=...)",),
    "statistics_dtype": ("factors=ravine.Factors(statistics_dtype=...)",),
    "tolerance": ("roots=ravine.Roots(tolerance=...)",),
}
"""An old name, and what to write now: the first candidate that is an argument of the function."""


def instead(name: str, known: Iterable[str]) -> str:
    """The advice for an argument that is not among the known ones of a function.

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

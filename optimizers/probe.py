"""What a transformation does to every parameter, found by calling its `init` on shapes."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from ..core.checks import shown
from ..core.paths import key_names, path_string, paths_of
from ..core.transformation import Link, watching

WRAPPERS = frozenset(
    (
        "by_role",
        "combine_by_role",
        "on_mesh",
        "split_state",
        "with_monitors",
        "with_telemetry",
    )
)
"""Links that do not change what is done to a parameter."""


@dataclasses.dataclass
class Found:
    """What is done to one parameter."""

    links: list[str] = dataclasses.field(default_factory=list)
    """Names of the functions that made the transformations it goes through, in order."""
    says: dict[str, str] = dataclasses.field(default_factory=dict)
    """What the links say about it."""
    kinds: list[str] = dataclasses.field(default_factory=list)
    """Names of the states that hold something for it alone."""
    bytes: int = 0
    """Of what these states hold for it."""

    @property
    def optimizer(self) -> str:
        """The best name there is."""
        label = self.says.get("optimizer", "fallback")
        if label != "fallback":
            return label
        rates = ("scale_by_learning_rate", "add_decayed_weights")
        links = [name for name in self.links if name not in WRAPPERS and name not in rates]
        if links:
            return " → ".join(name.removeprefix("scale_by_") for name in links)
        if "scale_by_learning_rate" in self.links:
            return "sgd"
        names = [kind.removeprefix("ScaleBy").removesuffix("State") for kind in self.kinds]
        return " → ".join(dict.fromkeys(names)) or "-"


def probe(tx: Any, params: Any) -> tuple[dict[str, Found], int]:
    """What is done to every parameter, by path, and the bytes of the shared state."""
    if not callable(getattr(tx, "init", None)):
        raise ValueError(
            "tx must be a gradient transformation such as ravine.adamw(1e-3) (of an nnx.Optimizer its "
            f"tx), got {shown(tx)}."
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not hasattr(leaf, "dtype"):
            where = f"the parameter {path_string(path)!r}" if path else "params"
            raise ValueError(
                f"{where} must be an array or its shape, got {shown(leaf)}; make it one, or leave it "
                "out, as eqx.filter(model, eqx.is_inexact_array) does."
            )
    leaves = jax.tree_util.tree_leaves_with_path(params)
    own_keys = [key_names(path) for path, _ in leaves]
    keys = list(zip(paths_of(params), own_keys, strict=True))
    found = {path: Found() for path, _ in keys}
    with watching() as links:
        state = jax.eval_shape(lambda tree: tx.init(tree), params)  # a new function, never cached
    for link in links:
        _note(link, found)
    shared = 0
    for names, starts, kinds, leaf in _leaves(state, (), (), ()):
        size = leaf.size * leaf.dtype.itemsize  # of random keys too, which NumPy has no dtype for
        owners = [(len(own), path) for path, own in keys if own and _contains(names, own, starts)]
        if len(keys) == 1 and not keys[0][1] and leaf.ndim:
            owners = [(0, keys[0][0])]
        if not owners:
            shared += size
            continue
        owner = found[max(owners)[1]]
        owner.bytes += size
        owner.kinds += [kind for kind in kinds[-1:] if kind not in owner.kinds]
    return found, shared


def _note(link: Link, found: dict[str, Found]) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(link.params)
    for index, (path, _) in enumerate(leaves):
        owner = found.get(path_string(path))
        if owner is None:
            continue
        owner.links.append(link.name)
        for what, says in link.says.items():
            text = says[index] if isinstance(says, list) else says
            if text is not None:
                both = what == "how" and what in owner.says
                owner.says[what] = f"{owner.says[what]}; {text}" if both else text


def _leaves(
    node: Any, names: tuple[str, ...], starts: tuple[int, ...], kinds: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], tuple[int, ...], tuple[str, ...], Any]]:
    """Every leaf with the names of its keys, where fields of states begin in these, and the states."""
    children, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    if len(children) == 1 and not children[0][0]:
        yield names, starts, kinds, node
        return
    if hasattr(node, "_fields"):
        kinds = (*kinds, type(node).__name__)
        starts = (*starts, len(names) + 1)
    for path, child in children:
        if child is not None:
            yield from _leaves(child, (*names, *key_names(path)), starts, kinds)


def _contains(names: Sequence[str], part: Sequence[str], starts: Sequence[int]) -> bool:
    """Whether a path is part of another, from the field of a state on, if there is any state."""
    return any(
        tuple(names[at : at + len(part)]) == tuple(part)
        for at in starts or range(len(names) - len(part) + 1)
    )

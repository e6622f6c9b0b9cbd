"""Between trees of leaves and the matrices in them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ....core.arithmetic import wide
from ....core.paths import path_string
from ....core.transformation import transformation
from ..mesh.exchange import move_in, move_out, resharded
from ..mesh.placement import WHOLE, Names, Placement, explicit_sizes, mesh_of, names_of, place
from .layout import DEFAULT, Layout, MatrixAxes, layout

DEFAULT_AXES = DEFAULT
Axes = MatrixAxes | Callable[[str], MatrixAxes]
"""Axes of all leaves, or a function from a leaf's path to its axes."""


def axes_of_leaves(tree: Any, axes: Axes) -> list[MatrixAxes]:
    """The axes of every leaf, in the order of the leaves."""
    paths = [path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return [axes if isinstance(axes, MatrixAxes) else axes(path) for path in paths]


def layouts_of(tree: Any, axes: Axes) -> list[Layout]:
    """The layout of every leaf, in the order of the leaves."""

    def layout_of(path: Any, leaf: Any) -> Layout:
        name = path_string(path)
        return layout(leaf.shape, axes if isinstance(axes, MatrixAxes) else axes(name), name)

    return [layout_of(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


@dataclasses.dataclass(frozen=True)
class Matrices:
    """A leaf as matrices, on the mesh that it is sharded over."""

    layout: Layout
    placement: Placement = WHOLE
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """The sizes of the mesh's axes, by name."""

    def local(self) -> "Matrices":
        """The same for the part of the leaf on one device."""
        if not self.placement.inside:
            return self
        parts = [self.placement.parts(names) for names in self.placement.inside]
        return dataclasses.replace(self, layout=self.layout.shrunk(parts))

    @property
    def names(self) -> tuple[Names, Names, Names]:
        """Mesh axes that cut the batch, rows and columns of a device's matrices."""
        inside = self.placement.inside
        if not inside:
            return (), (), ()
        batch = {name for axis in self.layout.batch_axes for name in inside[axis]}
        rows, columns = self.layout.row_axes[0], self.layout.column_axes[0]
        # Matrices dealt by the same mesh axes are joined, in whatever order the axes come.
        dealing = tuple(name for name in self.sizes if name in batch)
        return dealing, inside[rows], inside[columns]

    def opened(self, leaf: jax.Array) -> tuple[jax.Array, ...]:
        """A device's batches `[L, M, N]` of a leaf."""
        return self.layout.to_matrices(move_in(leaf, self.placement))

    def closed(self, pieces: Sequence[jax.Array]) -> jax.Array:
        """The inverse of `opened`."""
        return move_out(self.layout.from_matrices(pieces), self.placement)


def matrices_of(tree: Any, axes: Axes) -> list[Matrices]:
    """The matrices of every leaf, in the order of the leaves."""

    def matrices(leaf: Any, found: Layout) -> Matrices:
        mesh = mesh_of(leaf)
        if mesh is None:
            return Matrices(found)
        sizes, names = explicit_sizes(mesh), names_of(leaf)
        used = {n: size for n, size in sizes.items() if any(n in axis for axis in names)}
        cuts, free = found.cuts()
        return Matrices(found, place(names, cuts, used, free), sizes)

    return list(map(matrices, jax.tree.leaves(tree), layouts_of(tree, axes)))


def split(tree: Any, layouts: Sequence[Layout]) -> list[tuple[jax.Array, ...]]:
    """Every leaf as its batches of matrices `[L, M, N]`."""
    leaves = jax.tree.leaves(tree)
    return [layout.to_matrices(leaf) for leaf, layout in zip(leaves, layouts, strict=True)]


def joined(pieces: Sequence[Sequence[jax.Array]], like: Any, layouts: Sequence[Layout]) -> Any:
    """The inverse of `split`: a tree shaped like `like`."""
    leaves = [layout.from_matrices(p) for p, layout in zip(pieces, layouts, strict=True)]
    return jax.tree.map(resharded, jax.tree.unflatten(jax.tree.structure(like), leaves), like)


def map_pieces(function: Callable[..., jax.Array], layouts: Sequence[Layout], *trees: Any) -> Any:
    """Applies `function` to the pieces of the trees' leaves, and joins the results."""
    split_trees = [split(tree, layouts) for tree in trees]
    done = [
        [function(*arguments) for arguments in zip(*leaf, strict=True)]
        for leaf in zip(*split_trees, strict=True)
    ]
    return joined(done, trees[0], layouts)


def frobenius(x_LxMxN: jax.Array) -> jax.Array:
    """The Frobenius norm of every matrix, `[L, 1, 1]`, in at least float32."""
    return jnp.sqrt(jnp.sum(jnp.square(wide(x_LxMxN)), axis=(1, 2), keepdims=True))


def safe_divide(x: jax.Array, by: jax.Array) -> jax.Array:
    """`x / by`, and `x` where `by` is zero: matrices of size zero are not changed."""
    return x / jnp.where(by == 0, 1, by)


def no_state(axes: Axes) -> Callable[[optax.Params], optax.EmptyState]:
    """An `init` without state that refuses leaves that are not matrices."""

    def init(params: optax.Params) -> optax.EmptyState:
        layouts_of(params, axes)
        return optax.EmptyState()

    return init


def stateless_on_matrices(function: Any, axes: Axes) -> optax.GradientTransformation:
    """A transformation that applies `function` to every batch of matrices, and keeps no state."""

    def update(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del params
        return map_pieces(function, layouts_of(updates, axes), updates), state

    return transformation(no_state(axes), update)

"""`Explicit` axes in place of a mesh's `Auto` ones.

Matrix optimizers read from types how a leaf is cut, and types name `Explicit` axes only. So all axes of
a mesh are `Explicit` while such an optimizer runs. Axes that were `Auto` are assumed to cut no leaf,
unless `on_mesh` specifies otherwise, and they share the work like all axes that a leaf does not use.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from .placement import axes_of_type, mesh_in, names_of, spec


def explicitly(
    mesh: Mesh | AbstractMesh, function: Callable[..., Any], specs: Any, *arguments: Any
) -> Any:
    """`function` of arguments cut as the specifications say, with all `Auto` axes made `Explicit`."""
    # As leaves, since Flax trees are not trees of specifications.
    leaves, structure = jax.tree.flatten(arguments)
    of_leaves = lambda *leaves: function(*jax.tree.unflatten(structure, leaves))
    in_sharding = tuple(jax.tree.leaves(specs))
    with contextlib.ExitStack() as stack:
        stack.enter_context(set_outside_of_jit(mesh))
        if jax.sharding.get_abstract_mesh().empty:
            stack.enter_context(jax.sharding.use_abstract_mesh(mesh.abstract_mesh))
        found = jax.sharding.explicit_axes(of_leaves, axes=auto_axes(mesh), in_sharding=in_sharding)
        return found(*leaves)


def set_outside_of_jit(mesh: Mesh | AbstractMesh) -> contextlib.AbstractContextManager[None]:
    """Sets the mesh if none is set, for what is computed at once: JAX needs to know the devices then."""
    if isinstance(mesh, Mesh) and jax.sharding.get_abstract_mesh().empty:
        with contextlib.suppress(ValueError):  # while `jax.jit` and others trace
            return jax.set_mesh(mesh)
    return contextlib.nullcontext()


def auto_axes(mesh: Any) -> tuple[str, ...]:
    """The names of a mesh's `Auto` axes."""
    return tuple(axes_of_type(mesh, AxisType.Auto))


def on_mixed_meshes(init: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The `init` of a transformation, also for meshes with `Explicit` and `Auto` axes."""

    def init_anywhere(params: Any) -> Any:
        mesh = mesh_in(params)
        if mesh is None or not auto_axes(mesh):
            return init(params)
        return explicitly(mesh, init, specs_of(params), params)

    return init_anywhere


def specs_of(tree: Any) -> Any:
    """How the leaves of a tree are cut according to their types."""
    return jax.tree.map(lambda x: spec(names_of(x)), tree)


def specs_of_state(init: Callable[[Any], Any], tree: Any, specs: Any, mesh: AbstractMesh) -> Any:
    """How the state is cut that `init` makes of a tree cut as the specifications say.

    It is traced with all axes `Explicit`; nothing is computed.
    """
    twin = mesh.update_axis_types(dict.fromkeys(auto_axes(mesh), AxisType.Explicit))
    structs = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(twin, s)),
        tree,
        specs,
    )
    with jax.sharding.use_abstract_mesh(twin):
        return specs_after(init, structs)


def specs_after(function: Callable[[Any], Any], argument: Any) -> Any:
    """How the results of a function are cut; nothing is computed."""
    found = []

    def traced(argument: Any) -> Any:
        # Here, since `jax.eval_shape` drops types on a mesh with axes of several kinds (JAX 0.10).
        made = function(argument)
        found.append(specs_of(made))
        return made

    jax.eval_shape(traced, argument)
    return found[0]

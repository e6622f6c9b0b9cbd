"""Optimizers on a mesh: where their state is placed, and how to specify where parameters are.

Under an `Explicit` mesh, the default of ``jax.make_mesh``, types say how arrays are sharded, and every
optimizer of Ravine reads them. Under an `Auto` mesh traced types do not, and `on_mesh` supplies the
shardings. `state_shardings` gives the shardings of the state of any transformation, and `split_state`
spreads the state of an element-wise one over the devices that would otherwise hold copies of it.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ....core.arguments import checked
from ....core.own_norm import OwnNorm, norms_in, with_norm
from ....core.paths import key_names, path_string
from ....core.transformation import with_extra_args
from .exchange import resharded, resharded_as
from .explicit import auto_axes, explicitly, set_outside_of_jit, specs_of_state
from .placement import explicit_sizes, mesh_of, names_of, place


@checked
def state_shardings(tx: optax.GradientTransformation, params: optax.Params) -> Any:
    """The shardings of a transformation's state, for parameters sharded as these; nothing is computed.

    ``tx.init`` is traced on a copy of the mesh with all axes `Explicit`, and the shardings are read
    from the types of the result.

    Args:
      tx: any Optax transformation, Ravine's or not.
      params: a tree of arrays or `jax.ShapeDtypeStruct`, each with a `NamedSharding`.

    Returns:
      A tree of `NamedSharding` like the state, for ``jax.jit(tx.init, out_shardings=...)`` and for
      restoring a checkpoint.

    Raises:
      ValueError: for a parameter without a `NamedSharding`, or with an axis that its mesh axes do not
        divide.

    Example:
      >>> import jax, jax.numpy as jnp, ravine
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> params = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(mesh, P("data")))
      >>> ravine.state_shardings(ravine.scale_by_adam(), params).mu.spec
      P('data', None)
    """
    shardings = jax.tree_util.tree_map_with_path(_sharding_of, params)
    leaves = jax.tree.leaves(shardings)
    if not leaves:
        raise ValueError("state_shardings needs parameters, but this tree has no leaf.")
    mesh = leaves[0].mesh
    specs = jax.tree.map(lambda s: s.spec, shardings)
    check_specs(params, specs, mesh)
    state_specs = specs_of_state(tx.init, params, specs, mesh.abstract_mesh)
    return jax.tree.map(lambda s: NamedSharding(mesh, s), state_specs)


@checked
def on_mesh(
    tx: optax.GradientTransformation, param_specs: Any, mesh: Any = None
) -> optax.GradientTransformationExtraArgs:
    """The transformation for parameters with these shardings, under a mesh with some or all axes
    `Auto`.

    Inside, all axes are `Explicit`; results, and parameters for ``curvature=``, have the axes of the
    actual mesh. Under an `Explicit` mesh it changes nothing. Place parameters on the mesh before the
    first update, also on a mesh of one device: otherwise ``jax.jit`` traces the update again for the
    second, since what it returns is on the mesh.

    Args:
      tx: any transformation that works under an `Explicit` mesh; all of Ravine's do.
      param_specs: how parameters are sharded: a tree like them of `PartitionSpec` or `NamedSharding`,
        or the parameters themselves, if they are on a mesh; only their shardings are kept. With Flax,
        ``nnx.state(model, nnx.Param)`` or its ``nnx.get_partition_spec``. Parameters are matched by
        path, so that ``optax.masked`` may leave some out.
      mesh: the mesh; by default that of ``jax.set_mesh``, or else that of the parameters' shardings.

    Raises:
      ValueError: if no parameter is on a mesh; at `init` or the update: without a mesh, for a parameter
        without a specification, or for a specification that names axes the mesh does not have, or that
        does not divide the parameter.

    Example:
      >>> import jax, jax.numpy as jnp, ravine
      >>> from jax.sharding import AxisType, PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
      >>> tx = ravine.on_mesh(ravine.shampoo(1e-3), {"kernel": P("data")}, mesh)
      >>> state = jax.jit(tx.init)({"kernel": jnp.ones((4, 2))})
    """
    tx = optax.with_extra_args_support(tx)
    known, found_mesh = _known_specs(param_specs)

    def chosen() -> Mesh | AbstractMesh:
        current = jax.sharding.get_abstract_mesh()
        found = mesh if mesh is not None else found_mesh if current.empty else None
        found = current if found is None else found
        if found.empty:
            raise ValueError(
                "there is no mesh; call under jax.set_mesh(mesh), or give on_mesh one."
            )
        return found

    def passes_through(tree: Any) -> bool:
        # Optax's tree.map_params initialises a placeholder.
        return not jax.tree.leaves(tree) or not auto_axes(chosen())

    def mesh_for(tree: Any) -> contextlib.AbstractContextManager[None]:
        leaves = jax.tree.leaves(tree)
        return set_outside_of_jit(chosen()) if leaves else contextlib.nullcontext()

    def known_specs(tree: Any) -> Any:
        def spec_of(path: Any, x: Any) -> PartitionSpec:
            names = key_names(path)
            if names not in known:
                raise ValueError(
                    f"on_mesh was not told how the parameter {path_string(path)!r} of shape "
                    f"{tuple(x.shape)} is sharded; give it all parameters, or a PartitionSpec for each."
                )
            return known[names]

        specs = jax.tree_util.tree_map_with_path(spec_of, tree)
        check_specs(tree, specs, chosen())
        return specs

    def init(params: optax.Params) -> Any:
        if passes_through(params):
            with mesh_for(params):
                return tx.init(params)
        return explicitly(chosen(), tx.init, known_specs(params), params)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, Any]:
        if passes_through(updates):
            with mesh_for(updates):
                return tx.update(updates, state, params, **extra)
        found, specs = chosen(), known_specs(updates)
        state_specs = specs_of_state(tx.init, updates, specs, found.abstract_mesh)
        # Functions, such as Sophia's curvature, cannot be arguments of a traced function.
        functions = {name: value for name, value in extra.items() if callable(value)}
        if "curvature" in functions:
            functions["curvature"] = _with_auto_axes(functions["curvature"], auto_axes(found))
        arrays = {name: value for name, value in extra.items() if not callable(value)}
        whole = jax.tree.map(lambda _: PartitionSpec(), arrays)
        return explicitly(
            found,
            lambda u, s, p, arrays: tx.update(u, s, p, **arrays, **functions),
            (specs, state_specs, None if params is None else specs, whole),
            updates,
            state,
            params,
            arrays,
        )

    def norms(grads: optax.Updates, state: Any) -> dict[str, OwnNorm]:
        if passes_through(grads):
            with mesh_for(grads):
                return norms_in(tx, grads, state)
        found, specs = chosen(), known_specs(grads)
        state_specs = specs_of_state(tx.init, grads, specs, found.abstract_mesh)
        return explicitly(
            found, functools.partial(norms_in, tx), (specs, state_specs), grads, state
        )

    return with_norm(with_extra_args(init, update), "on_mesh", norms)


def _known_specs(params: Any) -> tuple[dict[tuple[str, ...], PartitionSpec], Any]:
    """Specifications by the parameters' paths, and the mesh if their shardings have one."""
    known, mesh = {}, None
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        sharding = (
            x if isinstance(x, NamedSharding | PartitionSpec) else getattr(x, "sharding", None)
        )
        if isinstance(sharding, NamedSharding):
            mesh, sharding = sharding.mesh, sharding.spec
        known[key_names(path)] = sharding
    if not any(isinstance(s, PartitionSpec) for s in known.values()):
        raise ValueError(
            "on_mesh needs to know how parameters are sharded, and none of these has a NamedSharding; "
            "place them with jax.device_put, or give a tree like them of PartitionSpec."
        )
    specs = {n: s if isinstance(s, PartitionSpec) else PartitionSpec() for n, s in known.items()}
    return specs, mesh


@checked
def split_state(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    r"""An element-wise optimizer whose state is spread over all devices (ZeRO, stage 1).

    Every mesh axis that does not shard a parameter shards its state, if it divides one of its axes:
    each device updates its part, and the updates are gathered, so that the shardings of updates and
    parameters do not change. Moments of data-parallel parameters take 1/devices of the memory.

    Args:
      tx: an element-wise optimizer, such as `ravine.adamw` and all first-order optimizers. Shampoo,
        SOAP and Muon share their work among devices without it.

    Source: Rajbhandari et al., 2020, https://arxiv.org/abs/1910.02054.

    Example:
      >>> import jax, jax.numpy as jnp, ravine
      >>> tx = ravine.split_state(ravine.adamw(1e-3))
      >>> with jax.set_mesh(jax.make_mesh((1,), ("data",))):
      ...     state = jax.jit(tx.init)(jnp.ones((8, 4)))
    """

    tx = optax.with_extra_args_support(tx)

    def split(tree: Any, like: Any) -> Any:
        return jax.tree.map(lambda x, leaf: resharded_as(x, _split_names(leaf)), tree, like)

    def init(params: optax.Params) -> Any:
        return tx.init(split(params, params))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, Any]:
        moved = None if params is None else split(params, params)
        found, state = tx.update(split(updates, updates), state, moved, **extra)
        return jax.tree.map(resharded, found, updates), state

    return with_extra_args(init, update)


def check_specs(params: Any, specs: Any, mesh: Any) -> None:
    """Raises for specifications that name axes the mesh does not have, or that do not divide."""

    def check(path: Any, x: Any, wanted: PartitionSpec) -> None:
        leaf = f"the parameter {path_string(path)!r} of shape {tuple(x.shape)}"
        if len(wanted) > len(x.shape):
            raise ValueError(f"{leaf} has fewer axes than its specification {wanted}.")
        for axis, entry in enumerate(wanted):
            names = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
            size = 1
            for name in names:
                if name not in mesh.shape:
                    known = ", ".join(map(repr, mesh.axis_names))
                    raise ValueError(f"{leaf}: the mesh has no axis {name!r}, only {known}.")
                size *= mesh.shape[name]
            if x.shape[axis] % size:
                raise ValueError(
                    f"{leaf}: axis {axis} of {x.shape[axis]} does not divide by the {size} devices of "
                    f"the mesh axes {names}; shard another axis, or leave this one whole."
                )

    jax.tree_util.tree_map_with_path(check, params, specs)


def _with_auto_axes(function: Callable[..., Any], axes: tuple[str, ...]) -> Callable[..., Any]:
    """A function from a tree to one like it, with these axes `Auto` instead of `Explicit`.

    An optimizer runs with `Explicit` axes, and calls its curvature with such parameters; the model,
    under an `Auto` mesh, needs `Auto` ones.
    """

    def call(tree: Any, *arguments: Any) -> Any:
        if mesh_of(jax.tree.leaves(tree)[0]) is None:
            return function(tree, *arguments)
        shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, tree)
        return jax.sharding.auto_axes(function, axes=axes, out_sharding=shardings)(tree, *arguments)

    return call


def _split_names(leaf: Any) -> Any:
    mesh = mesh_of(leaf)
    if mesh is None:
        return names_of(leaf)
    return place(names_of(leaf), leaf.shape, explicit_sizes(mesh)).inside


def _sharding_of(path: Any, x: Any) -> NamedSharding:
    sharding = getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        raise ValueError(
            f"the parameter {path_string(path)!r} has no NamedSharding; place it with "
            "jax.device_put, or give a jax.ShapeDtypeStruct with one."
        )
    return sharding

"""Checks of trees: of parameters, and of trees that must match them."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def check_real_leaves(params: Any) -> None:
    """Raises `TypeError` when a parameter is not a real floating-point array."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            name = jax.tree_util.keystr(path) or "(root)"
            if dtype is None:
                raise TypeError(
                    f"parameter {name} is a {type(leaf).__name__}, but optimizers take arrays; make it "
                    "one, or leave it out, as eqx.filter(model, eqx.is_inexact_array) does."
                )
            raise TypeError(
                f"parameter {name} has dtype {dtype}, but optimizers take real "
                "floating-point arrays; cast it, or leave it out "
                "with optax.masked or optax.partition."
            )


def check_params_given(params: Any, what: str) -> None:
    """Raises when `update` was called without parameters that the rule needs."""
    if params is None:
        raise ValueError(f"{what} needs the parameters: call tx.update(grads, state, params).")


def is_part(params: Any) -> bool:
    """Whether `optax.masked` or `optax.partition` took parameters out of the tree."""

    def is_taken(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    return any(map(is_taken, jax.tree.leaves(params, is_leaf=is_taken)))


def as_mask(mask: Any) -> Any:
    """Returns a tree of booleans, or a function that makes one from the parameters, unchanged.

    Raises:
      ValueError: for anything else.
    """
    leaves = jax.tree.leaves(mask)
    if callable(mask) or (leaves and all(map(_is_truth, leaves))):
        return mask
    raise ValueError("masks are booleans")


def _is_truth(leaf: Any) -> bool:
    return isinstance(leaf, bool) or getattr(leaf, "dtype", None) == jnp.bool_


def check_mask(mask: Any, params: Any, name: str) -> None:
    """Raises unless a mask, or a function that makes one, covers `params` and selects some.

    If the parameters are only part of a tree, a mask may select none of them.
    """
    if not jax.tree.leaves(params) or is_part(params):
        return
    tree = mask(params) if callable(mask) else mask
    try:
        covered = jax.tree.map(lambda m, part: jax.tree.map(lambda _: bool(m), part), tree, params)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{name} is not shaped like the parameters: {error}; give every parameter a boolean."
        ) from error
    if not any(jax.tree.leaves(covered)):
        raise ValueError(
            f"{name} selects no parameter; correct it, or leave out what it is the mask of."
        )

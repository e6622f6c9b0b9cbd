"""Refusals at construction and `init`: one sentence that names the culprit and the mend."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax


def is_number(value: Any) -> bool:
    """Whether there is a value to check; traced and array hyperparameters have none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_decay_rates(**rates: Any) -> None:
    """Raises unless every exponential decay rate (a beta) lies in [0, 1)."""
    for name, rate in rates.items():
        if is_number(rate) and not 0.0 <= rate < 1.0:
            raise ValueError(
                f"{name} must lie in [0, 1), got {rate!r}; common values are 0.9 to 0.999."
            )


def check_non_negative(**values: Any) -> None:
    """Raises unless every value is finite and at least zero."""
    for name, value in values.items():
        if is_number(value) and not (math.isfinite(value) and value >= 0.0):
            raise ValueError(f"{name} must be finite and not negative, got {value!r}.")


def check_some_eps(eps: Any, eps_root: Any) -> None:
    """Raises when nothing keeps a root of zero away from a denominator."""
    check_non_negative(eps=eps, eps_root=eps_root)
    if is_number(eps) and is_number(eps_root) and eps == 0 and eps_root == 0:
        raise ValueError(
            "eps and eps_root are both 0, so a parameter whose gradients are all zero would be "
            "updated by 0/0; give eps > 0."
        )


def check_real_leaves(params: Any) -> None:
    """Raises `TypeError` when a parameter is not a real floating-point array."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            name = jax.tree_util.keystr(path) or "(root)"
            raise TypeError(
                f"parameter {name} has dtype {dtype or type(leaf)}, but optimizers take real "
                "floating-point arrays; cast it, or leave it out "
                "with optax.masked or optax.partition."
            )


def check_params_given(params: Any, what: str) -> None:
    """Raises when `update` was called without the parameters a rule needs."""
    if params is None:
        raise ValueError(f"{what} needs the parameters: call tx.update(grads, state, params).")


def is_part(params: Any) -> bool:
    """Whether `optax.masked` or `optax.partition` took parameters out of the tree."""

    def is_taken(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    return any(map(is_taken, jax.tree.leaves(params, is_leaf=is_taken)))


def check_mask(mask: Any, params: Any, name: str) -> None:
    """Raises unless a mask, or a function that makes one, covers `params` and selects some.

    Of parameters that are themselves part of a tree, a mask may well select none.
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

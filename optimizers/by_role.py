"""A direction for the roles it suits, another optimizer for the rest."""

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import fields
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from ..core.arithmetic import is_usable
from ..core.checks import check_decay_rates, check_non_negative
from ..core.options import options
from ..core.remembered import Remembered
from ..core.transformation import with_extra_args
from ..core.tree_checks import is_part
from .adam import adamw
from .links.curvature import with_whole_curvature
from .links.decay import Mask, decay_or_identity
from .links.learning_rate import as_fallback, scale_by_learning_rate
from .matrix.shape.layout import MatrixAxes
from .matrix.shape.matrices import DEFAULT_AXES, Axes
from .roles import Decided, Role, Rules, check_roles, complete, decide, matrices

VOCABULARY: dict[str, Literal["rows", "columns"]] = {"embedding": "rows", "head": "columns"}


@options("fallback")
class Fallback:
    """AdamW for the parameters that an optimizer for matrices does not take.

    Attributes:
      learning_rate: a number or a schedule; ``None`` takes `ratio` times the optimizer's own.
      ratio: its learning rate divided by the optimizer's; ``None`` takes the optimizer's default,
        mostly 1.
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the second; 0.95 as in Keller Jordan's Muon, Moonlight and MARS, not AdamW's own
        default.
      eps: added to the root of the second moment.
      weight_decay: multiplied by the learning rate; ``None`` takes the optimizer's decay.

    Raises:
      ValueError: for values out of range, or if both a learning rate and a ratio are given.

    Example:
      >>> import ravine
      >>> tx = ravine.muon(0.02, fallback=ravine.Fallback(ratio=0.1))
      >>> tx = ravine.muon(0.02, fallback=ravine.lion(1e-4))  # another optimizer altogether
    """

    learning_rate: optax.ScalarOrSchedule | None = None
    ratio: float | None = None
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: optax.ScalarOrSchedule | None = None

    def __post_init__(self) -> None:
        said = {f"fallback.{field.name}": getattr(self, field.name) for field in fields(self)}
        check_decay_rates(**{name: said.pop(name) for name in ("fallback.b1", "fallback.b2")})
        check_non_negative(**said)
        if self.learning_rate is not None and self.ratio is not None:
            raise ValueError("fallback.learning_rate and fallback.ratio are both given; drop one.")

    def with_ratio(self, ratio: float) -> "Fallback":
        """The same with this ratio, unless its learning rate is given."""
        if self.learning_rate is None and self.ratio is None:
            return dataclasses.replace(self, ratio=ratio)
        return self

    def build(
        self,
        learning_rate: optax.ScalarOrSchedule,
        weight_decay: optax.ScalarOrSchedule,
        weight_decay_mask: Mask | None,
        mu_dtype: Any,
    ) -> optax.GradientTransformation:
        """AdamW to go with an optimizer that has these."""
        rate = self.learning_rate
        return adamw(
            _times(1.0 if self.ratio is None else self.ratio, learning_rate)
            if rate is None
            else rate,
            self.b1,
            self.b2,
            self.eps,
            mu_dtype=mu_dtype,
            weight_decay=weight_decay if self.weight_decay is None else self.weight_decay,
            weight_decay_mask=weight_decay_mask,
        )


FALLBACK = Fallback()


def _times(ratio: float, learning_rate: optax.ScalarOrSchedule) -> optax.ScalarOrSchedule:
    if ratio == 1:
        return learning_rate
    if callable(learning_rate):
        return lambda count: ratio * learning_rate(count)
    return ratio * learning_rate


def by_role(
    name: str,
    direction: Callable[[Axes], optax.GradientTransformation],
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: optax.ScalarOrSchedule,
    weight_decay_mask: Mask | None,
    rules: Rules | None,
    roles: Collection[Role],
    fallback: optax.GradientTransformation | Fallback,
    decay: optax.GradientTransformation | None = None,
    fallback_ratio: float = 1.0,
    fallback_mu_dtype: Any = None,
    gated: bool = False,
    vectors: bool = False,
) -> optax.GradientTransformation:
    """``direction → decay → learning rate`` for parameters of `roles`, `fallback` for all others.

    Args:
      name: of the first part, in the state of ``optax.partition``.
      direction: for trees of only those parameters; a function of the rows and columns of each, by
        path.
      learning_rate: of the direction.
      weight_decay: of both.
      weight_decay_mask: of both.
      rules: role rules; None for the default.
      roles: the roles that the direction takes.
      fallback: a complete optimizer with its learning rate, or AdamW's options. While no parameter is
        its own, its state stays as it is.
      decay: replaces decoupled decay.
      fallback_ratio: AdamW's learning rate divided by the direction's, unless its options say.
      fallback_mu_dtype: AdamW's `mu_dtype`.
      gated: whether the fallback treats unusable gradients as zeros, leaf by leaf, to match a direction
        that leaves such blocks out of its moments.
      vectors: whether the direction takes parameters with fewer than two axes.
    """
    check_non_negative(learning_rate=learning_rate)
    if decay is None:
        decay = decay_or_identity(weight_decay, weight_decay_mask)
    if isinstance(fallback, Fallback):
        chosen = fallback.with_ratio(fallback_ratio)
        fallback = chosen.build(learning_rate, weight_decay, weight_decay_mask, fallback_mu_dtype)
    if gated:
        fallback = _gated(fallback)
    fallback = as_fallback(fallback)
    idle = optax.GradientTransformationExtraArgs(fallback.init, _unchanged)
    complete(rules)
    check_roles(f"the roles of {name}", roles)
    if not roles:
        raise ValueError(
            f"{name} has no roles, so no parameter is its own; give one or more, as in "
            'roles=["matrix"].'
        )
    link = scale_by_learning_rate(learning_rate)
    direction(DEFAULT_AXES)  # Refuses values out of range here, before there are parameters.

    def chained(axes: tuple[tuple[str, MatrixAxes], ...]) -> optax.GradientTransformation:
        return optax.chain(direction(dict(axes).__getitem__), decay, link)

    chain = Remembered(chained, most=8)

    def parts(tree: Any) -> optax.GradientTransformationExtraArgs:
        decided = decide(tree, rules, roles, vectors=vectors)
        mine = tuple((d.path, _with_words(d)) for d in decided if d.role in roles and d.axes)
        if decided and not mine and not is_part(tree):
            raise ValueError(
                f"{name} gets no parameter: none has the role {' or '.join(roles)}; correct the rules, "
                "or take the optimizer that the rest is left to."
            )
        labels = [name if d.role in roles else "fallback" for d in decided]
        rest = fallback if "fallback" in labels else idle
        labels = jax.tree.unflatten(jax.tree.structure(tree), labels)
        return optax.partition({name: chain(mine), "fallback": rest}, lambda _: labels)

    def init(params: Any) -> Any:
        return parts(params).init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if extra:
            extra = with_whole_curvature(extra, params)
        return parts(updates).update(updates, state, params, **extra)

    def describe(tree: Any) -> dict[str, list[Any]]:
        decided = decide(tree, rules, roles, vectors=vectors)
        return {
            "optimizer": [name if d.role in roles else "fallback" for d in decided],
            "role": [d.role for d in decided],
            "matrices": [matrices(d) if d.role in roles else "-" for d in decided],
        }

    return with_extra_args(init, update, describe)


def _with_words(decided: Decided) -> Any:
    """Its axes, with the side that indexes the vocabulary."""
    return decided.axes and dataclasses.replace(
        decided.axes, vocabulary=decided.axes.vocabulary or VOCABULARY.get(decided.role or "")
    )


def _unchanged(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
    """The update of an optimizer that has no parameters: its state stays as it is."""
    del params, extra
    return updates, state


def _gated(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx`, with zeros in place of the gradient of a leaf that is not usable."""
    inner = optax.with_extra_args_support(tx)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, Any]:
        seen = jax.tree.map(lambda g: jnp.where(is_usable(g), g, 0), updates)
        return inner.update(seen, state, params, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)

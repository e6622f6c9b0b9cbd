"""Time in a state: the counts passed to schedules, and how to advance them without an update."""

from typing import Any

import jax
import optax

from ...core.arithmetic import increment
from .accumulate import AccumulateState
from .learning_rate import RATE_STATES

# They count emitted updates, and a skipped micro-step emits none.
_TIMELESS = (AccumulateState, optax.MultiStepsState)


def advance(opt_state: Any) -> Any:
    """The same state with every schedule advanced by one update: Ravine's clocks and Optax's.

    A clock is the count of a learning rate, or of a state that holds nothing else, such as scheduled
    weight decay. Counts next to moments, which correct their bias, do not change.
    """

    def is_known(node: Any) -> bool:
        fields = getattr(node, "_fields", None)
        return fields == ("count",) or isinstance(
            node, (*RATE_STATES, *_TIMELESS, optax.InjectStatefulHyperparamsState)
        )

    def advanced(node: Any) -> Any:
        if not is_known(node) or isinstance(node, _TIMELESS):
            return node
        node = node._replace(count=increment(node.count))
        if isinstance(node, optax.InjectStatefulHyperparamsState):
            states, inner = advance((node.hyperparams_states, node.inner_state))
            node = node._replace(hyperparams_states=states, inner_state=inner)
        return node

    return jax.tree.map(advanced, opt_state, is_leaf=is_known)

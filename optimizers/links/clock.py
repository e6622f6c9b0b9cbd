"""Time in a state: the counts that schedules are called with, and how they go on without an update."""

from typing import Any

import jax
import optax

from ...core.arithmetic import increment
from .accumulate import AccumulateState
from .learning_rate import RATE_STATES

# They count what they emit, of which a skipped micro-step is none.
_TIMELESS = (AccumulateState, optax.MultiStepsState)


def advance(opt_state: Any) -> Any:
    """The state as it is, but with every schedule one update on: clocks of Ravine's and of Optax's.

    A clock is the count of a learning rate, and that of a state which holds nothing else, such as
    scheduled weight decay. Counts beside moments, which correct their bias, stay.
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

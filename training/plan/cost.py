"""What one optimizer costs per chip: sizes, arithmetic, communication and time, of a compiled
program."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from .by_hand import ELEMENT, Work
from .collectives import Collective, collectives
from .compile import Compiled
from .flops import Arithmetic
from .model_time import exposed_seconds, model_seconds, passes_of_step
from .network import Network
from .roofline import Estimate, passed_over, seconds_of, sent_in

STAGED = 1.5
"""Copies of a state on the host that are on the chip at once during an update, in which it comes and
goes: what the TPU's compiler makes of AdamW (docs/log.md, 2026-11-28). For plans by hand."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one optimizer costs; bytes and arithmetic are of one chip."""

    optimizer: str
    parameters: int = 0
    state: int = 0
    temporary: int = 0
    arithmetic: Arithmetic = dataclasses.field(default_factory=Arithmetic)
    collectives: tuple[Collective, ...] = ()
    repeated: dict[str, int] = dataclasses.field(default_factory=dict)
    """By path in the state: how many chips hold the same, where more than one do."""
    gradients: int = 0
    """With float32 sums over micro-batches; 0 in a train step, where they are among the
    temporaries."""
    seconds: float = 0.0
    """To trace and compile."""
    activations: float = 0.0
    """By hand; 0 in a train step, where they are among the temporaries."""
    checkpoint: int = 0
    """Bytes of parameters and state over all chips, each array once."""
    estimate: Estimate = dataclasses.field(default_factory=Estimate)
    refused: str = ""
    """Why there is no program."""
    master: int = 0
    """Of a float32 copy of the parameters, where there is one."""
    on_host: bool = False
    """Whether the state is kept in the memory of the host, and moved to the chip and back each step."""
    host: int = 0
    """What the program keeps there: all of the state but scalars."""

    @property
    def memory(self) -> float:
        """Bytes of all of it; parameters and state are updated in place.

        Activations are gone when the update's temporaries come, so only the larger of the two
        counts.
        """
        held = self.parameters + self.master + self.gradients
        held += self.state - self.host if self.on_host else self.state
        return held + max(self.temporary, self.activations)

    @property
    def sent(self) -> float:
        """Bytes one chip sends in a step, by the rules of `ravine.training.plan.collectives`."""
        return sum(c.total for c in self.collectives if c.always)

    @property
    def sent_at_times(self) -> float:
        """More, in branches and in loops of unknown length."""
        return sum(c.total for c in self.collectives if not c.always)


def plan_of(
    name: str,
    compiled: Compiled,
    mesh: Mesh,
    network: Network | None = None,
    work: Work | None = None,
    *,
    is_step: bool = False,
    on_host: bool = False,
    master_copy: bool = False,
) -> Plan:
    """The plan of what was compiled.

    Args:
      name: of the optimizer.
      compiled: its update, or a train step with it.
      mesh: that it was compiled for.
      network: between its chips; without one times are 0.
      work: the model's part; without one it is left out.
      is_step: whether a train step was compiled.
      on_host: whether it was compiled with the state in the memory of the host.
      master_copy: whether to count a float32 copy of the parameters, read and written each step.
    """
    memory = compiled.program.memory_analysis()
    assert memory is not None, "compilers of TPUs and CPUs always report it"
    found = tuple(collectives(compiled.program.as_text() or "", mesh.size))
    parameters, state = bytes_per_device(compiled.params), bytes_per_device(compiled.state)
    master = 4 * parameters // ELEMENT if master_copy else 0
    sums = work.accumulators(parameters) if work and not is_step else 0
    host = bytes_per_device([x for x in jax.tree.leaves(compiled.state) if x.ndim and on_host])
    # XLA for CPU takes the host's memory for its own, so what comes to the chip is counted by hand.
    staged = 0 if memory.host_argument_size_in_bytes else round(STAGED * host)
    leaves = jax.tree.leaves((compiled.params, compiled.state))
    estimate = Estimate()
    if network is not None:
        estimate = _estimate(compiled, found, network, work, (parameters, state), is_step)
        more = 2 * state / network.chip.host if on_host else 0.0
        more += 2 * master / network.chip.bandwidth
        estimate = dataclasses.replace(estimate, update=estimate.update + more)
    return Plan(
        name,
        parameters=parameters,
        state=state,
        temporary=memory.temp_size_in_bytes + staged,
        arithmetic=compiled.arithmetic,
        collectives=found,
        repeated=_repeated(compiled.state, mesh),
        gradients=0 if is_step else parameters + round(sums),
        seconds=compiled.seconds,
        activations=sum(work.activations().values()) if work and not is_step else 0.0,
        checkpoint=sum(x.size * jnp.dtype(x.dtype).itemsize for x in leaves)
        + (4 * sum(x.size for x in jax.tree.leaves(compiled.params)) if master_copy else 0),
        master=master,
        estimate=estimate,
        on_host=on_host,
        host=host,
    )


def _estimate(
    compiled: Compiled,
    found: tuple[Collective, ...],
    network: Network,
    work: Work | None,
    sizes: tuple[int, int],
    is_step: bool,
) -> Estimate:
    parameters, state = sizes
    arithmetic = compiled.arithmetic
    products = seconds_of(network, arithmetic.products)
    sent = sent_in(network, (c for c in found if c.always))
    at_times = seconds_of(network, arithmetic.more_products)
    at_times += sent_in(network, (c for c in found if not c.always))
    passed = passed_over(network, parameters, parameters, state)
    if work is None:
        return Estimate(passed + products, sent, at_times)
    rate = network.chip.products["bfloat16"]
    useful = work.operations(recomputed=False) / rate
    if is_step:  # the products of model and optimizer are one program's
        products += passes_of_step(work) / network.chip.bandwidth
        exposed = max(0.0, sent - products)
        return Estimate(passed, 0.0, at_times, products, exposed, work.tokens, useful)
    model = model_seconds(work, network.chip)
    exposed = exposed_seconds(work, network.chip, sent_in(network, work.exchanges()))
    return Estimate(passed + products, sent, at_times, model, exposed, work.tokens, useful)


def bytes_per_device(tree: Any) -> int:
    """Of arrays with shardings, or of their shapes, on one device."""
    shards = [(x.sharding.shard_shape(x.shape), x.dtype) for x in jax.tree.leaves(tree)]
    return sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in shards)


def _repeated(state: Any, mesh: Mesh) -> dict[str, int]:
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        shard = math.prod(x.sharding.shard_shape(x.shape))
        copies = mesh.size * shard // max(1, math.prod(x.shape))
        if x.ndim > 1 and copies > 1:
            found[jax.tree_util.keystr(path, simple=True, separator="/")] = copies
    return found

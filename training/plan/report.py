"""Plans as JSON, for machines: everything that is printed, in bytes, operations and seconds."""

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from .by_hand import Work
from .cost import Plan
from .network import Network
from .verdict import spare, verdict

if TYPE_CHECKING:
    from .plan import PlanConfig


def to_json(config: "PlanConfig", plans: list[Plan], network: Network, work: Work) -> str:
    """An object with the configuration, the chip, the model's part, and a list of plans."""
    chip = dataclasses.asdict(network.chip)
    return json.dumps(
        {
            "config": dataclasses.asdict(config),
            "chip": chip,
            "model": {
                "parameters": work.shape.count,
                "tokens": work.tokens,
                "operations": work.operations(),
                "activations": work.activations(),
                "sent": sum(c.total for c in work.exchanges()),
            },
            "plans": [_plain(found, network, work) for found in plans],
        },
        indent=2,
    )


def _plain(found: Plan, network: Network, work: Work) -> dict[str, Any]:
    if found.refused:
        return {"optimizer": found.optimizer, "fits": False, "refused": found.refused}
    by_kind: dict[str, dict[str, float]] = {}
    for c in found.collectives:
        kind = by_kind.setdefault(c.kind, {"times": 0, "sent": 0.0})
        kind["times"] += c.times
        kind["sent"] += c.total
    sizes = (
        "parameters",
        "master",
        "gradients",
        "state",
        "host",
        "temporary",
        "activations",
        "memory",
        "checkpoint",
    )
    estimate = found.estimate
    properties = ("optimizer", "step", "share", "tokens_per_second", "mfu")
    return {
        "optimizer": found.optimizer,
        "fits": spare(found, network.chip) >= 0,
        "verdict": verdict(found, network.chip, work),
        "bytes": {name: getattr(found, name) for name in sizes},
        "operations": {
            "always": found.arithmetic.always,
            "sometimes": found.arithmetic.sometimes,
            "uncounted": sorted(found.arithmetic.uncounted),
        },
        "collectives": by_kind,
        "sent": found.sent,
        "sent_at_times": found.sent_at_times,
        "repeated": found.repeated,
        "estimate": dataclasses.asdict(estimate)
        | {name: getattr(estimate, name) for name in properties},
        "compile_seconds": found.seconds,
    }

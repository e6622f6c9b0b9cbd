"""Writes the tables of docs/memory.md: bytes of optimizer state per parameter, from shapes alone."""

import argparse
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import ravine
from ravine.training.shapes.presets import PRESETS

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
MODELS = ("gpt2", "llama2-7b")
B = jnp.bfloat16
# Options that save memory, one after the other.
SAVING = {
    "`sgd(0.1, momentum=0.9)`": ravine.sgd(0.1, momentum=0.9),
    "`sgd(0.1, momentum=0.9, mu_dtype=bfloat16)`": ravine.sgd(0.1, momentum=0.9, mu_dtype=B),
    "`adamw(mu_dtype=bfloat16)`": ravine.adamw(1e-3, mu_dtype=B),
    "`lion(mu_dtype=bfloat16)`": ravine.lion(1e-4, mu_dtype=B),
    "`muon(mu_dtype=bfloat16)`": ravine.muon(0.02, mu_dtype=B),
    "`shampoo(factors=Factors(packed=True))`": ravine.shampoo(
        1e-3, factors=ravine.Factors(packed=True)
    ),
    "`shampoo(factors=Factors(packed=True, root_dtype=bfloat16))`": ravine.shampoo(
        1e-3, factors=ravine.Factors(packed=True, root_dtype=B)
    ),
    "`shampoo(blocks=Blocks(size=128))`": ravine.shampoo(1e-3, blocks=ravine.Blocks(size=128)),
    '`shampoo(blocks=Blocks(sides="smaller"))`': ravine.shampoo(
        1e-3, blocks=ravine.Blocks(sides="smaller")
    ),
    "`soap(blocks=Blocks(size=512))`": ravine.soap(3e-3, blocks=ravine.Blocks(size=512)),
    '`soap(blocks=Blocks(size=None, sides="smaller"))`': ravine.soap(
        3e-3, blocks=ravine.Blocks(size=None, sides="smaller")
    ),
    "`soap(mu_dtype=bfloat16, nu_dtype=bfloat16)`": ravine.soap(3e-3, mu_dtype=B, nu_dtype=B),
}


def bytes_per_parameter(tx, model: str) -> float:
    """For the state of float32 parameters in the shapes of a published model."""
    params = PRESETS[model].parameters(jnp.float32)
    state = jax.eval_shape(tx.init, params)
    size = lambda x: math.prod(x.shape) * x.dtype.itemsize
    return sum(map(size, jax.tree.leaves(state))) / sum(math.prod(x.shape) for x in params.values())


def table(rows: dict) -> list[str]:
    lines = ["| optimizer | GPT-2, 124 M | LLaMA-2 7B |", "|---|---:|---:|"]
    for name, tx in rows.items():
        cells = [f"{bytes_per_parameter(tx, model):.1f}" for model in MODELS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def section(name: str) -> str:
    if name == "defaults":
        defaults = {
            f"`{name}`": ravine.OptimizerConfig(name, {}).build(1e-3) for name in ravine.names()
        }
        return "\n".join(table(defaults))
    return "\n".join(table(SAVING))


def written(text: str) -> str:
    """The page with its tables regenerated."""
    for name in ("defaults", "saving"):
        first, rest = text.split(f"<!-- {name} -->\n")
        last = rest.split(f"<!-- /{name} -->")[1]
        text = f"{first}<!-- {name} -->\n{section(name)}\n<!-- /{name} -->{last}"
    return text


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(written(PAGE.read_text()))

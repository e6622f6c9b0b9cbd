"""The Python code blocks of README.md and docs/*.md run."""

from pathlib import Path

import jax
import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

ROOT = Path(__file__).parents[1]
SYBIL = Sybil([PythonCodeBlockParser()])
DOCUMENTS = [
    path
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if "```python\n" in path.read_text()
]
# What a reader has at hand already.
GIVEN = {
    "pods.md": """
import jax, jax.numpy as jnp, ravine
from jax.sharding import PartitionSpec as P
schedule = ravine.schedules.cosine(1e-3, steps=10)
grads = params = {"dense": {"kernel": jnp.eye(8)}}
param_specs = {"dense": {"kernel": P("fsdp", "tensor")}}
""",
    "stability.md": """
import jax, jax.numpy as jnp, optax, ravine
from jax.sharding import PartitionSpec as P
mesh = jax.make_mesh((4, 2), ("data", "model"))
weights = {"q_up": jnp.ones((8, 16 * 192)), "kv_up": jnp.ones((8, 16 * 256))}
grads = params = {"attention": {name: {"kernel": w} for name, w in weights.items()}}
largest = jnp.ones(16)
""",
}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_code_blocks_run(path):
    document = SYBIL.parse(path)
    exec(GIVEN.get(path.name, ""), document.namespace)
    examples = list(document.examples())
    assert examples
    with jax.numpy_dtype_promotion("standard"):
        for example in examples:
            example.evaluate()

"""The Python code blocks of README.md and docs/*.md run."""

import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
import ravine
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

ROOT = Path(__file__).parents[1]
SYBIL = Sybil([PythonCodeBlockParser()])
DOCUMENTS = [
    path
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if "```python\n" in path.read_text()
]
# What readers already have at hand.
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
# Pages of which readers take one block without those above.
ALONE = {"frameworks.md"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_code_blocks_run(path):
    document = SYBIL.parse(path)
    exec(GIVEN.get(path.name, ""), document.namespace)
    examples = list(document.examples())
    assert examples
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for example in examples:
            if path.name in ALONE:
                document.namespace.clear()
            example.evaluate()


def defaults(builder):
    # None and 0 both turn momentum and decay off.
    return {k: p.default or 0.0 for k, p in inspect.signature(builder).parameters.items()}


def test_the_page_on_optax_names_every_default_that_differs():
    page = (ROOT / "docs" / "coming_from_optax.md").read_text().partition("## Other names")[0]
    rows = [row for row in page.splitlines() if row.startswith("| `")]
    for name in ravine.names():
        theirs = {"sophia_h": "sophia"}.get(name, name)
        builder = getattr(optax, theirs, None) or getattr(optax.contrib, theirs, None)
        ours, other = defaults(getattr(ravine, name)), defaults(builder) if builder else {}
        if theirs == "rmsprop":
            other["b2"] = other.pop("decay")
        for argument in ours.keys() & other.keys() - {"learning_rate"}:
            if ours[argument] != other[argument]:
                told = [r for r in rows if f"`{name}`" in r and f"`{argument}`" in r]
                assert told, f"{name} {argument}: {other[argument]}, {ours[argument]}"


@pytest.mark.parametrize(
    "instead",
    [
        "shampoo(schedule)",
        pytest.param("soap(schedule)", marks=pytest.mark.slow),
        pytest.param('muon(schedule, scale="moonlight")', marks=pytest.mark.slow),
    ],
)
def test_readme_takes_other_optimizers_in_the_same_place(instead):
    lines, flax, *_ = SYBIL.parse(ROOT / "README.md").examples()
    code = f"{lines.parsed}\n{flax.parsed}"
    for old, new in (
        ("adamw(schedule, b2=0.95, weight_decay=0.1)", instead),
        ("width=128, layers=4", "width=32, layers=1"),
        ("(16, 65)", "(2, 17)"),
    ):
        assert old in code
        code = code.replace(old, new)
    found = {}
    with jax.numpy_dtype_promotion("standard"):
        exec(code, found)
    assert jnp.isfinite(found["loss"])


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_rows_of_a_table_have_as_many_cells_as_its_head(path):
    """A row that is cut by a line break is no row for readers."""
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for block in re.findall(r"(?:^\|.*\n)+", prose, flags=re.MULTILINE):
        rows = [re.sub(r"`[^`]*`", "", row) for row in block.splitlines()]
        cells = [len(re.findall(r"(?<!\\)\|", row)) for row in rows]
        wrong = [
            row for row, count in zip(block.splitlines(), cells, strict=True) if count != cells[0]
        ]
        assert not wrong

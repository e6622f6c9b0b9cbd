"""The documentation's API pages list every public name exactly once, and nothing else."""

import importlib
import re
from pathlib import Path

import pytest
import ravine

DOCS = Path(__file__).parents[1] / "docs"
PACKAGES = (ravine, ravine.schedules, ravine.stability)
MODULES = {"optimizers", "schedules", "stability", "__version__"}
DIRECTIVE = re.compile(r"^\.\. (currentmodule|auto\w+):: ([\w.]+)$", re.MULTILINE)


def documented():
    """Pairs of module and name, in the order of the pages."""
    found = []
    for page in sorted((DOCS / "api").glob("*.md")):
        module = None
        for directive, name in DIRECTIVE.findall(page.read_text()):
            if directive == "currentmodule":
                module = name
            else:
                found.append((module, name))
    return found


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_public_name_has_a_place(package):
    names = [name for module, name in documented() if module == package.__name__]
    assert sorted(names) == sorted(set(package.__all__) - MODULES)


def test_what_is_documented_is_there():
    for module, name in documented():
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_every_notebook_is_a_lesson():
    lessons = (DOCS / "lessons.md").read_text()
    for path in (DOCS.parent / "notebooks").glob("*.ipynb"):
        assert f"(../notebooks/{path.name})" in lessons
        assert f"\n../notebooks/{path.stem}\n" in lessons


def test_tables_of_memory_are_what_the_optimizers_keep(monkeypatch):
    monkeypatch.syspath_prepend(DOCS.parent / "benchmarks")
    memory = importlib.import_module("memory")
    page = (DOCS / "memory.md").read_text()
    assert memory.written(page) == page


def test_the_picture_draws_the_table_of_results(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    rows = importlib.import_module("speedup_picture").rows()
    readme = (DOCS.parent / "README.md").read_text()
    alternative = readme.split("](docs/speedup.svg)")[0].rsplit("![", 1)[1]
    for _, worth, low, high in rows:
        assert low <= worth <= high
        assert f"{worth:.2f}" in alternative or worth == 1


def test_every_command_is_on_the_trainer_page():
    from ravine.training.cli import COMMANDS

    page = (DOCS / "api" / "trainer.md").read_text()
    for name, what in COMMANDS.items():
        assert f"| `python -m ravine {name}` | {what} |" in page


def anchors(page):
    """Heading anchors, built as GitHub builds them."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs", "notebooks"]
)
def test_links_between_files_lead_somewhere(name):
    start = DOCS.parent / name
    pages = [start] if start.is_file() else [*start.rglob("*.md"), *start.glob("*.py")]
    for page in pages:
        text = page.read_text()
        if page.suffix == ".py":
            text = "\n".join(line for line in text.splitlines() if line.startswith("#"))
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"\w+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name}: {link}"
            if anchor and target.suffix == ".md":
                assert anchor in anchors(target.read_text()), f"{page.name}: {link}"


def rows_of_tables(text):
    """Lines outside code that begin a table row."""
    outside = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [line.strip() for line in outside.splitlines() if line.lstrip().startswith("|")]


def test_rows_of_tables_are_one_line_each():
    root = DOCS.parent
    for page in [*root.glob("*.md"), *DOCS.rglob("*.md"), *root.glob("tests/*.md")]:
        for row in rows_of_tables(page.read_text()):
            assert row.endswith("|"), f"{page.name}: {row}"

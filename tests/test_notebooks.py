"""Notebooks run from top to bottom, use only public names, and are committed with their outputs."""

import ast
import re
import runpy
from pathlib import Path
from types import ModuleType

import jax
import jupytext
import nbformat
import pytest
import ravine
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
TRAINER = (NOTEBOOKS[0].parents[1] / "docs/api/trainer.md").read_text()
LOCAL_PATH = re.compile(r"(?<![\w.:/<])/\w[\w.-]*/\w|\b[A-Z]:\\+\w|site-packages")

# Run notebooks here in the same way as when they are saved.
ThisInterpreter = runpy.run_path(str(NOTEBOOKS[0].with_name("save.py")))["ThisInterpreter"]

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """What a cell shows, in order: the types of its displays, and whether it prints."""
    shown = []
    for output in cell.outputs:
        kind = output.get("name") or tuple(sorted(output.get("data", ())))
        # A stream may arrive in pieces, and warnings about the machine are not part of the lesson.
        if kind != "stderr" and not (shown and shown[-1] == kind == "stdout"):
            shown.append(kind)
    return shown


@pytest.mark.notebooks
@every_notebook
def test_runs_and_shows_what_is_committed(path, tmp_path, monkeypatch):
    committed = nbformat.read(path, as_version=4)
    fresh = nbformat.read(path, as_version=4)
    for cell in code_cells(fresh):
        cell.outputs = []

    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("RAVINE_SMOKE", "1")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    NotebookClient(
        fresh,
        kernel_manager_class=ThisInterpreter,
        timeout=300,
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()

    for cell, again in zip(code_cells(committed), code_cells(fresh), strict=True):
        assert kinds(cell) == kinds(again), f"run the notebook and save it; cell:\n{cell.source}"


@every_notebook
def test_outputs_are_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert any(cell.outputs for cell in code_cells(notebook))

    for number, cell in enumerate(code_cells(notebook), start=1):
        assert cell.execution_count == number, "saved after a run from top to bottom"
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            texts = [output.get("text", "")]
            texts += [v for k, v in output.get("data", {}).items() if not k.startswith("image/png")]
            assert not LOCAL_PATH.search("\n".join(map(str, texts)))
    assert not LOCAL_PATH.search(str(notebook.metadata))


@every_notebook
def test_is_its_script_run(path):
    notebook, script = nbformat.read(path, as_version=4), jupytext.read(path.with_suffix(".py"))
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in script.cells
    ], f"python notebooks/save.py {path.stem}"


@every_notebook
def test_uses_only_public_names(path):
    source = "\n".join(cell.source for cell in code_cells(nbformat.read(path, as_version=4)))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert_public(alias.name)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                assert_public(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_"), ast.unparse(node)
            assert_public(ast.unparse(node))


def assert_public(dotted):
    """No private name; inside ravine, each part is exported by the module before it."""
    if not re.fullmatch(r"[\w.]+", dotted):
        return  # an attribute of an expression
    assert not any(part.startswith("_") for part in dotted.split(".")), dotted
    head, *parts = dotted.split(".")
    if head != "ravine":
        return
    if parts[:1] == ["training"]:  # imported on demand; a name is public if its page documents it
        module, _, name = dotted.rpartition(".")
        page = TRAINER.partition(f".. currentmodule:: {module}\n")[2].partition("currentmodule")[0]
        assert re.search(rf"^.. auto\w+:: {name}$", page, re.MULTILINE), f"{dotted}: undocumented"
        return
    owner = ravine
    for part in parts:
        if isinstance(owner, ModuleType):
            assert part in getattr(owner, "__all__", [part]), f"{dotted}: {part} is not exported"
        owner = getattr(owner, part)

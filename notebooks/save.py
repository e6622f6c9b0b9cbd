"""Runs lessons and saves them with their outputs: `python notebooks/save.py [NAME ...]`.

A lesson is written in NAME.py, in jupytext's percent format; NAME.ipynb is that file, run from top to
bottom. Edit either, then `jupytext --sync`, or edit the .py and save it with this.
"""

import sys
from pathlib import Path

import jupytext
import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

HERE = Path(__file__).parent
METADATA = {
    "jupytext": {"formats": "ipynb,py:percent"},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


class ThisInterpreter(AsyncKernelManager):
    """A kernel in this interpreter, whatever kernels the user has installed under its name."""

    @property
    def kernel_spec(self):
        launch = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=launch, display_name=self.kernel_name, language="python")


def lessons() -> list[Path]:
    """The scripts of all lessons."""
    return sorted(path for path in HERE.glob("*.py") if path.name != Path(__file__).name)


def merged(outputs: list) -> list:
    """A cell's outputs: what was printed in pieces as one, without what the machine warned of."""
    kept: list = []
    for output in outputs:
        if output.get("name") == "stderr":
            continue
        if kept and output.get("name") == kept[-1].get("name") == "stdout":
            kept[-1]["text"] += output["text"]
        else:
            kept.append(output)
    return kept


def save(script: Path) -> None:
    """Executes one lesson and writes its notebook beside it."""
    notebook = jupytext.read(script)
    notebook.metadata = nbformat.from_dict(METADATA)
    NotebookClient(notebook, timeout=1800, kernel_manager_class=ThisInterpreter).execute()
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"{script.stem}-{index}"[:64]
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = merged(cell.outputs)
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat_minor = 5
    nbformat.write(notebook, script.with_suffix(".ipynb"))


if __name__ == "__main__":
    for script in [HERE / f"{name}.py" for name in sys.argv[1:]] or lessons():
        print(script.name)
        save(script)

"""The environment in which the peers run: pinned, and created by the benchmark that needs it."""

import subprocess
import sys
from pathlib import Path

PINS = ("torch==2.13.0", "pytorch-optimizer==4.1.0", "numpy==2.4.0")
FOLDER = Path(__file__).parents[2] / ".cache" / "peers"


def interpreter(folder: Path, wheels: Path | None = None) -> str:
    """The Python of the environment in `folder`, which is created if it is missing.

    The library's own environment is not changed. If pip would install PyTorch for a GPU, which also
    works but is large, configure pip with an index that has PyTorch for CPUs. On a machine without a
    network it is installed from a folder of wheels, which `pip download` fills with `PINS` elsewhere.
    """
    place = folder / "torch"
    python, stamp = place / "bin" / "python", place / "pins.txt"
    wanted = "\n".join(PINS)
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        print(f"installing {', '.join(PINS)} into {place} (once, some minutes)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        local = [] if wheels is None else ["--no-index", "--find-links", str(wheels)]
        subprocess.run([*install, *local, *PINS], check=True)
        stamp.write_text(wanted, encoding="utf-8")
    return str(python)

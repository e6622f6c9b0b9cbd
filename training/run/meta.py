"""The origin of a run: optimizer, configuration, text, versions, machine; written when it starts."""

import datetime
import functools
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from ..compare.entrants import Entrant
from ..config import RunConfig, decisive
from ..data.buckets import absolute, named
from ..data.corpus import Corpus
from ..identity import to_json
from .files import read_json, write_json
from .origin import Origin
from .outcome import periods_in

_PACKAGES = ("ravine", "jax", "jaxlib", "optax", "flax", "numpy", "grain")


def write_meta(
    folder: Path,
    run: RunConfig,
    entrant: Entrant,
    corpus: Corpus,
    mesh: Mesh,
    step: int,
    origin: Origin | None = None,
) -> None:
    """Writes ``meta.json`` of a run that begins, goes on, or branches off `origin`, at a step."""
    before = periods_in(folder) or (periods_in(origin.records) if origin else [])
    periods = [(start, every) for start, every in before if start < step]
    if not periods or periods[-1][1] != run.eval_every:
        periods.append((step if periods else 0, run.eval_every))
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    meta = {
        **_decides(run, entrant, corpus),
        "run": to_json(run),
        **provenance(),
        "mesh": dict(mesh.shape),
        "processes": jax.process_count(),
        "started": now,
        "evaluations": periods,
    }
    if origin is not None:
        meta["branched_from"] = {"run": named(absolute(origin.run)), "step": origin.step}
    write_json(folder / "meta.json", meta)


def check_meta(folder: Path, run: RunConfig, entrant: Entrant, corpus: Corpus) -> bool:
    """Whether the folder holds a run of this optimizer, configuration and text; false if it holds none.

    Raises:
      ValueError: if it holds another one, as when folders of two races were mixed.
    """
    file = folder / "meta.json"
    if not file.exists():
        return False
    fix = f"move {folder} away, and this run starts again"
    found = read_json(file, fix)
    for name, mine in _decides(run, entrant, corpus).items():
        theirs = found.get(name)
        if name == "run" and isinstance(theirs, dict):
            theirs = decisive(theirs)
        if name == "text" and isinstance(theirs, dict):  # it may have moved
            theirs, mine = theirs.get("fingerprint"), mine["fingerprint"]
        if theirs != mine:
            raise ValueError(f"{file} is of a run of another {name}; {fix}.")
    return True


def _decides(run: RunConfig, entrant: Entrant, corpus: Corpus) -> dict[str, Any]:
    return {
        "optimizer": json.loads(entrant.optimizer.to_json()),
        "learning_rate": entrant.learning_rate,
        "run": to_json(run, resumed=True),
        "text": {"description": corpus.description, "fingerprint": corpus.fingerprint},
    }


def provenance() -> dict[str, Any]:
    """Versions, device and revision: what a number comes from."""
    return {
        "versions": {name: metadata.version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "device": f"{jax.devices()[0].device_kind} ({jax.devices()[0].platform})",
        "machine": platform.machine(),
        "git_revision": _git_revision(),
    }


@functools.cache  # the code that runs is that of its start
def _git_revision() -> str | None:
    """The revision of the checkout this package lies in; ``None`` for an installed wheel."""
    here = Path(__file__).parents[2]
    if not (here / ".git").exists():
        return None
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

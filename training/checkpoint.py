"""Checkpoints of a run, by Orbax: parameters, optimizer state, step and position in the data.

A checkpoint holds whole arrays and says nothing of the mesh, so that it is restored onto any. Orbax
gives a folder its name when all is written. What happens to the folder later, a disk that was full or a
copy that was cut off, only a reader would find, on a pod perhaps in one process of many; so the first
process adds a list of the files with their sizes, the seal, and looks at it before anyone reads.
"""

import concurrent.futures
import itertools
import json
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import grain
import jax
from orbax.checkpoint import v1 as ocp

from .processes import from_first, is_first
from .step import TrainState

KEPT = 2
SEAL = "files.json"


class Checkpoints:
    """The newest checkpoints of one run, written in the background, each whole or not there.

    All processes of a run make one and call its methods alike, on one file system.

    Args:
      folder: where they lie; made when missing.
      identity: JSON values that a checkpoint must agree with to be restored (the configuration).
    """

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self._identity = identity
        newest: Any = ocp.training.preservation_policies.LatestN(KEPT)
        self._orbax = ocp.training.Checkpointer(
            str(folder.absolute()), preservation_policy=newest, cleanup_tmp_directories=True
        )
        self._background = concurrent.futures.ThreadPoolExecutor(1)
        self._writing: concurrent.futures.Future[None] | None = None

    def save(self, state: TrainState, batches: grain.DatasetIterator) -> None:
        """Starts writing; the arrays are copied before this returns, so they may be donated."""
        self._wait()
        metadata: Any = {"identity": self._identity, "data": batches.get_state()}
        step = int(state.step)
        # The loop decides when; Orbax's own policy must not drop one.
        written = self._orbax.save_async(step, state, force=True, custom_metadata=metadata)

        def seal() -> None:
            if written is not None and written.result() and is_first():
                _seal(self._folder(step))

        self._writing = self._background.submit(seal)

    def forget_from(self, step: int) -> None:
        """Removes the checkpoints of this step and of later ones."""
        self._wait()
        for found in [found.step for found in self._orbax.checkpoints if found.step >= step]:
            self._orbax.delete(found)

    def restore(self, state: TrainState, batches: grain.DatasetIterator) -> TrainState:
        """The newest checkpoint that can be used, in the layout of `state`; `state` when there is none.

        `batches` is moved to the position it had when the checkpoint was written. Of newer ones it is
        said why they are refused: those that were cut off are removed, those of another configuration
        set aside, in a folder beside this one.

        Raises:
          ValueError: if there are checkpoints, but each was cut off or is of another configuration.
            Nothing is touched then.
        """
        steps = sorted((found.step for found in self._orbax.checkpoints), reverse=True)
        if not steps:
            return state
        broken = json.loads(from_first(json.dumps([_complaint(self._folder(s)) for s in steps])))
        cut_off, others = {}, {}
        for step, complaint in zip(steps, broken, strict=True):
            if complaint:
                cut_off[step] = f"was cut off ({complaint})"
                continue
            metadata: Any = self._orbax.metadata(step).custom_metadata
            differing = self._differing(metadata["identity"])
            if not differing:
                break
            others[step] = f"is of another configuration ({'; '.join(differing[:3])})"
        else:
            why = {**cut_off, **others}[steps[0]]
            raise ValueError(
                f"none of the checkpoints in {self._orbax.directory} can be used; that of step "
                f"{steps[0]} {why}. Use the configuration they were written with, another folder, or "
                "remove them."
            )
        for found, done in ((cut_off, "removed"), (others, "set aside")):
            for refused, why in found.items():
                warnings.warn(
                    f"the checkpoint of step {refused} in {self._orbax.directory} {why} and is {done}; "
                    f"going on from that of step {step}.",
                    stacklevel=2,
                )
        for refused in cut_off:
            self._orbax.delete(refused)
        self._set_aside(others)
        abstract = jax.tree.map(ocp.arrays.to_shape_dtype_struct, state)
        restored = self._orbax.load(step, abstract)
        batches.set_state(metadata["data"])
        return restored

    def close(self) -> None:
        """Waits for what is being written."""
        self._wait()
        self._background.shutdown()
        self._orbax.close()

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def _folder(self, step: int) -> Path:
        return Path(str(self._orbax.directory)) / str(step)

    def _set_aside(self, steps: Collection[int]) -> None:
        """Moves checkpoints out of the way of those that will be written."""
        if not steps:
            return
        if is_first():
            folder = Path(str(self._orbax.directory))
            aside = folder.with_name(f"{folder.name}-refused")
            aside.mkdir(exist_ok=True)
            for step in steps:
                names = (aside / f"{step}.{n}" for n in itertools.count())
                self._folder(step).rename(next(name for name in names if not name.exists()))
        from_first("moved")
        self._orbax.reload()

    def _differing(self, found: dict[str, Any]) -> list[str]:
        """What is not as in this configuration."""
        mine, theirs = _leaves(self._identity), _leaves(found)
        return [
            f"{name} is {theirs.get(name)!r} there and {mine.get(name)!r} here"
            for name in {**theirs, **mine}
            if mine.get(name) != theirs.get(name)
        ]


def _sizes(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != SEAL
    }


def _seal(folder: Path) -> None:
    draft = folder / f"{SEAL}.tmp"
    sizes = _sizes(folder)
    draft.write_text(json.dumps(sizes), encoding="utf-8")
    draft.replace(folder / SEAL)


def _complaint(folder: Path) -> str:
    """What is wrong with a checkpoint; nothing for a whole one."""
    try:
        listed = json.loads((folder / SEAL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{SEAL}, which is written last, is missing or cut off"
    there = _sizes(folder)
    for name, size in listed.items():
        if there.get(name) != size:
            return f"{name} has {there.get(name, 'no')} of {size} bytes"
    return ""


def _leaves(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    inner = (_leaves(value, f"{path}.{name}" if path else name) for name, value in tree.items())
    return {name: value for leaves in inner for name, value in leaves.items()}

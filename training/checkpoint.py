"""Checkpoints of a run, by Orbax: parameters, optimizer state, step and position in the data.

A checkpoint holds whole arrays and nothing about the mesh, so it can be restored onto any. Orbax
gives a folder its name when all is written. What happens to the folder later, a disk that was full, a
copy that was cut off or a bit that flipped, a reader would find late, on a pod perhaps in one process
of many, or not at all; so the first process adds a list of the files with their sizes and SHA-256, the
seal, and compares before anyone reads.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import itertools
import json
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import grain
import jax
from orbax.checkpoint import v1 as ocp

from .distributed import from_first, is_first
from .run import orbax_noise
from .run.files import said, write_json
from .step import TrainState

KEPT = 2
SEAL = "files.json"
REFUSED = "checkpoints-refused"
_METADATA = "_CHECKPOINT_METADATA"


class Checkpoints:
    """The newest checkpoints of one run, written in the background, each whole or not there.

    All processes of a run make one and call its methods alike, on one file system.

    Args:
      folder: where they lie; made when missing.
      identity: JSON values that a checkpoint must agree with to be restored (the configuration).
      past: from a step to more of them, of what came before it.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        past: Callable[[int], dict[str, Any]] = lambda step: {},
    ):
        self._identity, self._past = identity, past
        self._path = folder.absolute()
        orbax_noise.quiet()
        self._background = concurrent.futures.ThreadPoolExecutor(1)
        self._writing: concurrent.futures.Future[None] | None = None

    @functools.cached_property
    def _orbax(self) -> ocp.training.Checkpointer:
        """Opened once the seals were compared: it reads the metadata of every checkpoint."""
        newest: Any = ocp.training.preservation_policies.LatestN(KEPT)
        return ocp.training.Checkpointer(
            str(self._path), preservation_policy=newest, cleanup_tmp_directories=True
        )

    def save(self, state: TrainState, batches: grain.DatasetIterator) -> None:
        """Starts writing; the arrays are copied before this returns, so they may be donated.

        Raises:
          OSError: if this checkpoint cannot be written, or the one before could not be.
        """
        self._wait()
        step = int(state.step)
        identity = {**self._identity, **self._past(step)}
        metadata: Any = {"identity": identity, "data": batches.get_state()}
        self._step = step
        with self._unwritten():
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
        said why they are refused; they are set aside, in a folder beside this one.

        Raises:
          ValueError: if there are checkpoints, but each was cut off, is damaged or is of another
            configuration. Nothing is touched then.
        """
        steps = self._steps()
        if not steps:
            return state
        refused: dict[int, str] = {}
        for step in steps:
            complaint = from_first(_complaint(self._folder(step)) if is_first() else "")
            if not complaint:
                metadata: Any = ocp.metadata(str(self._folder(step))).custom_metadata
                differing = self._differing(metadata["identity"], step)
                if not differing:
                    break
                complaint = f"is of another configuration ({'; '.join(differing[:3])})"
            refused[step] = complaint
        else:
            raise ValueError(
                f"none of the checkpoints in {self._path} can be used; that of step {steps[0]} "
                f"{refused[steps[0]]}. Use the configuration they were written with, another folder, or "
                "remove them."
            )
        for older in steps[steps.index(step) + 1 :]:
            read = {_METADATA}
            complaint = from_first(_complaint(self._folder(older), read) if is_first() else "")
            if complaint:
                refused[older] = complaint
        self._warn(refused, step)
        self._set_aside(refused)
        abstract = jax.tree.map(ocp.arrays.to_shape_dtype_struct, state)
        restored = self._orbax.load(step, abstract)
        batches.set_state(metadata["data"])
        return restored

    def close(self) -> None:
        """Waits until all writing is done.

        Raises:
          OSError: if it cannot be.
        """
        try:
            self._wait()
        finally:
            self._background.shutdown()
            if "_orbax" in vars(self):
                with self._unwritten():  # it raises the same again
                    self._orbax.close()

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            with self._unwritten():
                writing.result()

    @contextlib.contextmanager
    def _unwritten(self) -> Iterator[None]:
        """The errors that Orbax and TensorStore raise for a full disk, of many types, as one."""
        try:
            yield
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reason = f"the checkpoint of step {self._step} in {self._path} cannot be written"
            raise OSError(f"{reason}: {lines[0][:200]}") from error

    def _steps(self) -> list[int]:
        """Of the checkpoints that are there, newest first."""
        steps = []
        if is_first() and self._path.is_dir():
            steps = [int(entry.name) for entry in self._path.iterdir() if entry.name.isdecimal()]
        return json.loads(from_first(json.dumps(sorted(steps, reverse=True))))

    def _warn(self, refused: dict[int, str], step: int) -> None:
        for other, why in refused.items():
            warnings.warn(
                f"the checkpoint of step {other} in {self._path} {why} and is set aside; "
                f"going on from that of step {step}.",
                stacklevel=3,
            )

    def _folder(self, step: int) -> Path:
        return self._path / str(step)

    def _set_aside(self, steps: Collection[int]) -> None:
        """Moves checkpoints out of the way of those that will be written."""
        if not steps:
            return
        if is_first():
            aside = self._path.with_name(f"{self._path.name}-refused")
            aside.mkdir(exist_ok=True)
            for step in steps:
                names = (aside / f"{step}.{n}" for n in itertools.count())
                self._folder(step).rename(next(name for name in names if not name.exists()))
        from_first("moved")

    def _differing(self, found: dict[str, Any], step: int) -> list[str]:
        """What differs from this configuration."""
        mine, theirs = _leaves({**self._identity, **self._past(step)}), _leaves(found)
        return [
            f"{name} is {theirs.get(name)!r} there and {mine.get(name)!r} here"
            for name in {**theirs, **mine}
            if mine.get(name) != theirs.get(name)
        ]


def _files(folder: Path) -> dict[str, Path]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _contents(files: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file, several at a time: hashing leaves other threads alone."""

    def content(path: Path) -> dict[str, Any]:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": path.stat().st_size, "sha256": digest}

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(zip(files, pool.map(content, files.values()), strict=True))


def _seal(folder: Path) -> None:
    write_json(folder / SEAL, _contents(_files(folder)))


def _complaint(folder: Path, only: Collection[str] | None = None) -> str:
    """What is wrong with a checkpoint; empty for one that is intact.

    Of a checkpoint that will not be restored the contents of some files are enough.
    """
    try:
        listed = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        sizes = {name: content["bytes"] for name, content in listed.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return f"was cut off ({SEAL}, which is written last, is missing or damaged)"
    try:
        there = _files(folder)
        for name, size in sizes.items():
            found = there[name].stat().st_size if name in there else "no"
            if found != size:
                return f"was cut off ({name} has {found} of {size} bytes)"
        compared = {name: there[name] for name in listed if only is None or name in only}
        for name, content in _contents(compared).items():
            if content != listed[name]:
                return f"is damaged ({name} does not have the content that was written)"
    except OSError as error:
        return f"cannot be read ({said(error)})"
    return ""


def _leaves(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    inner = (_leaves(value, f"{path}.{name}" if path else name) for name, value in tree.items())
    return {name: value for leaves in inner for name, value in leaves.items()}

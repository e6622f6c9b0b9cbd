"""Checkpoints of a run, by Orbax: parameters, optimizer state, step and position in the data.

A checkpoint holds whole arrays and nothing about the mesh, so it can be restored onto any. Orbax
gives a folder its name when all is written. What happens to the folder later, a disk that was full, a
copy that was cut off or a bit that flipped, a reader would find late, on a pod perhaps in one process
of many, or not at all; so the first process adds a list of the files with their sizes and SHA-256, the
seal, and compares before anyone reads.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from .data.taking import Batches
from .distributed import from_first, is_first
from .rollback import Rollback
from .run import orbax_noise
from .run.files import said, write_json
from .step import TrainState

SEAL = "files.json"
REFUSED = "checkpoints-refused"
METADATA = "_CHECKPOINT_METADATA"
_STATE, _SNAPSHOTS = "state", "snapshots"


@dataclasses.dataclass(frozen=True)
class Origin:
    """A checkpoint of another run, from which a branch starts."""

    run: Path
    """The folder of that run."""
    step: int

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.run / "checkpoints" / str(self.step)


class Checkpoints:
    """The newest checkpoints of one run, written in the background, each whole or not there.

    All processes of a run make one and call its methods alike, on one file system.

    Args:
      folder: where they lie; made when missing.
      identity: JSON values that a checkpoint must agree with to be restored (the configuration).
      past: from a step to more of them, of what came before it.
      origin: where to start if there is no checkpoint yet.
      keep: how many; 0 for all.
      on_sealed: called by the first process, in the background, when one is whole.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        past: Callable[[int], dict[str, Any]] = lambda step: {},
        *,
        origin: Origin | None = None,
        keep: int = 2,
        on_sealed: Callable[[], None] = lambda: None,
    ):
        self._identity, self._past = identity, past
        self._origin, self._keep, self._on_sealed = origin, keep, on_sealed
        self.branched: Origin | None = None
        """Where `restore` has found the state, if not here."""
        self._path = folder.absolute()
        orbax_noise.quiet()
        self._background = concurrent.futures.ThreadPoolExecutor(1)  # which starts no thread yet
        self._writing: concurrent.futures.Future[None] | None = None

    def _open(self) -> None:
        """Removes what a kill has left half written, as Orbax does when it is opened."""
        _ = self._orbax

    @functools.cached_property
    def _orbax(self) -> ocp.training.Checkpointer:
        """Opened once the seals were compared: it reads the metadata of every checkpoint."""
        policies = ocp.training.preservation_policies
        newest: Any = policies.LatestN(self._keep) if self._keep else policies.PreserveAll()
        return ocp.training.Checkpointer(
            str(self._path), preservation_policy=newest, cleanup_tmp_directories=True
        )

    def save(self, state: TrainState, batches: Batches, rollback: Rollback | None = None) -> None:
        """Starts writing; the arrays are copied before this returns, so they may be donated.

        Raises:
          OSError: if this checkpoint cannot be written, or the one before could not be.
        """
        self._wait()
        step = int(state.step)
        identity = {**self._identity, **self._past(step)}
        metadata: Any = {"identity": identity, "data": batches.get_state()}
        parts: dict[str, Any] = {_STATE: state}
        if rollback is not None:
            metadata["rollback"] = rollback.get_state()
            if rollback.snapshots:
                parts[_SNAPSHOTS] = {str(at): held for at, held in rollback.snapshots.items()}
        self._step = step
        with self._unwritten():
            # The loop decides when; Orbax's own policy must not drop one.
            written = self._orbax.save_checkpointables_async(
                step, parts, force=True, custom_metadata=metadata
            )

        def seal() -> None:
            if written is not None and written.result() and is_first():
                folder = self._folder(step)
                write_json(folder / SEAL, _contents(_files(folder)))
                self._on_sealed()

        self._writing = self._background.submit(seal)

    def forget_from(self, step: int) -> None:
        """Removes the checkpoints of this step and of later ones."""
        self._wait()
        for found in [found.step for found in self._orbax.checkpoints if found.step >= step]:
            self._orbax.delete(found)

    def restore(
        self, state: TrainState, batches: Batches, rollback: Rollback | None = None
    ) -> TrainState:
        """The newest checkpoint that can be used, in the layout of `state`; `state` when there is none.

        `batches` is moved to the position it had when the checkpoint was written, and `rollback` is
        given what it had seen and held. Where there are none yet, that of the origin is used. Of newer
        ones it is said why they are refused; they are set aside, in a folder beside this one.

        Raises:
          ValueError: if there are checkpoints, but each was cut off, is damaged or is of another
            configuration, or if that of the origin is. Nothing is touched then.
        """
        steps = self._steps()
        if not steps:
            if self._origin is None:
                return state
            self.check_origin()
            self.branched = self._origin
            return self._read(self._origin.folder, state, batches, rollback)
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
            read = {METADATA}
            complaint = from_first(_complaint(self._folder(older), read) if is_first() else "")
            if complaint:
                refused[older] = complaint
        self._warn(refused, step)
        self._set_aside(refused)
        self._open()
        return self._read(self._folder(step), state, batches, rollback)

    def check_origin(self, only: Collection[str] | None = None) -> None:
        """Refuses an origin that is not whole, or whose past is not that of this configuration.

        Args:
          only: files whose contents are compared, of all of them by default.

        Raises:
          ValueError: that says why.
        """
        origin = self._origin
        if origin is None:
            return
        there = is_first() and origin.folder.is_dir()
        complaint = _complaint(origin.folder, only) if there else ""
        if is_first() and not there:
            found = sorted(map(int, steps_of(origin.folder.parent)))
            complaint = f"is not there; those of steps {found} are" if found else "is not there"
        complaint = from_first(complaint)
        if not complaint:
            metadata: Any = ocp.metadata(str(origin.folder.absolute())).custom_metadata
            differing = self._differing(metadata["identity"], origin.step)
            if differing:
                complaint = f"has another past ({'; '.join(differing[:3])})"
        if complaint:
            raise ValueError(
                f"the checkpoint of step {origin.step} in {origin.run} {complaint}; a branch may change "
                "what comes after its checkpoint, nothing before."
            )

    def _read(
        self, folder: Path, state: TrainState, batches: Batches, rollback: Rollback | None
    ) -> TrainState:
        path = str(folder.absolute())
        metadata: Any = ocp.metadata(path).custom_metadata
        abstract = jax.tree.map(ocp.arrays.to_shape_dtype_struct, state)
        parts: dict[str, Any] = {_STATE: abstract}
        seen = metadata.get("rollback")
        if rollback is not None and seen is not None and seen["snapshots"]:
            parts[_SNAPSHOTS] = {str(at): abstract for at in seen["snapshots"]}
        found = ocp.load_checkpointables(path, parts)
        batches.set_state(metadata["data"])
        if rollback is not None and seen is not None:
            snapshots = found.get(_SNAPSHOTS, {})
            rollback.set_state(seen, {at: snapshots[str(at)] for at in seen["snapshots"]})
        return found[_STATE]

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
        if is_first():
            steps = list(map(int, steps_of(self._path)))
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


def steps_of(folder: Path) -> list[str]:
    """The names of checkpoints in a folder."""
    if not folder.is_dir():
        return []
    return [entry.name for entry in folder.iterdir() if entry.name.isdecimal()]


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

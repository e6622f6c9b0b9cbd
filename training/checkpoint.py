"""Checkpoints of a run, by Orbax: parameters, optimizer state, step and position in the data.

A checkpoint holds whole arrays and nothing about the mesh, so it can be restored onto any. Orbax
gives a folder its name when all is written. What happens to the folder later, a disk that was full, a
copy that was cut off or a bit that flipped, a reader would find late, on a pod perhaps in one process
of many, or not at all; so the first process adds a list of the files with their sizes and SHA-256, the
seal, and compares before anyone reads. A folder may be one in a bucket, ``gs://``.
"""

import concurrent.futures
import contextlib
import functools
import itertools
import json
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from .data.buckets import absolute, named, url_of
from .data.taking import Batches
from .distributed import from_first, is_first, unanimous
from .rollback import Rollback
from .run import orbax_noise
from .run.origin import Origin
from .run.seal import complaint_of, move, names_in, write_seal
from .step import TrainState

METADATA = "_CHECKPOINT_METADATA"
_STATE, _SNAPSHOTS = "state", "snapshots"


class Checkpoints:
    """The newest checkpoints of one run, written in the background, each whole or not there.

    All processes of a run make one and call its methods alike, on one file system or bucket.

    Args:
      folder: where they lie; made when missing.
      identity: JSON values that a checkpoint must agree with to be restored (the configuration).
      past: from a step to more of them, of what came before it.
      origin: where to start if there is no checkpoint yet.
      keep: how many; 0 for all.
      on_whole: called by the first process, in the background, when one is whole: with its seal on a
        disk, and before that in a bucket, so that what is copied there is not older than it.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        past: Callable[[int], dict[str, Any]] = lambda step: {},
        *,
        origin: Origin | None = None,
        keep: int = 2,
        on_whole: Callable[[], None] = lambda: None,
    ):
        self._identity, self._past = identity, past
        self._origin, self._keep, self._on_whole = origin, keep, on_whole
        self.branched: Origin | None = None
        """Where `restore` has found the state, if not here."""
        self._path = absolute(folder)
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
            named(self._path), preservation_policy=newest, cleanup_tmp_directories=True
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
                before = bool(url_of(self._path))
                if before:
                    self._on_whole()
                write_seal(self._folder(step))
                if not before:
                    self._on_whole()

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
        steps = _steps(self._path)[::-1]
        if not steps:
            if self._origin is None:
                return state
            self.check_origin()
            self.branched = self._origin
            return self._read(self._origin.folder, state, batches, rollback)
        refused: dict[int, str] = {}
        for step in steps:
            complaint = _agreed(self._folder(step))
            if not complaint:
                metadata: Any = ocp.metadata(named(self._folder(step))).custom_metadata
                differing = self._differing(metadata["identity"], step)
                if not differing:
                    break
                complaint = f"is of another configuration ({'; '.join(differing[:3])})"
            refused[step] = complaint
        else:
            raise ValueError(
                f"none of the checkpoints in {named(self._path)} can be used; that of step {steps[0]} "
                f"{refused[steps[0]]}. Use the configuration they were written with, another folder, or "
                "remove them."
            )
        for older in steps[steps.index(step) + 1 :]:
            complaint = _agreed(self._folder(older), {METADATA})
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
        found = _steps(origin.checkpoints)
        if origin.step in found:
            complaint = _agreed(origin.folder, only)
        else:
            complaint = f"is not there; those of steps {found} are" if found else "is not there"
        if not complaint:
            metadata: Any = ocp.metadata(named(absolute(origin.folder))).custom_metadata
            differing = self._differing(metadata["identity"], origin.step)
            if differing:
                complaint = f"has another past ({'; '.join(differing[:3])})"
        if complaint:
            raise ValueError(
                f"the checkpoint of step {origin.step} in {named(origin.run)} {complaint}; a branch may "
                "change what comes after its checkpoint, nothing before."
            )

    def _read(
        self, folder: Path, state: TrainState, batches: Batches, rollback: Rollback | None
    ) -> TrainState:
        path = named(absolute(folder))
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
            where = named(self._path)
            reason = f"the checkpoint of step {self._step} in {where} cannot be written"
            raise OSError(f"{reason}: {lines[0][:200]}") from error

    def _warn(self, refused: dict[int, str], step: int) -> None:
        for other, why in refused.items():
            warnings.warn(
                f"the checkpoint of step {other} in {named(self._path)} {why} and is set aside; "
                f"going on from that of step {step}.",
                stacklevel=3,
            )

    def _folder(self, step: int) -> Path:
        return self._path / str(step)

    def _set_aside(self, steps: Collection[int]) -> None:
        """Moves checkpoints out of the way of those that will be written."""
        if not steps:
            return
        with unanimous():
            if is_first():
                aside = self._path.with_name(f"{self._path.name}-refused")
                there = names_in(aside)
                for step in steps:
                    names = (f"{step}.{n}" for n in itertools.count())
                    move(self._folder(step), aside / next(x for x in names if x not in there))

    def _differing(self, found: dict[str, Any], step: int) -> list[str]:
        """What differs from this configuration."""
        mine, theirs = _leaves({**self._identity, **self._past(step)}), _leaves(found)
        return [
            f"{name} step {step} are others"  # known by a digest
            if name.endswith(" before")
            else f"{name} is {theirs.get(name)!r} there and {mine.get(name)!r} here"
            for name in {**theirs, **mine}
            if mine.get(name) != theirs.get(name)
        ]


def steps_of(folder: Path) -> list[str]:
    """The names of checkpoints in a folder."""
    return [name for name in names_in(folder) if name.isdecimal()]


def _steps(folder: Path) -> list[int]:
    """Of the checkpoints that are there, oldest first, as the first process sees them."""
    with unanimous():
        steps = sorted(map(int, steps_of(folder))) if is_first() else []
    return json.loads(from_first(json.dumps(steps)))


def _agreed(folder: Path, only: Collection[str] | None = None) -> str:
    """What the first process finds wrong with a checkpoint."""
    with unanimous():
        complaint = complaint_of(folder, only) if is_first() else ""
    return from_first(complaint)


def _leaves(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    inner = (_leaves(value, f"{path}.{name}" if path else name) for name, value in tree.items())
    return {name: value for leaves in inner for name, value in leaves.items()}

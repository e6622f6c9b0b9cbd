"""Checkpoints of a run, by Orbax: parameters, optimizer state, step and position in the data."""

from pathlib import Path
from typing import Any

import grain
import jax
from orbax.checkpoint import v1 as ocp

from .step import TrainState

KEPT = 2


class Checkpoints:
    """The newest checkpoints of one run, written in the background, each whole or not there.

    Args:
      folder: where they lie; made when missing.
      identity: JSON values that a checkpoint must agree with to be restored (the configuration).
    """

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self._identity = identity
        newest: Any = ocp.training.preservation_policies.LatestN(KEPT)
        path = str(folder.absolute())
        self._orbax = ocp.training.Checkpointer(path, preservation_policy=newest)

    def save(self, state: TrainState, batches: grain.DatasetIterator) -> None:
        """Starts writing; the arrays are copied before this returns, so they may be donated."""
        metadata: Any = {"identity": self._identity, "data": batches.get_state()}
        # The loop decides when; Orbax's own policy must not drop one.
        self._orbax.save_async(int(state.step), state, force=True, custom_metadata=metadata)

    def restore(self, state: TrainState, batches: grain.DatasetIterator) -> TrainState:
        """The newest checkpoint in the layout of `state`, or `state` itself when there is none.

        `batches` is moved to the position it had when the checkpoint was written.

        Raises:
          ValueError: if the checkpoint is of another configuration.
        """
        newest = self._orbax.latest
        if newest is None:
            return state
        metadata: Any = self._orbax.metadata(newest.step).custom_metadata
        if metadata["identity"] != self._identity:
            raise ValueError(
                f"the checkpoint of step {newest.step} in {self._orbax.directory} is of another "
                "configuration; use the one it was written with, or another folder."
            )
        abstract = jax.tree.map(ocp.arrays.to_shape_dtype_struct, state)
        restored = self._orbax.load(newest.step, abstract)
        batches.set_state(metadata["data"])
        return restored

    def close(self) -> None:
        """Waits for what is being written."""
        self._orbax.close()

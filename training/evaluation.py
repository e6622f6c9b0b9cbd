"""The held-out loss of a run, as its records have it."""

import math
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from .average import averaged
from .config import RunConfig
from .data.batches import heldout_batches
from .data.corpus import Corpus
from .schedule_free import evaluated
from .sharding import batch_sharding, local_shards
from .step import TrainState, mean_loss


class Evaluation:
    """``evaluate(state)``: held-out losses by name, of the same text every time.

    Args:
      run: how much text, and whether the average is evaluated too.
      corpus: the text.
      graphdef: the model's static half.
      mesh: of the parameters.
    """

    def __init__(self, run: RunConfig, corpus: Corpus, graphdef: nnx.GraphDef, mesh: Mesh):
        self._run, self._graphdef = run, graphdef
        self._bytes_per_token = corpus.bytes_per_token
        shards, shard_count = local_shards(batch_sharding(mesh, run.batch_size), run.batch_size)
        rows = heldout_batches(
            corpus,
            batches=run.eval_batches,
            batch_size=run.batch_size,
            context=run.model.context,
            shards=shards,
            shard_count=shard_count,
        )
        sharding = batch_sharding(mesh, run.batch_size, leading=1)
        self.batches_NxBxT1 = jax.make_array_from_process_local_data(sharding, rows)

    def __call__(self, state: TrainState) -> dict[str, float]:
        """The losses: ``heldout_loss``, and those that the run asks for."""
        found = {"heldout_loss": self._loss(evaluated(state))}
        if self._run.ema:
            found["heldout_loss_ema"] = self._loss(averaged(state.opt_state))
        if self._bytes_per_token is not None:
            bits = found["heldout_loss"] / math.log(2) / self._bytes_per_token
            found["heldout_bits_per_byte"] = bits
        return found

    def _loss(self, params: Any) -> float:
        return float(mean_loss(self._graphdef, params, self.batches_NxBxT1, self._run.fused))

"""A model and its optimizer on a mesh: where each has its arrays, and the state they start from."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..optimizers.matrix.mesh.shardings import on_mesh, state_shardings
from ..stability import Guarded
from .model_config import ModelConfig
from .sharding import check_context, parameter_shardings
from .step import TrainState, init_state, model_graph, parameters

REMEMBERED = 8
"""How many of the last placements, and of their steps, are not made again for the next run like them."""


@dataclasses.dataclass(frozen=True, eq=False)
class Placed:
    """What `place` returns, the same object for the same arguments.

    Attributes:
      model: the model.
      tx: the optimizer, as it is under the mesh.
      shardings: of the state.
    """

    model: ModelConfig
    tx: optax.GradientTransformationExtraArgs
    shardings: TrainState

    @property
    def graphdef(self) -> nnx.GraphDef:
        """The model's static half."""
        return model_graph(self.model)

    def init(self, seed: int) -> TrainState:
        """The state before the first step."""
        mesh = self.shardings.step.mesh
        return self._init(_parameters(self.model, mesh)[1](jax.random.key(seed)))

    @functools.cached_property
    def _init(self) -> Callable[[Any], TrainState]:
        state = lambda params: init_state(params, self.tx)
        return jax.jit(state, out_shardings=self.shardings)


@functools.lru_cache(maxsize=REMEMBERED)
def place(model: ModelConfig, tx: optax.GradientTransformation, mesh: Mesh) -> Placed:
    """The optimizer for a model on a mesh, and the shardings of its state; nothing is computed.

    Raises:
      ValueError: for parameters or sequences that the mesh does not divide, and what `tx.init` refuses.
    """
    check_context(model.context, mesh)
    params, _ = _parameters(model, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    specs = jax.tree.map(lambda s: s.spec, shardings)
    if isinstance(tx, Guarded):
        tx = tx.around(on_mesh(tx.inner, specs, mesh))
    else:
        tx = on_mesh(tx, specs, mesh)
    step = NamedSharding(mesh, PartitionSpec())
    return Placed(model, tx, TrainState(step, shardings, state_shardings(tx, params)))


@functools.lru_cache(maxsize=REMEMBERED)
def _parameters(model: ModelConfig, mesh: Mesh) -> tuple[Any, Callable[[jax.Array], Any]]:
    """Shapes and shardings of a model's parameters, and the program that makes them from a key.

    Optimizers of one model share it.
    """
    shapes = jax.eval_shape(lambda: parameters(model, jax.random.key(0)))
    shardings = parameter_shardings(shapes, mesh)
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
    return params, jax.jit(lambda key: parameters(model, key), out_shardings=shardings)

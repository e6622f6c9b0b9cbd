"""The fused loss in the trainer: the same gradients, and what the compiled step sends."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ravine
from ravine.stability import fused_cross_entropy
from ravine.training import loss as loss_module
from ravine.training import step as step_module
from ravine.training.batch_size.config import BatchSizeConfig
from ravine.training.batch_size.trainer import Trainer
from ravine.training.config import RunConfig
from ravine.training.data.batches import train_batches
from ravine.training.data.corpus import load_corpus
from ravine.training.model import ModelConfig
from ravine.training.placed import place
from ravine.training.plan.collectives import collectives
from ravine.training.sharding import batch_sharding, build_mesh
from ravine.training.step import (
    abstract_state,
    init_params,
    make_loss,
    make_train_step,
    mean_loss,
)
from ravine.training.studies import decay
from ravine.training.width.coordinates import changes

from .run_rounding import rounding_of
from .tolerances import furthest

MODEL = ModelConfig(vocabulary=96, width=16, layers=2, heads=2, context=8, final_soft_cap=5.0)


@pytest.fixture(autouse=True)
def chunked(monkeypatch):
    """Splits few tokens into several chunks."""
    monkeypatch.setattr(loss_module, "chunk_of", lambda columns, backend: 7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loss_and_gradients_are_those_from_logits(dtype):
    graphdef, params = init_params(dataclasses.replace(MODEL, dtype=dtype), 0)
    batch = jax.random.randint(jax.random.key(0), (4, 9), 0, 96)
    plain, fused = (
        jax.jit(jax.value_and_grad(make_loss(graphdef, fused))) for fused in (False, True)
    )
    # Values rounded to 8 bits: the logits, their gradient, that of the hidden states (twice), and its
    # effect in the layers.
    bound = 5 * 2.0**-8
    if dtype == "float32":
        bound = rounding_of(lambda params: plain(params, batch), params)
    assert furthest(fused(params, batch), plain(params, batch)) <= bound


@pytest.mark.parametrize(
    "mesh", ["fsdp=4,tensor=2", pytest.param("data=2,fsdp=4", marks=pytest.mark.slow)]
)
def test_steps_on_a_mesh_are_those_of_one_device(mesh):
    batch = jax.random.randint(jax.random.key(0), (8, 9), 0, 96)
    ends, bound = [], 0.0
    for text, fused in (("data=1", False), (mesh, True)):
        devices = build_mesh(text, jax.devices()[: 8 if fused else 1])
        with jax.set_mesh(devices):
            placed = place(MODEL, ravine.sgd(0.1), devices)
            state, shardings = placed.init(0), placed.shardings
            step = make_train_step(placed.graphdef, placed.tx, z_loss=1e-2, fused=fused)
            step = jax.jit(step, out_shardings=(shardings, shardings.step))
            rows = jax.device_put(batch, batch_sharding(devices, 8))
            heldout = jax.device_put(batch[None], batch_sharding(devices, 8, leading=1))
            measure = jax.jit(functools.partial(mean_loss, placed.graphdef, fused=fused))

            def end(params, state=state, step=step, rows=rows, heldout=heldout, measure=measure):
                after, metrics = step(state._replace(params=params), rows)
                return after.params, metrics["loss"], measure(after.params, heldout)

            ends.append(jax.device_get(end(state.params)))
            bound = bound or rounding_of(end, state.params)  # measured on one device
    assert furthest(*ends) <= bound


def compiled(fused_loss, monkeypatch):
    """What a step of a model with a large head sends, and the bytes of the head's gradient."""
    model = ModelConfig(vocabulary=16384, width=16, layers=1, heads=2, context=8)
    monkeypatch.setattr("ravine.training.step.fused_loss", fused_loss)
    mesh = build_mesh("fsdp=4,tensor=2")
    placed = place(model, ravine.sgd(0.1), mesh)
    tx, shardings = placed.tx, placed.shardings
    with jax.set_mesh(mesh):
        state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            abstract_state(model, tx, jnp.float32),
            shardings,
        )
        batch = jax.ShapeDtypeStruct((32, 9), jnp.int32, sharding=batch_sharding(mesh, 32))
        step = make_train_step(placed.graphdef, tx, fused=True, attention_logits=False)
        step = jax.jit(step, out_shardings=(shardings, shardings.step))
        text = step.lower(state, batch).compile().as_text()
    return [c for c in collectives(text) if c.sent], 4 * 16 * 16384 // 2


def large_sums(found, whole):
    return [c for c in found if c.kind in ("all-reduce", "reduce-scatter") and c.bytes >= whole / 4]


def test_the_gradient_of_the_head_is_summed_once_and_not_in_every_chunk(monkeypatch):
    found, whole = compiled(loss_module.fused_loss, monkeypatch)
    assert max((c.bytes for c in found if c.in_loop), default=0) < whole / 16
    assert [c.times for c in large_sums(found, whole)] == [1, 1]  # for the embedding and the head
    assert (
        max(c.bytes for c in found) < 1.01 * whole
    )  # the logits of a device's rows have 4 times as many

    def left_alone(hidden, kernel, targets, *, z_loss, cap, cap_form):
        return fused_cross_entropy(hidden, kernel, targets, z_loss=z_loss, cap=cap, chunk=7)

    found, whole = compiled(left_alone, monkeypatch)
    assert max(c.bytes for c in found if c.in_loop) >= whole / 4  # the wrapper prevents this
    assert [c.times for c in large_sums(found, whole) if not c.in_loop] == [1]  # for the embedding


@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({"vocabulary": 8192}, False),
        ({"vocabulary": 8256}, True),
        ({"vocabulary": 8256, "loss": "plain"}, False),
        ({"vocabulary": 8256, "monitor_every": 5}, False),
        ({"vocabulary": 256, "loss": "fused"}, True),
    ],
)
def test_large_vocabularies_use_the_fused_loss_by_default(options, fused):
    vocabulary = options.pop("vocabulary")
    assert RunConfig(model=ModelConfig(vocabulary=vocabulary), **options).fused == fused


def test_the_fused_loss_is_refused_with_monitors():
    with pytest.raises(ValueError, match="take --loss plain"):
        RunConfig(loss="fused", monitor_every=5)


def of_batch_size(config, corpus):
    asked = BatchSizeConfig(model=config, batch_size=4, eval_batches=1)
    trainer = Trainer(asked, corpus)
    state = trainer.fresh()
    trainer.loss(state)
    trainer.step(4).lower(state, next(trainer.batches(4, seed=0)), jnp.float32(1e-3))
    trainer.noise(state, seed=0)


def of_decay(config, corpus):
    asked = decay.DecayStudyConfig(steps=2, batch_size=4, eval_batches=1, model=config)
    decay._run(asked, corpus, 0.1)


def of_coordinates(config, corpus):
    batches = [next(train_batches(corpus, batch_size=4, context=config.context, seed=0))]
    changes(ravine.OptimizerConfig("adamw"), 1e-3, config, config.width, batches, rule=[False])


@pytest.mark.parametrize("command", [of_batch_size, of_decay, of_coordinates])
@pytest.mark.parametrize("vocabulary", [8192, 8256])
def test_commands_beside_races_use_it_too(command, vocabulary, tmp_path, monkeypatch):
    """Every loss of a large vocabulary is the fused one, of a small one none."""
    jax.clear_caches()
    losses = {"fused": 0, "plain": 0}

    def counted(name, call):
        def counting(*args, **kwargs):
            losses[name] += 1
            return call(*args, **kwargs)

        return counting

    monkeypatch.setattr(loss_module, "chunk_of", lambda columns, backend: 32)
    for name, of_step in (("fused", "fused_loss"), ("plain", "next_token_loss")):
        call = counted(name, getattr(step_module, of_step))
        monkeypatch.setattr(step_module, of_step, call)
    monkeypatch.setattr(step_module, "_of_logits", counted("plain", step_module._of_logits))
    file = tmp_path / "tokens.bin"
    np.random.default_rng(0).integers(0, vocabulary, 20_000).astype("<u2").tofile(file)
    model = ModelConfig(vocabulary=vocabulary, width=16, layers=1, heads=2, context=8)
    command(model, load_corpus([file], vocabulary=vocabulary))
    used, other = ("fused", "plain") if vocabulary > 8192 else ("plain", "fused")
    assert losses[used] > 0
    assert losses[other] == 0

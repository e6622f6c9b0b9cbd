"""The trainer's loop: when values are fetched, what a step computes, and what identifies a run."""

import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ravine.training import model as model_module
from ravine.training import train as loop
from ravine.training.compare import sweep
from ravine.training.compare.entrants import line_up
from ravine.training.config import RunConfig
from ravine.training.identity import to_json
from ravine.training.metrics import Clock, Metrics, Rates
from ravine.training.model import ModelConfig
from ravine.training.placed import place
from ravine.training.programs import Programs
from ravine.training.run.around import RunPaths
from ravine.training.run.outcome import Outcome
from ravine.training.sharding import batch_sharding, build_mesh
from ravine.training.step import init_params, init_state, make_loss, make_train_step

from .run_rounding import rounding_of
from .short_race import records
from .tolerances import UNIT, furthest

pytestmark = pytest.mark.usefixtures("untimed")

MODEL = ModelConfig(width=16, layers=2, heads=2, context=16)
SMALL = {"model": MODEL, "batch_size": 4, "eval_batches": 1, "eval_every": 4}


def train(corpus, folder, **options):
    run = RunConfig(**SMALL | options)
    (entrant,) = line_up("adamw")
    folder.mkdir()
    outcome = Outcome(entrant.name, entrant.learning_rate)
    loop.train(run, entrant.build(run), corpus, outcome, RunPaths(folder))
    return records(folder)


def test_records_are_the_same_however_many_are_fetched_at_a_time(corpus, tmp_path):
    runs = [
        train(corpus, tmp_path / str(every), steps=11, log_every=every, monitor_every=3)
        for every in (1, 3, 100)
    ]
    assert runs[0] == runs[1] == runs[2]
    assert [r["step"] for r in runs[0]] == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 11]


def test_programs_follow_the_settings_of_jax():
    """An earlier run with another default matmul precision does not matter."""
    (entrant,) = line_up("sgd")
    run, mesh = RunConfig(**SMALL), build_mesh()
    placed = place(MODEL, entrant.build(run), mesh)
    rows = batch_sharding(mesh, run.batch_size)
    found = []
    with jax.set_mesh(mesh):
        state = placed.init(0)
        for precision in ("default", "highest", "default"):
            with jax.default_matmul_precision(precision):
                traced, _ = Programs(run, placed, rows, "sgd").of(run.batch_size, state)
            found.append(str(traced.jaxpr).count("HIGHEST"))
    plain, precise, again = found
    assert precise > plain == again


def test_the_host_is_one_step_behind_and_fetches_all_at_once(monkeypatch):
    waited, transfers = [], []
    monkeypatch.setattr(jax, "block_until_ready", lambda x: waited.append(int(x["loss"])))
    get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: transfers.append(len(x)) or get(x))
    metrics = Metrics(Clock())
    for step in range(5):
        metrics.add(step, {"loss": jnp.float32(step)})
        assert waited == list(range(step))  # the previous step, never this one
    assert [e["step"] for e in metrics.fetch(keep_last=True)] == [0, 1, 2, 3]
    assert waited == [0, 1, 2, 3]
    assert [e["loss"] for e in metrics.fetch()] == [4.0]
    assert (waited, transfers) == ([0, 1, 2, 3, 4], [4, 1])


@pytest.mark.parametrize("asked", [False, True])
def test_largest_logits_are_there_only_on_request(asked):
    (entrant,) = line_up("adamw")
    config = dataclasses.replace(MODEL, attention="xla")
    tx = entrant.build(RunConfig(model=config, qk_clip=50.0 if asked else 0.0))
    graphdef, params = init_params(config, 0)
    step = make_train_step(graphdef, tx, attention_logits=asked)
    batch = jnp.zeros((2, 17), jnp.int32)
    text = str(jax.make_jaxpr(step)(init_state(params, tx), batch))
    # The maximum of [B, H, T, T] over all axes but heads: no other one in a step is over three axes.
    assert ("reduce_max[axes=(0, 2, 3)" in text) == asked


def test_kernels_of_attention_agree():
    graphdef, params = init_params(MODEL, 0)
    batch = jax.random.randint(jax.random.key(0), (2, 17), 0, 256)
    plain = jax.jit(jax.grad(make_loss(graphdef)))
    other, _ = init_params(dataclasses.replace(MODEL, attention="xla"), 0)
    found = jax.jit(jax.grad(make_loss(other)))(params, batch)
    bound = rounding_of(lambda params: plain(params, batch), params)
    assert furthest(found, plain(params, batch)) <= bound


def test_fused_projections_equal_separate_ones(monkeypatch):
    graphdef, params = init_params(dataclasses.replace(MODEL, kv_heads=1), 0)
    batch = jax.random.randint(jax.random.key(0), (2, 17), 0, 256)
    joined = jax.jit(jax.value_and_grad(make_loss(graphdef)))
    bound = rounding_of(lambda params: joined(params, batch), params)
    monkeypatch.setattr(model_module, "JOINED", 0)
    apart = jax.jit(jax.value_and_grad(make_loss(graphdef)))
    assert furthest(apart(params, batch), joined(params, batch)) <= bound


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ({"attention": "xla", "attention_soft_cap": 30.0}, "has no soft-cap"),
        ({"attention": "cudnn"}, "bfloat16 only"),
    ],
)
def test_impossible_attention_is_refused(words, problem):
    with pytest.raises(ValueError, match=problem):
        ModelConfig(**words)


def test_options_that_came_later_leave_committed_trials_known():
    """The digest with which training/compare/trials.jsonl stores its rows, for the text "text"."""
    assert sweep._task(sweep.SweepConfig(), "text") == "9ac231352777"
    run = RunConfig(schedule="cosine")  # the default when they were written, in `UNTOLD`
    told = to_json(run)
    digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    assert digest[:12] == "75bc7342eddd"
    assert to_json(dataclasses.replace(run, log_every=7)) == told
    later = dataclasses.replace(run, micro_batches=2)
    assert to_json(later) == told | {"micro_batches": 2}


def test_learning_rates_are_asked_for_one_block_at_a_time():
    asked = []

    def schedule(count):
        asked.append(count.shape[0])
        return 1e-3 * count.astype("float32")

    rates = Rates(schedule, 2**31 - 1)
    steps = [0, 1, 4095, 4096, 7, 2**31 - 2]
    expected = 1e-3 * np.array(steps)
    np.testing.assert_allclose([rates[step] for step in steps], expected, rtol=4 * UNIT)
    assert asked == [4096, 4096, 4096, 4095]

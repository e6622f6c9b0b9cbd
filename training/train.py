"""One run: a model, an optimizer, a loop; every number it makes goes to a file as it is made."""

import contextlib
import dataclasses
import hashlib
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from ..core.transformation import states_of
from ..stability import FiniteGateState, SkipStepState, monitored, noise_scale
from .average import averaged
from .checkpoint import Checkpoints
from .config import RunConfig
from .cost import cost_of
from .data.batches import heldout_batches, train_batches
from .data.corpus import Corpus
from .distributed import is_first
from .identity import to_json
from .metrics import Clock, Metrics, Rates
from .model import ModelConfig
from .rollback import GaveUp, Rollback
from .run import interrupts
from .run.files import Lines, dumps, write_text
from .run.outcome import Outcome, RunFailed
from .run.profile import Profile
from .samples import samples
from .sharding import batch_sharding, build_mesh, local_shards
from .step import TrainState, init_sharded, make_train_step, mean_loss, place, unmeasured


def train(
    run: RunConfig,
    tx: optax.GradientTransformation,
    corpus: Corpus,
    outcome: Outcome,
    folder: Path,
    on_record: Callable[[dict[str, float]], None] = lambda record: None,
    mesh: Mesh | None = None,
    on_start: Callable[[], None] = lambda: None,
) -> Outcome:
    """Trains from the seed, or from the newest checkpoint in `folder`, to the last step.

    Args:
      run: the configuration.
      tx: the optimizer, learning rate included.
      corpus: the tokens.
      outcome: filled as the run goes on, so that an interruption leaves what was reached.
      folder: an existing folder for ``metrics.jsonl`` and checkpoints.
      on_record: called with every record.
      mesh: with `Auto` axes, of all devices of all processes, which all call this alike; by default of
        one device.
      on_start: called when nothing is left that could refuse the run, before anything is written.

    Returns:
      `outcome`, its status ``finished``, or ``diverged`` if a loss stopped being finite or a guard
      skipped every step.

    Raises:
      ValueError: if none of the checkpoints in `folder` can be used.
      RunFailed: if the loss or its gradient is not finite before the first update.
      Interrupted: between two steps after a signal (see `interrupts`); the last step's checkpoint is
        written then, where there are checkpoints.
    """
    mesh = mesh or build_mesh()
    with jax.set_mesh(mesh):
        return _train(run, tx, corpus, outcome, folder, on_record, mesh, on_start)


def _train(
    run: RunConfig,
    tx: optax.GradientTransformation,
    corpus: Corpus,
    outcome: Outcome,
    folder: Path,
    on_record: Callable[[dict[str, float]], None],
    mesh: Mesh,
    on_start: Callable[[], None],
) -> Outcome:
    tx, shardings = place(run.model, tx, mesh)
    rows = batch_sharding(mesh, run.batch_size)
    shards, shard_count = local_shards(rows, run.batch_size)
    sizes: Any = {"batch_size": run.batch_size, "context": run.model.context}
    mine: Any = {"shards": shards, "shard_count": shard_count}
    batches = train_batches(corpus, seed=run.seed, read_threads=run.read_threads, **sizes, **mine)
    heldout = jax.make_array_from_process_local_data(
        batch_sharding(mesh, run.batch_size, leading=1),
        heldout_batches(corpus, batches=run.eval_batches, **sizes, **mine),
    )
    graphdef, state = init_sharded(run.model, run.seed, tx, shardings)
    outcome.parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    outcome.state_bytes_per_parameter = _bytes(state.opt_state) / outcome.parameters

    with contextlib.ExitStack() as stack:
        rates = Rates(run.learning_rate(outcome.learning_rate), run.steps)
        identity = {
            "optimizer": outcome.name,
            "hyperparameters": outcome.hyperparameters,
            "learning_rate": outcome.learning_rate,
            "run": to_json(run, resumed=True),
            "text": corpus.fingerprint,  # a position in the data means nothing in another text
        }
        past = lambda step: {"learning rates before": _digest(rates.before(step))}
        checkpoints = Checkpoints(folder / "checkpoints", identity, past)
        stack.callback(checkpoints.close)
        state = checkpoints.restore(state, batches)
        metrics_file = folder / "metrics.jsonl"
        kept = outcome.take_up(metrics_file, run, int(state.step))
        clock = Clock(max((entry["seconds"] for entry in kept), default=0.0))
        on_start()
        file = None
        if is_first():
            write_text(metrics_file, "".join(dumps(entry) + "\n" for entry in kept))
            file = stack.enter_context(contextlib.closing(Lines(metrics_file)))

        shape = (run.batch_size, run.model.context + 1)
        example = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
        started = time.perf_counter()
        wanted = bool(run.qk_clip or run.monitor_every)
        step = make_train_step(
            graphdef,
            tx,
            run.micro_batches,
            z_loss=run.z_loss,
            monitor_every=run.monitor_every,
            attention_logits=wanted,
            fused=run.fused,
            noise_scale_every=run.noise_scale_every,
        )
        step_fn = jax.jit(
            _telling(step, run),
            donate_argnums=0,
            out_shardings=(shardings, shardings.step, shardings.step),
        )
        traced = step_fn.trace(state, example)
        compiled = traced.lower().compile()
        outcome.compile_seconds = time.perf_counter() - started
        outcome.cost = dataclasses.asdict(cost_of(run.model, tx, state, traced, compiled))
        interrupts.check()

        def record(entry: dict[str, Any]) -> None:
            outcome.add([entry])
            if file is not None:
                file.write(entry)
            on_record(entry)

        policy = run.rollback_policy()
        rollback = Rollback(policy) if policy else None
        metrics = Metrics(clock)
        alone = jax.process_count() == 1
        done = int(state.step)
        profile = Profile(run.profile and run.profile / folder.name, done)
        stack.callback(profile.close)
        while done < run.steps:
            profile.before(done, state)
            clock.start()
            batch = jax.make_array_from_process_local_data(rows, next(batches), shape)
            state, told, sampled = compiled(state, batch)
            for every, values in zip(
                (run.monitor_every, run.noise_scale_every), sampled, strict=True
            ):
                if every and done % every == 0:
                    told |= values
            metrics.add(done, told)
            done += 1
            evaluates = done % run.eval_every == 0 or done == run.steps
            saves = done == run.steps or (run.checkpoint_every and done % run.checkpoint_every == 0)
            waits = evaluates or saves or rollback is not None or done == 1 or interrupts.pending()
            if not waits and done % run.log_every:
                continue
            entries = metrics.fetch(keep_last=not waits)
            if waits:
                clock.stop()
            back = None
            for entry in entries:
                entry["learning_rate"] = rates[entry["step"]]
                if entry["step"] == 0 and not run.skip_spikes:
                    _check_first(entry)
                try:
                    back = rollback.observe(done, state, entry["loss"]) if rollback else None
                except GaveUp as reason:
                    record(entry)
                    warnings.warn(f"{outcome.name} diverged: {reason}", stacklevel=3)
                    outcome.status = "diverged"
                    return outcome
                record(entry | {"returned_to": back.step} if back else entry)
                if not (math.isfinite(entry["loss"]) or back or run.skip_spikes):
                    outcome.status = "diverged"
                    return outcome
            if back:
                state, done = back.state, back.step
                for _ in range(back.skip_batches):
                    next(batches)
                checkpoints.forget_from(done)
                if run.checkpoint_every:
                    checkpoints.save(state, batches)
                continue
            if evaluates:
                loss = float(mean_loss(graphdef, state.params, heldout, run.fused))
                entry = {"step": done, "seconds": clock.seconds, "heldout_loss": loss}
                if run.ema:
                    mean = averaged(state.opt_state)
                    entry["heldout_loss_ema"] = float(mean_loss(graphdef, mean, heldout, run.fused))
                if corpus.bytes_per_token is not None:
                    bits = loss / math.log(2) / corpus.bytes_per_token
                    entry["heldout_bits_per_byte"] = bits
                record(entry)
                if not math.isfinite(loss):
                    outcome.status = "diverged"
                    return outcome
            stop = waits and interrupts.pending()
            # Other processes may not have received the signal, and would not take part.
            if saves or (stop and alone):
                checkpoints.save(state, batches)
            if stop:
                interrupts.check()
    interrupts.check()
    guard = _guard(state.opt_state)
    if guard and int(guard.skipped) >= done:
        warnings.warn(
            f"{outcome.name} learned nothing: all {done} steps were skipped, as their losses or "
            "gradients were not finite; check the data and the model before the learning rate.",
            stacklevel=3,
        )
        outcome.status = "diverged"
        return outcome
    if run.samples:
        rows_BxT = heldout[0, :, :-1]
        outcome.samples = samples(graphdef, state.params, rows_BxT, run.samples, corpus, run.seed)
        if is_first():
            write_text(folder / "samples.txt", "".join(f"{line}\n" for line in outcome.samples))
    outcome.optimizer_milliseconds = optimizer_milliseconds(run.model, tx, state)
    outcome.status = "finished"
    return outcome


def optimizer_milliseconds(
    model: ModelConfig, tx: optax.GradientTransformation, state: TrainState, repeats: int = 10
) -> float:
    """Median time of the update alone, its buffers donated as in training; `state` is used up.

    Estimates of a curvature are the model's work, and not counted.
    """
    tx = optax.with_extra_args_support(tx)

    def update(grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
        updates, opt_state = tx.update(grads, opt_state, params, **unmeasured(model))
        return opt_state, optax.apply_updates(params, updates)

    shardings = jax.tree.map(lambda x: x.sharding, (state.opt_state, state.params))
    constants = lambda params: jax.tree.map(lambda p: jnp.full_like(p, 1e-3), params)
    grads = jax.jit(constants, out_shardings=shardings[1])(state.params)
    compiled = jax.jit(update, donate_argnums=(1, 2), out_shardings=shardings)
    opt_state, params = jax.block_until_ready(compiled(grads, state.opt_state, state.params))
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        opt_state, params = jax.block_until_ready(compiled(grads, opt_state, params))
        times.append(time.perf_counter() - started)
    return 1e3 * float(np.median(times))


def _telling(step: Callable[..., Any], run: RunConfig) -> Callable[..., Any]:
    """The step, and readings of its state: skipped steps among the metrics; monitors and noise apart."""

    def telling(state: TrainState, batch: Any) -> tuple[TrainState, Any, Any]:
        state, metrics = step(state, batch)
        if guard := _guard(state.opt_state):
            metrics |= {"skipped": guard.skipped}
        monitors = monitored(state.opt_state) if run.monitor_every else {}
        noise = noise_scale(state.opt_state) if run.noise_scale_every else {}
        return state, metrics, (monitors, noise)

    return telling


def _guard(opt_state: Any) -> SkipStepState | FiniteGateState | None:
    """The state of the outermost guard."""
    return next(iter(states_of((SkipStepState, FiniteGateState), opt_state)), None)


def _check_first(entry: dict[str, float]) -> None:
    """No optimizer has a share in what the first step finds."""
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(entry.get(name, 0.0)):
            raise RunFailed(
                f"the {name.replace('_', ' ')} is {entry[name]} before the first update: check the "
                "model's options and the text, not the optimizer."
            )


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()[:16]


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

"""One run: a model, an optimizer, a loop; every number it makes goes to a file as it is made."""

import contextlib
import dataclasses
import math
import warnings
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from .batch_schedule import CONSTANT
from .checkpoint import Checkpoints
from .config import RunConfig
from .cost import cost_of
from .data.batches import train_batches, train_rows
from .data.corpus import Corpus
from .data.taking import Batches, OfManySizes, OfOneSize
from .distributed import is_first
from .evaluation import Evaluation
from .metrics import Clock, Metrics
from .placed import place
from .programs import Programs, guard_of
from .rollback import GaveUp, Rollback
from .run import interrupts
from .run.around import NO_HOOKS, Hooks, RunPaths
from .run.files import Lines, dumps, write_text
from .run.outcome import Outcome, RunFailed
from .run.past import identity_of, past_of, rates_of
from .run.profile import Profile
from .samples import samples
from .schedule_free import evaluated
from .sharding import batch_sharding, build_mesh, local_shards
from .step import TrainState
from .update_time import optimizer_milliseconds


class _Diverged(Exception):
    """Why a run ends before its last step; nothing where the records say it."""


def train(
    run: RunConfig,
    tx: optax.GradientTransformation,
    corpus: Corpus,
    outcome: Outcome,
    paths: RunPaths,
    hooks: Hooks = NO_HOOKS,
    mesh: Mesh | None = None,
) -> Outcome:
    """Trains from the seed, or from the newest checkpoint, to the last step.

    Args:
      run: the configuration.
      tx: the optimizer, learning rate included.
      corpus: the tokens.
      outcome: filled as the run goes on, so that an interruption leaves what was reached.
      paths: where records and checkpoints are, and what the run branches off.
      hooks: what is called with every record, and when it starts and writes checkpoints.
      mesh: with `Auto` axes, of all devices of all processes, which all call this alike; by default of
        one device.

    Returns:
      `outcome`, its status ``finished``, or ``diverged`` if a loss stopped being finite or a guard
      skipped every step.

    Raises:
      ValueError: if there are checkpoints, and none can be used, or if that of the origin cannot.
      RunFailed: if the loss or its gradient is not finite before the first update.
      Interrupted: between two steps after a signal (see `interrupts`); the last step's checkpoint is
        written then, where there are checkpoints.
    """
    mesh = mesh or build_mesh()
    try:
        with jax.set_mesh(mesh):
            _train(run, tx, corpus, outcome, paths, hooks, mesh)
        outcome.status = "finished"
    except _Diverged as reason:
        outcome.status = "diverged"
        if reason.args:
            warnings.warn(f"{outcome.name} {reason}", stacklevel=2)
    return outcome


def _train(
    run: RunConfig,
    tx: optax.GradientTransformation,
    corpus: Corpus,
    outcome: Outcome,
    paths: RunPaths,
    hooks: Hooks,
    mesh: Mesh,
) -> None:
    # Text, model and optimizer, where the mesh has them.
    placed = place(run.model, tx, mesh)
    rows = batch_sharding(mesh, run.batch_size)
    batches = _batches(run, corpus, *local_shards(rows, run.batch_size))
    state = placed.init(run.seed)
    evaluate = Evaluation(run, corpus, placed.graphdef, mesh)
    outcome.parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    outcome.state_bytes_per_parameter = _bytes(state.opt_state) / outcome.parameters

    with contextlib.ExitStack() as stack:
        # Where it was left, or where it branches off.
        rates = rates_of(run, outcome)
        identity, past = identity_of(run, outcome, corpus), past_of(run, rates)
        checkpoints = Checkpoints(
            paths.checkpoints,
            identity,
            past,
            origin=paths.origin,
            keep=run.keep_checkpoints,
            on_whole=hooks.on_checkpoint,
        )
        stack.callback(checkpoints.close)
        policy = run.rollback_policy()
        rollback = Rollback(policy) if policy else None
        state = checkpoints.restore(state, batches, rollback)
        done = int(state.step)
        metrics_file = paths.folder / "metrics.jsonl"
        read = (
            checkpoints.branched.records / metrics_file.name
            if checkpoints.branched
            else metrics_file
        )
        kept = outcome.take_up(read if is_first() else None, run, done)
        clock = Clock(max((entry["seconds"] for entry in kept), default=0.0))

        # Nothing is left that could refuse it: from here on files are written.
        hooks.on_start()
        file = None
        if is_first():
            write_text(metrics_file, "".join(dumps(entry) + "\n" for entry in kept))
            file = stack.enter_context(contextlib.closing(Lines(metrics_file)))

        def record(entry: dict[str, Any]) -> None:
            outcome.add([entry])
            if file is not None:
                file.write(entry)
            hooks.on_record(entry)

        # A program for each size of batch, compiled when its time comes; now the first.
        programs, largest = Programs(run, placed, rows, outcome.name), 0

        def program_of(size: int, state: TrainState) -> Any:
            nonlocal largest
            traced, compiled = programs.of(size, state)
            outcome.compile_seconds = programs.seconds
            if size > largest:  # what a step costs at most
                cost = cost_of(placed, state, traced, compiled)
                outcome.cost, largest = dataclasses.asdict(cost), size
            return compiled

        program_of(run.batch_sizes.at(done), state)
        interrupts.check()

        metrics = Metrics(clock)
        profile = Profile(run.profile and run.profile / paths.folder.name, done)
        stack.callback(profile.close)
        while done < run.updates:
            # One step.
            size = run.batch_sizes.at(done)
            if not programs.in_use(size):
                jax.block_until_ready(state)  # the step before is training still
                clock.stop()
            program = program_of(size, state)
            profile.before(done, state)
            clock.start()
            shape = (size, run.model.context + 1)
            batch = jax.make_array_from_process_local_data(rows, batches.take(size), shape)
            state, told, sampled = program(state, batch)
            for every, values in zip(
                (run.monitor_every, run.noise_scale_every), sampled, strict=True
            ):
                if every and done % every == 0:
                    told |= values
            metrics.add(done, told)
            done += 1

            # What it told, of several steps together if nothing has to be decided yet.
            evaluates = done % run.eval_every == 0 or done == run.updates
            saves = done == run.updates or (
                run.checkpoint_every and done % run.checkpoint_every == 0
            )
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
                    raise _Diverged(f"diverged: {reason}") from reason
                record(entry | {"returned_to": back.step} if back else entry)
                if not (math.isfinite(entry["loss"]) or back or run.skip_spikes):
                    raise _Diverged
            if back:
                state, done = back.state, back.step
                for _ in range(back.skip_batches):
                    batches.take(run.batch_sizes.at(done))
                checkpoints.forget_from(done)
                if run.checkpoint_every:
                    checkpoints.save(state, batches, rollback)
                continue

            # Evaluations and checkpoints.
            if evaluates:
                losses = evaluate(state)
                record({"step": done, "seconds": clock.seconds, **losses})
                if not math.isfinite(losses["heldout_loss"]):
                    raise _Diverged
            stop = waits and interrupts.pending()
            # Other processes may not have received the signal, and would not take part.
            if saves or (stop and jax.process_count() == 1):
                checkpoints.save(state, batches, rollback)
            if stop:
                interrupts.check()

    # The last checkpoint is on disk.
    interrupts.check()
    guard = guard_of(state.opt_state)
    if guard and int(guard.skipped) >= done:
        raise _Diverged(
            f"learned nothing: all {done} steps were skipped, as their losses or gradients were not "
            "finite; check the data and the model before the learning rate."
        )
    if run.samples:
        prompts_BxT = evaluate.batches_NxBxT1[0, :, :-1]
        outcome.samples = samples(
            placed.graphdef, evaluated(state), prompts_BxT, run.samples, corpus, run.seed
        )
        if is_first():
            write_text(
                paths.folder / "samples.txt", "".join(f"{line}\n" for line in outcome.samples)
            )
    outcome.optimizer_milliseconds = optimizer_milliseconds(placed, state)


def _batches(run: RunConfig, corpus: Corpus, shards: tuple[int, ...], shard_count: int) -> Batches:
    """This process's rows of every batch."""
    context, seed = run.model.context, run.seed
    if run.batches != CONSTANT:
        rows = train_rows(
            corpus, context=context, seed=seed, order=run.order, batch_size=run.batch_size
        )
        return OfManySizes(rows, run.batch_size, shards, shard_count)
    iterator = train_batches(
        corpus,
        batch_size=run.batch_size,
        context=context,
        seed=seed,
        shards=shards,
        shard_count=shard_count,
        read_threads=run.read_threads,
        order=run.order,
    )
    return OfOneSize(iterator, run.batch_size)


def _check_first(entry: dict[str, float]) -> None:
    """No optimizer has a share in what the first step finds."""
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(entry.get(name, 0.0)):
            raise RunFailed(
                f"the {name.replace('_', ' ')} is {entry[name]} before the first update: check the "
                "model's options and the text, not the optimizer."
            )


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

"""The training loop. Pretraining, fine-tuning and everything later is batches and a loss run through this."""

import logging
import math
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ternlm.checkpoint.folders import checkpoint_folder
from ternlm.config.section import UserError
from ternlm.data.batch import Batch
from ternlm.optim.schedule import apply_schedule
from ternlm.train.report import Reporter, StepFacts
from ternlm.train.run import Run
from ternlm.train.step import accumulate_gradients, update_weights
from ternlm.train.stop import StopFile, StopSignals, out_of_time

logger = logging.getLogger(__name__)


class TrainingError(UserError):
    """Training can't go on; everything up to the last checkpoint is kept."""


@dataclass(frozen=True)
class Every:
    """Something to do after each step at which `due` says so; its metrics are reported with the step's."""

    due: Callable[[int], bool]
    act: Callable[[], dict[str, float]]
    before: Callable[[list[Batch]], None] | None = None
    """What to do before such a step, which is given its microbatches."""


def train_loop(run: Run, batches: Iterable[list[Batch]], reporter: Reporter, extras: Sequence[Every] = ()) -> None:
    """Train until the last step, the time budget, a signal or the stop file; save on the way and at the end.

    batches: one list of microbatches per step; an empty one is a step to be passed over.
    `run.stopped` tells why it ended. Raises TrainingError when too many steps in a row were bad.
    """
    train, progress = run.config.train, run.progress
    if progress.step and out_of_time(train, progress.seconds, progress.seconds / progress.step):
        run.stopped = f"the time budget of {train.max_minutes:g} minutes is used up; raise train.max_minutes"
        logger.warning("nothing was trained: %s", run.stopped)
        return
    stop_file = StopFile(train.stop_file if run.mesh.is_first else None, progress.step)
    saved_at = now = time.monotonic()
    first = True
    # Signals are only noted until the last save is on the disk: a second SIGTERM must not kill it.
    with StopSignals() as signals:
        try:
            for microbatches in batches:
                for every in extras:
                    if every.before and every.due(progress.step + 1):
                        every.before(microbatches)
                facts = train_step(run, microbatches)
                step_seconds = time.monotonic() - now
                extra: dict[str, float] = {}
                for every in extras:
                    extra |= every.act() if every.due(progress.step) else {}
                asked = stop_file.asks(progress.step)
                # The first step of a process compiles: it says nothing about the next one's duration.
                expected = 0.0 if first else step_seconds
                elapsed = progress.seconds + time.monotonic() - now
                wishes = Wishes(
                    signals.received, asked, out_of_time(train, elapsed, expected), time.monotonic() - saved_at
                )
                run.stopped, save_now = _agree(run, facts, wishes)
                reporter.report(facts, step_seconds, extra, last=run.stopped is not None)
                _check_progress(run, facts)
                if save_now:
                    progress.seconds += time.monotonic() - now
                    now = saved_at = time.monotonic()
                    reporter.sync()
                    run.save()
                progress.seconds += time.monotonic() - now
                now, first = time.monotonic(), False
                if run.stopped:
                    logger.info("stopped after step %d: %s", progress.step, run.stopped)
                    break
        except BaseException as error:
            # Of several ranks some may be gone, and the save with them: no waiting for it.
            if run.mesh.layout.world == 1 or isinstance(error, UserError):
                run.saver.finish()
            raise
        run.saver.finish()


def train_step(run: Run, microbatches: Sequence[Batch]) -> StepFacts | None:
    """Train on one global batch and count it; a bad step is counted and never applied.

    Returns None for a step that has nothing to train on.
    """
    config, progress = run.config, run.progress
    progress.step += 1
    if not microbatches:
        return None
    apply_schedule(run.optimizers, progress.updates, config.train.steps, config.optimizer, config.schedule)
    scale = run.scaler.scale if run.scaler else 1.0
    loss = accumulate_gradients(run.laid_out, run.loss_fn, microbatches, run.autocast, scale)
    if not loss.count:
        logger.warning("step %d has no token to train on: its documents have no targets with loss", progress.step)
        update_weights(run.pieces, run.optimizers, run.mesh, 0.0, apply=False)
        progress.skipped += 1
        progress.skipped_in_row += 1
        return None
    verdict = run.spikes.judge(loss.mean)
    norm = update_weights(
        run.pieces, run.optimizers, run.mesh, config.optimizer.clip_norm, loss.divisor, apply=verdict == "ok"
    )
    applied = verdict == "ok" and math.isfinite(norm)
    if run.scaler:
        run.scaler.update(overflow=not math.isfinite(norm))
    progress.updates += applied
    progress.skipped += not applied
    progress.skipped_in_row = 0 if applied else progress.skipped_in_row + 1
    progress.tokens += sum(batch.tokens_BT.numel() for batch in microbatches) * run.mesh.layout.data
    return StepFacts(loss, norm, spiked=verdict == "stop", microbatches=microbatches)


def out_of_patience(run: Run) -> bool:
    """Whether as many validations as `validation.patience` in a row were no better than the best."""
    return 0 < run.config.validation.patience <= run.progress.worse_in_row


def why_out_of_patience(run: Run) -> str:
    """Say why a run ends by `out_of_patience`, and where its best model is."""
    progress = run.progress
    best = checkpoint_folder(run.folder, progress.best_step)
    return (
        f"the held-out loss has not fallen for {progress.worse_in_row} validations; it was least, "
        f"{progress.best_loss:.4g}, after step {progress.best_step}: {best}"
    )


def _check_progress(run: Run, facts: StepFacts | None) -> None:
    progress = run.progress
    if progress.skipped_in_row < run.config.train.max_skipped_in_row:
        return
    figures = f"loss {facts.loss.mean:.4g}, gradient norm {facts.norm:.4g}" if facts else "no token to train on"
    raise TrainingError(
        f"the newest {progress.skipped_in_row} steps had non-finite gradients, loss spikes or nothing to train on "
        f"(step {progress.step}: {figures}); go on from the last checkpoint with a lower optimizer.lr, pass over the "
        "data with data.skip_steps, or look at them with `tern data inspect`"
    )


@dataclass(frozen=True)
class Wishes:
    """What one rank would have the run do after a step; clocks, files and signals differ between ranks."""

    signal: str | None
    """Name of the signal it received."""
    asked: str | None
    """What the stop file says, "stop" or "save"; only the first rank reads it."""
    late: bool
    """Whether the time budget is used up by its clock."""
    seconds_since_save: float


def _agree(run: Run, facts: StepFacts | None, wishes: Wishes) -> tuple[str | None, bool]:
    """Return why the run ends, if it does, and whether to save: the same on every rank. Collective."""
    train, first = run.config.train, run.mesh.is_first
    number = signal.Signals[wishes.signal].value if wishes.signal else 0
    own = [
        number,
        first and wishes.asked == "stop",
        first and wishes.asked == "save",
        first and wishes.late,
        first and _save_is_due(run, wishes.seconds_since_save),
    ]
    signalled, stop, save, late, due = run.mesh.agree([float(wish) for wish in own])
    reason = None
    if signalled:
        reason = f"received {signal.Signals(int(signalled)).name}"
    elif facts and facts.spiked:
        reason = "the loss spiked (train.spike = stop)"
    elif stop:
        reason = f"the stop file {train.stop_file} asked for it"
    elif run.progress.step >= train.steps:
        reason = "the last step is done"
    elif out_of_patience(run):
        reason = why_out_of_patience(run)
    elif late:
        reason = f"the time budget of {train.max_minutes:g} minutes is used up"
    return reason, bool(reason or save or due)


def _save_is_due(run: Run, seconds_since_save: float) -> bool:
    checkpoint, step = run.config.checkpoint, run.progress.step
    by_steps = checkpoint.every_steps > 0 and step % checkpoint.every_steps == 0
    best = run.config.validation.patience > 0 and run.progress.best_step == step
    return by_steps or best or 0 < checkpoint.every_minutes * 60 <= seconds_since_save

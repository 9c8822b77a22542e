"""Training from the first step to the last: what happens between two steps, and where the ranks agree on it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ds_lowrank.collectives import any_rank, any_rank_and_mean, raise_if_any_failed, raise_on_all_ranks
from ds_lowrank.data.batches import Step
from ds_lowrank.training.arguments import LARGEST
from ds_lowrank.training.console import ConsoleError
from ds_lowrank.training.health import Health
from ds_lowrank.training.interrupt import StopRequest
from ds_lowrank.training.launcher import Launchers
from ds_lowrank.training.loop import train_step
from ds_lowrank.training.meter import Meter
from ds_lowrank.training.metrics import Reporter
from ds_lowrank.training.run import Run
from ds_lowrank.training.step_record import step_record
from ds_lowrank.training.time_limits import TimeLimits
from ds_lowrank.training.whereabouts import Stage, enter


def train(run: Run, limits: TimeLimits, launchers: Launchers | None = None) -> bool:
    """Train until the last step, or until a rank is asked to stop. Collective.

    Args:
        run: the run.
        limits: how long the ranks wait for each other: in the first step, and while they save, longer than otherwise.
        launchers: the launchers above this process; their end is a request to stop.

    Returns:
        Whether the run is finished.

    Raises:
        BrokenRunError: losses, gradients or weights have not been finite for some steps, or are not at the end.
        CheckpointError: a checkpoint could not be written.
        DataError: the data cannot be read any further.
        OutputError: the metrics, or what is said on the console, could not be written; of the console it is raised
            when a checkpoint has been saved.
        RemoteError: another rank failed.
    """
    with raise_on_all_ranks():
        report = Reporter(run.arguments.output, run.engine, run.steps, run.progress.step)
    with report:
        training = _Training(run, report, StopRequest(dist.get_rank(), launchers), limits)
        while run.progress.step < run.steps:
            if training.step():
                return False
    return True


def due(step: int, interval: int) -> bool:
    """Whether something that happens every ``interval`` steps happens after this step; never if it is 0."""
    return interval > 0 and step % interval == 0


class _Training:
    def __init__(self, run: Run, report: Reporter, stop: StopRequest, limits: TimeLimits) -> None:
        self._run, self._report, self._stop, self._limits = run, report, stop, limits
        conditions = run.arguments.stop_on or ()
        self._health = Health(run.engine, run.progress.step, lambda: run.checkpoint, conditions, run.course)
        self._watches_norm = any(each.kind == "grad-norm" for each in conditions)
        self._saved = run.progress.step
        self._good_batch: Mapping[str, Tensor] | None = None
        self._last_record = replace(run.progress)
        self._save_is_due = False
        self._is_unheard = False
        self._console_error: Exception | None = None
        self._meter = Meter(run.steps, run.flops, run.sharers, run.identity.precision)
        with raise_on_all_ranks():
            if (line := self._meter.describe()) is not None:
                report.say(line)

    def step(self) -> bool:
        """Take one step with everything that belongs to it; return whether the run stops after it, as it was asked."""
        run, progress, interval = self._run, self._run.progress, self._run.arguments.save_interval
        step = progress.step + 1
        final = step == run.steps
        evaluates = run.evaluate is not None and (final or due(step, run.arguments.eval_interval))
        records = final or evaluates or step == 1 or due(step, run.arguments.log_interval)
        lr = run.engine.get_lr()[0]
        started = time.perf_counter()
        self._enter(step, "reading data")
        batches, tokens = self._read()
        self._enter(step, "training")
        with self._health.step(step):
            update = records and run.arguments.update_ratio
            result = train_step(run.engine, batches, records, self._watches_norm, update)
        if not self._limits.short:
            self._limits.shorten()
        result.grad_norm_ratio = run.course.add_norm(result.grad_norm)
        self._meter.add(batches)
        progress.step, progress.tokens = step, progress.tokens + tokens
        progress.seconds += time.perf_counter() - started
        record = None
        if records:
            record = step_record(run.engine, result, lr, progress, self._last_record, self._meter)
            self._last_record = replace(progress)
            if evaluates and run.evaluate is not None:
                self._enter(step, "evaluating")
                record |= run.evaluate(step)
        error = self._write(record)
        unheard = isinstance(error, ConsoleError)
        own = self._stop.received, unheard, error is not None and not unheard, run.is_writing
        seen = *self._health.symptoms(result), self._health.is_beyond(result)
        flags, loss = any_rank_and_mean(*own, *seen, number=result.loss, device=run.engine.device)
        asked, unheard, failed, writing, no_loss, no_gradient, is_beyond = flags
        if failed:
            raise_if_any_failed(error)
        if unheard:  # the run is in order: it ends with this error once it is saved
            self._is_unheard, self._console_error = True, self._console_error or error
        if run.is_saving and not writing:
            with self._saving(step):
                self._complete_save()
        if (found := self._health.note(step, no_loss, no_gradient, loss, is_beyond)) is not None:
            with self._saving(step):
                self._save_last_good()
            self._health.end(step, found)
        if self._health.sound == step:
            self._good_batch = batches[-1]
        self._save_is_due |= (asked and not final) or due(step, interval) or (final and interval > 0) or unheard
        # After a step that failed, a save waits for one that does not: it may be the first of many.
        if final or (self._save_is_due and self._health.is_clean(step)):
            sound = self._health.is_sound(batches[-1])
            if final and not sound:
                with self._saving(step):
                    self._complete_save()  # of an earlier step, which was sound
                self._health.end(step)
            if sound and self._save_is_due:
                stops = (asked or self._is_unheard) and not final
                with self._saving(step):
                    self._save(waits=final or stops or self._is_unheard, stops=stops)
                if self._is_unheard:
                    raise_if_any_failed(self._console_error)
                return stops
        return False

    def _enter(self, step: int, what: str) -> None:
        """Note what this rank does; the first step may take as long as the set-up, as it compiles."""
        enter(Stage.STEP if self._limits.short else Stage.SETUP, f"step {step}, {what}")

    def _read(self) -> Step:
        """Read this rank's data of the next step. Collective: a cheaper ``raise_on_all_ranks``."""
        found, error = None, None
        try:
            found = self._run.data.next_step()
        except Exception as caught:
            error = caught
        if any_rank(error is not None, device=self._run.engine.device)[0]:
            raise_if_any_failed(error)
        assert found is not None
        return found

    def _write(self, record: dict[str, Any] | None) -> Exception | None:
        """Report a step; return this rank's error, on which the ranks still have to agree."""
        try:
            if record is not None:
                self._report.record(record)
            self._report.advance()
        except Exception as error:
            return error
        return None

    def _save_last_good(self) -> None:
        """Save the weights of the last good step, if every later update was skipped, and delete nothing for them."""
        run, good = self._run, self._health.sound
        self._complete_save()
        is_due = self._saved < good < run.progress.step and run.arguments.save_interval > 0
        if not is_due or not self._health.keeps_good_weights or self._good_batch is None:
            return
        if self._health.is_sound(self._good_batch):
            run.begin_save(keep=LARGEST)
            run.complete_save()
            with raise_on_all_ranks():
                self._report.say(f"saved {run.checkpoint}, with the weights of step {good}")

    @contextmanager
    def _saving(self, step: int) -> Iterator[None]:
        """While this rank may wait for files, its own or those of the others."""
        enter(Stage.FILES, f"step {step}, saving")
        with self._limits.longer():
            yield

    def _save(self, waits: bool, stops: bool) -> None:
        run, self._save_is_due = self._run, False
        self._saved = run.progress.step
        self._complete_save()
        run.begin_save()
        if not run.is_saving:
            self._complete_save(run.checkpoint)
        elif waits:
            self._complete_save()
        if stops:
            with raise_on_all_ranks():
                self._report.say(
                    f"{self._stop.reason} at step {run.progress.step} of {run.steps}; --resume continues from here"
                )

    def _complete_save(self, saved: Path | None = None) -> None:
        """Complete a checkpoint that has been begun, and report it or one that is complete already."""
        saved = saved or self._run.complete_save()
        if saved is not None:
            with raise_on_all_ranks():
                self._report.say(f"saved {saved}")

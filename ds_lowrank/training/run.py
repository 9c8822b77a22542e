"""A run from its first step to its last: training, evaluation, metrics, checkpoints and requests to stop.

Each program makes a ``Run`` and passes it to ``run_script``.
"""

from __future__ import annotations

import logging
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.config import DeepSpeedConfigError

import ds_lowrank.integration.initialize
from ds_lowrank.checkpoint.choose import set_aside_newer
from ds_lowrank.checkpoint.export import Savable, export
from ds_lowrank.checkpoint.manifest import Identity, Progress
from ds_lowrank.checkpoint.random_state import get_random_state, set_random_state
from ds_lowrank.checkpoint.store import load_checkpoint, save_checkpoint
from ds_lowrank.collectives import RemoteError, broadcast_from_rank0
from ds_lowrank.data.batches import Step
from ds_lowrank.data.errors import DataError
from ds_lowrank.errors import CheckpointError
from ds_lowrank.training import distributed
from ds_lowrank.training.folders import Folders
from ds_lowrank.training.interrupt import StopRequest
from ds_lowrank.training.loop import train_step
from ds_lowrank.training.metrics import Reporter
from ds_lowrank.training.output import AlreadyFinishedError, begin_output, record_save, write_results
from ds_lowrank.training.step_record import step_record

logger = logging.getLogger("ds_lowrank")


class Stateful(Protocol):
    """A part of a run that is saved in checkpoints, in addition to the engine."""

    def state_dict(self) -> dict[str, Any]:
        """The state to save, loadable with ``torch.load(weights_only=True)``."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state."""


class Steps(Stateful, Protocol):
    """An endless stream of training data."""

    def next_step(self) -> Step:
        """This rank's part of the next optimizer step."""


@dataclass
class Run:
    """A run that is ready for its first step.

    Attributes:
        arguments: the command line, for its intervals and folders; ``eval_interval`` is in steps, 0 for the end only.
        engine: the engine of the model.
        steps: the run's total number of steps, including those before a resume.
        identity: identifies the run in its checkpoints.
        data: the training data.
        tokenizer: the tokenizer to export with the model, or None.
        evaluate: called on every rank with the number of the step that was just taken; the ``eval_*`` numbers that it
            returns are added to the record. None for no evaluation.
        parts: further parts to save in checkpoints, in addition to engine, data and random states.
        facts: returns further entries of the summary at the end of the run.
        progress: how far the run is.
    """

    arguments: Namespace
    engine: DeepSpeedEngine
    steps: int
    identity: Identity
    data: Steps
    tokenizer: Savable | None
    evaluate: Callable[[int], dict[str, float]] | None = None
    parts: dict[str, Stateful] = field(default_factory=dict)
    facts: Callable[[], Mapping[str, Any]] = dict
    progress: Progress = field(default_factory=Progress)

    def resume(self, checkpoint: Path | None) -> None:
        """Continue from a checkpoint. Collective.

        Args:
            checkpoint: the folder of the checkpoint; None to start from the beginning.

        Raises:
            CheckpointError: the checkpoint cannot be loaded.
            DataError: it belongs to other data.
            RemoteError: another rank failed.
        """
        save, output = self.arguments.save, self.arguments.output
        if checkpoint is None:
            broadcast_from_rank0(lambda: begin_output(output))
            return
        self.progress, own = load_checkpoint(self.engine, checkpoint)
        for name, part in self._stateful().items():
            part.load_state_dict(own[name])
        set_random_state(own["random"])
        set_aside_newer(save, self.progress.step)
        if self.progress.step >= self.steps and dist.get_rank() == 0:
            logger.info("%s is at the last step: only the results are written again", checkpoint)

    def save(self) -> Path:
        """Save a checkpoint and return its folder. Collective.

        Raises:
            CheckpointError: the checkpoint could not be written.
        """
        own = {name: part.state_dict() for name, part in self._stateful().items()}
        own["random"] = get_random_state()
        directory, keep = self.arguments.save, self.arguments.keep_checkpoints
        saved = save_checkpoint(self.engine, directory, self.identity, self.progress, own, keep)
        broadcast_from_rank0(lambda: record_save(self.arguments.output, directory))
        return saved

    def _stateful(self) -> dict[str, Stateful]:
        return {"data": self.data, **self.parts}


def start_engine(
    model: Any, config: dict[str, Any], schedule: Callable[..., Any], parameters: Any = None, mpu: Any = None
) -> DeepSpeedEngine:
    """Make an engine in training mode with ``ds_lowrank.initialize``. Collective.

    Args:
        model: the model.
        config: the DeepSpeed configuration.
        schedule: makes the learning-rate scheduler of an optimizer; used if the configuration names none.
        parameters: parameters or parameter groups; None for all parameters of the model.
        mpu: the model-parallel unit, if DeepSpeed needs one.
    """
    engine, *_ = ds_lowrank.integration.initialize.initialize(
        model=model,
        model_parameters=parameters,
        config=config,
        mpu=mpu,
        lr_scheduler=None if "scheduler" in config else schedule,
    )
    engine.train()
    return engine


def train(run: Run) -> bool:
    """Train until the last step, or until a rank is asked to stop. Collective.

    Returns:
        Whether the run is finished.

    Raises:
        CheckpointError: a checkpoint could not be written.
        DataError: the data cannot be read any further.
        RemoteError: another rank failed.
    """
    arguments, engine, progress = run.arguments, run.engine, run.progress
    stop = StopRequest()
    with Reporter(arguments.output, engine, run.steps, progress.step) as report:
        last = replace(progress)
        while progress.step < run.steps:
            step = progress.step + 1
            final = step == run.steps
            evaluates = run.evaluate is not None and (final or due(step, arguments.eval_interval))
            records = final or evaluates or step == 1 or due(step, arguments.log_interval)
            lr = engine.get_lr()[0]
            started = time.perf_counter()
            batches, tokens = run.data.next_step()
            result = train_step(engine, batches, measure=records)
            progress.step, progress.tokens = step, progress.tokens + tokens
            progress.seconds += time.perf_counter() - started
            report.advance()
            if records:
                record = step_record(engine, result, lr, progress, since=last)
                if evaluates and run.evaluate is not None:
                    record |= run.evaluate(step)
                report.record(record)
                last = replace(progress)
            stopping = not final and stop.agreed(engine.device)
            if stopping or due(step, arguments.save_interval) or (final and arguments.save_interval):
                report.say(f"saved {run.save()}")
            if stopping:
                report.say(f"asked to stop at step {step} of {run.steps}; --resume continues from here")
                return False
    return True


def due(step: int, interval: int) -> bool:
    """Whether something that happens every ``interval`` steps happens after this step; never if it is 0."""
    return interval > 0 and step % interval == 0


def run_script(arguments: Namespace, set_up: Callable[[Namespace], Run]) -> NoReturn:
    """Join the job, set up the run, train, export, write the results, and end the process.

    Args:
        arguments: the command line of the program.
        set_up: makes the run. Its errors must be raised on every rank; they end the job before its first step.
    """
    distributed.join()
    folders = Folders({"--output": arguments.output, "--save": arguments.save})
    try:
        folders.claim()
        run = set_up(arguments)
    except AlreadyFinishedError as reason:
        folders.release()
        if dist.get_rank() == 0:
            print(reason)
        distributed.leave()
    except (ValueError, OSError, RemoteError, DeepSpeedConfigError) as error:
        folders.release()
        distributed.refuse(error)
    try:
        finished = train(run)
        if finished and arguments.export:
            export(run.engine, run.tokenizer, arguments.output / "export")
    except (CheckpointError, DataError, RemoteError) as error:
        folders.release()
        distributed.refuse(error)
    if dist.get_rank() == 0:
        write_results(arguments.output, run.steps, run.facts())
    folders.release()
    distributed.leave()

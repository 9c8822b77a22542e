"""A run from its first step to its last: training, evaluation, records, checkpoints, requests to stop.

Every script makes a `Run` and hands it to `run_script`.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, Protocol

from deepspeed import DeepSpeedEngine
from deepspeed.runtime.config import DeepSpeedConfigError
from torch.distributed import get_rank

import ds_lowrank.integration.initialize
from ds_lowrank.checkpoint.export import Savable, export
from ds_lowrank.checkpoint.manifest import Identity
from ds_lowrank.checkpoint.random_state import get_random_state, set_random_state
from ds_lowrank.checkpoint.store import Progress, load_checkpoint, save_checkpoint
from ds_lowrank.collectives import RemoteError
from ds_lowrank.data.batches import Step
from ds_lowrank.data.errors import DataError
from ds_lowrank.errors import CheckpointError
from ds_lowrank.training import distributed
from ds_lowrank.training.interrupt import StopRequest
from ds_lowrank.training.loop import train_step
from ds_lowrank.training.metrics import Reporter
from ds_lowrank.training.output import write_results
from ds_lowrank.training.step_record import step_record


class Stateful(Protocol):
    """What a checkpoint holds of a run beside the engine; the state is loadable with `weights_only=True`."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Steps(Stateful, Protocol):
    """An endless stream of data."""

    def next_step(self) -> Step: ...


@dataclass
class Run:
    """`arguments`: the intervals and folders of the command line, `eval_interval` in steps, 0 for the end only.

    steps: in all, those before a resume included.
    evaluate: called with the number of the step just done on every rank; its `eval_*` numbers go into the record.
    parts: what a checkpoint holds beside engine, data and random states.
    facts: more for the summary, asked at the end.
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
        """Continue from a checkpoint, if there is one. Collective."""
        if checkpoint is None:
            return
        self.progress, own = load_checkpoint(self.engine, checkpoint)
        for name, part in self._stateful().items():
            part.load_state_dict(own[name])
        set_random_state(own["random"])

    def save(self) -> Path:
        """Write a checkpoint; its folder. Collective."""
        own = {name: part.state_dict() for name, part in self._stateful().items()}
        own["random"] = get_random_state()
        directory, keep = self.arguments.save, self.arguments.keep_checkpoints
        return save_checkpoint(self.engine, directory, self.identity, self.progress, own, keep)

    def _stateful(self) -> dict[str, Stateful]:
        return {"data": self.data, **self.parts}


def start_engine(
    model: Any, config: dict[str, Any], schedule: Callable[..., Any], parameters: Any = None, mpu: Any = None
) -> DeepSpeedEngine:
    """An engine in training mode. `schedule` is used where the configuration names no scheduler."""
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
    """Run to the last step, or to the step at which a rank was asked to stop; whether it was the last."""
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
    return interval > 0 and step % interval == 0


def run_script(arguments: Namespace, set_up: Callable[[Namespace], Run]) -> NoReturn:
    """Join the job, set the run up, train, export, write the results, leave.

    Errors of `set_up` are raised on every rank; they end the job before its first step.
    """
    distributed.join()
    try:
        run = set_up(arguments)
    except (ValueError, OSError, RemoteError, DeepSpeedConfigError) as error:
        distributed.refuse(error)
    try:
        finished = train(run)
        if finished and arguments.export:
            export(run.engine, run.tokenizer, arguments.output / "export")
    except (CheckpointError, DataError, RemoteError) as error:
        distributed.refuse(error)
    if get_rank() == 0:
        write_results(arguments.output, run.steps, run.facts())
    distributed.leave()

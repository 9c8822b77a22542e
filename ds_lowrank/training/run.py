"""A run that is ready for its first step, with all of its state. Each program of ``launch/`` makes one."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from deepspeed import DeepSpeedEngine

import ds_lowrank.integration.initialize
from ds_lowrank.checkpoint.choose import set_aside_newer
from ds_lowrank.checkpoint.export import Savable
from ds_lowrank.checkpoint.manifest import Identity, Progress
from ds_lowrank.checkpoint.random_state import get_random_state, set_random_state
from ds_lowrank.checkpoint.store import load_checkpoint, save_checkpoint
from ds_lowrank.collectives import broadcast_from_rank0, raise_on_all_ranks
from ds_lowrank.data.batches import Step
from ds_lowrank.errors import CheckpointError
from ds_lowrank.training.course import Course
from ds_lowrank.training.flops import ModelFlops
from ds_lowrank.training.output import begin_output, is_new, record_save

logger = logging.getLogger("ds_lowrank")


class Stateful(Protocol):
    """A part of a run that is saved in checkpoints, in addition to the engine."""

    def state_dict(self) -> dict[str, Any]:
        """The state to save, loadable with ``torch.load(weights_only=True)``."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state. Of further parts, this is collective and raises on every rank or on none."""


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
        flops: of the model, on rank 0; None where they are not counted.
        sharers: the number of ranks that one copy of the model is split over.
        facts: returns further entries of the summary at the end of the run.
        course: the losses and gradient norms so far, as far as later ones are compared with them.
        progress: how far the run is.
        checkpoint: the newest checkpoint that was saved or loaded; None for none.
    """

    arguments: Namespace
    engine: DeepSpeedEngine
    steps: int
    identity: Identity
    data: Steps
    tokenizer: Savable | None
    evaluate: Callable[[int], dict[str, float]] | None = None
    parts: dict[str, Stateful] = field(default_factory=dict)
    flops: ModelFlops | None = None
    sharers: int = 1
    facts: Callable[[], Mapping[str, Any]] = dict
    course: Course = field(default_factory=Course)
    progress: Progress = field(default_factory=Progress)
    checkpoint: Path | None = None

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
        first = broadcast_from_rank0(lambda: checkpoint)
        with raise_on_all_ranks():
            if checkpoint != first:  # a network file system may show a new folder late
                raise CheckpointError(
                    f"this rank finds {checkpoint or 'no checkpoint'} to resume from, but rank 0 {first or 'none'}: "
                    "make sure that all nodes see the same files, and start again"
                )
        if broadcast_from_rank0(lambda: is_new(output, save, checkpoint)):
            broadcast_from_rank0(lambda: begin_output(output))
        if checkpoint is None:
            return
        self.progress, own = load_checkpoint(self.engine, checkpoint)
        with raise_on_all_ranks():
            states = {name: own[name] for name in self.parts}
            self.data.load_state_dict(own["data"])
            self.course.load_state_dict(own["course"])
        for name, part in self.parts.items():
            part.load_state_dict(states[name])
        with raise_on_all_ranks():
            set_random_state(own["random"])
        set_aside_newer(save, self.progress.step)
        if self.progress.step >= self.steps and dist.get_rank() == 0:
            logger.info("%s is at the last step: only the results are written again", checkpoint)
        self.checkpoint = checkpoint

    def save(self, keep: int | None = None) -> Path:
        """Save a checkpoint and return its folder. Collective.

        Args:
            keep: how many of the newest to keep; None for as many as the command line says.

        Raises:
            CheckpointError: the checkpoint could not be written.
        """
        with raise_on_all_ranks():
            own = {name: part.state_dict() for name, part in self._stateful().items()}
            own["random"] = get_random_state()
        directory, keep = self.arguments.save, self.arguments.keep_checkpoints if keep is None else keep
        self.checkpoint = save_checkpoint(self.engine, directory, self.identity, self.progress, own, keep)
        broadcast_from_rank0(lambda: record_save(self.arguments.output, directory))
        return self.checkpoint

    def _stateful(self) -> dict[str, Stateful]:
        return {"data": self.data, "course": self.course, **self.parts}


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

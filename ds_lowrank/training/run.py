"""A run that is ready for its first step, with all of its state. Each program of ``launch/`` makes one."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from deepspeed import DeepSpeedEngine

import ds_lowrank.integration.initialize
from ds_lowrank.checkpoint.choose import set_aside_newer
from ds_lowrank.checkpoint.common import COMMON
from ds_lowrank.checkpoint.export import Savable
from ds_lowrank.checkpoint.manifest import GRID, Identity, Manifest, Progress, comparable, read_manifest
from ds_lowrank.checkpoint.random_state import (
    get_random_state,
    random_state_text,
    reseed,
    restore_random_state,
    set_random_state,
)
from ds_lowrank.checkpoint.saved import find as find_saved
from ds_lowrank.checkpoint.store import load_checkpoint, save_checkpoint
from ds_lowrank.collectives import broadcast_from_rank0, raise_on_all_ranks
from ds_lowrank.data.batches import Step
from ds_lowrank.data.errors import DataError
from ds_lowrank.errors import CheckpointError
from ds_lowrank.integration.checkpoint import Saving, Snapshots, StateParts, begin_saving, load
from ds_lowrank.optimizer.optimizer import LowRankOptimizer
from ds_lowrank.optimizer.saved_state import STORED
from ds_lowrank.training.course import Course
from ds_lowrank.training.flops import ModelFlops
from ds_lowrank.training.output import begin_output, is_new, record_save
from ds_lowrank.training.param_groups import matrix_groups

logger = logging.getLogger("ds_lowrank")

KEPT: dict[str, StateParts] = {"settings": "state", "projected": "rest", "all": "none"}
"""What is loaded of the optimizer, by what ``--reset-optimizer`` resets."""
SAID = {
    "state": "its state, with the options of this run",
    "rest": "the moments of what AdamW steps, and begins anew with the matrices",
    "none": "nothing, and begins anew",
}


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
    _saving: Saving | None = None
    _snapshots: Snapshots | None = None

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
            if self.arguments.start_from is not None:
                self._start_from(find_saved(self.arguments.start_from))
            return
        with raise_on_all_ranks():
            manifest = read_manifest(checkpoint)
        if COMMON in manifest.files:
            self._load(checkpoint, manifest)
        else:
            self._load_stock(checkpoint)
        set_aside_newer(save, self.progress.step)
        if self.progress.step >= self.steps and dist.get_rank() == 0:
            logger.info("%s is at the last step: only the results are written again", checkpoint)
        self.checkpoint = checkpoint

    def _start_from(self, checkpoint: Path) -> None:
        """Begin with the weights of another run, and the moments of what AdamW steps in both. Collective."""
        with raise_on_all_ranks():
            manifest = read_manifest(checkpoint)
        load(self.engine, checkpoint, manifest, parts="rest", schedule="leave", with_counters=False)
        if dist.get_rank() == 0:
            logger.info("the weights are those of %s, and so are the moments of what AdamW steps", checkpoint)

    def _load(self, checkpoint: Path, manifest: Manifest) -> None:
        """Load a checkpoint that knows no grid."""
        own = asdict(self.identity)
        saved, wanted = comparable(manifest.run, STORED), comparable(own, STORED)
        has_changed = any(saved.get(key) != wanted[key] for key in ("optimizer", "optimizer_params"))
        parts: StateParts = "all"
        if has_changed:  # which check_identity lets pass with this flag alone
            parts = KEPT[self.arguments.reset_optimizer]
        loaded = load(
            self.engine, checkpoint, manifest, parts=parts, schedule="restore" if parts == "all" else "advance"
        )
        self.progress = replace(manifest.progress)
        state = loaded.caller
        with raise_on_all_ranks():
            states = {name: state[name] for name in self.parts}
            self.course.load_state_dict(state["course"])
            try:
                self.data.load_state_dict(state["data"])
            except DataError:
                if not self.arguments.reset_data:
                    raise
                if dist.get_rank() == 0:
                    logger.info("the data are others than those of %s: they begin anew", checkpoint)
        for name, part in self.parts.items():
            part.load_state_dict(states[name])
        if has_changed and dist.get_rank() == 0:
            logger.info("of %s the optimizer keeps %s", checkpoint, SAID[parts])
        with raise_on_all_ranks():
            rank = dist.get_rank()
            if all(manifest.run.get(key) == own[key] for key in GRID):
                restore_random_state(loaded.metadata[rank]["random"])
            else:
                reseed(self.identity.seed, self.progress.step, rank)
                if rank == 0:
                    logger.info("%s was saved on another grid: random generators, of dropout, begin anew", checkpoint)

    def _load_stock(self, checkpoint: Path) -> None:
        """Load a checkpoint of DeepSpeed's files."""
        self.progress, own = load_checkpoint(self.engine, checkpoint)
        with raise_on_all_ranks():
            states = {name: own[name] for name in self.parts}
            self.data.load_state_dict(own["data"])
            self.course.load_state_dict(own["course"])
        for name, part in self.parts.items():
            part.load_state_dict(states[name])
        with raise_on_all_ranks():
            set_random_state(own["random"])

    @property
    def is_saving(self) -> bool:
        """Whether a checkpoint has been begun and not completed."""
        return self._saving is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank is still writing its part of a checkpoint."""
        return self._saving is not None and self._saving.is_pending

    def begin_save(self, keep: int | None = None) -> None:
        """Begin to save a checkpoint, after completing one that has been begun before. Collective.

        Args:
            keep: how many of the newest to keep; None for as many as the command line says.

        Raises:
            CheckpointError: one of them could not be written.
        """
        self.complete_save()
        with raise_on_all_ranks():
            own = {name: part.state_dict() for name, part in self._stateful().items()}
        directory, keep = self.arguments.save, self.arguments.keep_checkpoints if keep is None else keep
        if not isinstance(self.engine.basic_optimizer, LowRankOptimizer):
            own["random"] = get_random_state()
            self._note(save_checkpoint(self.engine, directory, self.identity, self.progress, own, keep))
            return
        if self._snapshots is None and not self.arguments.synchronous_save:
            self._snapshots = Snapshots()
        self._saving = begin_saving(
            self.engine,
            directory,
            f"global_step{self.progress.step}",
            run=asdict(self.identity),
            progress=replace(self.progress),
            common=own,
            metadata={"random": random_state_text()},
            keep=keep,
            snapshots=self._snapshots,
        )
        if self._snapshots is None:
            self.complete_save()

    def complete_save(self) -> Path | None:
        """Wait for a checkpoint that has been begun, and give it its name. Collective.

        Returns:
            Its folder; None if none has been begun.

        Raises:
            CheckpointError: it could not be written.
        """
        saving, self._saving = self._saving, None
        if saving is None:
            return None
        return self._note(saving.complete())

    def _note(self, saved: Path) -> Path:
        self.checkpoint = saved
        broadcast_from_rank0(lambda: record_save(self.arguments.output, self.arguments.save))
        return saved

    def _stateful(self) -> dict[str, Stateful]:
        return {"data": self.data, "course": self.course, **self.parts}


def start_engine(
    model: Any,
    config: dict[str, Any],
    schedule: Callable[..., Any],
    matrix_lr_scale: float | None = None,
    mpu: Any = None,
) -> DeepSpeedEngine:
    """Make an engine in training mode with ``ds_lowrank.initialize``. Collective.

    Args:
        model: the model.
        config: the DeepSpeed configuration.
        schedule: makes the learning-rate scheduler of an optimizer; used if the configuration names none.
        matrix_lr_scale: a dense optimizer's factor on the learning rate of the layers' matrices; None for no factor.
        mpu: the model-parallel unit, if DeepSpeed needs one.
    """
    groups = None if matrix_lr_scale is None else matrix_groups(model, config["optimizer"], matrix_lr_scale)
    engine, *_ = ds_lowrank.integration.initialize.initialize(
        model=model,
        model_parameters=groups,
        config=config,
        mpu=mpu,
        lr_scheduler=None if "scheduler" in config else schedule,
    )
    engine.train()
    return engine

"""Planning a pre-training run: everything that can be decided and checked before anything is built."""

from __future__ import annotations

import logging
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from ds_lowrank.checkpoint.choose import check_unused, check_whole, find_checkpoint, step_of
from ds_lowrank.checkpoint.common import COMMON
from ds_lowrank.checkpoint.folder import share_of_files
from ds_lowrank.checkpoint.manifest import GRID, Identity, check_files, check_identity, read_manifest
from ds_lowrank.checkpoint.saved import find as find_saved
from ds_lowrank.collectives import global_rank
from ds_lowrank.errors import CheckpointError, ConfigError
from ds_lowrank.models.llama import config_of_folder, load_config
from ds_lowrank.models.weights import FolderWeights
from ds_lowrank.optimizer.registry import OPTIMIZERS
from ds_lowrank.optimizer.saved_state import STORED
from ds_lowrank.training import config as ds_config
from ds_lowrank.training.config import BatchSizes
from ds_lowrank.training.output import check_continued, check_output, check_restart
from ds_lowrank.training.parallelism import GridShape, grid_shape, without_global_size
from ds_lowrank.training.schedule import warmup_steps

logger = logging.getLogger("ds_lowrank")

OPTIMIZER = frozenset({"optimizer", "optimizer_params"})
DATA = frozenset({"sequence_length", "train_batch_size", "seed"})


@dataclass(frozen=True)
class Plan:
    """A checked plan of a pre-training run.

    Attributes:
        config: the complete DeepSpeed configuration.
        model: sizes of the model.
        grid: the degrees of parallelism.
        batch: the batch sizes.
        warmup: warm-up steps of the learning rate.
        identity: identifies the run in its checkpoints.
        checkpoint: the checkpoint to resume from, or None.
        weights: the weights of a Hugging Face folder given as the model; None if they are drawn from the seed or loaded
            from the checkpoint.
        tokenizer: the tokenizer of the command line, else the model's folder, else None.
    """

    config: dict[str, Any]
    model: LlamaConfig
    grid: GridShape
    batch: BatchSizes
    warmup: int
    identity: Identity
    checkpoint: Path | None
    weights: FolderWeights | None
    tokenizer: str | None

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step on all ranks together."""
        return self.batch.total * self.identity.sequence_length


def make_plan(arguments: Namespace, ranks: int) -> Plan:
    """Read and check all files that the command line names. Nothing is written. Not a collective.

    Args:
        arguments: the command line of launch/pretrain.py.
        ranks: the number of ranks in the job.

    Raises:
        ValueError: a setting or file cannot be used; the message says what to change.
        OSError: a file cannot be read.
    """
    config = ds_config.read_config(arguments.deepspeed_config)
    folder = arguments.model if arguments.model.is_dir() else None
    model = load_config(arguments.model) if folder is None else config_of_folder(folder)
    grid = grid_shape(arguments, config, model, ranks)
    batch = settle_config(arguments, config, grid.data)
    if arguments.sequence_length > model.max_position_embeddings:
        raise ValueError(
            f"--sequence-length {arguments.sequence_length} is above max_position_embeddings "
            f"{model.max_position_embeddings} of {arguments.model}: lower it"
        )
    warmup = warmup_steps(arguments.warmup, arguments.steps)
    replaces = ["export"] if arguments.export else []
    check_output(arguments.output, resuming=arguments.resume is not None, replaces=replaces)
    identity = identify(
        arguments,
        config,
        batch,
        ranks,
        model=model.to_diff_dict(),
        sequence_length=arguments.sequence_length,
        grid=grid,
    )
    checkpoint = checkpoint_to_resume(arguments, identity, arguments.steps)
    weights = None if folder is None or checkpoint is not None else FolderWeights(folder, model)
    tokenizer = arguments.tokenizer or (folder and str(folder))
    config = without_global_size(config, grid)
    return Plan(config, model, grid, batch, warmup, identity, checkpoint, weights, tokenizer)


def settle_config(arguments: Namespace, config: dict[str, Any], ranks: int) -> BatchSizes:
    """Override the DeepSpeed configuration by the command line, in place.

    Args:
        arguments: the command line of either program.
        config: the DeepSpeed configuration.
        ranks: the number of data-parallel ranks.

    Returns:
        The batch sizes.

    Raises:
        ValueError: there is no learning rate, or the batch sizes do not fit together.
    """
    ds_config.set_learning_rate(config, arguments.lr, arguments.deepspeed_config)
    if config["optimizer"]["type"] in OPTIMIZERS:
        config["optimizer"]["params"].setdefault("seed", arguments.seed)
    return ds_config.set_batch_sizes(config, ranks, arguments.global_batch_size, arguments.micro_batch_size)


def identify(
    arguments: Namespace,
    config: dict[str, Any],
    batch: BatchSizes,
    ranks: int,
    *,
    model: dict[str, Any],
    sequence_length: int,
    grid: GridShape | None = None,
    **optimizer_params: Any,
) -> Identity:
    """Make the identity by which a run's checkpoints are recognised.

    Args:
        arguments: the command line of either program.
        config: the DeepSpeed configuration, already overridden by the command line.
        batch: the batch sizes.
        ranks: the number of ranks in the job.
        model: the model's configuration, with everything else that determines its parameters.
        sequence_length: the most tokens of a sequence.
        grid: the degrees of parallelism; None for data parallelism only.
        **optimizer_params: settings that affect the optimizer in addition to ``optimizer.params``.
    """
    grid = grid or GridShape(ranks)
    if arguments.matrix_lr_scale is not None:
        optimizer_params["matrix_lr_scale"] = arguments.matrix_lr_scale
    return Identity(
        model=model,
        optimizer=config["optimizer"]["type"],
        optimizer_params={**config["optimizer"]["params"], **optimizer_params},
        precision=ds_config.precision(config),
        zero_stage=ds_config.zero_stage(config),
        ranks=ranks,
        tensor_parallel=grid.tensor,
        autotp_size=grid.autotp,
        pipeline_parallel=grid.pipeline,
        sequence_length=sequence_length,
        train_batch_size=batch.total,
        micro_batch_size=batch.micro,
        seed=arguments.seed,
    )


def check_start(arguments: Namespace, identity: Identity) -> None:
    """Check the checkpoint that a new run begins with.

    Args:
        arguments: the command line of either program.
        identity: identifies this run.

    Raises:
        CheckpointError: it is none, or damaged.
        ConfigError: the optimizer is none of this package.
    """
    if arguments.start_from is None:
        return
    if identity.optimizer not in OPTIMIZERS:
        raise ConfigError(
            f"--start-from is for the optimizers of this package, and optimizer.type is {identity.optimizer!r}: give "
            "the exported weights as --model"
        )
    check_files(folder := find_saved(arguments.start_from), read_manifest(folder), share_of_files())


def checkpoint_to_resume(arguments: Namespace, identity: Identity, steps: int) -> Path | None:
    """Find and check the checkpoint that ``--resume`` names.

    Args:
        arguments: the command line of either program.
        identity: identifies this run.
        steps: the run's total number of steps.

    Each rank reads its share of the checkpoint's files, so that all are checked if no rank raises.

    Returns:
        The folder of the checkpoint; None to start from the beginning, without ``--resume`` or with a ``--resume`` that
        names none and finds none: a run that was interrupted before its first checkpoint.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or it belongs to another run.
        AlreadyFinishedError: the run has finished, without checkpoints.
        ValueError: the checkpoint is beyond the last step.
        OSError: a file cannot be read, or something is in the way.
    """
    save: Path = arguments.save
    if arguments.resume is None:
        check_unused(save)
        check_start(arguments, identity)
        return None
    checkpoint = find_checkpoint(save, arguments.resume)
    if checkpoint is None:
        check_start(arguments, identity)
        check_restart(arguments.output, save, steps)
        if global_rank() == 0:
            logger.info("%s has no checkpoint to resume: starting from the beginning", save)
        return None
    check_continued(arguments.output, save, checkpoint)
    manifest = check_whole(checkpoint, save, share_of_files())
    may_differ: set[str] = set()
    if COMMON in manifest.files:
        may_differ |= GRID
        may_differ |= OPTIMIZER if arguments.reset_optimizer else set()
        may_differ |= DATA if arguments.reset_data else set()
    elif arguments.reset_optimizer or arguments.reset_data:
        raise CheckpointError(
            f"{checkpoint} has DeepSpeed's own files, of which neither --reset-optimizer nor --reset-data can keep the "
            "rest: leave these flags out, or convert it with python -m ds_lowrank checkpoint convert"
        )
    check_identity(checkpoint, manifest, identity, may_differ, STORED if COMMON in manifest.files else ())
    if step_of(checkpoint) > steps:
        raise ValueError(f"{checkpoint} is beyond --steps {steps}: give more --steps, or an earlier checkpoint")
    return checkpoint

"""What a run will do, decided from the command line and its files before anything is built."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from ds_lowrank.checkpoint.manifest import Identity, check_manifest
from ds_lowrank.checkpoint.store import find_checkpoint, step_of
from ds_lowrank.methods import METHODS
from ds_lowrank.models.llama import config_of_folder, load_config
from ds_lowrank.models.weights import FolderWeights
from ds_lowrank.training import config as ds_config
from ds_lowrank.training.config import BatchSizes
from ds_lowrank.training.output import check_output
from ds_lowrank.training.parallelism import GridShape, grid_shape, without_global_size
from ds_lowrank.training.schedule import warmup_steps


@dataclass(frozen=True)
class Plan:
    """`config` is DeepSpeed's, complete; `warmup` is in steps; `checkpoint` is the one to resume from.

    weights: by name and shape, of a folder given as the model; None for those of the seed, or of the checkpoint.
    tokenizer: as given, or that of the folder.
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
        return self.batch.total * self.identity.sequence_length


def make_plan(arguments: Namespace, ranks: int) -> Plan:
    """Read and check all files that the command line names; nothing is written.

    Raises ValueError or OSError for whatever cannot be honoured. Not a collective.
    """
    config = ds_config.read_config(arguments.deepspeed_config)
    folder = arguments.model if arguments.model.is_dir() else None
    model = load_config(arguments.model) if folder is None else config_of_folder(folder)
    grid = grid_shape(arguments, config, model, ranks)
    batch = settle_config(arguments, config, grid.data)
    if arguments.sequence_length > model.max_position_embeddings:
        raise ValueError(
            f"--sequence-length {arguments.sequence_length} is above max_position_embeddings "
            f"{model.max_position_embeddings} of {arguments.model}"
        )
    warmup = warmup_steps(arguments.warmup, arguments.steps)
    check_output(arguments.output, resuming=arguments.resume is not None)
    scale = arguments.matrix_lr_scale
    identity = identify(
        arguments,
        config,
        batch,
        ranks,
        model=model.to_diff_dict(),
        sequence_length=arguments.sequence_length,
        grid=grid,
        **({} if scale is None else {"matrix_lr_scale": scale}),
    )
    checkpoint = checkpoint_to_resume(arguments, identity, arguments.steps)
    weights = None if folder is None or checkpoint is not None else FolderWeights(folder, model)
    tokenizer = arguments.tokenizer or (folder and str(folder))
    config = without_global_size(config, grid)
    return Plan(config, model, grid, batch, warmup, identity, checkpoint, weights, tokenizer)


def settle_config(arguments: Namespace, config: dict[str, Any], ranks: int) -> BatchSizes:
    """Put over DeepSpeed's configuration what the command line says. Raises ValueError.

    ranks: of data parallelism.
    """
    ds_config.set_learning_rate(config, arguments.lr)
    if config["optimizer"]["type"] in METHODS:
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
    """The run's identity; `grid` where there is more than data parallelism, `optimizer_params` beside the JSON's."""
    grid = grid or GridShape(ranks)
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


def checkpoint_to_resume(arguments: Namespace, identity: Identity, steps: int) -> Path | None:
    """What --resume names, checked; None without that flag. `steps` is the length of the run."""
    if arguments.resume is None:
        return None
    checkpoint = find_checkpoint(arguments.save, arguments.resume)
    check_manifest(checkpoint, identity)
    if step_of(checkpoint) >= steps:
        raise ValueError(f"{checkpoint} is already at --steps {steps}: the run is finished; give more --steps")
    return checkpoint

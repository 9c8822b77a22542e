"""What a run will do, decided from the command line and its files before anything is built."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from ds_lowrank.checkpoint.manifest import Identity, check_manifest
from ds_lowrank.checkpoint.store import find_checkpoint, step_of
from ds_lowrank.methods import METHODS
from ds_lowrank.models.llama import load_config
from ds_lowrank.training import config as ds_config
from ds_lowrank.training.config import BatchSizes
from ds_lowrank.training.output import check_output
from ds_lowrank.training.schedule import warmup_steps


@dataclass(frozen=True)
class Plan:
    """`config` is DeepSpeed's, complete; `warmup` is in steps; `checkpoint` is the one to resume from."""

    config: dict[str, Any]
    model: LlamaConfig
    batch: BatchSizes
    warmup: int
    identity: Identity
    checkpoint: Path | None

    @property
    def tokens_per_step(self) -> int:
        return self.batch.total * self.identity.sequence_length


def make_plan(arguments: Namespace, ranks: int) -> Plan:
    """Read and check all files that the command line names; nothing is written.

    Raises ValueError or OSError for whatever cannot be honoured. Not a collective.
    """
    config = ds_config.read_config(arguments.deepspeed_config)
    ds_config.set_learning_rate(config, arguments.lr)
    if config["optimizer"]["type"] in METHODS:
        config["optimizer"]["params"].setdefault("seed", arguments.seed)
    batch = ds_config.set_batch_sizes(config, ranks, arguments.global_batch_size, arguments.micro_batch_size)
    model = load_config(arguments.model)
    if arguments.sequence_length > model.max_position_embeddings:
        raise ValueError(
            f"--sequence-length {arguments.sequence_length} is above max_position_embeddings "
            f"{model.max_position_embeddings} of {arguments.model}"
        )
    warmup = warmup_steps(arguments.warmup, arguments.steps)
    check_output(arguments.output, resuming=arguments.resume is not None)
    identity = _identity(arguments, config, model, batch, ranks)
    checkpoint = _checkpoint(arguments, identity)
    return Plan(config, model, batch, warmup, identity, checkpoint)


def _identity(
    arguments: Namespace, config: dict[str, Any], model: LlamaConfig, batch: BatchSizes, ranks: int
) -> Identity:
    params = dict(config["optimizer"]["params"])
    if arguments.matrix_lr_scale is not None:
        params["matrix_lr_scale"] = arguments.matrix_lr_scale
    return Identity(
        model=model.to_diff_dict(),
        optimizer=config["optimizer"]["type"],
        optimizer_params=params,
        precision=ds_config.precision(config),
        zero_stage=ds_config.zero_stage(config),
        ranks=ranks,
        sequence_length=arguments.sequence_length,
        train_batch_size=batch.total,
        micro_batch_size=batch.micro,
        seed=arguments.seed,
    )


def _checkpoint(arguments: Namespace, identity: Identity) -> Path | None:
    if arguments.resume is None:
        return None
    checkpoint = find_checkpoint(arguments.save, arguments.resume)
    check_manifest(checkpoint, identity)
    if step_of(checkpoint) >= arguments.steps:
        raise ValueError(
            f"{checkpoint} is already at --steps {arguments.steps}: the run is finished; give more --steps"
        )
    return checkpoint

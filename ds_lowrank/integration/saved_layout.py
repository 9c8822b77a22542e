"""Refusing a checkpoint of another layout before DeepSpeed fails on it with an error about the sizes of tensors."""

from __future__ import annotations

import functools
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from ds_lowrank.errors import CheckpointError

OPTIMIZER_FILE = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MODEL_FILE = re.compile(r"(zero_pp_rank_\d+_)?mp_rank_(\d+)_model_states\.pt")


@dataclass(frozen=True)
class SavedLayout:
    """What the names of DeepSpeed's files tell about a checkpoint.

    Attributes:
        stage: ``0``, ``1 or 2``, or ``3``.
        is_bf16: whether ZeRO's files are those of a bf16 run; False at stage 0.
        data: the number of ranks that share the optimizer's state; 1 at stage 0.
        model: the number of model-parallel ranks.
    """

    stage: str
    is_bf16: bool
    data: int
    model: int

    def __str__(self) -> str:
        if self.stage == "0":
            return f"ZeRO 0, {self.model} model-parallel ranks"
        precision = "bf16" if self.is_bf16 else "fp32 or fp16"
        return f"ZeRO {self.stage} in {precision}, {self.data} data-parallel by {self.model} model-parallel ranks"


def layout_of_files(folder: Path) -> SavedLayout | None:
    """The layout of a checkpoint; None if the folder has none of DeepSpeed's files.

    Args:
        folder: the folder of the checkpoint.
    """
    names = [path.name for path in folder.glob("*.pt")]
    optimizer = [match for name in names if (match := OPTIMIZER_FILE.fullmatch(name))]
    model = [match for name in names if (match := MODEL_FILE.fullmatch(name))]
    if not model:
        return None
    size = 1 + max(int(match[2]) for match in model)
    if not optimizer:
        return SavedLayout("0", False, 1, size)
    stage = "3" if any(match[1] for match in model) else "1 or 2"
    return SavedLayout(stage, bool(optimizer[0][1]), 1 + max(int(match[2]) for match in optimizer), size)


def layout_of_engine(engine: DeepSpeedEngine) -> SavedLayout:
    """The layout that the engine itself would save."""
    stage = int(engine.zero_optimization_stage())
    if stage == 0:
        return SavedLayout("0", False, 1, engine.mp_world_size)
    data = dist.get_world_size(engine.optimizer.dp_process_group)
    return SavedLayout("3" if stage == 3 else "1 or 2", engine.bfloat16_enabled(), data, engine.mp_world_size)


def check_before_loading(engine: DeepSpeedEngine) -> None:
    """Make ``engine.load_checkpoint`` raise ``CheckpointError`` if optimizer state of another layout is to be loaded.

    Args:
        engine: an engine whose optimizer is one of this package.
    """
    load = engine.load_checkpoint
    signature = inspect.signature(load)

    @functools.wraps(load)
    def load_checkpoint(*args: Any, **named: Any) -> Any:
        given = signature.bind(*args, **named)
        given.apply_defaults()
        found = given.arguments
        if found["load_optimizer_states"] and not found["load_module_only"]:
            _check(engine, Path(found["load_dir"]), found["tag"])
        try:
            return load(*args, **named)
        except KeyError as error:
            if error.args != ("dynamic_loss_scale",):  # with which the state of DeepSpeed's wrapper begins
                raise
            raise CheckpointError(
                f"{found['load_dir']} was saved by a run without fp32 copies of the weights, which this run has: "
                "train in the precision of that run, with its optimizer.params.master_weights"
            ) from None

    engine.load_checkpoint = load_checkpoint


def _check(engine: DeepSpeedEngine, directory: Path, tag: Any) -> None:
    if tag is None:
        latest = directory / "latest"
        if not latest.is_file():
            return  # DeepSpeed warns and loads nothing
        tag = latest.read_text().strip()
    saved, own = layout_of_files(directory / str(tag)), layout_of_engine(engine)
    if saved is not None and saved != own:
        raise CheckpointError(
            f"{directory / str(tag)} was saved with {saved}; this run has {own}. Resume with the ZeRO stage, precision "
            "and grid of ranks of the run that saved it"
        )

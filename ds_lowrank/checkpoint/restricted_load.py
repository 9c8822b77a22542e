"""Reading DeepSpeed's files as data: a checkpoint cannot run code.

``torch.save`` writes pickles, and a pickle may name any function to be called when it is read. DeepSpeed 0.19.8 reads
its files without restriction. Within ``restricted`` they are read with ``weights_only=True``, which accepts tensors,
plain values and the few classes below.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.checkpoint.universal_checkpoint import SubparamShape
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from ds_lowrank.errors import CheckpointError

CLASSES = (LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address, SubparamShape)
"""The classes that DeepSpeed's wrappers put into their files; none of them does anything when it is made."""


def zero_stage(enumeration: Any, name: str) -> ZeroStageEnum:
    """What ``getattr`` does in a file: Python 3.11.2 writes a ZeRO stage as ``getattr(ZeroStageEnum, "weights")``.

    Args:
        enumeration: must be ``ZeroStageEnum``.
        name: the name of one of its members.

    Raises:
        ValueError: it is something else, which a file must not reach.
    """
    if enumeration is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
        raise ValueError(f"it names the attribute {name}")
    return ZeroStageEnum[name]


UNSUPPORTED = re.compile(r"GLOBAL ([\w.]+)|class ([\w.]+)")


def read_data(path: Path | BinaryIO, map_location: Any = "cpu", *, mapped: bool = False) -> Any:
    """Read a file of ``torch.save``; nothing in it is run.

    Args:
        path: the file, or what is to be written to one.
        map_location: as for ``torch.load``.
        mapped: whether tensors stay on the disk until they are used.

    Raises:
        CheckpointError: the file is damaged, or contains something else than data.
    """
    try:
        with torch.serialization.safe_globals([*CLASSES, (zero_stage, "builtins.getattr")]):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mapped)
    except Exception as error:  # whatever a damaged pickle leads to
        lines = str(error).strip().splitlines() or [type(error).__name__]
        named = UNSUPPORTED.search(str(error))
        reason = f"it names {named[1] or named[2]}" if named else lines[0]
        if not isinstance(path, Path):
            raise CheckpointError(
                f"client_state can only have tensors and plain values, which can be read again ({reason})"
            ) from error
        raise CheckpointError(
            f"{path} does not contain the data of a checkpoint ({reason}); nothing in it was run. Resume from another "
            "checkpoint"
        ) from error


@contextmanager
def restricted(engine: DeepSpeedEngine) -> Iterator[None]:
    """A context in which the engine reads the files of a checkpoint with ``read_data``.

    Args:
        engine: the engine whose ``load_checkpoint`` is called inside the context.
    """
    engine.checkpoint_engine.load = lambda path, map_location=None: read_data(Path(path), map_location)
    try:
        yield
    finally:
        del engine.checkpoint_engine.load  # restores the method of the class

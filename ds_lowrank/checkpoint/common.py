"""common.pt and the other names of a checkpoint's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ds_lowrank.checkpoint.manifest import Manifest
from ds_lowrank.checkpoint.restricted_load import read_data
from ds_lowrank.errors import CheckpointError

COMMON = "common.pt"
TENSORS = ".safetensors"


def rank_file(rank: int) -> str:
    """The name of a rank's file.

    Args:
        rank: in the whole job.
    """
    return f"rank_{rank:05d}{TENSORS}"


def tensor_files(manifest: Manifest) -> list[str]:
    """The names of a checkpoint's files of tensors, in the order of the ranks that wrote them.

    Args:
        manifest: of the checkpoint.
    """
    return sorted(name for name in manifest.files if name.endswith(TENSORS))


def read_common(checkpoint: Path) -> dict[str, Any]:
    """What the ranks of a checkpoint have alike.

    Args:
        checkpoint: its folder.

    Raises:
        CheckpointError: it is not what was saved.
    """
    common = read_data(checkpoint / COMMON)
    wanted = {"optimizer", "engine", "caller", "progress"}
    if not isinstance(common, dict) or set(common) != wanted:
        raise CheckpointError(f"{checkpoint} is damaged: {COMMON} does not have {sorted(wanted)}")
    return common

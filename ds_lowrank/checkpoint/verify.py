"""Whether a checkpoint has every element of every tensor exactly once."""

from __future__ import annotations

from pathlib import Path

from ds_lowrank.checkpoint.common import COMMON
from ds_lowrank.checkpoint.manifest import DamagedError, check_files, read_manifest
from ds_lowrank.checkpoint.saved import Saved, opened


def verify(folder: Path) -> str:
    """Read all files of a checkpoint and check everything that can be checked without a model.

    Args:
        folder: of the checkpoint.

    Returns:
        What was found to be right. Of files that DeepSpeed wrote for an optimizer of its own, only that they are there.

    Raises:
        CheckpointError: it is damaged; the message names the file, or the tensor.
        OSError: a file cannot be read.
    """
    manifest = read_manifest(folder)
    if COMMON not in manifest.files:
        check_files(folder, manifest)
        return f"{len(manifest.files)} files, as they were saved"
    with opened(folder) as saved:
        check_states(saved)  # opening it has checked that each element is there, once
        return f"{len(list(saved.tensors))} tensors, every element once"


def check_states(saved: Saved) -> None:
    """Check that the states belong to the weights.

    Args:
        saved: the checkpoint.

    Raises:
        DamagedError: there is a state without a weight, or plain values without tensors.
    """
    weights = set(saved.weights)
    named = {key.split("/")[0] for key in saved.tensors if "/" in key}
    known = set(saved.common["optimizer"]["values"])
    for missing in sorted(named - known):
        raise DamagedError(f"{saved.folder} is damaged: common.pt lacks the state of {missing}")
    for missing in sorted(name for name in named - weights if "@tensor" not in name):  # local projection has its own
        raise DamagedError(f"{saved.folder} is damaged: it has a state of {missing}, but not the weight")

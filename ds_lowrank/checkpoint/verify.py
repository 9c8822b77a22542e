"""Whether a checkpoint has every element of every tensor exactly once."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from pathlib import Path

from ds_lowrank.checkpoint.common import COMMON
from ds_lowrank.checkpoint.manifest import DamagedError, check_files, read_manifest
from ds_lowrank.checkpoint.saved import Saved, opened
from ds_lowrank.sharding.layout import Rectangle


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
        for key in saved.tensors:  # opening it has counted the elements: each is there, if none is there twice
            if overlap(saved.tensors.rectangles(key)):
                raise DamagedError(f"{folder} is damaged: it has elements of {key} twice, and lacks others")
        check_states(saved)
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


def overlap(rectangles: Iterable[Rectangle]) -> bool:
    """Whether any two rectangles of a matrix have an element in common.

    Args:
        rectangles: of one matrix.
    """
    events = []
    for r in rectangles:
        if r.height and r.width:
            events += [(r.row, 1, r.col, r.col + r.width), (r.row + r.height, 0, r.col, r.col + r.width)]
    active: list[tuple[int, int]] = []  # columns of the rectangles that are in this row, in order
    for _, begins, first, end in sorted(events):
        at = bisect_left(active, (first, end))
        if not begins:
            del active[at]
            continue
        if (at and active[at - 1][1] > first) or (at < len(active) and active[at][0] < end):
            return True
        insort(active, (first, end))
    return False

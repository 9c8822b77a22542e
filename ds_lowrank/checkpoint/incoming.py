"""Checkpoints of AdamW runs that DeepSpeed wrote, as one of ours: for a low-rank run to start from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ds_lowrank.checkpoint.common import COMMON, rank_file
from ds_lowrank.checkpoint.folder import complete, partial_of, prepare
from ds_lowrank.checkpoint.manifest import Progress, Sealed
from ds_lowrank.checkpoint.outgoing import check_free
from ds_lowrank.checkpoint.owned import delete_owned
from ds_lowrank.checkpoint.skeleton import Skeleton
from ds_lowrank.checkpoint.tensor_file import write_pieces
from ds_lowrank.errors import CheckpointError
from ds_lowrank.sharding.layout import Rectangle
from ds_lowrank.sharding.pieces import Piece, as_matrix

TAG = "global_step0"
"""The new run begins at step 0."""
FILE_BYTES = 2**30
"""So much is in memory before it is written."""
MOMENTS = ("exp_avg", "exp_avg_sq")
Named = Iterator[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Incoming:
    """What was read of a checkpoint of another program.

    Attributes:
        step: optimizer steps that the run had taken.
        weights: parameters and buffers, whole, one after the other: masters where there are any.
        moments: returns those of ``exp_avg`` or ``exp_avg_sq``, in the shapes of the parameters, fp32.
        steps: AdamW's step of every parameter that has moments.
    """

    step: int
    weights: Callable[[], Named]
    moments: Callable[[str], Named]
    steps: dict[str, int] = field(default_factory=dict)


def to_ours(found: Incoming, source: Path, skeleton: Skeleton | None, out: Path, *, moments: bool = True) -> None:
    """Write a folder with ``latest`` and one checkpoint that knows no grid.

    Args:
        found: what was read.
        source: where, for the checkpoint's own record.
        skeleton: of the model, for stacks of experts; None if it is not known.
        out: the folder to make.
        moments: whether AdamW's moments are kept, for what still takes AdamW.

    Raises:
        CheckpointError: the checkpoint is of another model, or there is such a folder.
        OSError: it cannot be written.
    """
    check_free(out)
    was_there = out.exists()
    kept = found.steps if moments else {}
    prepare(out, TAG)
    try:
        writer = _Writer(partial_of(out, TAG) / TAG)
        for name, tensor in found.weights():
            writer.add(pieces_of(name, tensor, "", skeleton))
        for key in MOMENTS if kept else ():
            for name, tensor in found.moments(key):
                writer.add(pieces_of(name, tensor, f"/{key}", skeleton))
        writer.flush()
        if skeleton is not None:
            check_complete(skeleton, writer.shapes)
        values = {one: {"step": kept[name]} for name in kept for one in matrices_of(name, skeleton)}
        content = {
            "optimizer": _state(values, [key for key in writer.shapes if "/" not in key]),
            "engine": {"counters": {}, "scheduler": None, "loss_scale": {}},
            "caller": {"converted_from": str(source), "step": found.step},
            "progress": {"step": 0, "tokens": 0},
        }
        torch.save(content, writer.folder / COMMON)
        complete(out, TAG, {}, Progress(), writer.sealed, [*writer.sealed, COMMON])
    except BaseException:
        delete_owned(partial_of(out, TAG))
        if not was_there:
            out.rmdir()
        raise


def pieces_of(name: str, tensor: torch.Tensor, key: str, skeleton: Skeleton | None) -> Iterable[Piece]:
    """A parameter, or its moments, as a checkpoint has them.

    Args:
        name: of the parameter or buffer.
        tensor: whole.
        key: appended to names.
        skeleton: of the model; None for one matrix of the parameter's name.

    Raises:
        CheckpointError: the parameter has another shape in the model.
    """
    if skeleton is not None and name in skeleton.shapes:
        if tuple(tensor.shape) != skeleton.shapes[name]:
            raise CheckpointError(
                f"{name} is {tuple(tensor.shape)} in the checkpoint and {skeleton.shapes[name]} by the configuration: "
                "give the --config of its model"
            )
        return skeleton.pieces(name, tensor, key)
    rows, columns = as_matrix(tensor.shape)
    return [Piece(name + key, tuple(tensor.shape), (Rectangle(0, 0, rows, columns, 0),), tensor.reshape(-1))]


def matrices_of(name: str, skeleton: Skeleton | None) -> list[str]:
    """The names of the logical matrices that a parameter consists of.

    Args:
        name: of the parameter.
        skeleton: of the model; None if it is not known.
    """
    return [name] if skeleton is None else [one.name for one in skeleton.matrices(name)]


def check_complete(skeleton: Skeleton, written: Mapping[str, Any]) -> None:
    """Check that a checkpoint had all weights of a model.

    Args:
        skeleton: of the model.
        written: what was found, by name.

    Raises:
        CheckpointError: it is of another model.
    """
    wanted = {one for name in skeleton.shapes for one in matrices_of(name, skeleton)} | set(skeleton.buffers)
    weights = {key for key in written if "/" not in key}
    for name in sorted(wanted ^ weights):
        raise CheckpointError(f"the checkpoint is of another model than --config: only one of them has {name}")


class _Writer:
    """Writes pieces as they come, a file for every gigabyte."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sealed: dict[str, Sealed] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: list[Piece] = []
        self._bytes = 0

    def add(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            self.shapes[piece.key] = piece.shape
            self._pieces.append(piece)
            self._bytes += piece.data.numel() * piece.data.element_size()
        if self._bytes >= FILE_BYTES:
            self.flush()

    def flush(self) -> None:
        name = rank_file(len(self.sealed))
        self.sealed[name] = write_pieces(self.folder / name, self._pieces, {})
        self._pieces, self._bytes = [], 0


def _state(values: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """A plain state of which an optimizer can load the rest, which AdamW steps."""
    return {
        "format": 1,
        "method": "AdamW",
        "counts": {},
        "values": dict(values),
        "projected": [],
        "groups": [{"settings": {"state_dtype": "fp32"}, "names": names}],
    }

"""The weights of a checkpoint as other programs have them: whole parameters, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ds_lowrank.checkpoint.owned import delete_owned, make_owned, replace_owned
from ds_lowrank.checkpoint.saved import Saved
from ds_lowrank.checkpoint.skeleton import Skeleton
from ds_lowrank.errors import CheckpointError
from ds_lowrank.sharding.layout import Rectangle
from ds_lowrank.sharding.pieces import as_matrix


class Outgoing:
    """The weights of a checkpoint.

    Args:
        saved: the open checkpoint.
        skeleton: of its model; None if it is not known. Then every matrix is a parameter of its own.

    Attributes:
        parameters: shapes by name.
        buffers: shapes by name; without a model, tensors of integers.
        same: further names of parameters: the first name for each.

    Raises:
        CheckpointError: the checkpoint is of another model.
    """

    def __init__(self, saved: Saved, skeleton: Skeleton | None) -> None:
        self._source, self._skeleton = saved.tensors, skeleton
        if skeleton is not None:
            skeleton.check(saved.tensors, saved.weights)
            self.parameters = skeleton.shapes
            names = skeleton.buffers
        else:
            names = [name for name in saved.weights if not saved.tensors.dtype(name).is_floating_point]
            left = (name for name in saved.weights if name not in names)
            self.parameters = {name: saved.tensors.shape(name) for name in left}
        self.buffers = {name: saved.tensors.shape(name) for name in names}
        self.same = {} if skeleton is None else skeleton.same

    def read(self, name: str, out: torch.Tensor) -> None:
        """Read one parameter or buffer.

        Args:
            name: of it.
            out: where to put it: contiguous, any dtype, on the CPU; converted by rounding to nearest.
        """
        if self._skeleton is not None and name in self.parameters:
            self._skeleton.read(name, self._source, out)
            return
        rows, columns = as_matrix(self._source.shape(name))
        self._source.read(name, [Rectangle(0, 0, rows, columns, 0)], out)

    def whole(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One parameter or buffer.

        Args:
            name: of it.
            dtype: to convert to; None for that in which a buffer was saved.
        """
        shape = self.parameters[name] if name in self.parameters else self.buffers[name]
        out = torch.empty(shape, dtype=dtype or self._source.dtype(name), device="cpu")
        self.read(name, out)
        return out


def check_free(folder: Path) -> None:
    """Check that a folder may be written.

    Args:
        folder: to be made.

    Raises:
        CheckpointError: there is something of this name.
    """
    if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
        raise CheckpointError(f"{folder} already exists and is not overwritten: give another OUT")


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A folder to write to, which gets its name when everything is in it and on the disk.

    Args:
        folder: to be made.

    Raises:
        CheckpointError: there is something of this name.
        OSError: it cannot be written; nothing is left of it.
    """
    check_free(folder)
    folder = folder.absolute()
    aside = folder.with_name(f".{folder.name}.partial")
    delete_owned(aside)
    make_owned(aside)
    try:
        yield aside
        replace_owned(aside, folder)
    except BaseException:
        if aside.exists():
            delete_owned(aside)
        raise

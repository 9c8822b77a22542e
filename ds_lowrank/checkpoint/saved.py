"""A checkpoint that is opened without an engine: by the commands that list, check and convert it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_lowrank.checkpoint.common import COMMON, read_common, tensor_files
from ds_lowrank.checkpoint.manifest import FILE, Manifest, check_files, read_manifest
from ds_lowrank.checkpoint.reader import SavedTensors
from ds_lowrank.errors import CheckpointError


@dataclass(frozen=True)
class Saved:
    """An open checkpoint.

    Attributes:
        folder: where it is.
        manifest: its manifest.
        common: what its ranks have alike.
        tensors: weights under their names, states under NAME/KEY.
    """

    folder: Path
    manifest: Manifest
    common: dict[str, Any]
    tensors: SavedTensors

    @property
    def weights(self) -> list[str]:
        """The names of parameters and buffers."""
        return [key for key in self.tensors if "/" not in key]


def find(path: Path) -> Path:
    """The folder of a checkpoint that a command line names.

    Args:
        path: the folder itself, or the one above it with the file ``latest``.

    Raises:
        CheckpointError: it is neither.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    latest = path / "latest"
    folder = path
    if not (path / FILE).is_file() and latest.is_file():
        folder = path / latest.read_text(errors="replace").strip()
    if (folder / FILE).is_file():
        return folder
    if any(folder.glob("*_model_states.pt")):
        raise CheckpointError(
            f"{folder} was written by DeepSpeed itself: python -m ds_lowrank checkpoint convert makes one of ours of it"
        )
    raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {FILE}")


@contextmanager
def opened(folder: Path, *, check: bool = True) -> Iterator[Saved]:
    """Open a checkpoint.

    Args:
        folder: of the checkpoint.
        check: whether to read all files first and compare their checksums; otherwise only sizes are compared.

    Raises:
        CheckpointError: it is damaged, or of another version.
        OSError: a file cannot be read.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest, slice(None) if check else slice(0))
    if COMMON not in manifest.files:
        raise CheckpointError(
            f"{folder} has the files of DeepSpeed's for an optimizer of its own: convert them with --to ours, or for "
            "its own formats use DeepSpeed's zero_to_fp32 and ds_to_universal"
        )
    common = read_common(folder)
    with SavedTensors(folder, tensor_files(manifest)) as tensors:
        yield Saved(folder, manifest, common, tensors)

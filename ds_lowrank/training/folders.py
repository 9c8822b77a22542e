"""The folders that a run writes to: created, tried and locked before anything else happens."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path

from ds_lowrank.collectives import global_rank, raise_on_all_ranks
from ds_lowrank.training.lock import Lock
from ds_lowrank.training.shared import check_shared


class Folders:
    """The folders of one run. Rank 0 holds them; on the other ranks, nothing happens.

    Args:
        folders: the folders, keyed by the flag that names each.
    """

    def __init__(self, folders: dict[str, Path]) -> None:
        self._folders = folders
        self._locks: list[Lock] = []
        self._created: list[Path] = []

    def claim(self, hosts: Sequence[str] = ()) -> None:
        """Create the folders where they are missing, and lock them by a file in each. Collective.

        Args:
            hosts: the node of every rank, if the nodes must share the folders.

        Raises:
            ValueError: a folder cannot be written, or another run uses it, or a node does not share it; the message
                names the flag.
            RemoteError: on the other ranks.
        """
        try:
            with raise_on_all_ranks():
                if global_rank() == 0:
                    self._claim()
            if len(set(hosts)) > 1:
                for flag, folder in self._folders.items():
                    check_shared(flag, folder, hosts)
        except Exception:
            self.release()
            raise

    def _claim(self) -> None:
        taken: list[Path] = []
        for flag, folder in self._folders.items():
            try:
                self._create(folder)
                if not any(folder.samefile(other) for other in taken):
                    self._locks.append(Lock(folder))
                    taken.append(folder)
            except BlockingIOError as error:
                raise ValueError(f"{flag}: {error}") from None
            except OSError as error:
                raise ValueError(
                    f"{flag} {folder} cannot be written ({error.strerror or error}): give a folder on a disk with free "
                    "space where you may create files"
                ) from None

    def _create(self, folder: Path) -> None:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        for path in reversed(missing):
            if path.is_symlink():
                raise FileNotFoundError(errno.ENOENT, "it is a link to nothing")
            path.mkdir(exist_ok=True)
            self._created.append(path)
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is not a folder")

    def release(self) -> None:
        """Unlock the folders, and delete those that were created and have stayed empty."""
        for lock in self._locks:
            lock.release()
        for path in reversed(self._created):
            try:
                path.rmdir()
            except OSError:
                continue  # it has content by now
        self._locks, self._created = [], []

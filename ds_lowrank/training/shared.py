"""Whether all nodes of a job see the same folder under one path."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from ds_lowrank.collectives import all_gather_object, broadcast_from_rank0, global_rank, is_local_rank0
from ds_lowrank.errors import ConfigError

LATE_SECONDS = 30.0
"""How long a network file system may take to show a file that another node has written."""


def check_shared(flag: str, folder: Path, hosts: Sequence[str]) -> None:
    """Check that every node sees what rank 0 writes into a folder, and can write there itself. Collective.

    Args:
        flag: the flag that names the folder, for the message.
        folder: a folder in which rank 0 can write.
        hosts: the node of every rank.

    Raises:
        ConfigError: a node does not see it, or cannot write to it; the same message on every rank.
        RemoteError: rank 0 cannot write there.
    """
    name = broadcast_from_rank0(lambda: _written(folder))
    found = all_gather_object(_try(folder, name) if is_local_rank0() else None)
    if global_rank() == 0:
        (folder / name).unlink(missing_ok=True)
    troubles = {host: trouble for host, trouble in zip(hosts, found, strict=True) if trouble}
    if troubles:
        host, trouble = next(iter(troubles.items()))
        more = f" (and {len(troubles) - 1} more nodes)" if len(troubles) > 1 else ""
        raise ConfigError(
            f"{flag} {folder} is not one folder for all nodes: {host} {trouble}{more}. Give a folder that all nodes "
            "share and may write to, or train without checkpoints: --save-interval 0"
        )


def _written(folder: Path) -> str:
    name = f".seen-by-all-{uuid.uuid4().hex}"  # of a new name, whose absence no node remembers
    (folder / name).touch(exist_ok=False)
    return name


def _try(folder: Path, name: str) -> str | None:
    """What is wrong with the folder on this node; None if nothing is."""
    end = time.monotonic() + LATE_SECONDS
    while not (folder / name).exists():
        if time.monotonic() > end:
            return "does not see what rank 0 wrote there"
        time.sleep(0.1)
    own = folder / f"{name}.{global_rank()}"
    try:
        own.touch(exist_ok=False)
        own.unlink()
    except OSError as error:
        return f"cannot write there ({error.strerror or error})"
    return None

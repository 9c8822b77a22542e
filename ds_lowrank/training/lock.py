"""A lock on a folder: two runs that write to one folder would destroy each other's files.

The lock is ``flock`` on FOLDER/.lock, which the kernel releases when the process ends, however it ends. The file names
host and process for the message. Some network file systems keep such a lock on one host only, or know none. The owner
therefore also touches the file every few seconds; who finds a file that another host has written, or that cannot be
locked, watches it for a while, and takes it over if it stays untouched.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

logger = logging.getLogger("ds_lowrank")

FILE = ".lock"
START = b'{"host"'
"""With which the file of every lock starts; other files of that name are left alone."""
BEAT_SECONDS = 2.0
WATCH_SECONDS = 15.0


class Lock:
    """A lock on a folder, held until ``release`` or the end of the process.

    Args:
        folder: an existing folder.

    Raises:
        BlockingIOError: another process holds it; the message names that process.
        OSError: the file of the lock cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._done = threading.Event()
        self._descriptor = self._acquire()
        threading.Thread(target=self._beat, name=f"lock of {folder}", daemon=True).start()

    def release(self) -> None:
        """Give the lock up and delete its file."""
        self._done.set()
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def _acquire(self) -> int:
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                if self._is_locked(descriptor):
                    self._write(descriptor)
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # its owner has deleted the file meanwhile

    def _is_locked(self, descriptor: int) -> bool:
        owner = self._owner(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            certain = owner.get("host") == socket.gethostname()
        except BlockingIOError:
            raise self._refusal(owner) from None
        except OSError:  # this file system has no locks
            certain = False
        if owner and not certain:
            self._watch(descriptor, owner)
        try:
            return os.path.samestat(os.fstat(descriptor), self._path.stat())
        except FileNotFoundError:
            return False

    def _watch(self, descriptor: int, owner: dict[str, Any]) -> None:
        """Wait for a sign of life of another process that claims to own the lock."""
        logger.info(
            "%s was locked by process %s on %s: watching it for %.0f seconds",
            *(self._path.parent, owner.get("process"), owner.get("host"), WATCH_SECONDS),
        )
        seen = os.fstat(descriptor).st_mtime_ns
        end = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < end:
            time.sleep(BEAT_SECONDS / 4)
            if os.fstat(descriptor).st_mtime_ns != seen:
                raise self._refusal(owner)

    def _refusal(self, owner: dict[str, Any]) -> BlockingIOError:
        who = "another run"
        if owner:
            who += f" (process {owner.get('process')} on {owner.get('host')}, since {owner.get('since')})"
        return BlockingIOError(
            f"{self._path.parent} is in use by {who}: wait until that run has ended, or give another folder"
        )

    def _owner(self, descriptor: int) -> dict[str, Any]:
        content = os.pread(descriptor, 4096, 0)
        if content.strip(b"\0") and not content.startswith(START):  # zeros are what a power cut may leave
            raise FileExistsError(errno.EEXIST, f"{self._path} is in the way: this program did not write it")
        try:
            found = json.loads(content)
        except ValueError:  # cut short
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, descriptor: int) -> None:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        text = json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": since}).encode()
        try:
            if os.pwrite(descriptor, text, 0) != len(text):
                raise OSError(errno.ENOSPC, "No space left on device")
            os.ftruncate(descriptor, len(text))
            os.fsync(descriptor)
        except OSError:
            self._path.unlink(missing_ok=True)
            raise

    def _beat(self) -> None:
        while not self._done.wait(BEAT_SECONDS):
            try:
                os.utime(self._path)
            except OSError:
                continue  # a disk that is away for a moment; only a waiting process misses the sign of life

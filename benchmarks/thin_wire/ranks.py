"""The driver's side of the two ranks: starting them at the ends of the wire, and telling both the same."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.thin_wire.wire import ADDRESSES, INTERFACE, Wire

PORT = "29500"
"""Nothing else is in the namespaces."""
PATIENCE = 300.0
"""Seconds to wait for an answer."""


class Ranks:
    """The two ranks, as a context.

    Args:
        wire: At whose ends they run.
    """

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._folder = tempfile.TemporaryDirectory(prefix="thin_wire")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []

    def __enter__(self) -> Ranks:
        try:
            address = str(Path(self._folder.name, "driver"))
            with Listener(address, family="AF_UNIX") as listener:
                for number in range(len(ADDRESSES)):
                    self._processes.append(self._start(number, address))
                for _ in self._processes:
                    self._connections.append(listener.accept())
            first = self._answers()
            order = sorted(range(len(first)), key=lambda at: first[at]["rank"])
            self._connections = [self._connections[at] for at in order]
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            if kind is not None or not self._connections:
                process.kill()
        if kind is None and self._connections:
            for connection in self._connections:
                connection.send({"do": "end"})
        for process in self._processes:
            process.wait(PATIENCE)
        self._folder.cleanup()

    def tell(self, do: str, **more: Any) -> tuple[list[dict[str, Any]], float]:
        """Tell both ranks the same, and return their answers and how many seconds both took.

        Raises:
            RuntimeError: A rank has died or does not answer in time.
        """
        started = time.perf_counter()
        for connection in self._connections:
            connection.send({"do": do, **more})
        return self._answers(), time.perf_counter() - started

    def _answers(self) -> list[dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + PATIENCE
        while len(found) < len(self._connections):
            waiting = [one for number, one in enumerate(self._connections) if number not in found]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RuntimeError(f"no answer within {PATIENCE:.0f} s\n{self._said()}")
            for connection in ready:
                number = self._connections.index(connection)  # type: ignore[arg-type]
                try:
                    found[number] = self._connections[number].recv()
                except EOFError:
                    raise RuntimeError(f"a rank has died\n{self._said()}") from None
        return [found[number] for number in sorted(found)]

    def _start(self, number: int, address: str) -> subprocess.Popen[bytes]:
        environment = os.environ | {
            "RANK": str(number), "LOCAL_RANK": "0", "WORLD_SIZE": str(len(ADDRESSES)),
            "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": PORT, "GLOO_SOCKET_IFNAME": INTERFACE,
            "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = self._wire.inside(number, [sys.executable, "-m", "benchmarks.thin_wire.rank", address])
        with self._log(number).open("wb") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def _log(self, number: int) -> Path:
        return Path(self._folder.name, f"rank{number}.log")

    def _said(self) -> str:
        """The ends of what the ranks have written."""
        numbers = range(len(self._processes))
        return "\n".join(f"rank {n}: ...{self._log(n).read_text(errors='replace')[-2000:]}" for n in numbers)

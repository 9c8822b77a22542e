"""Run a script as torchrun does, on ranks that are forked from the engine tests' warm server.

Imports take five seconds per process, while a script of ``launch/`` steps the tests' models in milliseconds.
"""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.engines.pool import warm_context


def run_script(
    script: Path, arguments: list[str], ranks: int, folder: Path, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run a script on some ranks in ``folder``.

    Returns:
        The largest exit code of the ranks, and the output of all ranks together.

    Raises:
        AssertionError: A rank did not end within ``timeout`` seconds.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as logs:
        out, err = Path(logs, "out"), Path(logs, "err")
        workers = [
            warm_context().Process(target=_rank, args=(script, arguments, rank, ranks, port, folder, out, err))
            for rank in range(ranks)
        ]
        for worker in workers:
            worker.start()
        end = time.monotonic() + timeout
        for worker in workers:
            worker.join(max(0, end - time.monotonic()))
        hanging = [worker for worker in workers if worker.is_alive()]
        for worker in hanging:
            worker.kill()
        assert not hanging, f"{len(hanging)} ranks did not end in time: {err.read_text()}"
        code = max(abs(worker.exitcode or 0) for worker in workers)
        return subprocess.CompletedProcess(arguments, code, out.read_text(), err.read_text())


def _rank(
    script: Path, arguments: list[str], rank: int, ranks: int, port: int, folder: Path, out: Path, err: Path
) -> None:
    for descriptor, path in ((1, out), (2, err)):
        with path.open("a") as file:
            os.dup2(file.fileno(), descriptor)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.chdir(folder)
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")

"""Run a script as torchrun does, on ranks that are forked from the engine tests' warm server.

Imports take five seconds per process, while a script of ``launch/`` steps the tests' models in milliseconds.
"""

from __future__ import annotations

import socket
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.faults.programs import run_as_rank
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
            warm_context().Process(target=run_as_rank, args=(script, arguments, rank, ranks, port, folder, out, err))
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

"""The programs of ``launch/``, on ranks forked from a process that has imported everything.

Imports take five seconds a process; a forked rank starts in some tenths of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from benchmarks.faults.trial import Outcome

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
MODEL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
"""A model that steps in milliseconds."""
PRELOAD = ["benchmarks.faults.preload"]


@dataclass(frozen=True)
class Finished:
    """A program that has ended.

    Attributes:
        codes: the exit code of every rank, negative for a signal.
        out: standard output of all ranks together.
        err: standard error of all ranks together.
        hung: whether ranks had to be killed because they did not end in time.
    """

    codes: tuple[int, ...]
    out: str
    err: str
    hung: bool

    @property
    def succeeded(self) -> bool:
        """Whether every rank ended with 0."""
        return not any(self.codes)

    def refusal(self) -> Outcome:
        """Judge a program that should have refused to start or to go on."""
        last = self.err.strip().splitlines()[-1:] or [""]
        if self.hung:
            return Outcome("hang", last[0])
        if "Traceback" in self.err + self.out:
            return Outcome("traceback", last[0])
        if self.succeeded:
            return Outcome("accepted")
        return Outcome("refused" if "error: " in self.err else "no message", last[0])


class Running:
    """A program of ``launch/`` on some ranks.

    Args:
        program: ``pretrain`` or ``finetune``.
        arguments: its command line.
        ranks: how many.
        folder: the working directory; the output of the ranks is written beside it.
        prepare: called with its rank in every rank before the program, to make something fail there; a function at the
            top level of a module.
    """

    def __init__(
        self,
        program: str,
        arguments: Sequence[str],
        ranks: int,
        folder: Path,
        prepare: Callable[[int], None] | None = None,
    ) -> None:
        number = len(list(folder.parent.glob(f"{folder.name}.*.out")))
        self.out, self.err = (folder.parent / f"{folder.name}.{number}.{stream}" for stream in ("out", "err"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.processes: list[BaseProcess] = [
            context.Process(
                target=run_as_rank,
                args=(
                    LAUNCH / f"{program}.py",
                    list(arguments),
                    rank,
                    ranks,
                    port,
                    folder,
                    self.out,
                    self.err,
                    prepare,
                ),
            )
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def send(self, signal_number: int, rank: int) -> None:
        """Send a signal to one rank, if it is still alive.

        Args:
            signal_number: for example ``signal.SIGKILL``.
            rank: which one.
        """
        process = self.processes[rank]
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal_number)

    def wait_for(self, condition: Callable[[], bool], timeout: float = 60.0) -> bool:
        """Wait until something is so, or the program has ended.

        Args:
            condition: asked every few milliseconds.
            timeout: in seconds.

        Returns:
            Whether it is so.
        """
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if condition():
                return True
            if not any(process.is_alive() for process in self.processes):
                return condition()
            time.sleep(0.002)
        return False

    def finish(self, timeout: float = 120.0) -> Finished:
        """Wait for the end of all ranks; those that have not ended by then are killed.

        Args:
            timeout: in seconds.
        """
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        hung = [process for process in self.processes if process.is_alive()]
        for process in hung:
            process.kill()
            process.join()
        texts = [path.read_text(errors="replace") if path.exists() else "" for path in (self.out, self.err)]
        codes = tuple(-signal.SIGKILL if p.exitcode is None else p.exitcode for p in self.processes)
        return Finished(codes, texts[0], texts[1], bool(hung))


def run(program: str, arguments: Sequence[str], ranks: int, folder: Path, timeout: float = 120.0) -> Finished:
    """Run a program of ``launch/`` to its end.

    Args:
        program: ``pretrain`` or ``finetune``.
        arguments: its command line.
        ranks: how many.
        folder: the working directory.
        timeout: in seconds; ranks that have not ended by then are killed.
    """
    return Running(program, arguments, ranks, folder).finish(timeout)


def run_as_rank(
    script: Path,
    arguments: list[str],
    rank: int,
    ranks: int,
    port: int,
    folder: Path,
    out: Path,
    err: Path,
    prepare: Callable[[int], None] | None = None,
) -> None:
    """Run a script in this process as ``torchrun`` would start a rank.

    Args:
        script: the script.
        arguments: its command line.
        rank: this process's rank, also on its node.
        ranks: how many there are.
        port: of rank 0, on this machine.
        folder: the working directory.
        out: file to which standard output is appended.
        err: file to which standard error is appended.
        prepare: called with the rank before the script; None for nothing.
    """
    for descriptor, path in ((1, out), (2, err)):
        with path.open("a") as file:
            os.dup2(file.fileno(), descriptor)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.chdir(folder)
    if prepare is not None:
        prepare(rank)
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")

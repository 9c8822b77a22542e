"""Starting and ending a job under ``deepspeed``, ``torchrun`` or as a single process."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import warnings
from datetime import timedelta
from typing import NoReturn

import deepspeed
import deepspeed.ops
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils.logging import set_log_level_from_string
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore, _set_pg_timeout, _world
from torch.distributed.rendezvous import rendezvous
from transformers.utils.logging import disable_progress_bar

from ds_lowrank.training.bulletin import Bulletin
from ds_lowrank.training.console import ConsoleHandler, explained
from ds_lowrank.training.failures import Failure, Kind, message, quoted
from ds_lowrank.training.launcher import check_environment

TIMEOUT = 1800.0
"""Default time limit of a collective in seconds."""


def join(timeout: float = TIMEOUT) -> None:
    """Initialise ``torch.distributed`` from the launcher's environment or, without one, as a single process.

    Args:
        timeout: the time limit of a collective in seconds.

    Raises:
        ConfigError: the process is one of several that have no ranks.
    """
    check_environment(os.environ)
    set_log_level_from_string(os.environ.get("DS_LOG_LEVEL", "warning"))
    _show_roles()
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # megatron-core warns in every module that it uses torch's kernels; the role table says so once.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    disable_progress_bar()  # shown when a file is written; it would interrupt the log
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # It takes half a minute to compile and leaves 66 MiB per rank in /dev/shm; gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    backend = accelerator.communication_backend_name()
    limit_later_groups(timeout)
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        _join_again(backend, timedelta(seconds=timeout))
    deepspeed.init_distributed(backend, verbose=False, timeout=timedelta(seconds=timeout))


def _join_again(backend: str, timeout: timedelta) -> None:
    """Initialise ``torch.distributed`` after ``torchrun --max-restarts`` has started the ranks again.

    ``torchrun`` of torch 2.13 keeps its store. Under the same keys, ranks would find the addresses of dead ones there.
    """
    store, rank, ranks = next(rendezvous("env://", timeout=timeout))
    own = PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=ranks, timeout=timeout)


def limit_later_groups(timeout: float) -> None:
    """Give groups that are made without a time limit, as DeepSpeed makes them, this one instead of torch's own.

    It also ends the wait for a rank that is gone when a group is made, of which no connection tells.

    Args:
        timeout: in seconds.
    """
    distributed_c10d.default_pg_timeout = timedelta(seconds=timeout)
    setattr(distributed_c10d, "default_pg_nccl_timeout", timedelta(seconds=timeout))  # noqa: B010  # not exported


def limit_collectives(timeout: float) -> None:
    """Give every process group the time limit of :func:`join`, also those that were made with another one.

    Args:
        timeout: in seconds.
    """
    for group in list(_world.pg_map):
        _set_pg_timeout(timedelta(seconds=timeout), group)


def _show_roles() -> None:
    """Print what the optimizer logs at the start: which parameters it projects, and how large their state is."""
    log = logging.getLogger("ds_lowrank")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.handlers = [ConsoleHandler()]


def leave() -> NoReturn:
    """End a finished job with exit code 0 once every rank is done. Collective.

    Ranks wait for each other, as with gloo one that leaves early aborts the others. Functions registered with
    ``atexit`` (such as a monitor's last upload) still run. The interpreter's own teardown is skipped: DeepSpeed keeps
    process groups alive until then, and gloo's threads occasionally abort it.
    """
    with explained():
        sys.stdout.flush()
    dist.barrier()
    dist.destroy_process_group()
    atexit._run_exitfuncs()
    _end(0)


def watch_others(timeout: float = TIMEOUT) -> Bulletin:
    """Open the board of errors, and from now on end this process a few seconds after another rank has failed.

    Args:
        timeout: the time limit of collectives in seconds, for messages.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    bulletin = Bulletin(rank, ranks)

    def end(found: dict[int, Failure]) -> None:
        failure = quoted(found) or Failure(Kind.GONE)
        _print_and_end(message(failure, rank, ranks, found, timeout))

    bulletin.watch(end)
    return bulletin


def fail(
    error: Exception, expected: tuple[type[Exception], ...], bulletin: Bulletin | None, timeout: float = TIMEOUT
) -> NoReturn:
    """End a process that cannot start or continue with exit code 1, with one line that says why.

    Args:
        error: the error of this rank. The other ranks have it too, or have others, or lose their connection.
        expected: kinds of errors whose messages say what to change; of others the traceback is printed.
        bulletin: where the ranks post their errors; None if this process could not join the others.
        timeout: the time limit of collectives in seconds, for messages.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # with which launchers end the others once the first has ended
    failure = Failure.of(error, expected)
    if bulletin is None:
        _print_and_end(_before_joining(failure, error))
    if not bulletin.claim():
        threading.Event().wait()  # for the thread that is ending this process
    found = bulletin.exchange(failure)
    _print_and_end(message(failure, dist.get_rank(), dist.get_world_size(), found, timeout))


def _before_joining(failure: Failure, error: Exception) -> str:
    label = f"rank {os.environ['RANK']}: " if os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ else ""
    if failure.kind in (Kind.GONE, Kind.SILENT):
        return (
            f"{label}error: the ranks did not find each other: {str(error).splitlines()[0]}; check MASTER_ADDR, "
            "MASTER_PORT and WORLD_SIZE, and that every rank was started within --timeout"
        )
    return f"{label}error: {failure.text}"


def _print_and_end(text: str | None) -> NoReturn:
    if text is not None:
        os.write(
            2, f"{text.rstrip()}\n".encode(errors="backslashreplace")
        )  # one call, so that lines of several ranks are not mixed
    _end(1)  # no teardown: with gloo, the last ranks would abort with messages of their own


def _end(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)

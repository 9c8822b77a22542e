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
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils.logging import set_log_level_from_string
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store
from transformers.utils.logging import disable_progress_bar

from ds_lowrank.errors import ConfigError
from ds_lowrank.training.bulletin import Bulletin
from ds_lowrank.training.console import ConsoleHandler, explained, tell
from ds_lowrank.training.failures import (
    Crew,
    Failure,
    Kind,
    is_from_network,
    kept_by,
    message,
    quoted,
    silence,
    unanswered,
    waited_for,
)
from ds_lowrank.training.launcher import check_environment
from ds_lowrank.training.lifeline import hold_lifelines
from ds_lowrank.training.mpirun import adopt
from ds_lowrank.training.roll_call import Presence, call_roll, describe
from ds_lowrank.training.same_everywhere import difference
from ds_lowrank.training.time_limits import SETUP_TIMEOUT, TimeLimits, limit_collectives, limit_later_groups
from ds_lowrank.training.vigil import Vigil
from ds_lowrank.training.whereabouts import Sign, described, main_stack, waits

logger = logging.getLogger("ds_lowrank")

JOIN_TIMEOUT = 45.0
"""Default of how long to wait at the start for ranks that do not come, in seconds."""
MORE = "; with NCCL_DEBUG=INFO, NCCL says what it tries"
RANKS_HERE = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")
"""Where ``torchrun``, ``deepspeed`` and ``mpirun`` say how many ranks are on this node."""


def join(
    timeout: float = SETUP_TIMEOUT, join_timeout: float = JOIN_TIMEOUT, facts: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """Initialise ``torch.distributed`` from the launcher's environment or, without one, as a single process.

    Args:
        timeout: the time limit of a collective in seconds.
        join_timeout: how long to wait for ranks that do not come, in seconds.
        facts: what must be the same on all ranks, by name.

    Returns:
        The host name of every rank's node.

    Raises:
        ConfigError: the process is one of several that have no ranks; or, on every rank, ranks did not come, or differ
            in what must be the same.
    """
    adopt(os.environ)
    check_environment(os.environ)
    _quieten()
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
    limit_later_groups(timeout)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = _open_store(rank, ranks, join_timeout)
    mine = Presence(socket.gethostname(), facts or {}, _machine())
    present = call_roll(store, rank, ranks, mine, join_timeout, difference)
    if rank == 0 and len(set(present.hosts)) > 1:
        logger.info("%d ranks on %d nodes: %s", ranks, len(set(present.hosts)), describe(present.hosts))
    _connect(PrefixStore(f"call {present.call}", store), rank, ranks, timeout, join_timeout)
    return present.hosts


def _machine() -> str:
    """What identifies this machine until it is started again."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _quieten() -> None:
    set_log_level_from_string(os.environ.get("DS_LOG_LEVEL", "warning"))
    _show_roles()
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # megatron-core warns in every module that it uses torch's kernels; the role table says so once.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    disable_progress_bar()  # shown when a file is written; it would interrupt the log


def _open_store(rank: int, ranks: int, join_timeout: float) -> TCPStore:
    """The store that the launcher's variables name. Under ``torchrun`` its agent keeps it, otherwise rank 0 does."""
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        ranks,
        is_master=rank == 0 and not kept,
        timeout=timedelta(seconds=join_timeout),
        wait_for_workers=False,
        multi_tenant=True,
    )


def _connect(store: Store, rank: int, ranks: int, timeout: float, join_timeout: float) -> None:
    """Initialise ``torch.distributed`` on ranks that are all there.

    With gloo they connect to each other now, at the addresses of their interfaces; with NCCL a communicator is made,
    which may take minutes on thousands of ranks.
    """
    accelerator = get_accelerator()
    backend = accelerator.communication_backend_name()
    gloo = backend == "gloo"
    first = min(timeout, join_timeout) if gloo else timeout
    bound = accelerator.device_name() == "cuda" and ranks > 1  # as DeepSpeed binds a rank to its device
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if bound else None
    store.set_timeout(timedelta(seconds=first))
    limit, reason = timedelta(seconds=first), None
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=limit, device_id=device)
    except RuntimeError as error:
        if not is_from_network(error):
            raise
        reason = str(error).splitlines()[0]
    if reason is not None:
        raise ConfigError(
            f"the ranks are there, but cannot connect to each other ({reason}): set {backend.upper()}_SOCKET_IFNAME on "
            f"every node to the network interface that the other nodes can reach{'' if gloo else MORE}"
        )
    store.set_timeout(timedelta(seconds=timeout))
    limit_collectives(timeout)
    deepspeed.init_distributed(backend, verbose=False, timeout=timedelta(seconds=timeout))


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


def watch_others(limits: TimeLimits, hosts: Sequence[str] | None = None) -> Bulletin:
    """Open the board of errors, and from now on end this process a few seconds after another rank has failed.

    Args:
        limits: how long a rank may not answer.
        hosts: the node of every rank; None for one node.
    """
    rank, crew = dist.get_rank(), Crew(dist.get_world_size(), tuple(hosts or ()))
    bulletin = Bulletin(rank, crew)

    def end(found: dict[int, Failure]) -> None:
        others_waited = any(failure.kind is Kind.SILENT for failure in found.values())
        if others_waited and not waits(main_stack()):
            failure = Failure(Kind.OWN, waited_for(described()))
        else:
            failure = quoted(found, crew) or Failure(Kind.SILENT if others_waited else Kind.GONE)
        say_and_end(failure, found)

    def lost(there: int, seconds: float) -> None:
        if not bulletin.closed and bulletin.claim():
            failure = Failure(Kind.OWN, unanswered(there, crew, seconds))
            say_and_end(failure, bulletin.exchange(failure))

    def silent(other: int | None, sign: Sign | None) -> None:
        if not bulletin.closed and bulletin.claim():
            who = kept_by() if other is None else [other]
            text = silence(who, crew, f"--timeout {limits.timeout:g} s", dict.fromkeys(who, sign))
            failure = Failure(Kind.SILENT, text)
            say_and_end(failure, bulletin.exchange(failure))

    def say_and_end(failure: Failure, found: dict[int, Failure]) -> NoReturn:
        _print_and_end(message(failure, rank, crew, found, str(limits), bulletin.signs))

    bulletin.watch(end, Vigil(rank, crew.ranks, limits.timeout, silent))
    hold_lifelines(PrefixStore("ds_lowrank/lifelines", _get_default_store()), rank, crew.hosts, limits.timeout, lost)
    return bulletin


def fail(
    error: Exception, expected: tuple[type[Exception], ...], bulletin: Bulletin | None, limits: TimeLimits
) -> NoReturn:
    """End a process that cannot start or continue with exit code 1, with one line that says why.

    Args:
        error: the error of this rank. The other ranks have it too, or have others, or lose their connection.
        expected: kinds of errors whose messages say what to change; of others the traceback is printed.
        bulletin: where the ranks post their errors; None if this process could not join the others.
        limits: the time limit of collectives, for messages.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # with which launchers end the others once the first has ended
    failure = Failure.of(error, expected)
    if bulletin is None:
        _print_and_end(_before_joining(failure, error))
    if not bulletin.claim():
        threading.Event().wait()  # for the thread that is ending this process
    found = bulletin.exchange(failure)
    _print_and_end(message(failure, dist.get_rank(), bulletin.crew, found, str(limits), bulletin.signs))


def _before_joining(failure: Failure, error: Exception) -> str:
    label = ""
    if os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ:
        label = f"rank {os.environ['RANK']}{_on_this_node()}: "
    if failure.kind in (Kind.GONE, Kind.SILENT):
        return (
            f"{label}error: the ranks did not find each other: {str(error).splitlines()[0]}; check MASTER_ADDR "
            f"({os.environ['MASTER_ADDR']}), MASTER_PORT ({os.environ['MASTER_PORT']}) and WORLD_SIZE, and that every "
            "rank was started within --join-timeout"
        )
    return f"{label}error: {failure.text}"


def _on_this_node() -> str:
    """The host's name, where the launcher says that there are other nodes."""
    here = next((os.environ[name] for name in RANKS_HERE if name in os.environ), os.environ["WORLD_SIZE"])
    return "" if here == os.environ["WORLD_SIZE"] else f" on {socket.gethostname()}"


def _print_and_end(text: str | None) -> NoReturn:
    if text is not None:
        tell(text)
    _end(1)  # no teardown: with gloo, the last ranks would abort with messages of their own


def _end(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)

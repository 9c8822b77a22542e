"""Connections between the nodes of a job that tell of a node without power or network.

Such a node says nothing, so that connections to it stay open, and who waits for it waits until ``--timeout``. The
kernels of both sides probe an idle connection and end it when nothing comes back. They answer for a process that is
busy or stopped, which is not the end of a node.
"""

from __future__ import annotations

import errno
import logging
import os
import selectors
import socket
import threading
import uuid
from collections.abc import Callable, Sequence

from torch.distributed.distributed_c10d import Store

logger = logging.getLogger("ds_lowrank")

LIMIT_SECONDS = 120.0
"""The longest time without an answer from a node; ``--timeout`` may be shorter."""
CONNECT_SECONDS = 10.0
PROBES = 4
WHERE = "where rank 0 listens"
ENDED = (errno.ECONNRESET, errno.EPIPE)
"""What a process leaves that has ended, and whose error, if it has one, is reported otherwise."""


def hold_lifelines(
    store: Store, rank: int, hosts: Sequence[str], timeout: float, lost: Callable[[int, float], None]
) -> None:
    """Connect the first rank of every other node to rank 0, and watch the connections in a thread. Collective.

    Args:
        store: the store of the job.
        rank: this process's rank.
        hosts: the node of every rank.
        timeout: how long a node may not answer, in seconds; at most ``LIMIT_SECONDS``.
        lost: called with a rank whose node does not answer, and for how long it does not.
    """
    first_ranks = {hosts.index(host) for host in set(hosts)}
    if len(first_ranks) < 2 or rank not in first_ranks:
        return
    seconds = min(timeout, LIMIT_SECONDS)
    if rank == 0:
        listener = _Listener(seconds, lost)
        store.set(WHERE, f"{_own_address()} {listener.port} {listener.token}")
        target = listener.run
    else:
        address, port, token = store.get(WHERE).decode().split()
        line = _connect(address, int(port), f"{token} {rank}\n", seconds)
        if line is None:
            logger.info(
                "%s cannot connect to %s, port %s: if either loses its network, the job ends only after --timeout",
                *(hosts[rank], address, port),
            )
            return

        def target() -> None:
            if _is_lost(line):
                lost(0, seconds)

    threading.Thread(target=target, name="lifelines", daemon=True).start()


class _Listener:
    """Rank 0's end of the connections."""

    def __init__(self, seconds: float, lost: Callable[[int, float], None]) -> None:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._socket = socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=1024)
        self._seconds, self._lost = seconds, lost
        self._ranks: dict[socket.socket, int | None] = {}
        self.port: int = self._socket.getsockname()[1]
        self.token = uuid.uuid4().hex

    def run(self) -> None:
        """Accept connections and wait for their ends."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._socket:
                        line, _ = self._socket.accept()
                        _probe(line, self._seconds)
                        self._ranks[line] = None
                        selector.register(line, selectors.EVENT_READ)
                    elif isinstance(key.fileobj, socket.socket) and not self._read(key.fileobj):
                        selector.unregister(key.fileobj)
                        key.fileobj.close()

    def _read(self, line: socket.socket) -> bool:
        """Read from a connection; return whether it goes on."""
        try:
            token, _, rank = line.recv(100).decode(errors="replace").partition(" ")
        except OSError as error:
            known = self._ranks.pop(line)
            if known is not None and error.errno not in ENDED:
                self._lost(known, self._seconds)
            return False
        if token == self.token and self._ranks[line] is None:
            self._ranks[line] = int(rank)
            return True
        del self._ranks[line]
        return False


def _own_address() -> str:
    """This node's address on the way to the store, which the other nodes can reach too."""
    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    family, _, _, _, address = socket.getaddrinfo(*where, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        own = str(probe.getsockname()[0])
    return os.environ["MASTER_ADDR"] if own.startswith("127.") or own == "::1" else own


def _connect(address: str, port: int, greeting: str, seconds: float) -> socket.socket | None:
    try:
        line = socket.create_connection((address, port), timeout=CONNECT_SECONDS)
        line.sendall(greeting.encode())
    except OSError:
        return None
    line.settimeout(None)
    _probe(line, seconds)
    return line


def _probe(line: socket.socket, seconds: float) -> None:
    """Let the kernel end a connection over which nothing comes back for some seconds."""
    between = max(1, round(seconds / 8))
    idle = max(1, round(seconds) - PROBES * between)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, between)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)


def _is_lost(line: socket.socket) -> bool:
    """Wait until a connection ends, and say whether that is because the other node does not answer."""
    try:
        while line.recv(100):
            continue
    except OSError as error:
        return error.errno not in ENDED
    return False

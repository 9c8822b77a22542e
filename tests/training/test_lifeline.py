"""Lifelines between nodes: what ends one, and what does not."""

from __future__ import annotations

import errno
import socket
import threading
from typing import Any

import pytest
from torch.distributed import HashStore

from ds_lowrank.training import lifeline
from ds_lowrank.training.lifeline import WHERE, hold_lifelines

HOSTS = ("node1", "node1", "node2", "node2")


class Line:
    """A connection that ends in a way of its own."""

    def __init__(self, end: OSError | bytes) -> None:
        self.end = end

    def recv(self, size: int) -> bytes:
        if isinstance(self.end, OSError):
            raise self.end
        return self.end


@pytest.mark.parametrize(
    ("end", "lost"),
    [
        (TimeoutError(errno.ETIMEDOUT, "Connection timed out"), True),
        (OSError(errno.EHOSTUNREACH, "No route to host"), True),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), False),
        (b"", False),
    ],
    ids=["timeout", "unreachable", "reset", "closed"],
)
def test_only_a_node_that_does_not_answer_is_lost(end, lost):
    assert lifeline._is_lost(Line(end)) is lost


def test_the_first_rank_of_every_other_node_is_connected_and_the_kernel_probes(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    store, probed, lost = HashStore(), [], []
    probe = lifeline._probe

    def watched(line: socket.socket, seconds: float) -> None:
        probe(line, seconds)
        probed.append(line)

    monkeypatch.setattr(lifeline, "_probe", watched)
    names = ("SO_KEEPALIVE", "TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
    for rank in range(4):
        hold_lifelines(store, rank, HOSTS, 1800, lambda *found: lost.append(found))
    both = threading.Event()
    for _ in range(500):
        if len(probed) == 2 or both.wait(0.01):
            break
    assert len(probed) == 2  # rank 0's end and that of rank 2
    for line in probed:
        level = {"SO_KEEPALIVE": socket.SOL_SOCKET}
        found = [line.getsockopt(level.get(name, socket.IPPROTO_TCP), getattr(socket, name)) for name in names]
        assert found == [1, 60, 15, 4]  # 60 + 4 x 15 = 120 seconds
    assert not lost


def test_one_node_has_no_lifeline():
    store: Any = HashStore()
    hold_lifelines(store, 0, ("node1", "node1"), 1800, pytest.fail)
    assert not store.check([WHERE])


def test_a_stranger_is_turned_away(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    store = HashStore()
    hold_lifelines(store, 0, ("node1", "node2"), 1800, pytest.fail)
    address, port, token = store.get(WHERE).decode().split()
    for said, answer in ((b"GET / HTTP/1.0\n", b""), (f"{token} 1\n".encode(), None)):
        with socket.create_connection((address, int(port)), timeout=0.5) as line:
            line.sendall(said)
            if answer is None:
                with pytest.raises(TimeoutError):
                    line.recv(1)
            else:
                assert line.recv(1) == answer

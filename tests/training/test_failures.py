"""Which line each rank prints when a run ends with an error."""

import time

import pytest
import torch
import torch.distributed as dist

from ds_lowrank.collectives import RemoteError
from ds_lowrank.errors import CheckpointError
from ds_lowrank.training.distributed import limit_later_groups
from ds_lowrank.training.failures import Crew, Failure, Kind, message, quoted, unanswered
from tests.engines.pool import run_ranks

EXPECTED = (ValueError, RemoteError)
PEER = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1")
LATE = RuntimeError("[third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 4000ms for recv")


def own(text):
    return Failure(Kind.OWN, text)


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (ValueError("lr is negative"), own("lr is negative")),
        (RemoteError("another rank failed; rank 1: ..."), Failure(Kind.REMOTE, "another rank failed; rank 1: ...")),
        (PEER, Failure(Kind.GONE)),
        (LATE, Failure(Kind.SILENT)),
        (dist.DistNetworkError("failed to recv, got 0 bytes"), Failure(Kind.GONE)),
        (dist.DistStoreError("wait timeout after 5000ms"), Failure(Kind.SILENT)),
        (caused(CheckpointError("not saved; is the disk full?"), PEER), Failure(Kind.GONE)),
        # A hub that closes the connection is no lost rank.
        (
            caused(ValueError("'hf:x' cannot be read"), ConnectionResetError("Connection reset by peer")),
            own("'hf:x' cannot be read"),
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nDetails"),
            own("CUDA out of memory.; lower --micro-batch-size or --sequence-length, or raise the ZeRO stage"),
        ),
    ],
)
def test_the_kind_of_an_error(error, failure):
    assert Failure.of(error, EXPECTED) == failure


def _makes_a_group_without_rank_1():
    limit_later_groups(1)
    if dist.get_rank() == 1:
        return None
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?i)timeout"):
        dist.new_group()
    return time.monotonic() - started


def test_the_time_limit_holds_for_a_rank_that_is_gone_when_a_group_is_made():
    seconds = run_ranks(2, _makes_a_group_without_rank_1)[0]
    assert 0.9 < seconds < 20  # torch's own limit is 1800


def test_an_unexpected_error_keeps_its_traceback_and_every_line_has_the_rank():
    try:
        raise KeyError("key")
    except KeyError as error:
        failure = Failure.of(error, EXPECTED)
    lines = message(failure, 1, Crew(2), {1: failure}, 60.0).splitlines()
    assert lines[0] == "rank 1: error: KeyError, which is a bug; please report it with these lines:"
    assert lines[1] == "rank 1: Traceback (most recent call last):" and lines[-1] == "rank 1: KeyError: 'key'"
    assert all(line.startswith("rank 1: ") for line in lines)
    assert quoted({1: failure}, Crew(2)).text.count("\n") == 0


def test_one_process_says_its_error_without_a_rank():
    assert message(own("no such file"), 0, Crew(1), {}, 60.0) == "error: no such file"


def test_an_error_of_all_ranks_is_said_once_and_otherwise_by_each_that_has_it():
    same = {0: own("no such file"), 1: own("no such file")}
    assert [message(same[rank], rank, Crew(2), same, 60.0) for rank in (0, 1)] == ["error: no such file", None]
    some = {**same, 2: Failure(Kind.REMOTE, "another rank failed")}
    assert [message(some[rank], rank, Crew(3), some, 60.0) for rank in (0, 1, 2)] == [
        "rank 0: error: no such file",
        "rank 1: error: no such file",
        None,
    ]


def test_ranks_that_wait_in_vain_say_for_whom(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    gone, silent = Failure(Kind.GONE), Failure(Kind.SILENT)
    assert message(gone, 0, Crew(3), {0: gone, 1: gone}, 60.0).startswith(
        "rank 0: error: another rank is gone (rank 2); its"
    )
    assert message(gone, 1, Crew(3), {}, 60.0).startswith(
        "rank 1: error: another rank is gone (rank 0); its own message"
    )
    text = message(silent, 0, Crew(2), {0: silent}, 60.0)
    assert text == "rank 0: error: no answer from rank 1 within --timeout 60 s: stopped, or hanging"
    found = {0: gone, 1: own("disk full")}
    assert message(gone, 0, Crew(2), found, 60.0) == "rank 0: error: another rank failed; rank 1: disk full"
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert message(gone, 1, Crew(3), {}, 60.0).startswith("rank 1: error: another rank is gone; its own message")


def test_with_several_nodes_every_rank_that_is_named_has_its_node(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    crew = Crew(4, ("node1", "node1", "node2", "node2"))
    gone, full = Failure(Kind.GONE), own("disk full")
    assert message(full, 2, crew, {2: full}, 60.0) == "rank 2 on node2: error: disk full"
    text = message(gone, 0, crew, {0: gone, 2: full}, 60.0)
    assert text == "rank 0 on node1: error: another rank failed; rank 2 on node2: disk full"
    text = message(gone, 0, crew, {0: gone, 1: gone}, 60.0)
    assert text.startswith("rank 0 on node1: error: another rank is gone (ranks 2, 3 on node2); its own message")
    assert unanswered(2, crew, 120.0).startswith("no answer from node2 (ranks 2, 3) for 120 s: it has no power")
    assert message(full, 1, Crew(2, ("node1", "node1")), {1: full}, 60.0) == "rank 1: error: disk full"

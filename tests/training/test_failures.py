"""Which line each rank prints when a run ends with an error."""

import time

import pytest
import torch
import torch.distributed as dist

from ds_lowrank.collectives import RemoteError
from ds_lowrank.errors import CheckpointError
from ds_lowrank.training.failures import Crew, Failure, Kind, message, quoted, silence, unanswered
from ds_lowrank.training.time_limits import TimeLimits, limit_later_groups
from ds_lowrank.training.whereabouts import Sign
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


def _waits_for_rank_1(seconds):
    limits, group = TimeLimits(*seconds), dist.new_group()  # of its own, as it is broken afterwards
    limits.lengthen()
    if dist.get_rank() == 1:
        time.sleep(4)
        return None
    with limits.longer():
        assert str(limits) == "--setup-timeout 60 s"
    limits.shorten()
    assert str(limits) == "--timeout 1 s"
    with limits.longer():
        assert str(limits) == "--setup-timeout 60 s"
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?i)timed out"):
        dist.all_reduce(torch.zeros(1), group=group)
    took = time.monotonic() - started
    limits.lengthen()  # for the other rank, which comes late to the end of the test
    return took


def test_the_limit_of_steps_holds_again_after_a_save():
    assert 0.9 < run_ranks(2, _waits_for_rank_1, (1.0, 60.0))[0] < 20  # the other limit is 60


def test_a_set_up_may_take_as_long_as_a_step():
    assert TimeLimits(3600.0, 1800.0).setup_timeout == 3600.0


def test_an_unexpected_error_keeps_its_traceback_and_every_line_has_the_rank():
    try:
        raise KeyError("key")
    except KeyError as error:
        failure = Failure.of(error, EXPECTED)
    lines = message(failure, 1, Crew(2), {1: failure}, "--timeout 60 s").splitlines()
    assert lines[0] == "rank 1: error: KeyError, which is a bug; please report it with these lines:"
    assert lines[1] == "rank 1: Traceback (most recent call last):" and lines[-1] == "rank 1: KeyError: 'key'"
    assert all(line.startswith("rank 1: ") for line in lines)
    assert quoted({1: failure}, Crew(2)).text.count("\n") == 0


def test_one_process_says_its_error_without_a_rank():
    assert message(own("no such file"), 0, Crew(1), {}, "--timeout 60 s") == "error: no such file"


def test_an_error_of_all_ranks_is_said_once_and_otherwise_by_each_that_has_it():
    same = {0: own("no such file"), 1: own("no such file")}
    assert [message(same[rank], rank, Crew(2), same, "--timeout 60 s") for rank in (0, 1)] == [
        "error: no such file",
        None,
    ]
    some = {**same, 2: Failure(Kind.REMOTE, "another rank failed")}
    assert [message(some[rank], rank, Crew(3), some, "--timeout 60 s") for rank in (0, 1, 2)] == [
        "rank 0: error: no such file",
        "rank 1: error: no such file",
        None,
    ]


def test_ranks_that_wait_in_vain_say_for_whom(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    gone, silent = Failure(Kind.GONE), Failure(Kind.SILENT)
    assert message(gone, 0, Crew(3), {0: gone, 1: gone}, "--timeout 60 s").startswith(
        "rank 0: error: another rank is gone (rank 2); its"
    )
    assert message(gone, 1, Crew(3), {}, "--timeout 60 s").startswith(
        "rank 1: error: another rank is gone (rank 0); its own message"
    )
    text = message(silent, 0, Crew(2), {0: silent}, "--timeout 60 s")
    assert text == "rank 0: error: no answer from rank 1 within --timeout 60 s: stopped, or hanging"
    found = {0: gone, 1: own("disk full")}
    assert message(gone, 0, Crew(2), found, "--timeout 60 s") == "rank 0: error: another rank failed; rank 1: disk full"
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert message(gone, 1, Crew(3), {}, "--timeout 60 s").startswith(
        "rank 1: error: another rank is gone; its own message"
    )


def seen(text, waits=False, still=0.0):
    return Sign("step", text, waits=waits, still=still)


def test_ranks_that_wait_in_vain_say_where_a_silent_rank_was_seen():
    silent, limit = Failure(Kind.SILENT), "--timeout 300 s"
    reading, waiting = seen("step 41, reading data"), seen("step 41, reading data", waits=True, still=290.0)
    # Rank 2 has not reported its error yet, but has waited too.
    text = message(silent, 0, Crew(3), {0: silent}, limit, {0: waiting, 1: reading, 2: waiting})
    assert text == (
        "rank 0: error: no answer from rank 1 within --timeout 300 s: stopped, or hanging; last seen in step 41, "
        "reading data"
    )
    # A rank that was stopped in a collective was not seen waiting in it for long.
    assert "rank 1 within" in message(silent, 0, Crew(2), {0: silent}, limit, {1: seen("step 3", waits=True)})
    assert "rank 1 within" in message(silent, 0, Crew(2), {0: silent}, limit, {1: waiting})  # there is no other
    everyone = dict.fromkeys(range(3), silent)
    text = message(silent, 0, Crew(3), everyone, limit, {0: seen("a"), 1: seen("b"), 2: seen("a")})
    assert "no answer from another rank within --timeout 300 s: stopped, or hanging" in text
    assert text.endswith("hanging; last seen: ranks 0, 2 in a; rank 1 in b")
    assert message(silent, 0, Crew(3), everyone, limit, {0: seen("a"), 1: seen("a"), 2: seen("a")}).endswith("hanging")
    crew = Crew(2, ("node1", "node2"))
    assert silence([1], crew, limit, {1: None}).startswith("no answer from rank 1 on node2 within --timeout 300 s")
    # One that has noticed by its watch says it itself, and the others quote it.
    told = Failure(Kind.SILENT, "no answer from rank 1")
    assert message(told, 2, Crew(3), {2: told}, limit) == "rank 2: error: no answer from rank 1"
    assert "rank 2: no answer from rank 1" in message(silent, 0, Crew(3), {0: silent, 2: told}, limit)


def test_with_several_nodes_every_rank_that_is_named_has_its_node(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    crew = Crew(4, ("node1", "node1", "node2", "node2"))
    gone, full = Failure(Kind.GONE), own("disk full")
    assert message(full, 2, crew, {2: full}, "--timeout 60 s") == "rank 2 on node2: error: disk full"
    text = message(gone, 0, crew, {0: gone, 2: full}, "--timeout 60 s")
    assert text == "rank 0 on node1: error: another rank failed; rank 2 on node2: disk full"
    text = message(gone, 0, crew, {0: gone, 1: gone}, "--timeout 60 s")
    assert text.startswith("rank 0 on node1: error: another rank is gone (ranks 2, 3 on node2); its own message")
    assert unanswered(2, crew, 120.0).startswith("no answer from node2 (ranks 2, 3) for 120 s: it has no power")
    assert message(full, 1, Crew(2, ("node1", "node1")), {1: full}, "--timeout 60 s") == "rank 1: error: disk full"

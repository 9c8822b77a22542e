"""The roll call at the start: who is there, on which node, with which packages."""

from __future__ import annotations

import threading
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import pytest
from torch.distributed import TCPStore

from ds_lowrank.errors import ConfigError
from ds_lowrank.training.roll_call import NUMBER, Presence, Present, call_roll, describe, numbers
from ds_lowrank.training.same_everywhere import difference, facts

HOSTS = ("node1", "node1", "node2")


def presence(rank: int, **facts: str) -> Presence:
    return Presence(HOSTS[rank], {"torch": "2.13.0", **facts})


@pytest.fixture
def store():
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def everyone(store: TCPStore, answers: dict[int, Callable[[Any], Any]]) -> dict[int, Any]:
    """What each rank gets: an answer, or the message of an error."""
    results: dict[int, Any] = {}

    def run(rank: int) -> None:
        try:
            results[rank] = answers[rank](store.clone())
        except ConfigError as error:
            results[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in answers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def comes(rank: int, seconds: float = 30, **facts: str) -> Callable[[Any], Any]:
    return lambda store: call_roll(store, rank, 3, presence(rank, **facts), seconds, difference)


def test_ranks_that_are_all_there_learn_where_the_others_are(store):
    assert everyone(store, {rank: comes(rank) for rank in range(3)}) == dict.fromkeys(range(3), Present(1, HOSTS))


def test_machines_of_the_same_name_are_told_apart(store):
    def comes_from(rank: int, machine: str) -> Callable[[Any], Any]:
        return lambda store: call_roll(store, rank, 2, Presence("localhost", {}, machine), 30, difference)

    found = everyone(store, {0: comes_from(0, "0a1b2c3d"), 1: comes_from(1, "4e5f6a7b")})
    assert found[0].hosts == found[1].hosts == ("localhost-0a1b2c", "localhost-4e5f6a")


def test_a_rank_that_does_not_come_is_named_on_every_rank_that_did(store):
    found = everyone(store, {rank: comes(rank, 0.5) for rank in (0, 2)})
    assert found[0] == found[2]
    assert found[0].startswith(
        "rank 1 of 3 did not come within --join-timeout 0.5 s, only rank 0 on node1, rank 2 on node2 did."
    )


def test_a_rank_0_that_does_not_come_is_named(store):
    (message,) = everyone(store, {1: comes(1, 0.3)}).values()
    assert message.startswith("rank 0 did not come within --join-timeout 0.3 s")


def test_other_versions_are_refused_on_every_rank(store):
    found = everyone(store, {0: comes(0), 1: comes(1), 2: comes(2, torch="2.12.1")})
    message = "the nodes of this job differ: torch is 2.12.1 on node2, 2.13.0 on node1. Give all nodes the same"
    assert found == dict.fromkeys(range(3), message)


def test_after_a_restart_ranks_wait_for_the_new_rank_0_and_not_for_the_dead_one(store):
    """``torchrun`` keeps the store, with the entries and the answer of the ranks before."""
    everyone(store, {rank: comes(rank) for rank in range(3)})
    early, late = threading.Event(), {}

    def is_early(store: Any) -> Any:
        early.set()
        return comes(1)(store)

    def is_late(store: Any) -> Any:
        early.wait()
        late["number"] = store.add(NUMBER, 0)
        return comes(0)(store)

    found = everyone(store, {0: is_late, 1: is_early, 2: comes(2)})
    assert late == {"number": 1} and found == dict.fromkeys(range(3), Present(2, HOSTS))


def test_ranks_and_nodes_in_words():
    assert [numbers(ranks) for ranks in ([3], [0, 4], [0, 1], range(8))] == [
        *("rank 3", "ranks 0, 4", "ranks 0, 1", "ranks 0 to 7")
    ]
    assert describe(["a", "b", "a"]) == "ranks 0, 2 on a, rank 1 on b"
    many = describe([f"node{rank // 8}" for rank in range(800)])
    assert many.startswith("ranks 0 to 7 on node0, ") and many.endswith(", ..., ranks 792 to 799 on node99")
    assert many.count(" on ") == 8


def test_what_must_be_the_same_is_the_packages_the_command_line_and_its_files(tmp_path):
    def of(**changed: Any) -> dict[str, str]:
        config, model = tmp_path / "ds.json", tmp_path / "model.json"
        config.write_text(changed.pop("contents", "{}"))
        model.write_text("{}")
        given = {"steps": 6, "tensor_parallel": 1, "cache": "c", "deepspeed_config": str(config), "model": model}
        return facts(Namespace(**{**given, **changed}))

    def differing(**changed: Any) -> str | None:
        return difference([Presence("node1", of()), Presence("node2", of(**changed))])

    assert {"Python", "torch", "deepspeed", "transformers", "ds_lowrank"} <= of().keys()
    assert "megatron-core" not in of() and "megatron-core" in of(tensor_parallel=2)
    assert differing() is None
    assert differing(cache="elsewhere", data="elsewhere", local_rank=1) is None
    assert "--steps is 6 on node1, 7 on node2" in differing(steps=7)
    assert "the file of --deepspeed_config is " in differing(contents='{"a": 1}')
    assert differing(model="/no/such.json").startswith("the nodes of this job differ: --model is ")


def test_at_most_three_differences_are_named():
    ranks = [Presence(host, {name: f"{name} of {host}" for name in "abcde"}) for host in ("node1", "node2")]
    assert difference(ranks).endswith("c of node2 on node2 (and 2 more differences). Give all nodes the same")

"""The all-to-all of a round on gloo: the right elements, on any group, however many go to each rank."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from ds_lowrank.sharding.all_to_all import all_to_all
from tests.engines.pool import run_ranks


def sizes(sender, receiver):
    """Different for every pair, and none from a rank to the one before it."""
    return 0 if receiver == sender - 1 else 3 * sender + receiver + 1


def exchanged(members, rounds):
    """What a rank receives in the last of several rounds, and what it ought to; None for a rank that is no member."""
    group = dist.new_group(members)
    if dist.get_rank() not in members:
        return None
    rank, ranks = dist.get_rank(group), range(len(members))
    outgoing, incoming = [sizes(rank, r) for r in ranks], [sizes(r, rank) for r in ranks]
    for number in range(rounds):
        send = torch.cat([torch.full((sizes(rank, r),), 100.0 * number + 10 * rank + r) for r in ranks])
        right = torch.cat([torch.full((sizes(r, rank),), 100.0 * number + 10 * r + rank) for r in ranks])
        received = torch.full((sum(incoming),), torch.nan)
        all_to_all(received, send, incoming, outgoing, group)
        if not torch.equal(received, right):
            return received, right
    return received, right


@pytest.mark.parametrize(("world", "members"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (4, [1, 3]), (4, [3, 1, 0])])
def test_every_rank_receives_its_pieces_in_rank_order(world, members):
    found = run_ranks(world, exchanged, members, 3)
    assert [rank for rank, one in enumerate(found) if one is not None] == sorted(members)
    for received, right in (one for one in found if one is not None):
        assert torch.equal(received, right)

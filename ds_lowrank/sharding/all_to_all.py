"""One all-to-all: the ranks of a group send one another different numbers of elements."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

TAG = 1515
"""Of the messages between two ranks, so that they meet no others of the same group."""


def all_to_all(
    received: torch.Tensor,
    send: torch.Tensor,
    receive_sizes: Sequence[int],
    send_sizes: Sequence[int],
    group: dist.ProcessGroup,
) -> None:
    """Send every rank its piece, and wait for theirs. Collective.

    On gloo each rank asks for all that it will receive before it sends anything. gloo's own ``all_to_all_single`` sends
    first, and a rank that comes later than a round trip then asks only after its data, over the same connection: one
    direction of the wire waits for the other, and the exchange takes twice as long.

    Args:
        received: filled with the ranks' pieces in rank order, 1-D, contiguous.
        send: the pieces for the ranks in rank order, 1-D, contiguous, of the same dtype and device.
        receive_sizes: how many elements come from each rank.
        send_sizes: how many go to each rank.
        group: the ranks.
    """
    if send.device.type != "cpu" or "cpu:gloo" not in dist.get_backend_config(group):
        dist.all_to_all_single(received, send, list(receive_sizes), list(send_sizes), group=group)
        return
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    incoming, outgoing = torch.split(received, list(receive_sizes)), torch.split(send, list(send_sizes))
    incoming[rank].copy_(outgoing[rank])
    others = [(rank + distance) % size for distance in range(1, size)]
    waits = [dist.irecv(incoming[r], group=group, tag=TAG, group_src=r) for r in others if receive_sizes[r]]
    waits += [dist.isend(outgoing[r], group=group, tag=TAG, group_dst=r) for r in others if send_sizes[r]]
    for work in waits:
        if work is not None:  # only for a rank outside of the group
            work.wait()

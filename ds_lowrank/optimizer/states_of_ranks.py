"""The states of data-parallel ranks brought together for one file, where DeepSpeed saves only the first rank's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves, tree_map

from ds_lowrank.collectives import all_gather_object


@dataclass(frozen=True)
class _Like:
    """A tensor's shape and dtype, in its place."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def states_on_first(own: dict[str, Any], group: dist.ProcessGroup) -> list[dict[str, Any]]:
    """What every rank passes, on the first rank of the group; nothing on the others. Collective.

    One tensor at a time is on the first rank's device.

    Args:
        own: plain values and tensors in nested dicts and lists.
        group: the ranks.

    Returns:
        On the first rank a dict of every rank, in order, its tensors on the CPU; elsewhere an empty list.
    """
    tensors = [leaf for leaf in tree_leaves(own) if isinstance(leaf, torch.Tensor)]
    outlines = all_gather_object(tree_map(_like, own), group)
    first, *others = dist.get_process_group_ranks(group)
    if dist.get_rank() != first:
        for tensor in tensors:
            dist.send(tensor.contiguous(), first, group=group)
        return []
    device = tensors[0].device if tensors else torch.device("cpu")

    def received(leaf: Any, sender: int) -> Any:
        if not isinstance(leaf, _Like):
            return leaf
        tensor = torch.empty(leaf.shape, dtype=leaf.dtype, device=device)
        dist.recv(tensor, sender, group=group)
        return tensor.cpu()

    found = [tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf, own)]
    for sender, outline in zip(others, outlines[1:], strict=True):
        found.append(tree_map(lambda leaf, sender=sender: received(leaf, sender), outline))
    return found


def _like(leaf: Any) -> Any:
    return _Like(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf

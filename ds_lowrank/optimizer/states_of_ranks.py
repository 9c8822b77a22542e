"""The states of data-parallel ranks brought together for one file, where DeepSpeed saves only the first rank's."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ds_lowrank.collectives import all_gather_object


def states_on_first(own: dict[str, Any], group: dist.ProcessGroup) -> list[dict[str, Any]]:
    """What every rank passes, on the first rank of the group; nothing on the others. Collective.

    One tensor at a time is on the first rank's device.

    Args:
        own: plain values and tensors in nested dicts and lists.
        group: the ranks.

    Returns:
        On the first rank a dict of every rank, in order, its tensors on the CPU; elsewhere an empty list.
    """
    tensors: list[torch.Tensor] = []
    outlines = all_gather_object(_outline(own, tensors), group)
    first, *others = dist.get_process_group_ranks(group)
    if dist.get_rank() != first:
        for tensor in tensors:
            dist.send(tensor.contiguous(), first, group=group)
        return []
    device = tensors[0].device if tensors else torch.device("cpu")
    found = [_filled(outlines[0], [tensor.cpu() for tensor in tensors])]
    for sender, outline in zip(others, outlines[1:], strict=True):
        received = [_received(like, sender, group, device) for like in _likes(outline)]
        found.append(_filled(outline, received))
    return found


class _Like(tuple[tuple[int, ...], torch.dtype]):
    """The shape and dtype of a tensor, in its place."""


def _outline(value: Any, tensors: list[torch.Tensor]) -> Any:
    """The value with every tensor replaced by its shape and dtype; the tensors are appended in order."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return _Like((tuple(value.shape), value.dtype))
    if isinstance(value, dict):
        return {key: _outline(one, tensors) for key, one in value.items()}
    if isinstance(value, list):
        return [_outline(one, tensors) for one in value]
    return value


def _likes(outline: Any) -> list[_Like]:
    if isinstance(outline, _Like):
        return [outline]
    inner = outline.values() if isinstance(outline, dict) else outline if isinstance(outline, list) else ()
    return [like for one in inner for like in _likes(one)]


def _received(like: _Like, sender: int, group: dist.ProcessGroup, device: torch.device) -> torch.Tensor:
    shape, dtype = like
    tensor = torch.empty(shape, dtype=dtype, device=device)
    dist.recv(tensor, sender, group=group)
    return tensor.cpu()


def _filled(outline: Any, tensors: list[torch.Tensor]) -> Any:
    """An outline with tensors in their places again."""
    if isinstance(outline, _Like):
        return tensors.pop(0)
    if isinstance(outline, dict):
        return {key: _filled(one, tensors) for key, one in outline.items()}
    if isinstance(outline, list):
        return [_filled(one, tensors) for one in outline]
    return outline

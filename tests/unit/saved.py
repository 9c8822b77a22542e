"""What autograd saves for the backward pass, counted by torch's hooks."""

from __future__ import annotations

from collections.abc import Callable

import torch


def saved_bytes(model: torch.nn.Module, forward: Callable[[], object]) -> int:
    """Bytes of the storages that a forward pass saves, without those of the model; each is counted once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.Tensor] = {}  # the tensors stay alive, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()
    assert kept is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())

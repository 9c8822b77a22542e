"""Counts the bytes of tensors that are alive, while code runs on any device, meta included."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every storage that is made within the context until it is freed.

    What a kernel allocates for itself is not seen, nor is what the allocator cannot use.

    Attributes:
        now: bytes that are alive.
        peak: the most since the last :meth:`restart`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: dict[int, weakref.finalize[Any, Any]] = {}

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and follow the storages that are new in its results."""
        found = func(*args, **(kwargs or {}))
        given = {id(tensor.untyped_storage()) for tensor in tree_leaves((args, kwargs)) if _is_dense(tensor)}
        for tensor in tree_leaves(found):
            if _is_dense(tensor) and id(tensor.untyped_storage()) not in given:
                self._follow(tensor.untyped_storage())
        return found

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return
        self.now += size
        self.peak = max(self.peak, self.now)
        self._alive[key] = weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.now -= size
        del self._alive[key]


def _is_dense(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided

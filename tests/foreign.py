"""Settings of the whole process that a user's script may have made, and that must not reach what is computed here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def defaults(dtype: torch.dtype = torch.float32, device: str | None = None) -> Iterator[None]:
    """Make torch create tensors in ``dtype`` and on ``device`` where a call names neither."""
    dtype_before, device_before = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype_before)
        torch.set_default_device(None if device_before.type == "cpu" else device_before)


DEFAULTS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
    "fp64": {"dtype": torch.float64},
    "meta": {"device": "meta"},
}
"""Arguments of :func:`defaults`, none of which is torch's own default."""


class NothingFromDefaults(TorchDispatchMode):
    """Fails at the first operation whose result is in fp16 or on the meta device.

    With :func:`defaults` of fp16 and meta, in a computation that has neither, it finds what follows a default although
    the result does not show it.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (list, tuple)) else [found]:
            if isinstance(tensor, torch.Tensor):
                assert tensor.dtype != torch.float16 and not tensor.is_meta, f"{func} follows torch's defaults"
        return found


def under_foreign_defaults(compute: Callable[[], Any]) -> Any:
    """Run a computation under defaults of fp16 and meta, in which nothing may follow them."""
    with defaults(torch.float16, "meta"), NothingFromDefaults():
        return compute()

"""Functions of tensors that are compiled where that pays: on CUDA, on their first use."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar, cast

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

Result = TypeVar("Result")

logger = logging.getLogger("ds_lowrank")


def compiled_on_cuda(
    function: Callable[..., Result], compiler: Callable[..., Any] = torch.compile
) -> Callable[..., Result]:
    """Run a function compiled if its first argument is on CUDA, and as it is on other devices.

    Many small operations become one pass over memory. Nothing is compiled before the first call with a CUDA tensor, nor
    if the environment sets ``TORCH_COMPILE_DISABLE=1``. If compiling fails, for example because there is no triton, a
    warning names the reason once, and the function runs as it is from then on.

    Args:
        function: of tensors, outside of autograd, which it does not write to; no control flow depends on their values.
        compiler: called with the function and ``dynamic=True``.

    Returns:
        The function to call instead. Its results on CUDA are the same up to rounding.
    """
    compiled: Callable[..., Result] | None = None

    @wraps(function)
    def run(first: torch.Tensor, *others: torch.Tensor) -> Result:
        nonlocal compiled
        if first.is_meta:  # where a step is costed: as on a card, nothing but the result takes memory
            with _disable_current_modes():
                found = function(first, *others)
            return cast(Result, tree_map(torch.empty_like, found))
        if not first.is_cuda or compiled is function:
            return function(first, *others)
        if os.environ.get("TORCH_COMPILE_DISABLE", "0") == "1":
            compiled = function
            return function(first, *others)
        try:
            if compiled is None:
                compiled = compiler(function, dynamic=True)
            # Without what the tensors are views of: the shapes of that would distinguish calls, too.
            result: Result = compiled(*(tensor.data for tensor in (first, *others)))
            return result
        except torch.OutOfMemoryError:  # as it is, the function needs more
            raise
        except Exception as error:  # torch has no common class for them; the function's own error comes again
            compiled = function
            _warn_once(f"{type(error).__name__}: {error}".strip().splitlines()[0])
            return function(first, *others)

    return run


@lru_cache
def _warn_once(reason: str) -> None:
    logger.warning("torch.compile failed, so that steps on CUDA are slower than they could be: %s", reason)

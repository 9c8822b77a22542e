"""How data-parallel ranks share a global batch, and how a saved position is matched to the data of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_lowrank.data.errors import DataError


def check_batch_sizes(global_batch_size: int, micro_batch_size: int, world_size: int) -> None:
    """Check that the global batch is divided evenly among micro-batches and data-parallel ranks.

    Raises:
        DataError: global = micro x accumulation steps x ranks does not hold for any whole number of accumulation steps.
    """
    if min(global_batch_size, micro_batch_size, world_size) < 1:
        raise DataError("global_batch_size, micro_batch_size and world_size must be 1 or more")
    product = micro_batch_size * world_size
    if global_batch_size % product:
        below = global_batch_size // product * product
        nearest = f"{below} or {below + product}" if below else f"{product}"
        raise DataError(
            f"global_batch_size {global_batch_size} is not micro_batch_size x accumulation steps x ranks: "
            f"it must be a multiple of {micro_batch_size} x {world_size} = {product}; use {nearest}"
        )


def check_position(state: Mapping[str, Any], identity: Mapping[str, int | str]) -> None:
    """Check that a saved position belongs to the current data and settings.

    Args:
        state: the saved position.
        identity: what must be equal in it: data, sizes and seed.

    Raises:
        DataError: something differs; the message lists all differences.
    """
    different = [
        f"{name} was {state.get(name)!r} and is {value!r}"
        for name, value in identity.items()
        if state.get(name) != value
    ]
    if different:
        raise DataError(
            "the saved data position belongs to another run: "
            + "; ".join(different)
            + ". Restore these settings (the fingerprint is of the data and the tokenizer), or start a new run"
        )


def rows_of(rank: int, world_size: int, global_batch_size: int) -> slice:
    """A rank's rows of a global batch.

    Raises:
        DataError: ``rank`` is not in 0 to ``world_size`` - 1.
    """
    if not 0 <= rank < world_size:
        raise DataError(f"rank {rank} is not one of the {world_size} data-parallel ranks, 0 to {world_size - 1}")
    share = global_batch_size // world_size
    return slice(rank * share, (rank + 1) * share)

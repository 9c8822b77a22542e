"""Random sketches that every rank, on every layout and device, draws alike."""

from __future__ import annotations

import hashlib

import torch


def name_hash(*parts: str | int) -> int:
    """A 63-bit number from a name and counters, the same in every process."""
    digest = hashlib.sha256("\0".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def gaussian(seed: int, name: str, counter: int | str, rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """A standard normal matrix that is a function of (run seed, parameter name, counter) and nothing else.

    Drawn on the CPU and moved, because a device's own generator gives other numbers. CPUs with other vector
    instructions may round the last bit otherwise.

    Returns:
        rows x columns, fp32, on ``device``.
    """
    return torch.randn(rows, columns, generator=_generator(seed, name, counter)).to(device)


def rademacher(seed: int, name: str, counter: int | str, rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """The same with entries -1 and 1, each with probability one half."""
    return (torch.randint(0, 2, (rows, columns), generator=_generator(seed, name, counter)) * 2 - 1).float().to(device)


def _generator(seed: int, name: str, counter: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(name_hash(seed, name, counter))

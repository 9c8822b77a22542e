"""Random sketches that are the same on every rank, layout and device."""

from __future__ import annotations

import hashlib

import torch


def name_hash(*parts: str | int) -> int:
    """Hash names and counters to a 63-bit number that is the same in every process.

    Args:
        *parts: the names and counters, in order.
    """
    digest = hashlib.sha256("\0".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def gaussian(seed: int, name: str, counter: int | str, rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Draw a standard normal matrix that depends on the seed, the name and the counter only.

    It is drawn on the CPU and moved, because a device's own generator gives other numbers. CPUs with different vector
    instructions may round the last bit differently.

    Args:
        seed: seed of the run.
        name: name of the parameter.
        counter: tells apart the matrices of one parameter.
        rows: number of rows.
        columns: number of columns.
        device: where the result is needed.

    Returns:
        rows x columns, fp32, on ``device``.
    """
    generator = _generator(seed, name, counter)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu").to(device)


def rademacher(seed: int, name: str, counter: int | str, rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Draw a matrix with entries -1 and 1, each with probability one half, as :func:`gaussian` does.

    Args:
        seed: seed of the run.
        name: name of the parameter.
        counter: tells apart the matrices of one parameter.
        rows: number of rows.
        columns: number of columns.
        device: where the result is needed.

    Returns:
        rows x columns, fp32, on ``device``.
    """
    generator = _generator(seed, name, counter)
    return (torch.randint(0, 2, (rows, columns), generator=generator, device="cpu") * 2 - 1).float().to(device)


def _generator(seed: int, name: str, counter: int | str) -> torch.Generator:
    """A CPU generator seeded from a hash of the arguments."""
    return torch.Generator("cpu").manual_seed(name_hash(seed, name, counter))

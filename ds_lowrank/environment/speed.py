"""Measuring a machine: matrix products, memory, and sums over ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

SECONDS = 1.0
"""How long each measurement takes at most, besides two calls to warm up."""

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Speeds:
    """What one rank measured.

    Attributes:
        host: the name of its machine.
        products: TFLOPS of square products by kind, see ``DTYPES``; kinds that the device does not have are missing.
        memory: GB/s of a copy in the device's memory, bytes read and written.
        network: bus bandwidth of an all-reduce in GB/s, ``2 (n - 1) / n`` times bytes over seconds; None for one rank.
    """

    host: str
    products: dict[str, float]
    memory: float
    network: float | None


def best_seconds(call: Callable[[], object], device: torch.device, seconds: float | None = None) -> float:
    """The shortest time of a call, in the mean of as many calls as take a tenth of the time or so.

    The shortest, because what disturbs a measurement makes it longer.

    Args:
        call: what is measured.
        device: on which it works, and for which is waited.
        seconds: how long to measure; None for ``SECONDS``.
    """
    seconds = SECONDS if seconds is None else seconds
    call()
    once = _elapsed(call, device, 1)
    calls = max(1, round(seconds / 10 / once))
    rounds = max(1, min(10, int(seconds / (calls * once))))
    return min(_elapsed(call, device, calls) / calls for _ in range(rounds))


def _elapsed(call: Callable[[], object], device: torch.device, calls: int) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def product_tflops(kind: str, device: torch.device) -> float | None:
    """TFLOPS of a product of two square matrices; None if the device does not have it.

    Args:
        kind: a key of ``DTYPES``.
        device: where it is computed.
    """
    size = 1024 if device.type == "cpu" else 8192
    generator = torch.Generator(device).manual_seed(0)
    try:
        left, right = (
            torch.randn((size, size), dtype=torch.float32, device=device, generator=generator).to(DTYPES[kind])
            for _ in range(2)
        )
        with _fp32_products("high" if kind == "tf32" else "highest"):
            return 2 * size**3 / best_seconds(lambda: left @ right, device) / 1e12
    except RuntimeError:
        return None


@contextmanager
def _fp32_products(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def copy_gb_per_second(device: torch.device) -> float:
    """GB/s of copying memory to memory, bytes read and bytes written.

    Args:
        device: whose memory.
    """
    numbers = 2**26 if device.type == "cpu" else 2**28  # far more than caches hold
    source = torch.ones(numbers, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * 4 * numbers / best_seconds(lambda: target.copy_(source), device) / 1e9


def all_reduce_gb_per_second(device: torch.device) -> float | None:
    """Bus bandwidth of an all-reduce over all ranks in GB/s; None for one rank. Collective.

    Args:
        device: of the tensors.
    """
    if not dist.is_initialized() or (ranks := dist.get_world_size()) == 1:
        return None
    numbers = 2**23 if device.type == "cpu" else 2**26
    tensor = torch.zeros(numbers, dtype=torch.float32, device=device)
    dist.all_reduce(tensor)
    once = torch.tensor(_elapsed(lambda: dist.all_reduce(tensor), device, 1), dtype=torch.float64, device=device)
    dist.all_reduce(once, op=dist.ReduceOp.MAX)  # so that all ranks call it as often
    calls = max(1, min(100, round(SECONDS / once.item())))
    elapsed = torch.tensor(
        _elapsed(lambda: dist.all_reduce(tensor), device, calls) / calls, dtype=torch.float64, device=device
    )
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
    return 2 * (ranks - 1) / ranks * 4 * numbers / float(elapsed.item()) / 1e9

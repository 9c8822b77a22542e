"""``python -m ds_lowrank doctor --bench``: whether products, memory and network are as fast as they should be.

What a card should reach is a share of its data sheet. Of a CPU and of a network nothing is known, and only what cannot
be right is called wrong.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from ds_lowrank.environment.doctor import Line, device_name, print_report
from ds_lowrank.environment.packages import one_line
from ds_lowrank.environment.peaks import Peak, peak_of
from ds_lowrank.environment.speed import Speeds, all_reduce_gb_per_second, copy_gb_per_second, product_tflops

LEAST_OF_PRODUCTS = 0.5
LEAST_OF_MEMORY = 0.6
"""Shares of the data sheet below which a card is called wrong. Healthy ones do 0.6 to 0.9, less at low power limits."""

LEAST_OF_MEDIAN = 0.8
"""A rank that is slower than this share of the median holds up all others."""

FLOPS_PER_BYTE = 0.5
"""A product that reads both numbers of every multiplication from memory does 2 FLOPs for 8 bytes, one that works in
blocks, as it should, tens of FLOPs for each byte."""

LEAST_OF_NETWORK = {"nccl": 1.25, "gloo": 0.125}
"""GB/s between the ranks of one machine: 10 Gbit/s for cards, 1 Gbit/s for processes. Between machines, the latter."""

THROTTLED = "nvidia-smi -q -d CLOCK,POWER,PERFORMANCE"
BLAS = 'python -c "import torch; print(torch.__config__.show())"'
CONNECTIONS = "NCCL_DEBUG=INFO torchrun ... -m ds_lowrank doctor --bench"
MORE_RANKS = "torchrun --standalone --nproc_per_node {} -m ds_lowrank doctor --bench"


def bench() -> int:
    """Measure, and print a report on rank 0. Collective if a launcher has started several ranks.

    Returns:
        The exit code: 1 if something is wrong, else 0; the same on every rank.
    """
    started = time.monotonic()
    ranks, device = int(os.environ.get("WORLD_SIZE", "1")), _device()
    if ranks > 1:
        try:
            dist.init_process_group("gloo" if device.type == "cpu" else "nccl", timeout=timedelta(seconds=60))
        except Exception as error:  # of the store, gloo or NCCL: another rank is missing or cannot be reached
            print(f"error: the ranks did not find each other: {one_line(error)}")
            return 1
    kinds = ("fp32", "bf16") if device.type == "cpu" else ("bf16", "fp16", "tf32", "fp32")
    found = {kind: product_tflops(kind, device) for kind in kinds}
    own = Speeds(
        host=platform.node(),
        products={kind: value for kind, value in found.items() if value is not None},
        memory=copy_gb_per_second(device),
        network=all_reduce_gb_per_second(device),
    )
    everyone: list[Speeds] = [own] * ranks
    if ranks > 1:
        dist.all_gather_object(everyone, own)
        dist.destroy_process_group()
    lines = report(everyone, device)
    if os.environ.get("RANK", "0") == "0":
        return print_report(lines, f"Nothing is wrong. Measured in {time.monotonic() - started:.0f} s.")
    return int(any(line.wrong for line in lines))


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def report(everyone: Sequence[Speeds], device: torch.device) -> list[Line]:
    """Judge what the ranks have measured.

    Args:
        everyone: what each rank has, in order.
        device: the kind of device that all have.
    """
    on_cpu = device.type == "cpu"
    peak = None if on_cpu else peak_of(torch.cuda.get_device_name(device))
    known = "" if peak else "not in the table of peaks: only what cannot be right is called wrong"
    lines = [Line("device", device_name(device), known)]
    if on_cpu:
        lines.append(threads_line(sum(speeds.host == everyone[0].host for speeds in everyone)))
    for kind in everyone[0].products:
        lines.append(product_line(kind, everyone, peak, on_cpu))
    lines.append(memory_line(everyone, peak))
    return [*lines, network_line(everyone, "gloo" if on_cpu else "nccl")]


def threads_line(ranks: int) -> Line:
    """How many threads torch uses on a CPU.

    Args:
        ranks: the number of ranks that share the machine.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads, fair = torch.get_num_threads(), max(1, cores // ranks)
    value = f"{threads} of {cores} cores"
    if 2 * threads <= fair:
        given = os.environ.get("OMP_NUM_THREADS")
        text = f"OMP_NUM_THREADS is {given}" if given else "torch uses a part of the machine"
    elif threads >= 2 * fair:
        text = f"in each of {ranks} ranks, which wait for each other's threads"
    else:
        return Line("threads", value, f"in each of {ranks} ranks" if ranks > 1 else "")
    text = f"{text}: products are slower than they need be"
    return Line("threads", value, text, f"export OMP_NUM_THREADS={fair}", wrong=True)


def product_line(kind: str, everyone: Sequence[Speeds], peak: Peak | None, on_cpu: bool) -> Line:
    """How fast matrices are multiplied, by the slowest rank.

    Args:
        kind: the kind of product.
        everyone: what each rank has measured.
        peak: the card's data sheet, if it is known.
        on_cpu: whether they are multiplied on a CPU.
    """
    slowest, straggler = _slowest(everyone, lambda speeds: speeds.products.get(kind, 0.0))
    name, value = f"{kind} products", f"{slowest:.3g} TFLOPS"
    if straggler:
        return Line(name, value, straggler, THROTTLED if not on_cpu else "", wrong=True)
    if peak is not None:
        share = slowest / peak.tflops(kind)
        is_slow = share < LEAST_OF_PRODUCTS
        return Line(name, value, f"{share:.0%} of {peak.tflops(kind):g}", THROTTLED if is_slow else "", wrong=is_slow)
    memory = _slowest(everyone, lambda speeds: speeds.memory)[0]
    if kind == "fp32" and 1000 * slowest < FLOPS_PER_BYTE * memory:
        text = "no faster than the numbers come from memory: torch's BLAS does not fit this machine"
        return Line(name, value, text, BLAS if on_cpu else THROTTLED, wrong=True)
    if on_cpu and kind == "bf16" and slowest < everyone[0].products.get("fp32", 0.0):
        return Line(name, value, "slower than fp32, for which this CPU has the faster instructions")
    return Line(name, value)


def memory_line(everyone: Sequence[Speeds], peak: Peak | None) -> Line:
    """How fast memory is copied, by the slowest rank.

    Args:
        everyone: what each rank has measured.
        peak: the card's data sheet, if it is known.
    """
    slowest, straggler = _slowest(everyone, lambda speeds: speeds.memory)
    value = f"{slowest:.3g} GB/s"
    if straggler:
        return Line("memory", value, straggler, wrong=True)
    if peak is None:
        return Line("memory", value, "read and written by a copy")
    share = slowest / peak.memory
    is_slow = share < LEAST_OF_MEMORY
    return Line("memory", value, f"{share:.0%} of {peak.memory:g}", THROTTLED if is_slow else "", wrong=is_slow)


def network_line(everyone: Sequence[Speeds], backend: str) -> Line:
    """How fast ranks sum a tensor.

    Args:
        everyone: what each rank has measured.
        backend: what they sum it with, ``nccl`` or ``gloo``.
    """
    bandwidth, hosts = everyone[0].network, len({speeds.host for speeds in everyone})
    if bandwidth is None:
        count = torch.cuda.device_count() if backend == "nccl" else 2
        advice = MORE_RANKS.format(count) if count > 1 else ""
        return Line("network", "not measured", "there is one rank", advice)
    where = f"{len(everyone)} ranks on {hosts} machine{'s' if hosts > 1 else ''}, all-reduce by {backend}"
    least = LEAST_OF_NETWORK[backend] if hosts == 1 else LEAST_OF_NETWORK["gloo"]
    is_slow = bandwidth < least
    text = f"bus bandwidth, {where}" + (f"; at least {least:g} GB/s is normal" if is_slow else "")
    advice = CONNECTIONS if is_slow and backend == "nccl" else ""
    return Line("network", f"{bandwidth:.3g} GB/s", text, advice, wrong=is_slow)


def _slowest(everyone: Sequence[Speeds], speed: Callable[[Speeds], float]) -> tuple[float, str]:
    """The lowest of some speeds, and which rank holds up the others, '' if none does."""
    speeds = [speed(own) for own in everyone]
    low, middle = min(speeds), statistics.median(speeds)
    if low >= LEAST_OF_MEDIAN * middle:
        return low, ""
    rank = speeds.index(low)
    return low, f"rank {rank} on {everyone[rank].host} holds up the others, whose median is {middle:.3g}"

"""The memory of a run: what torch's allocator gave out and holds, and what the process has."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator


@dataclass(frozen=True)
class PeakMemory:
    """Peaks since the start, in GiB, each of the rank on which it is highest.

    Attributes:
        allocated: in tensors on the device; None on a CPU.
        reserved: held by torch's allocator on the device, with what is free for later tensors; None on a CPU.
        resident: of the process in the host's memory.
    """

    allocated: float | None
    reserved: float | None
    resident: float

    @property
    def main(self) -> float:
        """The one that runs out first: on the device or, without one, of the process."""
        return self.resident if self.allocated is None else self.allocated


def peak_memory(device: torch.device) -> PeakMemory:
    """Take the peaks of all ranks. Collective.

    Args:
        device: the device of the process group's tensors.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = [float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)]
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        peaks += [accelerator.max_memory_allocated(), accelerator.max_memory_reserved()]
    most = torch.tensor(peaks, dtype=torch.float64, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    resident, *on_device = (most / 2**30).tolist()
    allocated, reserved = on_device or (None, None)
    return PeakMemory(allocated, reserved, resident)

"""How fast a run is: FLOPS and the share of the card's peak, tokens a second, and when it will end."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ds_lowrank.checkpoint.manifest import Progress
from ds_lowrank.environment.peaks import Peak, kind_of_products, peak_of
from ds_lowrank.training.flops import ModelFlops


@dataclass(frozen=True)
class Speed:
    """What is known of the steps since the last record; None where it is not known.

    Attributes:
        tokens_per_second: of all ranks together, in training steps.
        tokens_per_second_per_gpu: the same over the number of ranks.
        tflops_per_gpu: the model's FLOPs of this rank's share of the batches over the seconds of training steps, in
            units of 1e12.
        mfu: model FLOPs utilization, that over the peak of the card in this precision.
        flops_source: how the FLOPs were found.
        remaining_seconds: until the last step, at the pace of this process so far, with its evaluations and saves.
        projected_end: when that is, local time in ISO format.
    """

    tokens_per_second: float
    tokens_per_second_per_gpu: float
    tflops_per_gpu: float | None
    mfu: float | None
    flops_source: str | None
    remaining_seconds: float | None
    projected_end: str | None


class Meter:
    """Adds up what is done, and divides it by the time that it took. It never waits for the device.

    Args:
        steps: the run's total number of steps.
        flops: of the model; None where they were not counted, as on all ranks but the first.
        sharers: the number of ranks that one copy of the model is split over, by tensor and pipeline parallelism.
        precision: in which the model is trained: ``fp32``, ``bf16`` or ``fp16``.
    """

    def __init__(self, steps: int, flops: ModelFlops | None, sharers: int, precision: str) -> None:
        self._steps, self._model, self._sharers = steps, flops, sharers
        self._flops = 0.0
        self._begun: tuple[int, float] | None = None  # the first step of this process, which is slower than the others
        self._kind = kind_of_products(precision)
        self._card, self._peak = _card()

    def describe(self) -> str | None:
        """One line on what MFU is measured by; None on a CPU, and where FLOPs are not counted."""
        if self._model is None or not self._card:
            return None
        text = f"model FLOPs by {self._model.source}"
        if self._peak is None:
            return f"{text}; no MFU, as the peak of {self._card} is not known"
        return f"{text}; MFU is of the {self._peak.tflops(self._kind):g} TFLOPS of {self._card} in {self._kind}"

    def add(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Count a step.

        Args:
            batches: this rank's micro-batches; ranks that share a copy of the model have the same ones.
        """
        if self._model is not None:
            self._flops += self._model.of(batches) / self._sharers

    def read(self, progress: Progress, since: Progress) -> Speed:
        """The speed since the last reading.

        Args:
            progress: how far the run is.
            since: how far it was at the last reading.
        """
        seconds = progress.seconds - since.seconds
        tokens = (progress.tokens - since.tokens) / seconds
        tflops = None if self._model is None else self._flops / seconds / 1e12
        self._flops = 0.0
        mfu = None if tflops is None or self._peak is None else tflops / self._peak.tflops(self._kind)
        left = self._remaining(progress.step)
        return Speed(
            tokens_per_second=tokens,
            tokens_per_second_per_gpu=tokens / dist.get_world_size(),
            tflops_per_gpu=tflops,
            mfu=mfu,
            flops_source=None if self._model is None else self._model.source,
            remaining_seconds=left,
            projected_end=None if left is None else _after(left),
        )

    def _remaining(self, step: int) -> float | None:
        now = time.monotonic()
        if self._begun is None:
            self._begun = (step, now)
            return None
        first, at = self._begun
        return (self._steps - step) * (now - at) / (step - first)


def _after(seconds: float) -> str:
    return (datetime.now().astimezone() + timedelta(seconds=seconds)).isoformat(timespec="seconds")


def _card() -> tuple[str, Peak | None]:
    """The name of this rank's card, '' for a CPU, and its peak."""
    if not torch.cuda.is_available():
        return "", None
    name = torch.cuda.get_device_name()
    return name, peak_of(name)

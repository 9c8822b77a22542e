"""One optimizer step, and what can be measured about it."""

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor, distributed

from ds_lowrank.integration.clipping import is_repaired, keeps_no_norm
from ds_lowrank.integration.forward_backward import forward_backward
from ds_lowrank.integration.train_batch import train_batch


@dataclass
class StepResult:
    """`loss` is this rank's mean over its micro-batches, a scalar tensor; `grad_norm` the raw norm, before clipping.

    A pipeline works on several micro-batches at a time: the whole is `step_seconds`, the other two None.
    """

    loss: Tensor
    grad_norm: float | None
    forward_seconds: float | None
    backward_seconds: float | None
    step_seconds: float


class Stopwatch:
    """Seconds since the last reading. With `exact` it waits for the device, which costs time: for log steps only."""

    def __init__(self, exact: bool) -> None:
        self._exact = exact
        self._last = self._now()

    def _now(self) -> float:
        if self._exact:
            get_accelerator().synchronize()
        return time.perf_counter()

    def read(self) -> float:
        now = self._now()
        elapsed, self._last = now - self._last, now
        return elapsed


def train_step(engine: DeepSpeedEngine, batches: Sequence[Mapping[str, Tensor]], measure: bool) -> StepResult:
    """Forward and backward over `batches`, the keyword arguments of the model, then one optimizer step.

    With `measure` the gradient norm is found and the times are exact; without it both are left at what is free. What an
    optimizer needs beyond one forward a batch counts as forward.
    """
    if isinstance(engine, PipelineEngine):
        return _pipeline_step(engine, batches, measure)
    watch = Stopwatch(exact=measure)
    forward = backward = 0.0

    def loss_of(batch: Mapping[str, Tensor]) -> Tensor:
        nonlocal forward, backward
        backward += watch.read()  # of the micro-batch before
        loss: Tensor = engine(**{key: value.to(engine.device) for key, value in batch.items()}).loss
        forward += watch.read()
        return loss

    losses = forward_backward(engine, [partial(loss_of, batch) for batch in batches])
    backward += watch.read()
    grad_norm = None
    unknown = keeps_no_norm(engine) and not is_repaired(engine)
    if measure and unknown:
        grad_norm = float(torch.nn.utils.get_total_norm([p.grad for p in engine.parameters() if p.grad is not None]))
        watch.read()
    engine.step()
    update = watch.read()
    if not unknown:
        grad_norm = _number(engine.get_global_grad_norm())
    return StepResult(torch.stack(losses).mean(), grad_norm, forward, backward, update)


def _pipeline_step(engine: PipelineEngine, batches: Sequence[Mapping[str, Tensor]], measure: bool) -> StepResult:
    """The same through a pipeline, which does all of it in one call: it is timed as one."""
    watch = Stopwatch(exact=measure)
    loss = train_batch(engine, [(batch["input_ids"], batch["labels"]) for batch in batches])
    return StepResult(loss, _number(engine.get_global_grad_norm()), None, None, watch.read())


def _number(norm: Tensor | float | None) -> float | None:
    return None if norm is None else float(norm)


def mean_over_ranks(loss: Tensor) -> float:
    """Collective."""
    total = loss.detach().double()
    distributed.all_reduce(total)
    return float(total) / distributed.get_world_size()


def peak_memory_gib(device: torch.device) -> float:
    """The most memory any rank has held: allocated by torch, or resident where the device is the CPU. Collective."""
    if get_accelerator().device_name() == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    else:
        held = get_accelerator().max_memory_allocated()
    most = torch.tensor([held], dtype=torch.float64, device=device)
    distributed.all_reduce(most, op=distributed.ReduceOp.MAX)
    return float(most.item()) / 2**30

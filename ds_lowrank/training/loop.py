"""One optimizer step, and measurements of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

from ds_lowrank.integration.clipping import gradient_norm, is_repaired, keeps_no_norm
from ds_lowrank.integration.forward_backward import forward_backward
from ds_lowrank.integration.reduction_time import reduction_timed
from ds_lowrank.integration.train_batch import train_batch
from ds_lowrank.optimizer.optimizer import LowRankOptimizer
from ds_lowrank.placement.grid import Grid


@dataclass
class StepResult:
    """Measurements of one optimizer step on this rank.

    Attributes:
        loss: mean over this rank's micro-batches, a scalar tensor.
        grad_norm: norm of the whole gradient before clipping; None if it was not computed.
        forward_seconds: time of the forward passes; None for a pipeline, which overlaps them with backward passes.
        backward_seconds: time of the backward passes, with the reductions; None for a pipeline.
        reduce_seconds: the part of it in which gradients were reduced and nothing else was done; None for a pipeline,
            and where it was not measured.
        step_seconds: time of the optimizer step; for a pipeline, of everything.
        update_ratio: norm of the update of the projected matrices over that of their weights; None if not measured.
        grad_norm_ratio: the gradient norm over its moving average; None if one of them is not known.
    """

    loss: Tensor
    grad_norm: float | None
    forward_seconds: float | None
    backward_seconds: float | None
    reduce_seconds: float | None
    step_seconds: float
    update_ratio: float | None = None
    grad_norm_ratio: float | None = None


class Stopwatch:
    """Measures the time between readings.

    Args:
        exact: whether to wait for the device before each reading. This costs time, so it is for log steps only.
    """

    def __init__(self, exact: bool) -> None:
        self._exact = exact
        self._last = self._now()

    def _now(self) -> float:
        if self._exact:
            get_accelerator().synchronize()
        return time.perf_counter()

    def read(self) -> float:
        """Seconds since the last reading, or since the stopwatch was made."""
        now = self._now()
        elapsed, self._last = now - self._last, now
        return elapsed


def train_step(
    engine: DeepSpeedEngine,
    batches: Sequence[Mapping[str, Tensor]],
    measure: bool,
    needs_norm: bool = False,
    update: bool = False,
) -> StepResult:
    """Run forward and backward passes over the micro-batches, then one optimizer step. Collective.

    Args:
        engine: the engine of the model, in training mode.
        batches: this rank's micro-batches, as keyword arguments of the model.
        measure: whether to compute the gradient norm and exact times; otherwise only what costs nothing is reported.
        needs_norm: whether to compute the gradient norm in any case.
        update: whether to measure the update of a low-rank optimizer, which takes a copy of the weights of one stack.

    Returns:
        The measurements. Additional forward passes that an optimizer needs count as forward time.
    """
    if update and isinstance(engine.basic_optimizer, LowRankOptimizer):
        with engine.basic_optimizer.updates_measured() as ratio:
            result = train_step(engine, batches, measure, needs_norm)
        result.update_ratio = ratio()
        return result
    if isinstance(engine, PipelineEngine):
        return _pipeline_step(engine, batches, measure)
    watch = Stopwatch(exact=measure)
    forward = backward = 0.0

    def loss_of(batch: Mapping[str, Tensor]) -> Tensor:
        nonlocal forward, backward
        backward += watch.read()  # of the previous micro-batch
        loss: Tensor = engine(**{key: value.to(engine.device) for key, value in batch.items()}).loss
        forward += watch.read()
        return loss

    with reduction_timed(engine) if measure else nullcontext() as reduction:
        losses = forward_backward(engine, [partial(loss_of, batch) for batch in batches])
        backward += watch.read()
    grad_norm = None
    unknown = keeps_no_norm(engine) and not is_repaired(engine)
    if (measure or needs_norm) and unknown:
        grad_norm = float(gradient_norm(list(engine.parameters()), Grid()))
        watch.read()
    engine.step()
    stepped = watch.read()
    if not unknown:
        grad_norm = _number(engine.get_global_grad_norm())
    reduced = None if reduction is None else reduction()
    return StepResult(torch.stack(losses).mean(), grad_norm, forward, backward, reduced, stepped)


def _pipeline_step(engine: PipelineEngine, batches: Sequence[Mapping[str, Tensor]], measure: bool) -> StepResult:
    """The same through a pipeline, which does everything in one call and is timed as a whole."""
    watch = Stopwatch(exact=measure)
    loss = train_batch(engine, [(batch["input_ids"], batch["labels"]) for batch in batches])
    return StepResult(loss, _number(engine.get_global_grad_norm()), None, None, None, watch.read())


def _number(norm: Tensor | float | None) -> float | None:
    return None if norm is None else float(norm)


def mean_over_ranks(loss: Tensor) -> float:
    """Average a scalar loss over all ranks. Collective."""
    total = loss.detach().double()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()

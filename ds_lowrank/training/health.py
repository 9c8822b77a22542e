"""Noticing that a run is broken: its losses, gradients or weights are not finite any more.

Such a run does not recover. It is ended, and what it has become is neither saved nor exported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

from ds_lowrank.collectives import any_rank
from ds_lowrank.optimizer.optimizer import LowRankOptimizer
from ds_lowrank.placement.zero import forward_weights
from ds_lowrank.training.loop import StepResult

BROKEN_STEPS = 10
"""So many steps in a row without a finite loss and gradient end the run. Damaged data rarely fill as many."""

SCALE_SEARCH_STEPS = 50
"""So many skipped steps in a row with finite losses end an fp16 run. DeepSpeed halves its loss scale from up to 2**32
down to 1, and skips a step each time."""

REMEDY = "lower the learning rate (--lr, optimizer.params.lr), lengthen --warmup or set gradient_clipping"


class BrokenRunError(RuntimeError):
    """The losses, gradients or weights of a run are not finite any more. Raised on every rank."""


class Health:
    """Watches the steps of a run.

    Args:
        engine: the engine of the model.
        step: the step after which the run starts or resumes.
        newest: returns the newest checkpoint that was saved or loaded, for messages; None for none.
    """

    def __init__(self, engine: DeepSpeedEngine, step: int, newest: Callable[[], Path | None]) -> None:
        self._engine = engine
        self._newest = newest
        self._sound = step  # the last step with a finite loss and gradient
        self._trained = step  # the last step with a finite loss, whose update may have been skipped
        self._skipped = self._skips()

    def _skips(self) -> int:
        optimizer = self._engine.basic_optimizer
        own = optimizer.skipped_updates if isinstance(optimizer, LowRankOptimizer) else 0
        return int(self._engine.skipped_steps) + own

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Run a step, in which DeepSpeed raises when even the smallest loss scale of fp16 overflows.

        Args:
            step: the number of the step.

        Raises:
            BrokenRunError: it did.
        """
        try:
            yield
        except Exception as error:
            if "loss scale already at minimum" not in str(error):
                raise
            raise self._error(step, "the gradient overflows fp16 at the smallest loss scale") from error

    def symptoms(self, result: StepResult) -> tuple[Tensor, bool]:
        """What is wrong with a step on this rank, as flags for ``any_rank``: no wait for the device.

        Args:
            result: the measurements of the step.

        Returns:
            Whether the loss is not finite, and whether the gradient is not, or the update was skipped.
        """
        skips, before = self._skips(), self._skipped
        self._skipped = skips
        norm = result.grad_norm
        return ~torch.isfinite(result.loss.detach()), skips > before or (norm is not None and not math.isfinite(norm))

    def note(self, step: int, loss: bool, gradient: bool) -> None:
        """Count a step, and end the run if it is one of too many.

        Args:
            step: its number.
            loss: whether any rank's loss was not finite.
            gradient: whether any rank's gradient was not finite, or its update was skipped.

        Raises:
            BrokenRunError: it was one of too many in a row.
        """
        if not loss:
            self._trained = step
            if not gradient:
                self._sound = step
        if step - self._trained >= BROKEN_STEPS:
            raise self._error(step, f"the loss has not been finite since step {self._trained + 1}")
        if step - self._sound >= (SCALE_SEARCH_STEPS if self._engine.fp16_enabled() else BROKEN_STEPS):
            raise self._error(step, f"the gradient has not been finite since step {self._sound + 1}")

    def is_clean(self, step: int) -> bool:
        """Whether a step that was noted had a finite loss and gradient, and its update was made.

        Args:
            step: the number of the last step.
        """
        return self._sound == step

    def end(self, step: int) -> NoReturn:
        """End a run that is not sound after its last step.

        Args:
            step: the number of the last step.

        Raises:
            BrokenRunError: always.
        """
        raise self._error(step, "the weights, or the loss that they give, are not finite")

    def _error(self, step: int, found: str) -> BrokenRunError:
        newest = self._newest()
        good = "no checkpoint was saved before" if newest is None else f"{newest} is the newest good checkpoint"
        return BrokenRunError(f"step {step}: {found}, and the run was ended; {REMEDY}, in another --output. {good}")

    def is_sound(self, batch: Mapping[str, Tensor]) -> bool:
        """Whether the weights and the loss that they give are finite on all ranks. Collective; for rare use.

        The loss of a step says nothing of its own update. Nor does a finite loss say enough: where the square of a
        weight overflows, a normalization divides by infinity, and the loss is that of a model which always guesses.

        Args:
            batch: a micro-batch of this rank's, as keyword arguments of the model.
        """
        weights = [self._has_finite_norm(parameter) for parameter in self._engine.module.parameters()]
        finite = torch.stack([*weights, torch.isfinite(self._loss(batch))]).all()
        return not any_rank(~finite, device=self._engine.device)[0]

    def _has_finite_norm(self, parameter: torch.nn.Parameter) -> Tensor:
        own, _ = forward_weights(parameter)
        elements = own.store.detach().reshape(-1)[own.offset : own.offset + own.end - own.start]
        norm: Tensor = torch.linalg.vector_norm(elements, dtype=torch.float32)
        return norm.isfinite().to(torch.device(self._engine.device))

    @torch.no_grad()
    def _loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        engine = self._engine
        if isinstance(engine, PipelineEngine):
            with _without_monitor(engine):
                found = engine.eval_batch(iter([(batch["input_ids"], batch["labels"])]), num_micro_batches=1)
        else:
            engine.eval()
            found = engine(**{key: value.to(engine.device) for key, value in batch.items()}).loss
        engine.train()
        loss: Tensor = found.detach().mean()
        return loss


@contextmanager
def _without_monitor(engine: PipelineEngine) -> Iterator[None]:
    """Keep ``eval_batch`` from sending its loss to the monitors as one of held-out text."""
    monitor = engine.monitor
    enabled, monitor.enabled = monitor.enabled, False
    try:
        yield
    finally:
        monitor.enabled = enabled

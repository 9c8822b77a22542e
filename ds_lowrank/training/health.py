"""Noticing that a run is broken: its losses, gradients or weights are not finite any more, or ``--stop-on`` says so.

Such a run does not recover. It is ended, and what it has become is neither saved nor exported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from ds_lowrank.training.course import Course
from ds_lowrank.training.loop import StepResult
from ds_lowrank.training.stop_on import Condition, Limits

BROKEN_STEPS = 10
"""So many steps in a row without a finite loss and gradient end the run, unless ``--stop-on nan:K`` says how many.
Damaged data rarely fill as many."""

SCALE_SEARCH_STEPS = 50
"""So many skipped steps in a row with finite losses end an fp16 run. DeepSpeed halves its loss scale from up to 2**32
down to 1, and skips a step each time."""

REMEDY = "lower the learning rate (--lr, optimizer.params.lr), lengthen --warmup or set gradient_clipping"


class BrokenRunError(RuntimeError):
    """The losses, gradients or weights of a run are not what they have to be any more. Raised on every rank."""


class Health:
    """Watches the steps of a run.

    Args:
        engine: the engine of the model.
        step: the step after which the run starts or resumes.
        newest: returns the newest checkpoint that was saved or loaded, for messages; None for none.
        conditions: those of ``--stop-on``.
        course: of the run; None for one that has only begun.

    Attributes:
        sound: the last step with a finite loss and gradient, whose update was made. Later ones were skipped.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        step: int,
        newest: Callable[[], Path | None],
        conditions: Sequence[Condition] = (),
        course: Course | None = None,
    ) -> None:
        self._engine = engine
        self._newest = newest
        self._nan = next((each for each in conditions if each.kind == "nan"), None)
        self._limits = Limits(conditions, course or Course(), step)
        self.sound = self._updated = step
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

    def is_beyond(self, result: StepResult) -> bool:
        """Whether this rank sees a gradient norm beyond the limit of ``--stop-on``: another flag for ``any_rank``.

        Args:
            result: the measurements of the step.
        """
        return self._limits.is_beyond(result.grad_norm_ratio)

    def note(
        self, step: int, no_loss: bool, no_gradient: bool, mean_loss: float = 0.0, norm_is_beyond: bool = False
    ) -> str | None:
        """Count a step, and find out whether it is one of too many.

        Args:
            step: its number.
            no_loss: whether any rank's loss was not finite.
            no_gradient: whether any rank's gradient was not finite, or its update was skipped.
            mean_loss: mean over micro-batches and ranks.
            norm_is_beyond: whether :meth:`is_beyond` on any rank.

        Returns:
            Why the run has to end; None if it has not.
        """
        if not no_gradient:
            self._updated = step
        if not no_loss:
            self._trained = step
            if not no_gradient:
                self.sound = step
        most = BROKEN_STEPS if self._nan is None else self._nan.steps
        cause = "" if self._nan is None else f"--stop-on {self._nan}: "
        if step - self._trained >= most:
            return f"{cause}the loss has not been finite since step {self._trained + 1}"
        if step - self.sound >= (max(most, SCALE_SEARCH_STEPS) if self._engine.fp16_enabled() else most):
            return f"{cause}the gradient has not been finite since step {self.sound + 1}"
        return self._limits.note(step, mean_loss, norm_is_beyond)

    def is_clean(self, step: int) -> bool:
        """Whether a step that was noted had a finite loss and gradient within their limits, and its update was made.

        Args:
            step: the number of the last step.
        """
        return self.sound == step and self._limits.is_quiet(step)

    @property
    def keeps_good_weights(self) -> bool:
        """Whether the weights are those of the last good step: it was within the limits, and no update followed."""
        return self._updated == self.sound and self._limits.is_quiet(self.sound)

    def end(self, step: int, found: str = "the weights, or the loss that they give, are not finite") -> NoReturn:
        """End a run.

        Args:
            step: the number of the last step.
            found: why.

        Raises:
            BrokenRunError: always.
        """
        raise self._error(step, found)

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

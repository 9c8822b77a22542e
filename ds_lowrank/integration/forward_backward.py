"""One call for the forward and backward passes of an optimizer step, whatever the optimizer needs of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ds_lowrank.errors import ConfigError
from ds_lowrank.integration.probe import perturbed_weights
from ds_lowrank.optimizer.optimizer import LowRankOptimizer

ONE_SIDED_DROPOUT = (
    "two_sided is false and the model has dropout: a one-sided difference is of first order in probe_radius, "
    "and dropout makes the loss rougher. Both passes drop the same elements; two_sided: true is more exact"
)

Forward = Callable[[], torch.Tensor]
"""Runs the model on one micro-batch and returns its loss, a scalar. May be called several times."""


def forward_backward(engine: Any, forwards: Forward | Sequence[Forward]) -> list[torch.Tensor]:
    """Run forward and backward on the micro-batches of one optimizer step; call ``engine.step()`` next.

    The same call serves every optimizer. For a method that probes the loss around the weights (``Lorenza``) it first
    runs forward passes without gradients on the same micro-batches with the same random state, moves the weights for
    the passes whose losses it returns, and restores them, also if anything raises.

    Args:
        engine: DeepSpeed's; or, without DeepSpeed, an optimizer of this package.
        forwards: one function per micro-batch of the step, in order; a single function stands for a list of one.

    Returns:
        The losses of the passes that gave the gradient, detached scalars, in order.

    Raises:
        ConfigError: there are more micro-batches than the step has left, or fewer than the step has although the method
            shares one perturbation among them.
        RemoteError: a probe failed on another rank; says which.
    """
    if hasattr(engine, "train_batch"):
        raise ConfigError(
            "a PipelineEngine runs forward and backward itself: call ds_lowrank.train_batch(engine, batches)"
        )
    steps = [forwards] if callable(forwards) else list(forwards)
    optimizer = engine if isinstance(engine, LowRankOptimizer) else getattr(engine, "basic_optimizer", None)
    passes = _Passes(engine, len(steps))
    passes.check_count()
    if not isinstance(optimizer, LowRankOptimizer) or optimizer.perturbation is None:
        return [passes.run(forward) for forward in steps]
    ascent = optimizer.perturbation.ascent
    if not ascent.per_micro_batch:
        passes.check_whole_step()
    if not ascent.two_sided and _drops(getattr(engine, "module", None)):
        optimizer.perturbation.warn_once("dropout", ONE_SIDED_DROPOUT)
    windows = [[forward] for forward in steps] if ascent.per_micro_batch else [steps]
    losses = [loss for window in windows for loss in _run_perturbed(optimizer, window, passes)]
    optimizer.perturbation.mark_gradients()
    return losses


def _run_perturbed(optimizer: LowRankOptimizer, window: Sequence[Forward], passes: _Passes) -> list[torch.Tensor]:
    """Run the passes of some micro-batches at weights that are perturbed for them."""

    def losses() -> list[torch.Tensor]:
        return [forward() for forward in window]

    with perturbed_weights(optimizer, losses, passes.device, passes.group, passes.position):
        return [passes.run(forward) for forward in window]


def _drops(module: Any) -> bool:
    """Whether a model in training mode has dropout."""
    if module is None or not module.training:
        return False
    return any(isinstance(part, torch.nn.Dropout) and part.p > 0 for part in module.modules())


class _Passes:
    """Backward passes as the engine wants them; without DeepSpeed, as plain torch does."""

    def __init__(self, engine: Any, count: int) -> None:
        self._engine, self._count, self._done = engine, count, 0
        self._is_plain = isinstance(engine, LowRankOptimizer)
        # Otherwise the caller decides when a step is complete, and each engine.step() is an optimizer step.
        self._counts = not self._is_plain and engine.managed_gradient_accumulation()

    @property
    def _whole(self) -> int:
        """The micro-batches of a step."""
        return int(self._engine.gradient_accumulation_steps()) if self._counts else self._count

    @property
    def position(self) -> int:
        """How many micro-batches of this step came before."""
        return int(self._engine.micro_steps) % self._whole if self._counts else self._done

    @property
    def device(self) -> torch.device:
        if self._is_plain:
            device: torch.device = self._engine.slots[0].parameter.device
            return device
        return torch.device(self._engine.device)

    @property
    def group(self) -> Any:
        """The data-parallel ranks; None for all, so that tensor-parallel ranks see the same number too."""
        alone = self._is_plain or self._engine.basic_optimizer.grid.tensor is not None
        return None if alone else getattr(self._engine, "seq_data_parallel_group", None)

    def check_count(self) -> None:
        left = self._whole - self.position
        if not 0 < self._count <= left:
            raise ConfigError(
                f"forward_backward got {self._count} micro-batches, and this step has {left} left of "
                f"gradient_accumulation_steps {self._whole}: pass those of one step, then call engine.step()"
            )

    def check_whole_step(self) -> None:
        if self._count != self._whole:
            raise ConfigError(
                f"accumulation 'per_step' needs all {self._whole} micro-batches of a step in one call of "
                f"forward_backward, got {self._count}: pass a list of {self._whole}, or set accumulation to "
                "'per_micro_batch'"
            )

    def run(self, forward: Forward) -> torch.Tensor:
        loss = forward()
        self._done += 1
        if self._is_plain:
            (loss / self._count).backward()  # type: ignore[no-untyped-call]
            return loss.detach()
        self._engine.backward(loss)
        if self._counts and self._done < self._count:
            self._engine.step()  # inside a step it only counts
        return loss.detach()

"""One optimizer step through DeepSpeed's ``PipelineEngine``, whatever the optimizer needs of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ds_lowrank.errors import ConfigError
from ds_lowrank.integration.probe import perturbed_weights
from ds_lowrank.optimizer.optimizer import LowRankOptimizer


def train_batch(engine: Any, batches: Iterable[Any]) -> torch.Tensor:
    """Run one step of a ``PipelineEngine`` on its micro-batches, with any optimizer.

    For a method that probes the loss around the weights (``Lorenza``) it first calls ``engine.eval_batch`` on the same
    micro-batches. That runs the model in evaluation mode, without dropout. The weights are restored before the
    optimizer changes them. For other optimizers it only calls ``engine.train_batch``.

    Args:
        engine: a ``PipelineEngine``.
        batches: ``(inputs, labels)`` of every micro-batch, as ``engine.train_batch`` takes them. Only the first and the
            last stage read them, but every rank must pass the same number.

    Returns:
        The mean loss over micro-batches and data-parallel ranks, on every rank: a scalar.

    Raises:
        ConfigError: the number of micro-batches is not that of a step, or the engine has no pipeline.
    """
    if not hasattr(engine, "train_batch"):
        raise ConfigError(
            "train_batch is for a PipelineEngine: call ds_lowrank.forward_backward(engine, forwards) and engine.step()"
        )
    batches = list(batches)
    if len(batches) != engine.micro_batches:
        raise ConfigError(
            f"train_batch got {len(batches)} micro-batches, gradient_accumulation_steps is {engine.micro_batches}: "
            "pass those of one step"
        )
    optimizer = engine.basic_optimizer
    if not isinstance(optimizer, LowRankOptimizer) or optimizer.perturbation is None:
        return _mean(engine.train_batch(iter(batches)))

    def losses() -> list[torch.Tensor]:
        return [engine.eval_batch(iter(batches))]

    with perturbed_weights(optimizer, losses, engine.device, None) as perturbation:
        perturbation.mark_gradients()  # before the engine's own step, inside its train_batch
        return _mean(engine.train_batch(iter(batches)))


def _mean(loss: torch.Tensor) -> torch.Tensor:
    return loss.detach().mean()

"""Predictions and losses on held-out examples, gathered over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from ds_lowrank.collectives import all_gather_object
from ds_lowrank.data.examples import Example, HeldOut


@torch.no_grad()
def predictions_of_all(
    engine: DeepSpeedEngine, batches: Sequence[HeldOut], predict: Callable[[torch.Tensor], list[float]]
) -> tuple[float, list[float], list[float]]:
    """Predict all held-out examples. Collective.

    Args:
        engine: the engine of the model; it is left in training mode.
        batches: this rank's batches; all ranks must have the same number of them.
        predict: makes predictions from logits ``[examples, classes]``.

    Returns:
        The mean loss per example, the predictions, and the labels in the same order, the same on every rank.
    """
    total, own = 0.0, []
    for loss, logits, examples in _forwards(engine, batches):
        total += float(loss) * len(examples)
        own += list(zip(predict(logits), (float(e.labels) for e in examples), strict=True))
    gathered = all_gather_object((total, own))
    pairs = [pair for _, share in gathered for pair in share]
    mean = sum(part for part, _ in gathered) / len(pairs)
    return mean, [prediction for prediction, _ in pairs], [label for _, label in pairs]


@torch.no_grad()
def summed_loss(engine: DeepSpeedEngine, batches: Sequence[HeldOut]) -> float:
    """Mean loss per labelled token over the batches of all ranks. Collective.

    Args:
        engine: the engine of the model; it is left in training mode.
        batches: this rank's batches; all ranks must have the same number of them.

    Returns:
        The loss in nats, the same number on every rank.
    """
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)  # loss times tokens, tokens
    for loss, _, examples in _forwards(engine, batches):
        tokens = sum(example.targets for example in examples)
        total += torch.stack([loss.double() * tokens, torch.full_like(total[1], tokens)])
    dist.all_reduce(total)
    return float(total[0] / total[1])


def _forwards(
    engine: DeepSpeedEngine, batches: Sequence[HeldOut]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, Sequence[Example]]]:
    """Loss, logits and examples of every batch that counts. The others run too, to keep the ranks in step."""
    engine.eval()
    for batch, examples in batches:
        output = engine(**{key: value.to(engine.device) for key, value in batch.items()})
        if examples:
            yield output.loss, output.logits, examples
    engine.train()

"""Predictions on held-out examples, gathered over the ranks; one result for all of them."""

from collections.abc import Callable, Iterator, Sequence

import torch
from deepspeed import DeepSpeedEngine
from torch import distributed

from ds_lowrank.data.examples import Example, HeldOut


@torch.no_grad()
def predictions_of_all(
    engine: DeepSpeedEngine, batches: Sequence[HeldOut], predict: Callable[[torch.Tensor], list[float]]
) -> tuple[float, list[float], list[float]]:
    """Mean loss an example, predictions from logits `[examples, classes]`, and labels, over all ranks. Collective."""
    total, own = 0.0, []
    for loss, logits, examples in _forwards(engine, batches):
        total += float(loss) * len(examples)
        own += list(zip(predict(logits), (float(e.labels) for e in examples), strict=True))
    gathered: list[tuple[float, list[tuple[float, float]]]] = [(0.0, [])] * distributed.get_world_size()
    distributed.all_gather_object(gathered, (total, own))
    pairs = [pair for _, share in gathered for pair in share]
    mean = sum(part for part, _ in gathered) / len(pairs)
    return mean, [prediction for prediction, _ in pairs], [label for _, label in pairs]


@torch.no_grad()
def summed_loss(engine: DeepSpeedEngine, batches: Sequence[HeldOut]) -> float:
    """Mean loss a labelled token over the batches of all ranks, in nats. Collective."""
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)  # loss times tokens, tokens
    for loss, _, examples in _forwards(engine, batches):
        tokens = sum(example.targets for example in examples)
        total += torch.stack([loss.double() * tokens, torch.full_like(total[1], tokens)])
    distributed.all_reduce(total)
    return float(total[0] / total[1])


def _forwards(
    engine: DeepSpeedEngine, batches: Sequence[HeldOut]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, Sequence[Example]]]:
    """Loss, logits and examples of every batch that counts; the others run too, as all ranks must run as many."""
    engine.eval()
    for batch, examples in batches:
        output = engine(**{key: value.to(engine.device) for key, value in batch.items()})
        if examples:
            yield output.loss, output.logits, examples
    engine.train()

"""The loss on held-out text, the same number on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine

from ds_lowrank.data.batches import ValidationBatch


@torch.no_grad()
def evaluate(engine: DeepSpeedEngine, batches: Sequence[ValidationBatch]) -> float:
    """Mean loss per predicted token over the batches of all ranks. Collective.

    Args:
        engine: the engine of the model; it is left in training mode.
        batches: this rank's batches. All ranks must have the same number of them, as a forward pass is a collective at
            ZeRO 3. Batches with 0 sequences run but do not count.

    Returns:
        The loss in nats, the same number on every rank.
    """
    if isinstance(engine, PipelineEngine):
        return _through_pipeline(engine, batches)
    engine.eval()
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)  # loss times tokens, tokens
    for batch, sequences in batches:
        batch = batch.to(engine.device)
        loss = engine(input_ids=batch, labels=batch).loss
        if sequences:
            tokens = sequences * (batch.shape[1] - 1)
            total += torch.stack([loss.double() * tokens, torch.full_like(total[1], tokens)])
    dist.all_reduce(total)
    engine.train()
    return float(total[0] / total[1])


def _through_pipeline(engine: PipelineEngine, batches: Sequence[ValidationBatch]) -> float:
    """The same through a pipeline. Batches have one size and all count; the engine averages over the ranks itself."""
    losses = [engine.eval_batch(iter([(tokens, tokens)]), num_micro_batches=1) for tokens, _ in batches]
    engine.train()
    return float(torch.stack(losses).double().mean())

"""The loss on held-out text, one number for all ranks."""

from collections.abc import Sequence

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import distributed

from ds_lowrank.data.batches import ValidationBatch


@torch.no_grad()
def evaluate(engine: DeepSpeedEngine, batches: Sequence[ValidationBatch]) -> float:
    """Mean loss a predicted token over the batches of all ranks, in nats.

    Collective. Every rank must hold as many batches, for a forward is a collective at ZeRO 3; those with 0
    sequences run without counting.
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
    distributed.all_reduce(total)
    engine.train()
    return float(total[0] / total[1])


def _through_pipeline(engine: PipelineEngine, batches: Sequence[ValidationBatch]) -> float:
    """Batches of one size, all of which count: the engine averages over the data-parallel ranks itself."""
    losses = [engine.eval_batch(iter([(tokens, tokens)]), num_micro_batches=1) for tokens, _ in batches]
    engine.train()
    return float(torch.stack(losses).double().mean())

"""The record of one optimizer step for metrics.jsonl."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from ds_lowrank.checkpoint.manifest import Progress
from ds_lowrank.collectives import all_gather_object
from ds_lowrank.optimizer.optimizer import LowRankOptimizer
from ds_lowrank.training.loop import StepResult, mean_over_ranks, peak_memory_gib


def step_record(
    engine: DeepSpeedEngine, result: StepResult, lr: float, progress: Progress, since: Progress
) -> dict[str, Any]:
    """Make the record of the last optimizer step. Collective.

    Args:
        engine: the engine of the model.
        result: this rank's measurements of the step.
        lr: the learning rate of the step.
        progress: how far the run is after the step.
        since: the progress at the previous record, from which tokens per second are computed.

    Returns:
        A record that can be written as JSON. ``loss`` is the mean over micro-batches and ranks; ``seconds`` counts
        training steps only; forward, backward and step times are those of this rank; ``memory_gib`` is the peak of the
        rank that used most.
    """
    optimizer = engine.basic_optimizer
    low_rank = isinstance(optimizer, LowRankOptimizer)
    counters: dict[str, float] = optimizer.metrics() if low_rank else {}
    matrices: dict[str, dict[str, int]] = optimizer.matrices() if low_rank else {}
    if low_rank and optimizer.grid.pipeline is not None:
        counters, matrices = _over_stages(counters, matrices, optimizer.grid.pipeline)
    return {
        "step": progress.step,
        "tokens": progress.tokens,
        "loss": mean_over_ranks(result.loss),
        "grad_norm": result.grad_norm,
        "lr": lr,
        "tokens_per_second": (progress.tokens - since.tokens) / (progress.seconds - since.seconds),
        "seconds": progress.seconds,
        "forward_seconds": result.forward_seconds,
        "backward_seconds": result.backward_seconds,
        "step_seconds": result.step_seconds,
        "memory_gib": peak_memory_gib(engine.device),
        # In fp32 at ZeRO 0, DeepSpeed does not check for overflow, and only the optimizer counts skipped steps.
        "skipped_steps": engine.skipped_steps + counters.get("lowrank/skipped_updates", 0),
        **counters,
        **({"matrices": matrices} if matrices else {}),
    }


def _over_stages(
    counters: dict[str, float], matrices: dict[str, dict[str, int]], pipeline: dist.ProcessGroup
) -> tuple[dict[str, float], dict[str, dict[str, int]]]:
    """Combine the metrics of all stages of a pipeline. Collective over the stages."""
    stages = all_gather_object((counters, matrices), pipeline)
    total = {key: sum(stage[key] for stage, _ in stages) for key in counters}
    projected = "lowrank/projected_matrices"
    total["lowrank/mean_rank"] = sum(s["lowrank/mean_rank"] * s[projected] for s, _ in stages) / max(
        1, total[projected]
    )
    for key in total.keys() & {"lowrank/skipped_updates", "lowrank/perturbation_norm", "lowrank/failed_ascents"}:
        total[key] = counters[key]  # every stage has that of the whole model
    return total, {name: found for _, of_stage in stages for name, found in of_stage.items()}

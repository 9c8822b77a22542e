"""The record of one optimizer step for metrics.jsonl."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from ds_lowrank.checkpoint.manifest import Progress
from ds_lowrank.collectives import all_gather_object
from ds_lowrank.optimizer.optimizer import LowRankOptimizer
from ds_lowrank.training.loop import StepResult, mean_over_ranks
from ds_lowrank.training.memory import peak_memory
from ds_lowrank.training.meter import Meter


def step_record(
    engine: DeepSpeedEngine, result: StepResult, lr: float, progress: Progress, since: Progress, meter: Meter
) -> dict[str, Any]:
    """Make the record of the last optimizer step. Collective.

    Args:
        engine: the engine of the model.
        result: this rank's measurements of the step.
        lr: the learning rate of the step.
        progress: how far the run is after the step.
        since: the progress at the previous record, from which tokens per second are computed.
        meter: what has counted the steps since then.

    Returns:
        A record that can be written as JSON. ``loss`` is the mean over micro-batches and ranks; ``seconds`` counts
        training steps only; the times of parts of a step and the FLOPS are those of this rank; peaks of memory are
        those of the rank that used most.
    """
    optimizer = engine.basic_optimizer
    low_rank = isinstance(optimizer, LowRankOptimizer)
    counters: dict[str, float] = optimizer.metrics() if low_rank else {}
    matrices: dict[str, dict[str, int]] = optimizer.matrices() if low_rank else {}
    if low_rank and optimizer.grid.pipeline is not None:
        counters, matrices = _over_stages(counters, matrices, optimizer.grid.pipeline)
    energy: dict[str, float | None] = optimizer.captured_energy() if low_rank else {}
    speed, memory = meter.read(progress, since), peak_memory(engine.device)
    return {
        "step": progress.step,
        "tokens": progress.tokens,
        "loss": mean_over_ranks(result.loss),
        "grad_norm": result.grad_norm,
        "grad_norm_ratio": result.grad_norm_ratio,
        "lr": lr,
        "tokens_per_second": speed.tokens_per_second,
        "tokens_per_second_per_gpu": speed.tokens_per_second_per_gpu,
        "tflops_per_gpu": speed.tflops_per_gpu,
        "mfu": speed.mfu,
        "flops_source": speed.flops_source,
        "seconds": progress.seconds,
        "remaining_seconds": speed.remaining_seconds,
        "projected_end": speed.projected_end,
        "forward_seconds": result.forward_seconds,
        "backward_seconds": result.backward_seconds,
        "reduce_seconds": result.reduce_seconds,
        "step_seconds": result.step_seconds,
        "refresh_seconds": optimizer.refresh_seconds if low_rank else None,
        "memory_gib": memory.main,
        "memory_reserved_gib": memory.reserved,
        "resident_gib": memory.resident,
        # In fp32 at ZeRO 0, DeepSpeed does not check for overflow, and only the optimizer counts skipped steps.
        "skipped_steps": engine.skipped_steps + counters.get("lowrank/skipped_updates", 0),
        **counters,
        "lowrank/captured_energy": energy.get("lowrank/captured_energy"),
        "lowrank/least_captured_energy": energy.get("lowrank/least_captured_energy"),
        "lowrank/update_ratio": result.update_ratio,
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

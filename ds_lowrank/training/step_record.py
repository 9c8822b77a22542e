"""What is known about one optimizer step, as one record of metrics.jsonl."""

from typing import Any

from deepspeed import DeepSpeedEngine
from torch import distributed

from ds_lowrank.checkpoint.store import Progress
from ds_lowrank.optimizer.optimizer import LowRankOptimizer
from ds_lowrank.training.loop import StepResult, mean_over_ranks, peak_memory_gib


def step_record(
    engine: DeepSpeedEngine, result: StepResult, lr: float, progress: Progress, since: Progress
) -> dict[str, Any]:
    """The record of the step just done, which used `lr`; its tokens a second are those from `since` on.

    Loss: mean over micro-batches and ranks. Seconds: of training steps alone; forward, backward and step are those of
    this step on this rank. Memory: the peak of the rank that holds most. Collective.
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
        # In fp32 at ZeRO 0 DeepSpeed looks for no overflow, and the optimizer's own count is the only one.
        "skipped_steps": engine.skipped_steps + counters.get("lowrank/skipped_updates", 0),
        **counters,
        **({"matrices": matrices} if matrices else {}),
    }


def _over_stages(
    counters: dict[str, float], matrices: dict[str, dict[str, int]], pipeline: distributed.ProcessGroup
) -> tuple[dict[str, float], dict[str, dict[str, int]]]:
    """What the stages of a pipeline report, together. Collective over them."""
    stages: list[Any] = [None] * distributed.get_world_size(pipeline)
    distributed.all_gather_object(stages, (counters, matrices), group=pipeline)
    total = {key: sum(stage[key] for stage, _ in stages) for key in counters}
    projected = "lowrank/projected_matrices"
    total["lowrank/mean_rank"] = sum(s["lowrank/mean_rank"] * s[projected] for s, _ in stages) / max(
        1, total[projected]
    )
    for key in total.keys() & {"lowrank/skipped_updates", "lowrank/perturbation_norm", "lowrank/failed_ascents"}:
        total[key] = counters[key]  # of the whole model on every stage
    return total, {name: found for _, of_stage in stages for name, found in of_stage.items()}

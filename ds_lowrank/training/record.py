"""What is known about one optimizer step, as one record of metrics.jsonl."""

from typing import Any

from deepspeed import DeepSpeedEngine

from ds_lowrank.checkpoint.store import Progress
from ds_lowrank.optimizer import LowRankOptimizer
from ds_lowrank.training.loop import StepResult, mean_over_ranks, peak_memory_gib


def describe(
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

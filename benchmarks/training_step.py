"""Time of a whole training step with several optimizers, at the same ZeRO stage, on the quick-start model.

python -m benchmarks.training_step --stages 0 1 2 3

All engines are in the same gloo ranks, one thread each, and take turns step by step. The rank is a quarter of the
hidden size; VLoRP has an eighth of that for each of eight units a row; LORENZA uses one two-sided probe. *ordinary*
steps keep their bases; *amortised* is the mean over an interval of 200 steps, one of which refreshes every basis. The
ratios compare amortised steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import Numbers, interleaved, options, report
from benchmarks.gpu.cases import method_options
from benchmarks.ranks import engines, on_ranks

MODEL = Path(__file__).parents[1] / "ds_configs/models/llama_quickstart.json"
GAP = 200
PARTS = ("forward", "backward", "step")
OTHERS = ("Apollo", "VLoRP", "OnlineSubspaceDescent")


def contenders(stage: int, micro: int, ranks: int, seed: int) -> dict[str, Any]:
    """Build one DeepSpeed engine per optimizer, each with its own copy of the same model. Collective."""
    from ds_lowrank.models import llama

    model = llama.load_config(MODEL)
    galore = {"lr": 1e-2, "rank": model.hidden_size // 4, "update_proj_gap": GAP}
    adamw = {"lr": 1e-3, "torch_adam": True}
    optimizers = {
        "AdamW": {"type": "AdamW", "params": adamw},
        "GaLore": {"type": "GaLore", "params": galore},
        "GaLore, int8": {"type": "GaLore", "params": {**galore, "state_dtype": "int8"}},
        "GradNormLoRP": {"type": "GradNormLoRP", "params": galore},
        **{
            name: {"type": name, "params": {"lr": 1e-3, **method_options(name, galore["rank"], GAP)}} for name in OTHERS
        },
        "Lorenza": {"type": "Lorenza", "params": {**galore, "perturbation_radius": 0.05}},
    }
    return engines(optimizers, model, stage, micro, ranks, seed)


def time_steps(stage: int, micro: int, length: int, repeats: int, seed: int) -> dict[str, dict[str, float]]:
    """Return the median seconds of each optimizer's forward, backward, step and refreshing step on this rank."""
    from ds_lowrank.training.loop import StepResult, train_step

    built = contenders(stage, micro, dist.get_world_size(), seed)
    vocabulary = built["AdamW"].module.config.vocab_size
    batch = torch.randint(vocabulary, (micro, length), generator=torch.Generator().manual_seed(seed))
    results: dict[str, list[StepResult]] = {name: [] for name in built}

    def step(name: str) -> Callable[[], None]:
        return lambda: results[name].append(
            train_step(built[name], [{"input_ids": batch, "labels": batch}], measure=True)
        )

    def refreshing(name: str) -> float:
        for slot in built[name].basic_optimizer.slots:
            slot.state["step"] = GAP
        step(name)()
        return results[name].pop().step_seconds

    interleaved({name: step(name) for name in built}, repeats, warm_up=2)
    found = {
        name: {part: median(getattr(result, f"{part}_seconds") for result in taken[2:]) for part in PARTS}
        for name, taken in results.items()
    }
    for name in (name for name in built if name not in ("AdamW", "OnlineSubspaceDescent")):  # these never refresh
        found[name]["refresh"] = median(refreshing(name) for _ in range(3))
    return found


def measure(stage: int, ranks: int, micro: int, length: int, repeats: int, seed: int) -> Numbers:
    """Return one record per optimizer at one ZeRO stage, with the times of rank 0."""
    found = on_ranks(ranks, time_steps, stage, micro, length, repeats, seed)
    rows: Numbers = []
    ordinary = {name: sum(seconds[part] for part in PARTS) for name, seconds in found.items()}
    amortised = {
        name: ordinary[name] + (seconds.get("refresh", seconds["step"]) - seconds["step"]) / GAP
        for name, seconds in found.items()
    }
    for name, seconds in found.items():
        rows.append(
            {
                "ZeRO": stage,
                "optimizer": name,
                **{f"{part} ms": 1e3 * seconds[part] for part in PARTS},
                "refresh ms": 1e3 * seconds["refresh"] if "refresh" in seconds else None,
                "ordinary ms": 1e3 * ordinary[name],
                "amortised ms": 1e3 * amortised[name],
                "over AdamW": amortised[name] / amortised["AdamW"],
                "over GaLore": amortised[name] / amortised["GaLore"],
            }
        )
    return rows


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = options(__doc__)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], choices=range(4))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--micro-batch-size", type=int, default=4, help="sequences per rank")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=31, help="steps of each optimizer")
    return parser.parse_args()


def main() -> None:
    """Measure and report."""
    arguments = parse()
    sizes = (arguments.ranks, arguments.micro_batch_size, arguments.sequence_length)
    repeats = 3 if arguments.quick else arguments.repeats
    rows = [row for stage in arguments.stages for row in measure(stage, *sizes, repeats, arguments.seed)]
    report(rows, arguments)


if __name__ == "__main__":
    main()

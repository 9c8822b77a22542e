"""GB of memory that each GPU needs for weights, gradients and state: arithmetic at a model's shapes, nothing is run.

python -m benchmarks.memory

Per parameter, with w bytes of a weight in the model's precision and W data-parallel ranks (the same is counted on real
engines by `tests/engines/test_memory.py`):

    ZeRO    weights    fp32 masters            gradients    the same, in the step
    0       w          4, none if w is fp32    w            w + 4, in fp32 w
    1       w          4 / W                   w            4 / W
    2       w          4 / W                   w / W        4 / W
    3       w / W      4 / W                   w / W        (w + 4) / W

The state is counted as the role table does, and shared by the W ranks from ZeRO 1 on. *Gathered* is what a step keeps
until its end for every projected matrix, ``4 r (held compressed rows + owned kept rows)``: at ZeRO 3 a rank holds all
compressed rows, at ZeRO 1 and 2 those of its share; one rank gathers no basis. At ZeRO 1 and 2 the gradient is there in
both precisions before that, which may be the more. Tensor and pipeline parallelism divide everything by their degrees,
on average. Activations, the buffers of DeepSpeed and of one round, and CUDA's own come on top of the larger of
*backward* and *step*.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import ds_lowrank
from benchmarks.common import Numbers, options, report
from ds_lowrank.estimate.deepspeed import per_element
from ds_lowrank.optimizer.report import state_bytes

MODELS = Path(__file__).parents[1] / "ds_configs/models"


@dataclass(frozen=True)
class Case:
    """One row: a model, how it is spread over GPUs, and an optimizer.

    Attributes:
        size: of ``ds_configs/models``.
        zero: the stage.
        data: data-parallel ranks.
        model_parallel: tensor times pipeline degree.
        optimizer: the method's ``type`` and options; AdamW has none.
        weight: bytes of a weight, 2 in bf16.
    """

    size: str
    zero: int
    data: int = 1
    model_parallel: int = 1
    optimizer: dict[str, Any] = field(default_factory=lambda: {"type": "AdamW"})
    weight: int = 2


def galore(rank: int, state_dtype: str = "fp32") -> dict[str, Any]:
    """GaLore's block of the configuration."""
    return {"type": "GaLore", "rank": rank, "state_dtype": state_dtype}


CASES = (
    *(Case("1b", 2, optimizer=optimizer) for optimizer in (galore(512), galore(512, "int8"), {"type": "AdamW"})),
    Case("1b", 2, optimizer={"type": "Apollo", "mini": True}),
    Case("3b", 2, optimizer=galore(512, "int8")),
    Case("7b", 2, optimizer=galore(128, "int8")),
    *(Case("7b", zero, 8, optimizer=optimizer) for zero in (2, 3) for optimizer in (galore(1024), {"type": "AdamW"})),
    Case("7b", 3, 8, optimizer=galore(128)),
    *(Case("7b", zero, 32, optimizer=galore(1024)) for zero in (1, 2, 3)),
    Case("7b", 1, 8, 32, optimizer=galore(1024)),
    Case("7b", 3, 8, 8, optimizer=galore(1024)),
)


def bytes_a_parameter(zero: int, weight: int, ranks: int) -> dict[str, float]:
    """Bytes of a trained parameter on a rank: weights, masters, gradients before the step, and in it.

    Args:
        zero: the stage.
        weight: bytes of a weight in the model's precision.
        ranks: data-parallel ranks.
    """
    return per_element(zero, weight, 1, 1 / ranks if zero else 1)


def shapes_of(optimizer: Any) -> tuple[int, int]:
    """Numbers of all bases and of all projected gradients: r times the compressed, and r times the kept dimension."""
    bases = projections = 0
    for slot in optimizer.slots:
        if slot.is_projected:
            bases += slot.rank * min(slot.shape)
            projections += slot.rank * max(slot.shape)
    return bases, projections


def measure(case: Case) -> dict[str, Any]:
    """The row of a case, in GB a GPU."""
    from transformers import LlamaForCausalLM

    from ds_lowrank.models import llama

    with torch.device("meta"):
        model: torch.nn.Module = LlamaForCausalLM(llama.load_config(MODELS / f"llama_{case.size}.json"))
    name, params = case.optimizer["type"], {key: value for key, value in case.optimizer.items() if key != "type"}
    trained = sum(parameter.numel() for parameter in model.parameters())
    state, bases, projections = 8 * trained, 0, 0
    if name != "AdamW":
        optimizer = getattr(ds_lowrank, name)(model, **params)
        optimizer.bind()
        state = sum(state_bytes(optimizer.slots))
        bases, projections = shapes_of(optimizer)
    each = {key: trained * value for key, value in bytes_a_parameter(case.zero, case.weight, case.data).items()}
    shared = case.data if case.zero else 1
    held = 0 if name == "Apollo" or shared == 1 else bases / (1 if case.zero == 3 else shared)
    gathered = 4 * (held + projections / shared)
    kept = each["weights"] + each["masters"] + state / shared
    parts = {
        **{key: each[key] for key in ("weights", "masters", "gradients")},
        "state": state / shared,
        "gathered": gathered,
        "backward": kept + each["gradients"],
        "step": kept
        + each["in the step"]
        + max(gathered, case.weight * trained / shared if case.zero in {1, 2} else 0),
    }
    return {
        "model": case.size,
        "GPUs": case.data * case.model_parallel,
        "data": case.data,
        "ZeRO": case.zero,
        "optimizer": ", ".join([name, *(f"{key} {value}" for key, value in params.items())]),
        **{key: round(value / case.model_parallel / 1e9, 2) for key, value in parts.items()},
    }


def main() -> None:
    """Compute and report."""
    arguments = options(__doc__).parse_args()
    logging.disable(logging.WARNING)
    rows: Numbers = [measure(case) for case in (CASES[:1] if arguments.quick else CASES)]
    report(rows, arguments)


if __name__ == "__main__":
    main()

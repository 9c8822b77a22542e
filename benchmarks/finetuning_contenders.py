"""The optimizers that ``benchmarks/finetuning.py`` compares, where their sweeps begin, and the bytes of their state."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import LlamaConfig, LlamaForSequenceClassification

from benchmarks.runs import ROOT
from ds_lowrank import add_adapters
from ds_lowrank.optimizer.roles import role_of
from ds_lowrank.placement.parameter_names import tag_of, tag_parameters

MODEL = ROOT / "ds_configs/models/llama_quickstart.json"
RANK = 8
GAP = 50
MOMENTS = 2 * 4  # bytes of state per element that AdamW trains


@dataclass(frozen=True, eq=False)
class Contender:
    """An optimizer, its options, and where the sweep of its learning rate begins.

    Attributes:
        name: The label in the table.
        type: DeepSpeed's ``optimizer.type``.
        params: DeepSpeed's ``optimizer.params``, without ``lr``.
        lr: The first learning rate, on every task.
        flags: Arguments of launch/finetune.py in addition to those that all contenders share.
    """

    name: str
    type: str
    params: Mapping[str, Any]
    lr: float
    flags: Mapping[str, Any] = field(default_factory=dict)


ADAMW = {"torch_adam": True}
BASIS = {"rank": RANK, "update_proj_gap": GAP, "scale": 1.0}
ADAPTERS = {"parametrization": "adapter", "adapter_rank": RANK, "adapter_alpha": 2.0 * RANK}
CONTENDERS: tuple[Contender, ...] = (
    Contender("AdamW", "AdamW", ADAMW, 1e-3),
    Contender("AdamW, two rates", "AdamW", ADAMW, 4e-3, {"matrix-lr-scale": 1 / 8}),
    Contender("LoRA", "AdamW", ADAMW, 5e-3, {"lora-rank": RANK, "lora-alpha": 2 * RANK}),
    Contender("GaLore", "GaLore", BASIS, 4e-3),
    Contender("Apollo", "Apollo", BASIS, 8e-3),
    Contender("Fira", "Fira", {**BASIS, "moments": "rotate"}, 2e-3),
    Contender("Tandem", "Tandem", {"rank": RANK, "scale": 1.0}, 4e-3),
    Contender("GradNormLoRP", "GradNormLoRP", BASIS, 4e-3),
    Contender("GradNormLoRP adapter", "GradNormLoRP", {**BASIS, **ADAPTERS, "rank": RANK // 2}, 5e-3),
    Contender("Lorenza", "Lorenza", BASIS, 4e-3),
)
"""All ranks equal LoRA's, except for an adapter's factors, which have no more columns than that and get half of it.
A basis lasts ``GAP`` steps, with Tandem its default of 25."""


def projected_numbers(contender: Contender) -> int:
    """Count the elements of the matrices that a low-rank method projects."""
    model = LlamaForSequenceClassification(LlamaConfig(**json.loads(MODEL.read_text())))
    if contender.params.get("parametrization") == "adapter":
        add_adapters(model, adapter_rank=contender.params["adapter_rank"])
    tag_parameters(model)
    tagged = [(tag_of(p), p) for p in model.parameters() if p.requires_grad]
    return sum(p.numel() for tag, p in tagged if tag and role_of(tag, tuple(p.shape), None, ()).projected)


def state_bytes(contender: Contender, record: Mapping[str, Any]) -> int:
    """Return the bytes of all moments and bases of a run."""
    trained, lowrank = int(record["trainable_parameters"]), record.get("lowrank/state_bytes")
    if lowrank is None:
        return MOMENTS * trained
    return int(lowrank) + MOMENTS * (trained - projected_numbers(contender))

"""The scenario of ``tests/engines``, trained by the Hugging Face Trainer, and by our own engine on the same batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.engines.scenario import BATCH, METHODS, full_weights, make_model, make_model_for, tokens

CONFIGS = Path(__file__).parents[2] / "ds_configs"
LR, STEPS = 0.01, 10


def hf_config(stage: int, method: str = "GaLore", **params: Any) -> dict[str, Any]:
    """The shipped configuration with its ``auto`` values, at any stage, with options for small matrices."""
    settings = json.loads((CONFIGS / f"hf_galore_zero{3 if stage == 3 else 2}.json").read_text())
    settings["zero_optimization"]["stage"] = stage
    auto = {key: value for key, value in settings["optimizer"]["params"].items() if value == "auto"}
    settings["optimizer"] = {"type": method, "params": {**METHODS[method], **auto, **params}}
    return settings


class Rows(torch.utils.data.Dataset):
    """The rows of all steps, in order."""

    def __init__(self, steps: int) -> None:
        self.rows = torch.cat([tokens(step) for step in range(steps)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def micro_batches(step: int, rank: int, ranks: int, gas: int) -> list[torch.Tensor]:
    """What accelerate gives a rank of a step: every ``ranks``-th batch."""
    return list(tokens(step).chunk(ranks * gas)[rank::ranks])


def arguments(folder: Path, stage: int, ranks: int, gas: int = 1, **options: Any) -> Any:
    """``TrainingArguments`` of the scenario, or of another ``kind``."""
    from transformers import TrainingArguments

    kind = options.pop("kind", TrainingArguments)
    config = options.pop("deepspeed", None) or hf_config(stage)
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH // (ranks * gas),
        "gradient_accumulation_steps": gas,
        "learning_rate": LR,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
        "adam_epsilon": METHODS["GaLore"]["eps"],
        "max_grad_norm": 0.5,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "deepspeed": config,
    }
    return kind(**settings | options)


def train_with_trainer(folder: Path, stage: int, gas: int = 1, **options: Any) -> dict[str, Any]:
    """Ten steps by the Trainer: this rank's view of the weights, and the log."""
    import torch.distributed as dist
    from transformers import Trainer

    import ds_lowrank

    ds_lowrank.register()
    own = arguments(folder, stage, dist.get_world_size(), gas, **options)
    trainer = Trainer(model=make_model(), args=own, train_dataset=Rows(STEPS))
    trainer.train()
    return {"weights": full_weights(trainer.model_wrapped), "log": trainer.state.log_history}


def train_with_own_engine(settings: dict[str, Any], gas: int = 1, steps: int = STEPS) -> dict[str, Any]:
    """The same steps through ``ds_lowrank.initialize``."""
    import torch.distributed as dist
    from transformers import get_linear_schedule_with_warmup

    import ds_lowrank

    rank, ranks = dist.get_rank(), dist.get_world_size()
    engine, *_ = ds_lowrank.initialize(
        model=make_model_for(settings, False),
        config=settings,
        lr_scheduler=lambda optimizer: get_linear_schedule_with_warmup(optimizer, 2, STEPS),
    )
    losses = []
    for step in range(steps):
        micros = micro_batches(step, rank, ranks, gas)
        losses += ds_lowrank.forward_backward(
            engine, [lambda m=micro: engine(input_ids=m, labels=m).loss for micro in micros]
        )
        engine.step()
    return {"weights": full_weights(engine), "losses": [float(loss) for loss in losses]}


def own_config(stage: int, ranks: int, gas: int = 1, **changes: Any) -> dict[str, Any]:
    """What the Trainer makes of ``hf_config``, written out."""
    from tests.engines.scenario import config

    return config(stage, ranks, gas=gas, clip=0.5, params={"lr": LR}, **changes)


def max_difference(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of a parameter."""
    assert weights.keys() == expected.keys()
    return max(float((weights[key] - expected[key]).norm() / expected[key].norm()) for key in expected)

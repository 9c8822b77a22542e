"""Give parts of a model their own rank, learning rate and weight decay, and choose by name what is projected.

    python examples/parameter_groups.py
    deepspeed --num_gpus 2 examples/parameter_groups.py    # prints the same losses

A group overrides any option of ``optimizer.params``. The table printed at the start shows what is projected. Runs on a
CPU in seconds. Needs ``pip install ".[train]"``.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import mse_loss

import ds_lowrank
from ds_lowrank.training.distributed import join, leave

CONFIG = {
    "train_batch_size": 64,
    "optimizer": {
        "type": "GaLore",
        "params": {"lr": 0.01, "rank": 8, "update_proj_gap": 20, "exclude_modules": ["gate"]},
    },
    "zero_optimization": {"stage": 1},
}


def make_model() -> torch.nn.Module:
    """A perceptron of three matrices, one of which is excluded from projection by its name."""
    torch.manual_seed(0)
    layers = {
        "up": torch.nn.Linear(32, 128),
        "act": torch.nn.GELU(),
        "gate": torch.nn.Linear(128, 128),
        "sigmoid": torch.nn.Sigmoid(),
        "down": torch.nn.Linear(128, 16),
    }
    return torch.nn.Sequential(OrderedDict(layers))


def make_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """A larger rank for ``up``, weight decay for all matrices, and a smaller learning rate for the biases."""
    named = dict(model.named_parameters())
    rest = [(name, p) for name, p in named.items() if p.ndim == 2 and name != "up.weight"]
    return [
        {"params": [("up.weight", named["up.weight"])], "rank": 16, "weight_decay": 0.1},
        {"params": rest, "weight_decay": 0.1},
        {"params": [(name, p) for name, p in named.items() if p.ndim == 1], "lr": 0.001},
    ]


def batch(step: int, rank: int = 0, ranks: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's share of the 64 samples of a step, which are the same on any number of ranks."""
    teacher = torch.randn(32, 16, generator=torch.Generator().manual_seed(0)) / 32**0.5
    inputs = torch.randn(64, 32, generator=torch.Generator().manual_seed(1 + step))
    return inputs[rank::ranks], torch.tanh(inputs @ teacher)[rank::ranks]


def train(steps: int = 100) -> torch.nn.Module:
    """Train, print the mean loss over all ranks, and return the model."""
    model = make_model()
    engine, *_ = ds_lowrank.initialize(model=model, model_parameters=make_groups(model), config=CONFIG)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for step in range(steps):
        inputs, targets = (tensor.to(engine.device) for tensor in batch(step, rank, ranks))

        def forward(inputs: torch.Tensor = inputs, targets: torch.Tensor = targets) -> torch.Tensor:
            return mse_loss(engine(inputs), targets)

        (loss,) = ds_lowrank.forward_backward(engine, forward)
        engine.step()
        dist.all_reduce(loss)
        if rank == 0 and (step + 1) % 20 == 0:
            print(f"step {step + 1:3}  loss {loss.item() / ranks:.4f}")
    return model


if __name__ == "__main__":
    join()  # one process, deepspeed or torchrun; on GPUs where there are any
    train()
    leave()

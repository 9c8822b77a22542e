"""Train with GaLore at ZeRO 2 where somebody else calls ``deepspeed.initialize``.

    python examples/register_with_stock_deepspeed.py
    deepspeed --num_gpus 2 examples/register_with_stock_deepspeed.py    # prints the same losses

``register`` makes the method names known as ``optimizer.type``. The loop is DeepSpeed's usual one. Runs on a CPU in
seconds. Needs ``pip install ".[train]"``.
"""

from __future__ import annotations

from collections import OrderedDict

import deepspeed
import torch
import torch.distributed as dist
from torch.nn.functional import mse_loss

import ds_lowrank
from ds_lowrank.training.distributed import join, leave

CONFIG = {
    "train_batch_size": 64,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "GaLore", "params": {"lr": 0.01, "rank": 8, "update_proj_gap": 20}},
    "zero_optimization": {"stage": 2},
}


def make_model() -> torch.nn.Module:
    """A perceptron: its two matrices are projected, AdamW takes its biases."""
    torch.manual_seed(0)
    layers = {"up": torch.nn.Linear(32, 128), "act": torch.nn.GELU(), "down": torch.nn.Linear(128, 16)}
    return torch.nn.Sequential(OrderedDict(layers))


def batch(step: int, rank: int = 0, ranks: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's share of the 64 samples of a step, which are the same on any number of ranks."""
    teacher = torch.randn(32, 16, generator=torch.Generator().manual_seed(0)) / 32**0.5
    inputs = torch.randn(64, 32, generator=torch.Generator().manual_seed(1 + step))
    return inputs[rank::ranks], torch.tanh(inputs @ teacher)[rank::ranks]


def train(steps: int = 100) -> torch.nn.Module:
    """Train, print the mean loss over all ranks, and return the model."""
    ds_lowrank.register()
    model = make_model()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=CONFIG)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for step in range(steps):
        inputs, targets = (tensor.to(engine.device) for tensor in batch(step, rank, ranks))
        loss = mse_loss(engine(inputs), targets)
        engine.backward(loss)
        engine.step()
        mean = loss.detach()
        dist.all_reduce(mean)
        if rank == 0 and (step + 1) % 20 == 0:
            print(f"step {step + 1:3}  loss {mean.item() / ranks:.4f}")
    return model


if __name__ == "__main__":
    join()  # one process, deepspeed or torchrun; on GPUs where there are any
    train()
    leave()

"""Train with GaLore as a plain ``torch.optim.Optimizer``: one process, no DeepSpeed, a scheduler of torch.

    python examples/without_deepspeed.py

Runs on a CPU in seconds. Needs ``pip install .``.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch.nn.functional import mse_loss

import ds_lowrank

STEPS = 100


def make_model() -> torch.nn.Module:
    """A perceptron: its two matrices are projected, AdamW takes its biases."""
    torch.manual_seed(0)
    layers = {"up": torch.nn.Linear(32, 128), "act": torch.nn.GELU(), "down": torch.nn.Linear(128, 16)}
    return torch.nn.Sequential(OrderedDict(layers))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The 64 samples of a step."""
    teacher = torch.randn(32, 16, generator=torch.Generator().manual_seed(0)) / 32**0.5
    inputs = torch.randn(64, 32, generator=torch.Generator().manual_seed(1 + step))
    return inputs, torch.tanh(inputs @ teacher)


def make_optimizer(model: torch.nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """GaLore on the model: its modules tell an embedding from a weight, and a name seeds the weight's projector."""
    optimizer: torch.optim.Optimizer = ds_lowrank.GaLore(model, lr=0.02, rank=8, update_proj_gap=20, weight_decay=0.01)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    steps: range,
) -> None:
    """Take the given steps, and print the loss."""
    for step in steps:
        inputs, targets = batch(step)
        optimizer.zero_grad()
        loss = mse_loss(model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
        if (step + 1) % 20 == 0:
            print(f"step {step + 1:3}  loss {loss.item():.4f}")


def resume_and_train() -> torch.nn.Module:
    """Train half of the steps, save, load into new objects, train the other half, and return the model."""
    model = make_model()
    optimizer, scheduler = make_optimizer(model)
    train(model, optimizer, scheduler, range(STEPS // 2))
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}

    model = make_model()
    optimizer, scheduler = make_optimizer(model)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    train(model, optimizer, scheduler, range(STEPS // 2, STEPS))
    return model


if __name__ == "__main__":
    resume_and_train()

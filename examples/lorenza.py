"""Train with LORENZA, which takes its gradient at weights moved uphill, with gradient accumulation.

    python examples/lorenza.py
    deepspeed --num_gpus 2 examples/lorenza.py    # prints the same losses

``forward_backward`` takes one function for each micro-batch of a step. It first runs them without gradients to probe
the loss around the weights, then moves the weights, runs forward and backward, and moves the weights back. Runs on a
CPU in seconds. Needs ``pip install ".[train]"``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.nn.functional import mse_loss

import ds_lowrank
from ds_lowrank.training.distributed import join, leave

MICRO_BATCHES = 2
OPTIONS = {
    "lr": 0.01,
    "rank": 8,
    "update_proj_gap": 20,
    "probes": 2,
    "probe_radius": 0.1,  # how far the loss is probed; larger differences have more digits
    "perturbation_radius": 0.05,  # how far from the weights the gradient is taken
}
CONFIG = {
    "train_batch_size": 64,
    "gradient_accumulation_steps": MICRO_BATCHES,
    "optimizer": {"type": "Lorenza", "params": OPTIONS},
    "zero_optimization": {"stage": 2},
}


def make_model() -> torch.nn.Module:
    """A perceptron: its two matrices are projected and perturbed, AdamW takes its biases."""
    torch.manual_seed(0)
    layers = {"up": torch.nn.Linear(32, 128), "act": torch.nn.GELU(), "down": torch.nn.Linear(128, 16)}
    return torch.nn.Sequential(OrderedDict(layers))


def micro_batches(step: int, rank: int = 0, ranks: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's share of the 64 samples of a step, in ``MICRO_BATCHES`` parts of equal size."""
    teacher = torch.randn(32, 16, generator=torch.Generator().manual_seed(0)) / 32**0.5
    inputs = torch.randn(64, 32, generator=torch.Generator().manual_seed(1 + step))[rank::ranks]
    return [(part, torch.tanh(part @ teacher)) for part in inputs.chunk(MICRO_BATCHES)]


def forward_of(model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The loss of one micro-batch, as a function that may be called several times."""
    return lambda: mse_loss(model(inputs), targets)


def train(steps: int = 100) -> torch.nn.Module:
    """Train, print the mean loss over all ranks, and return the model."""
    engine, *_ = ds_lowrank.initialize(model=make_model(), config=CONFIG)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for step in range(steps):
        parts = [(x.to(engine.device), y.to(engine.device)) for x, y in micro_batches(step, rank, ranks)]
        losses = ds_lowrank.forward_backward(engine, [forward_of(engine, *part) for part in parts])
        engine.step()
        loss = torch.stack(losses).mean()
        dist.all_reduce(loss)
        if rank == 0 and (step + 1) % 20 == 0:
            print(f"step {step + 1:3}  loss at the perturbed weights {loss.item() / ranks:.4f}")
    if rank == 0:
        print(engine.basic_optimizer.metrics())
    model: torch.nn.Module = engine.module
    return model


if __name__ == "__main__":
    join()  # one process, deepspeed or torchrun; on GPUs where there are any
    train()
    leave()

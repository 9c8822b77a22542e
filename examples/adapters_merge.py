"""Fine-tune with GradNormLoRP's adapters, then merge them into plain weights of the original architecture.

    python examples/adapters_merge.py

The adapters' factors are themselves projected. Runs on a CPU in seconds, without DeepSpeed; with it,
``ds_lowrank.initialize`` adds the adapters when ``optimizer.params`` has ``"parametrization": "adapter"``. Needs
``pip install .``.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch.nn.functional import mse_loss

import ds_lowrank


def make_model() -> torch.nn.Module:
    """A perceptron in place of a pre-trained model."""
    torch.manual_seed(0)
    layers = {"up": torch.nn.Linear(32, 128), "act": torch.nn.GELU(), "down": torch.nn.Linear(128, 16)}
    return torch.nn.Sequential(OrderedDict(layers))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The 64 samples of a step."""
    teacher = torch.randn(32, 16, generator=torch.Generator().manual_seed(0)) / 32**0.5
    inputs = torch.randn(64, 32, generator=torch.Generator().manual_seed(1 + step))
    return inputs, torch.tanh(inputs @ teacher)


def fine_tune(model: torch.nn.Module, steps: int = 100) -> None:
    """Train adapters of rank 8, whose gradients are projected to rank 4; everything else is frozen."""
    layers = ds_lowrank.add_adapters(model, adapter_rank=8, adapter_alpha=16.0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    print(f"adapters in {', '.join(layers)}: {trained} of {total} parameters are trained")
    optimizer = ds_lowrank.GradNormLoRP(
        model, lr=0.01, rank=4, update_proj_gap=20, scale=1.0, parametrization="adapter"
    )
    for step in range(steps):
        inputs, targets = batch(step)
        optimizer.zero_grad()
        loss = mse_loss(model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) % 20 == 0:
            print(f"step {step + 1:3}  loss {loss.item():.4f}")


def main() -> None:
    """Fine-tune, merge, and compare the outputs before and after."""
    model = make_model()
    fine_tune(model)
    inputs, _ = batch(step=0)
    with torch.no_grad():
        before = model(inputs)
        ds_lowrank.merge_adapters(model)
        difference = (model(inputs) - before).abs().max().item()
    print(f"merged: {', '.join(model.state_dict())}; the outputs differ by at most {difference:.0e}")


if __name__ == "__main__":
    main()

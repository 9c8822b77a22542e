"""A small model, its gradients, and the optimizer of every registered method with options that fit them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from ds_lowrank.integration.probe import perturbed_weights
from ds_lowrank.methods import METHODS
from ds_lowrank.optimizer.optimizer import LowRankOptimizer
from ds_lowrank.optimizer.registry import OPTIMIZERS
from tests.methods import of

EVERY = pytest.mark.parametrize("name", sorted(METHODS))


def having(trait: str) -> pytest.MarkDecorator:
    """Parametrize over the methods whose row in tests/rows has a trait."""
    return pytest.mark.parametrize("name", [name for name in sorted(METHODS) if getattr(of(name), trait)])


def small_model() -> torch.nn.Sequential:
    """Two matrices of 20 x 12 and 7 x 20, and two biases."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.Tanh(), torch.nn.Linear(20, 7))


def take_gradients(model: torch.nn.Module, step: int) -> None:
    """Compute the gradients of a step, a function of its number."""
    torch.manual_seed(1000 + step)
    model.zero_grad()
    model(torch.randn(32, 12)).square().mean().backward()


def build(name: str, model: torch.nn.Module, **options: Any) -> LowRankOptimizer:
    """The optimizer of a model."""
    return OPTIMIZERS[name](model, **{"lr": 1e-2, **of(name).small, **options})


def build_single(name: str, weight: torch.nn.Parameter, **options: Any) -> LowRankOptimizer:
    """The optimizer of one matrix."""
    return OPTIMIZERS[name]([("w", weight)], **{"lr": 0.1, **of(name).small, **options})


def run(optimizer: LowRankOptimizer, model: torch.nn.Module, steps: Iterable[int]) -> None:
    """Train for some steps."""
    for step in steps:
        take_gradients(model, step)
        optimizer.step()


def copy_of(model: torch.nn.Module) -> list[torch.Tensor]:
    """The weights as they are now."""
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_equal(first: Iterable[torch.Tensor], second: Iterable[torch.Tensor]) -> None:
    """Compare tensors bit for bit."""
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


PROBES: list[dict[str, Any]] = [
    {},
    {"probe_form": "gaussian", "two_sided": False},
    {"rank": None, "norm": "per_matrix"},
]


def perturbed(context: Callable[[], Any], options: dict[str, Any]) -> list[torch.Tensor]:
    """Train with Lorenza's ascent; the weights at which each gradient was taken, and those in the end."""
    model = small_model()
    inputs = torch.randn(8, 12, generator=torch.Generator().manual_seed(3))
    visited: list[torch.Tensor] = []

    def loss() -> torch.Tensor:
        visited.extend(copy_of(model))
        with torch.autocast("cpu", enabled=False):  # the passes are the caller's own
            return model(inputs).square().mean()

    with context():
        optimizer = OPTIMIZERS["Lorenza"](model, lr=1e-2, **{"rank": 3, **options})
    for _ in range(4):
        model.zero_grad()
        with context(), perturbed_weights(optimizer, lambda: [loss()], torch.device("cpu"), None) as perturbation:
            with torch.autocast("cpu", enabled=False):
                loss().backward()
            perturbation.mark_gradients()
        with context():
            optimizer.step()
    return [*visited, *copy_of(model)]

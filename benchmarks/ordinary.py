"""Optimizers that are ready for ordinary steps: every method past its first refresh, and the peers.

All of them step the same parameters with the same gradients.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from benchmarks.gpu.cases import Cell
from benchmarks.gpu.contenders import LR, NEVER, builders, refreshes
from ds_lowrank.methods import METHODS

FOREACH = "AdamW (torch, foreach)"
STATE_DTYPES = ("fp32", "int8")
AS_WEIGHTS = "as weights"
"""In the place of ``state_dtype`` for the peers."""
Optimizers = dict[tuple[str, str], torch.optim.Optimizer]
"""By name and dtype of the moments."""


def with_gradients(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, torch.nn.Parameter]:
    """Return fp32 parameters on the CPU with gradients of normal numbers.

    Args:
        shapes: By parameter name.
        seed: Of weights and gradients.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for name, shape in shapes.items():
        weight, gradient = torch.randn(2, *shape, generator=generator, dtype=torch.float32, device="cpu")
        parameters[name] = torch.nn.Parameter(weight)
        parameters[name].grad = gradient
    return parameters


def ready(parameters: Mapping[str, torch.nn.Parameter], rank: int, seed: int) -> Optimizers:
    """Return every registered method at every dtype of the moments, and the peers, after two steps of each.

    Args:
        parameters: Of a LLaMA by name, with gradients. All optimizers change them.
        rank: Of the bases.
        seed: Of the sketches.
    """
    found: Optimizers = {(FOREACH, AS_WEIGHTS): torch.optim.AdamW(parameters.values(), lr=LR, foreach=True)}
    for state_dtype in STATE_DTYPES:
        # LORENZA's perturbation is part of the backward pass, not of the step.
        chosen = {"update_proj_gap": NEVER, "perturbation_radius": 0.0}
        for name, build in builders(Cell("", rank, state_dtype), parameters, seed, **chosen).items():
            key = (name, state_dtype if name in METHODS else AS_WEIGHTS)
            if key not in found:
                found[key] = build()
    for optimizer in found.values():
        optimizer.step()
        optimizer.step()
    return found


def refreshes_of(optimizers: Optimizers) -> list[float]:
    """Return how many bases each optimizer has found; unequal before and after, some step was not an ordinary one."""
    return [refreshes(optimizer) for optimizer in optimizers.values()]

"""Every method on a device against the same method on the CPU: fp32 weights after several steps.

Both runs start from the same weights, get the same gradients, and draw the same sketches, which are always drawn on the
CPU. TF32 is off. What is left is the order in which products and norms are summed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

import ds_lowrank
from benchmarks.common import Numbers, relative_difference
from benchmarks.gpu.budget import Budget, interrupted_after
from benchmarks.gpu.cases import STATE_DTYPES, method_options, tagged
from ds_lowrank.methods import METHODS
from ds_lowrank.optimizer.registry import OPTIMIZERS

STEPS, GAP, RANK, LR = 7, 3, 8, 1e-2
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (64, 48),
    "model.layers.0.self_attn.q_proj.weight": (48, 48),
    "model.layers.0.mlp.up_proj.weight": (128, 48),
    "model.layers.0.mlp.down_proj.weight": (48, 128),
    "model.norm.weight": (48,),
}
"""A square, a tall and a wide matrix, and two parameters that AdamW steps."""
ROUNDING = 1e-6
"""About the relative error of a product in fp32 that is summed in another order."""
BOUNDS = {"fp32": 1e-4, "bf16": 1e-3, "int8": 5e-3}
"""The largest accepted relative difference of any parameter's weights, by ``state_dtype``.

The weights start small, so that after the last step they mostly consist of updates and a wrong update shows in full.
The column *rounding* says what changing every gradient by ``ROUNDING`` does to the same run on the CPU: over four seeds
at most 9e-6 with moments in fp32, a tenth of the bound. In bf16 and int8 an error that moves a moment across the
boundary between two codes counts as a whole code, and *rounding* is at most 4e-4 and 1.3e-3. All bounds are below the
2e-3 and 2.7e-2 by which moments in bf16 and int8 change the weights themselves.
"""


def agreement(device: torch.device, seed: int, budget: Budget) -> Numbers:
    """Return a row for each method and ``state_dtype``; *agrees* is None where time was up before it was compared."""
    rows: Numbers = []
    with exact_products():
        for state_dtype in STATE_DTYPES:
            for method in METHODS:
                rows.append(compare(method, state_dtype, device, seed, budget.left("agreement")))
    return rows


@contextmanager
def exact_products() -> Iterator[None]:
    """Switch TF32 off for matrix products in fp32, and restore the setting afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def compare(method: str, state_dtype: str, device: torch.device, seed: int, seconds: float) -> dict[str, Any]:
    """Return the row of one method, also when it fails."""
    row: dict[str, Any] = {
        "method": method,
        "state_dtype": state_dtype,
        "difference": None,
        "rounding": None,
        "bound": BOUNDS[state_dtype],
        "agrees": None,
        "error": "",
    }
    if seconds <= 0:
        return row | {"error": "not compared: the section's time was used up"}
    try:
        with interrupted_after(seconds):
            on_cpu = train(method, state_dtype, torch.device("cpu"), seed)
            row["rounding"] = largest_difference(
                train(method, state_dtype, torch.device("cpu"), seed, ROUNDING), on_cpu
            )
            row["difference"] = largest_difference(train(method, state_dtype, device, seed), on_cpu)
        row["agrees"] = row["difference"] <= row["bound"]
    except Exception as error:
        row |= {"agrees": False, "error": f"{type(error).__name__}: {error}"}
    return row


def train(
    method: str, state_dtype: str, device: torch.device, seed: int, change: float = 0.0
) -> dict[str, torch.Tensor]:
    """Return the weights after ``STEPS`` steps, on the CPU.

    The loss is linear in the weights, so its gradient does not depend on them and is the same on every device. A method
    that perturbs the weights before the backward pass does so here too.

    Args:
        method: A registered method.
        state_dtype: How its moments are stored.
        device: Where the weights and the optimizer are.
        seed: Seed of the weights and the gradients.
        change: The relative size of random changes of the gradients.
    """
    generator = torch.Generator().manual_seed(seed)
    starts = {name: 0.02 * gaussian(shape, generator) for name, shape in SHAPES.items()}
    weights = {name: torch.nn.Parameter(start.to(device)) for name, start in starts.items()}
    options = method_options(method, RANK, GAP, state_dtype=state_dtype, seed=seed, eps=1e-3)
    optimizer = OPTIMIZERS[method](tagged(weights), lr=LR, **options)
    changes = torch.Generator().manual_seed(seed + 1)
    for _ in range(STEPS):
        gradients = {name: gradient(shape, generator) for name, shape in SHAPES.items()}
        for exact in gradients.values():
            exact *= 1 + change * gaussian(exact.shape, changes)
        moved = {name: exact.to(device) for name, exact in gradients.items()}

        def loss(moved: Mapping[str, torch.Tensor] = moved) -> torch.Tensor:
            return torch.stack([(weights[name] * moved[name]).sum() for name in moved]).sum()

        ds_lowrank.forward_backward(optimizer, loss)
        optimizer.step()
        optimizer.zero_grad()
    return {name: weight.detach().cpu() for name, weight in weights.items()}


def gradient(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Draw a gradient whose singular values decay, as those of a trained model's matrices do."""
    drawn = gaussian(shape, generator)
    if len(shape) == 1:
        return drawn
    u, s, vh = torch.linalg.svd(drawn, full_matrices=False)
    decaying: torch.Tensor = (u * (s * 0.8 ** torch.arange(len(s), dtype=s.dtype, device=s.device))) @ vh
    return decaying


def gaussian(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Draw on the CPU, in fp32, whatever torch's defaults are."""
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)


def largest_difference(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
    """Return the largest relative difference of any parameter."""
    return max(relative_difference(a[name], b[name]) for name in b)

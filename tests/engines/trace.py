"""What a wrapper hands the optimizer and what comes out, put together over ranks: any wrapper, any dtype, exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ds_lowrank.reference import DENSE
from ds_lowrank.reference.galore import DenseAdamW
from tests.engines.scenario import METHODS, make_model_for, train_step


def trace_engine(settings: dict[str, Any], steps: int, zero_init: bool = False) -> dict[str, Any]:
    """``trace`` of the scenario."""

    import ds_lowrank

    model = make_model_for(settings, zero_init)
    return trace(ds_lowrank.initialize(model=model, config=settings)[0], steps, train_step)


def trace(engine: Any, steps: int, train: Callable[[Any, int], Any]) -> dict[str, Any]:
    """Train and record, for each step and parameter, this rank's part, gradient, and weights before and after."""
    optimizer = engine.basic_optimizer
    norms: list[float] = []
    records: list[dict[str, Any]] = []
    plain_step: Callable[..., Any] = optimizer.step

    def recorded_step(*args: Any, **kwargs: Any) -> Any:
        stores = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        slots = [slot for slot in optimizer.slots if id(slot.fragment.store) in stores]
        seen = {
            s.tag.name: {
                "shape": s.shape,
                "projected": s.role.projected,
                "held": [(r.row, r.col, r.height, r.width) for r in s.geometry.part.rectangles],
                "gradient": s.fragment.gradient.clone(),
                "before": s.fragment.weights.clone(),
            }
            for s in slots
        }
        result = plain_step(*args, **kwargs)
        for slot in slots:
            seen[slot.tag.name]["after"] = slot.fragment.weights.clone()
        records[-1].update(seen)
        return result

    optimizer.step = recorded_step
    for step in range(steps):
        records.append({})
        train(engine, step)
        norms.append(float(engine.get_global_grad_norm() or 0.0))
    wrapper = type(engine.optimizer).__name__
    return {"records": records, "norms": norms, "wrapper": wrapper, "metrics": optimizer.metrics()}


def names_of(traces: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """All parameters, each with the record of a rank that has one; the stages of a pipeline have different ones."""
    return {name: piece for trace in traces for name, piece in trace["records"][0].items()}


def assemble(traces: list[dict[str, Any]], step: int, name: str, key: str) -> torch.Tensor:
    """A whole tensor from all ranks' pieces; of copies any."""
    pieces = [trace["records"][step][name] for trace in traces if name in trace["records"][step]]
    shape = torch.Size(pieces[0]["shape"])
    whole = torch.full(shape if pieces[0]["projected"] else (1, shape.numel()), float("nan"))
    for piece in pieces:
        flat = piece[key].float()
        for row, col, height, width in piece["held"]:
            whole[row : row + height, col : col + width] = flat[: height * width].view(height, width)
            flat = flat[height * width :]
    assert not whole.isnan().any(), f"no rank holds all of {name}"
    return whole.view(pieces[0]["shape"])


def norm_of(traces: list[dict[str, Any]], step: int) -> float:
    """Of the gradient of the whole model that the wrapper presented."""
    squares = [assemble(traces, step, name, "gradient").double().square().sum() for name in names_of(traces)]
    return float(torch.stack(squares).sum().sqrt())


def worst_against_references(traces: list[dict[str, Any]], method: str = "GaLore", **options: Any) -> float:
    """Every step's weights should be what the dense reference makes of the gradients that the wrapper presented.

    Returns:
        The largest relative difference of any parameter after any step.
    """
    options = METHODS[method] | options
    largest = 0.0
    for name, first in names_of(traces).items():
        weight = assemble(traces, 0, name, "before")
        rule = (DENSE[method] if first["projected"] else DenseAdamW)(weight, name=name, **options)
        for step in range(len(traces[0]["records"])):
            weight.copy_(assemble(traces, step, name, "before"))
            rule.step(assemble(traces, step, name, "gradient"))
            after = assemble(traces, step, name, "after")
            largest = max(largest, ((after - weight).norm() / weight.norm()).item())
    return largest

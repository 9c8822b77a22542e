"""The picture of benchmarks/validation_loss.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = {"GaLore": "tab:blue", "AdamW": "tab:orange"}


class Setting(Protocol):
    """What the picture says of a run."""

    @property
    def optimizer(self) -> str: ...
    @property
    def lr(self) -> float: ...
    @property
    def scale(self) -> float: ...


Runs = Mapping[Any, list[dict[str, Any]]]


def draw(runs: Runs, best: Mapping[str, Setting], path: Path) -> None:
    """Write a PNG: the loss of the best runs over the steps, and the final loss of every run over its learning rate."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    curves, rates = figure.subplots(1, 2, width_ratios=[2, 1])
    _draw_curves(curves, runs, best)
    _draw_rates(rates, runs)
    for axes in (curves, rates):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")


def _draw_curves(axes: Axes, runs: Runs, best: Mapping[str, Setting]) -> None:
    for name, setting in best.items():
        points = [(record["step"], record["eval_loss"]) for record in runs[setting] if record["eval_loss"] is not None]
        label = f"{name}, lr {setting.lr:g}, matrices x {setting.scale:g}"
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=COLOURS[name], label=label)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("validation loss (nats per token)")


def _draw_rates(axes: Axes, runs: Runs) -> None:
    styles = {1: "-", 2: "--", 3: ":"}
    lines = sorted({(setting.optimizer, setting.scale) for setting in runs}, reverse=True)
    for name, scale in lines:
        points = sorted(
            (setting.lr, records[-1]["eval_loss"])
            for setting, records in runs.items()
            if (setting.optimizer, setting.scale) == (name, scale) and records[-1]["eval_loss"] is not None
        )
        if not points:
            continue
        number = [line for line in lines if line[0] == name].index((name, scale)) + 1
        label = f"{name}, matrices x {scale:g}"
        axes.plot(
            *zip(*points, strict=True), styles.get(number, "-."), marker="o", markersize=4,
            color=COLOURS[name], label=label,
        )  # fmt: skip
    axes.set_xscale("log")
    lrs = sorted({setting.lr for setting in runs})
    axes.set_xticks(lrs, [f"{lr:g}" for lr in lrs])
    axes.minorticks_off()
    axes.set_xlabel("learning rate")
    axes.set_ylabel("final validation loss")

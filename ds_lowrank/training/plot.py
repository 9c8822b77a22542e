"""Plotting the loss curve of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def plot_loss(records: list[dict[str, Any]], path: Path) -> None:
    """Plot training and evaluation loss against tokens.

    Args:
        records: the records of metrics.jsonl.
        path: the PNG file to write.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, style in (("loss", {"linewidth": 1.0}), ("eval_loss", {"marker": "o"})):
        points = [(record["tokens"], record[key]) for record in records if record.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=key.replace("_", " "), **style)
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=120, format="png")

"""Plotting the loss curves of runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Record = dict[str, Any]

AXES: dict[str, tuple[str, Callable[[Record], float]]] = {
    "steps": ("optimizer steps", lambda record: record["step"]),
    "tokens": ("tokens", lambda record: record["tokens"]),
    "hours": ("hours of training", lambda record: record["seconds"] / 3600),
}
"""What a curve may be drawn over: the label, and the value of a record."""

LOSSES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("loss", {"linewidth": 1.0}),
    ("eval_loss", {"marker": "o", "linestyle": "--"}),
)
PANEL = (8.0, 5.0)
"""Width and height of one panel in inches."""


def plot_loss(records: list[Record], path: Path) -> None:
    """Plot training and evaluation loss against tokens.

    Args:
        records: the records of metrics.jsonl.
        path: the PNG file to write.
    """
    plot_runs({"": records}, path, ["tokens"])


def plot_runs(runs: Mapping[str, list[Record]], path: Path, over: Sequence[str]) -> None:
    """Plot the losses of several runs, one color each: training losses as lines, evaluations as dots.

    Args:
        runs: the records of each run, by the name that the legend gives it; '' for one without a name.
        path: the PNG file to write.
        over: what is on the horizontal axis of each panel, from left to right: keys of ``AXES``.
    """
    figure = Figure(figsize=(PANEL[0] * len(over) ** 0.75, PANEL[1]), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Sequence[Axes] = figure.subplots(1, len(over), sharey=True, squeeze=False)[0]
    for panel, key in zip(panels, over, strict=True):
        _draw(panel, runs, key)
    panels[0].set_ylabel("loss")
    if panels[0].lines:
        panels[0].legend()
    figure.savefig(path, dpi=120, format="png")


def _draw(panel: Axes, runs: Mapping[str, list[Record]], over: str) -> None:
    label, value = AXES[over]
    for number, (name, records) in enumerate(runs.items()):
        for offset, (key, style) in enumerate(LOSSES):
            color = f"C{number if len(runs) > 1 else offset}"
            points = [(value(record), record[key]) for record in records if record.get(key) is not None]
            if points:
                title = f"{name}, {key}" if name else key
                panel.plot(*zip(*points, strict=True), label=title.replace("_", " "), color=color, **style)
    panel.set_xlabel(label)
    panel.grid(alpha=0.3)

"""The plots of the benchmarks that train models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.common import Numbers
from benchmarks.runs import Found, Records, Setting

COLOURS = {"GaLore": "tab:blue", "AdamW": "tab:orange"}
OTHERS = ("tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:gray", "tab:olive", "tab:cyan")


def colours(names: Sequence[str]) -> dict[str, str]:
    """Assign a colour to each optimizer; GaLore and AdamW have the same in every plot."""
    others = cycle(OTHERS)
    return {name: COLOURS.get(name) or next(others) for name in names}


@contextmanager
def picture(path: Path, size: tuple[float, float], widths: Sequence[float]) -> Iterator[Sequence[Axes]]:
    """Provide panels side by side to draw on, and write them to a PNG file at the end.

    Args:
        path: The PNG file.
        size: Width and height in inches.
        widths: Relative width of each panel.
    """
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels: Sequence[Axes] = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    yield panels
    for axes in panels:
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")


def mean_curve(runs: Sequence[Records]) -> dict[int, float]:
    """Return the mean validation loss of some runs by step, up to the first step at which one has diverged."""
    curve = {}
    for records in zip(*runs, strict=True):
        losses = [record["eval_loss"] for record in records]
        if None in losses:
            break
        curve[records[0]["step"]] = mean(losses)
    return curve


def draw_curve(axes: Axes, curve: Mapping[int, float], label: str, colour: str) -> None:
    """Draw one optimizer's validation loss over the steps."""
    axes.plot(list(curve), list(curve.values()), "o-", markersize=4, color=colour, label=label)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("validation loss (nats per token)")


def draw_sweep(runs: Found, best: Mapping[str, Setting], path: Path) -> None:
    """Draw the loss of the best runs over the steps, and the final loss of every run over its learning rate."""
    colour = colours(list(best))
    with picture(path, (10, 4.2), (2, 1)) as (curves, rates):
        for name, setting in best.items():
            label = f"{name}, lr {setting.lr:g}, matrices x {setting.scale:g}"
            draw_curve(curves, mean_curve([runs[setting]]), label, colour[name])
        _draw_rates(rates, runs, colour)


def _draw_rates(axes: Axes, runs: Found, colour: Mapping[str, str]) -> None:
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
            color=colour[name], label=label,
        )  # fmt: skip
    axes.set_xscale("log")
    lrs = sorted({setting.lr for setting in runs})
    axes.set_xticks(lrs, [f"{lr:g}" for lr in lrs])
    axes.minorticks_off()
    axes.set_xlabel("learning rate")
    axes.set_ylabel("final validation loss")


CURVES = 6
"""How many of the methods have a curve in the picture of all."""
LEAST_SHARE = 3e-4
"""Where a method that stores nothing stands on a logarithmic axis."""


def draw_methods(runs: Mapping[str, Sequence[Records]], rows: Numbers, path: Path) -> None:
    """Draw each method at its best setting, as a mean over seeds.

    The panels show the final loss of all, with its standard error, over the bytes of state relative to AdamW's; how far
    the best are from AdamW in the last two thirds of the steps; and their losses there over the time of their steps.

    Args:
        runs: The runs of each method's best setting, one for each seed.
        rows: The table of the methods, the best first.
        path: The PNG file.
    """
    colour = colours([row["optimizer"] for row in rows])
    curves = {name: mean_curve(own) for name, own in runs.items()}
    base = curves["AdamW"]
    with picture(path, (17, 5.6), (1.6, 1, 1)) as (states, above, seconds):
        for row in rows:
            name, share = row["optimizer"], max(row["over AdamW's"], LEAST_SHARE)
            states.errorbar(share, row["loss"], yerr=row["standard error"], fmt="o", color=colour[name])
            states.annotate(name, (share, row["loss"]), (5, 4), textcoords="offset points", fontsize="small")
        for row in rows[:CURVES]:
            name = row["optimizer"]
            late = [step for step in curves[name] if step in base and 3 * step >= max(base)]
            difference = [curves[name][step] - base[step] for step in late]
            above.plot(late, difference, "o-", color=colour[name], markersize=4, label=name)
            times, losses = [step * row["step over AdamW"] for step in late], [curves[name][step] for step in late]
            seconds.plot(times, losses, "o-", color=colour[name], markersize=4, label=name)
        states.axhline(next(row["loss"] for row in rows if row["optimizer"] == "AdamW"), color="gray", linewidth=0.8)
        states.set_xscale("log")
        states.set_xlabel("bytes of state of the matrices, over AdamW's")
        states.set_ylabel("final validation loss (nats per token)")
        above.set_xlabel("optimizer step")
        above.set_ylabel("validation loss above AdamW's")
        seconds.set_xlabel("time, in AdamW's steps")
        seconds.set_ylabel("validation loss")

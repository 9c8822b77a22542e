"""The estimate as text: one table a kind of rank, with AdamW at the same stage beside the method."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ds_lowrank.estimate.setup import ADAMW, Setup
from ds_lowrank.estimate.sizes import size_text
from ds_lowrank.estimate.total import Estimate, RankEstimate, kinds

ROWS: Sequence[tuple[str, Callable[[RankEstimate], int]]] = (
    ("weights", lambda rank: rank.kept.weights),
    ("fp32 masters", lambda rank: rank.kept.masters),
    ("gradients", lambda rank: rank.kept.gradients),
    ("states of matrices: moments", lambda rank: rank.optimizer.states.moments),
    ("states of matrices: bases", lambda rank: rank.optimizer.states.bases),
    ("bases that stay gathered", lambda rank: rank.optimizer.gathered),
    ("states of the rest (AdamW)", lambda rank: rank.optimizer.states.rest),
    ("copy of the weights (ascent)", lambda rank: rank.optimizer.copy),
    ("DeepSpeed's buffers", lambda rank: rank.kept.backward + rank.kept.always),
    ("activations", lambda rank: rank.not_checkpointed.peak),
    ("activations, checkpointed", lambda rank: rank.checkpointed.peak),
    ("gradients in the step", lambda rank: rank.kept.in_the_step),
    ("temporary in a step", lambda rank: rank.optimizer.ordinary),
    ("temporary in a refresh", lambda rank: rank.optimizer.refresh),
    ("of all of it in the host's memory", lambda rank: rank.offloaded),
    ("peak of a backward pass", lambda rank: rank.backward),
    ("peak of a step", lambda rank: rank.step),
    ("sent: gradients and weights", lambda rank: rank.traffic.gradients_and_weights),
    ("sent: optimizer, ordinary step", lambda rank: rank.traffic.optimizer),
    ("sent: optimizer, with a refresh", lambda rank: rank.traffic.refresh),
    ("sent: tensor parallelism", lambda rank: rank.traffic.tensor),
    ("sent: pipeline", lambda rank: rank.traffic.pipeline),
)
"""What a table shows. A row that is zero in every column is left out."""
ALWAYS = ("weights", "fp32 masters", "gradients")


def text_of(estimates: Sequence[Estimate]) -> str:
    """The tables of some runs that are spread over ranks alike, side by side.

    Args:
        estimates: one for each column.
    """
    setup = estimates[0].setup
    parts = [headline(setup)]
    for index, (name, _) in enumerate(kinds(estimates[0].ranks)):
        columns = [kinds(estimate.ranks)[index][1] for estimate in estimates]
        parts.append("\n".join([f"Bytes on {name}:", *_table([label(one.setup) for one in estimates], columns)]))
    if estimates[0].shared_state:
        parts.append(f"lowrank/state_bytes in metrics.jsonl: {estimates[0].shared_state}")
    return "\n\n".join(parts)


def headline(setup: Setup) -> str:
    """What was estimated, in a sentence.

    Args:
        setup: the run.
    """
    grid, batch = setup.grid, setup.batch
    pass_ = "recomputed" if setup.checkpointing else "kept"
    return (
        f"{grid.ranks} rank{'s' * (grid.ranks > 1)} (data {grid.data} x tensor {grid.tensor} x pipeline "
        f"{grid.pipeline}), micro-batch {batch.micro} x {setup.sequence} tokens, {batch.accumulation} per step, "
        f"activations {pass_}."
    )


def label(setup: Setup) -> str:
    """The head of a column.

    Args:
        setup: the run.
    """
    return f"{setup.method}, ZeRO {setup.zero}"


def _table(heads: Sequence[str], columns: Sequence[RankEstimate]) -> list[str]:
    rows = [(name, [value(rank) for rank in columns]) for name, value in ROWS]
    shown = [(name, [size_text(one) for one in found]) for name, found in rows if any(found) or name in ALWAYS]
    shown.insert(0, ("", list(heads)))
    first = max(len(name) for name, _ in shown)
    widths = [max(len(cells[i]) for _, cells in shown) for i in range(len(heads))]
    return [
        "  ".join([f"  {name:<{first}}", *(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))])
        for name, cells in shown
    ]


def columns_of(setup: Setup) -> list[Setup]:
    """The runs to compare: this one, and AdamW at the same stage.

    Args:
        setup: the run.
    """
    return [setup] if setup.method == ADAMW else [setup, setup.with_adamw()]

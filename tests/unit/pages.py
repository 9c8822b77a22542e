"""The pages of the documentation and their tables, as the tests read them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
NAMES = (
    *(
        "getting_started",
        "configuration",
        "finetuning",
        "methods",
        "lineage",
        "parallelism",
        "architecture",
        "communication",
    ),
    *("signals", "cluster", "nodes", "containers", "huggingface", "choosing", "memory", "checkpoints"),
)
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in NAMES}


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table after a heading, without the table's header; a prefix of the heading is enough."""
    known = [line for line in PAGES[page].splitlines() if line.startswith(heading)]
    heading = heading if heading in known else known[0]
    lines = itertools.dropwhile(lambda line: line != heading, PAGES[page].splitlines())
    table = itertools.takewhile(lambda x: x[:1] == "|", itertools.dropwhile(lambda x: x[:1] != "|", lines))
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in list(table)[2:]]


def rows_by_method(heading: str) -> list[tuple[str, dict[str, Any], list[str]]]:
    """The rows of a table of docs/methods.md: method, options, the other cells."""
    return [
        (method.strip("`"), json.loads(options.strip("`")), cells)
        for method, options, *cells in rows("methods", heading)
    ]


def state_rows() -> list[tuple[str, dict[str, Any], str]]:
    """The documented state of every method: method, options, and how many numbers one matrix takes, as a formula."""
    return [(method, options, cells[0].strip("`")) for method, options, cells in rows_by_method("### State")]


def weights(*shapes, **like):
    return [(f"w{i}", torch.nn.Parameter(torch.ones(shape, **like))) for i, shape in enumerate(shapes)]

"""What the GPU entry measures: models, options of every method, and the cells in order of importance."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from ds_lowrank.methods import METHODS
from ds_lowrank.placement.kinds import Kind
from ds_lowrank.placement.parameter_names import Tag, tag_as

MODELS = Path(__file__).parents[2] / "ds_configs/models"
TINY: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "use_cache": False,
}  # fmt: skip
"""The model of a CPU or smoke run."""
STATE_DTYPES = ("fp32", "bf16", "int8")
UNITS = 8
"""VLoRP's units per row: it is given an eighth of the rank, so that it stores as many numbers per row as the others."""
OPTIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    "AdaRankGrad": lambda rank: {"rank_max": rank},
    "VLoRP": lambda rank: {"rank": max(1, rank // UNITS), "granularity": min(UNITS, rank)},
}
"""Where a method's options at a rank are not simply ``rank``."""


@dataclass(frozen=True)
class Cell:
    """Optimizers that are timed in turns: one model, rank, dtype of the moments, and precision of products."""

    model: str
    rank: int
    state_dtype: str = "fp32"
    precision: str = "tf32"

    def __str__(self) -> str:
        return f"{self.model}, rank {self.rank}, {self.state_dtype}, {self.precision}"


STEP_CELLS: tuple[Cell, ...] = (
    *(Cell("1b", 512, precision=precision) for precision in ("tf32", "fp32")),
    *(Cell(model, 128) for model in ("350m", "1b", "60m")),
    *(Cell("350m", 128, state_dtype) for state_dtype in ("int8", "bf16")),
    *(Cell(model, 128, precision="fp32") for model in ("350m", "1b", "60m")),
    *(Cell(model, 512) for model in ("350m", "60m")),
    *(Cell(model, 128, state_dtype) for model in ("60m", "1b") for state_dtype in ("int8", "bf16")),
    *(Cell(model, 512, state_dtype) for model in ("350m", "1b", "60m") for state_dtype in ("int8", "bf16")),
)
"""The optimizer step on its own."""
WHOLE_CELLS: tuple[Cell, ...] = (
    *(Cell(model, 128) for model in ("350m", "1b", "60m")),
    *(Cell("350m", 128, state_dtype) for state_dtype in ("int8", "bf16")),
    *(Cell(model, 512) for model in ("350m", "1b", "60m")),
)
"""Forward, backward and step."""
TINY_CELLS: tuple[Cell, ...] = (Cell("tiny", 8), Cell("tiny", 8, "int8"))
"""What a CPU or smoke run times, in both sections."""


def method_options(method: str, rank: int, gap: int, **more: Any) -> dict[str, Any]:
    """Return the options of a method at a rank that are comparable to the other methods' at the same rank.

    Args:
        method: A registered method, also one that this module does not mention.
        rank: The columns of its bases.
        gap: Optimizer steps between refreshes, for methods that have such an interval.
        more: Further options; those that the method does not have are left out.
    """
    own = OPTIONS[method](rank) if method in OPTIONS else {}
    wanted = {"rank": rank, "update_proj_gap": gap} | own | more
    if method == "OnlineSubspaceDescent":  # its interval is that of a basis that is drawn, not of one that moves
        del wanted["update_proj_gap"]
    return {key: value for key, value in wanted.items() if key in METHODS[method].Options.model_fields}


def model_config(model: str) -> dict[str, Any]:
    """Return the LLaMA configuration ``tiny`` or one of ``ds_configs/models``, under Hugging Face's keys."""
    if model == "tiny":
        return dict(TINY)
    config: dict[str, Any] = json.loads((MODELS / f"llama_{model}.json").read_text())
    return config


def llama_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every LLaMA parameter by its name in Hugging Face's implementation."""
    hidden, inner, vocabulary = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{layer}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def is_projected(name: str) -> bool:
    """Whether the low-rank methods project the LLaMA parameter of that name; AdamW steps the others."""
    return "_proj." in name


def bytes_drawn(shapes: Mapping[str, tuple[int, ...]], dense: bool) -> int:
    """Return the fewest bytes that a step in fp32 reads and writes.

    AdamW reads and writes a weight and two moments and reads a gradient, 28 bytes an element. A low-rank method's
    moments are small: 12 bytes an element of a projected matrix.

    Args:
        shapes: of the parameters, by their names.
        dense: whether AdamW steps all of them.
    """
    return sum(prod(shape) * (28 if dense or not is_projected(name) else 12) for name, shape in shapes.items())


def tagged(parameters: Mapping[str, torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """Return LLaMA parameters that are in no model, tagged with what they are there."""
    kinds: dict[str, Kind] = {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head"}
    for name, parameter in parameters.items():
        tag_as(parameter, Tag(name, kinds.get(name, "weight")))
    return list(parameters.values())


def parameter_count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the number of elements of all parameters."""
    return sum(map(prod, shapes.values()))

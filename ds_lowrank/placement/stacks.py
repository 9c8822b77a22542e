"""Stacks: parameters that hold a matrix for every expert of a mixture. Each matrix is stepped on its own.

==============================  ========================================================================
stored as                       where
==============================  ========================================================================
``E x m x n``                   the experts of transformers 5 (Mixtral, Qwen3-MoE, gpt-oss, Llama 4, ...)
``(E m) x n``                   transformers' DBRX
a matrix that is viewed so       megatron-core's ``GroupedMLP``
==============================  ========================================================================

A shape alone does not tell a stack from a convolution's weight or from position embeddings, so it is marked as one,
from its module or by :func:`tag_stack`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ds_lowrank.errors import ConfigError
from ds_lowrank.placement.zero import unpartitioned_shape

STACK = "ds_lowrank_stack"
"""The attribute of a parameter in which :func:`tag_stack` stores a :class:`Stack`."""
COUNTS = ("num_experts", "num_local_experts", "moe_num_experts", "n_experts", "n_routed_experts", "n_shared_experts")
"""Attributes in which modules say how many experts they hold."""
STORED_AS_ROWS = frozenset({"DbrxExpertGLU"})
"""Modules whose experts' matrices are one above the other. No other: a router may have as many rows as they would."""
STORED_TRANSPOSED = frozenset(
    {
        ("Llama4TextExperts", "gate_up_proj"),
        ("Llama4TextExperts", "down_proj"),
        ("DbrxExpertGLU", "w2"),
        ("GroupedMLP", "weight1"),
        ("GroupedMLP", "weight2"),
    }
)
"""Parameters whose matrices are inputs x outputs, of modules that do not say so by ``is_transposed``."""


@dataclass(frozen=True)
class Stack:
    """How a parameter is a stack.

    Attributes:
        count: how many matrices this tensor-parallel rank has of it.
        rows: rows of each matrix on this rank; None if the parameter has a dimension for the experts.
    """

    count: int
    rows: int | None = None

    def matrix(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The shape of each matrix on this tensor-parallel rank.

        Args:
            shape: of the parameter there.
        """
        rows = shape[-2] if self.rows is None else self.rows
        return rows, math.prod(shape) // (self.count * rows)


def tag_stack(parameter: torch.Tensor, matrices: int | None = None, rows: int | None = None) -> None:
    """Declare that a parameter is a stack of matrices, for example one for each expert; each is projected on its own.

    The experts of transformers and megatron-core are recognised without it.

    Args:
        parameter: ``E x m x n``; or a matrix whose elements, in storage order, are those of ``E`` matrices, such as
            ``(E m) x n``. On a tensor-parallel rank, that rank's part.
        matrices: E, if the parameter has no dimension for it.
        rows: m, if the parameter has no dimension for E and m is not its number of rows divided by E.

    Raises:
        ConfigError: the parameter is not such a stack.
    """
    shape = unpartitioned_shape(parameter)
    if len(shape) == 3 and matrices in (None, shape[0]) and rows in (None, shape[1]):
        setattr(parameter, STACK, Stack(shape[0]))
        return
    height = rows or (shape[0] // matrices if matrices else 0)
    if len(shape) != 2 or not matrices or not height or math.prod(shape) % (matrices * height):
        raise ConfigError(
            f"tag_stack: a parameter of shape {shape} is not a stack of {matrices or 'E'} matrices. It must be "
            "E x m x n, or have two dimensions and be given matrices=E"
        )
    setattr(parameter, STACK, Stack(matrices, height))


def stack_of(parameter: Any, shape: tuple[int, ...]) -> Stack | None:
    """How a parameter is a stack, as it was declared or recognised; None if it is not one.

    Args:
        parameter: of the model.
        shape: its shape on this tensor-parallel rank.
    """
    stack: Stack | None = getattr(parameter, STACK, None)
    return stack if stack is not None and len(shape) in (2, 3) else None


def mark_stacks(module: torch.nn.Module) -> None:
    """Mark the stacks among a module's own parameters, if it is one that holds experts.

    Args:
        module: any module of a model.
    """
    kind = type(module).__name__
    count = next((n for n in (getattr(module, key, None) for key in COUNTS) if isinstance(n, int) and n > 0), None)
    if kind == "GroupedMLP" and count is not None and hasattr(module, "weight1"):
        _mark_grouped(module, count)
        return
    for name, parameter in module.named_parameters(recurse=False):
        shape = unpartitioned_shape(parameter)
        if hasattr(parameter, STACK) or isinstance(module, torch.nn.modules.conv._ConvNd):
            continue
        if len(shape) == 3 and ("expert" in kind.lower() or count == shape[0]) and not _holds_biases(name, shape):
            tag_stack(parameter)
        elif len(shape) == 2 and kind in STORED_AS_ROWS and count and shape[0] % count == 0:
            tag_stack(parameter, count)


def holds_vectors(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter of two dimensions holds vectors: the biases of experts or heads, a row for each.

    Args:
        name: the parameter's name in the model.
        shape: its shape.
    """
    return len(shape) == 2 and name.endswith("bias")


def _holds_biases(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter of three dimensions holds a vector for each expert."""
    return name.endswith("bias") or 1 in shape[1:]


def is_stored_transposed(module: torch.nn.Module, name: str) -> bool:
    """Whether the matrices in a module's stack are inputs x outputs, not outputs x inputs as in ``nn.Linear``.

    Args:
        module: that holds experts.
        name: of its own parameter.
    """
    return bool(getattr(module, "is_transposed", False)) or (type(module).__name__, name) in STORED_TRANSPOSED


def _mark_grouped(module: Any, count: int) -> None:
    """megatron-core views its two weights as ``E x hidden x f`` and ``E x f x hidden``."""
    hidden = module.config.hidden_size
    if not hasattr(module.weight1, STACK):
        tag_stack(module.weight1, count, rows=hidden)
        tag_stack(module.weight2, count)

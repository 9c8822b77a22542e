"""An engine's weights as pieces of logical tensors, and back: masters, and from them what forward passes read."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

import torch

from ds_lowrank.collectives import raise_on_all_ranks
from ds_lowrank.errors import CheckpointError
from ds_lowrank.optimizer.optimizer import LowRankOptimizer
from ds_lowrank.placement.grid import Grid
from ds_lowrank.placement.parameter_names import tag_names
from ds_lowrank.placement.tensor_parallel import logical_matrices
from ds_lowrank.placement.zero import (
    Interval,
    forward_weights,
    release_gathered,
    renew_forward_weights,
    unpartitioned_shape,
)
from ds_lowrank.sharding.layout import Rectangle
from ds_lowrank.sharding.logical import Logical
from ds_lowrank.sharding.pieces import Piece, Source, as_matrix


def weight_pieces(engine: Any) -> Iterator[Piece]:
    """This rank's pieces of all parameters and buffers; their tensors are the weights themselves where possible.

    Args:
        engine: with an optimizer of this package.
    """
    for logical, interval in _parts(engine):
        rectangles = logical.part(logical.own, interval.start, interval.end).rectangles
        if rectangles:
            yield Piece(logical.name, logical.shape, rectangles, interval.fragment(logical).weights.detach())
    for name, buffer in _buffers(engine.module):
        rows, columns = as_matrix(buffer.shape)
        yield Piece(name, tuple(buffer.shape), (Rectangle(0, 0, rows, columns, 0),), buffer.detach().contiguous())


def weight_names(engine: Any, parameters: Container[str] | None = None) -> set[str]:
    """The names of this rank's tensors in :func:`weight_pieces`.

    Args:
        engine: with an optimizer of this package.
        parameters: the names of parameters in the engine's module, without the others; None for all.
    """
    found = {logical.name for logical, _ in _parts(engine, parameters)}
    return found | {name for name, _ in _buffers(engine.module)}


@torch.no_grad()
def load_weights(engine: Any, source: Source) -> None:
    """Load this rank's share of all parameters and buffers. Collective, as DeepSpeed gathers what forward passes read.

    Args:
        engine: with an optimizer of this package, just built.
        source: what was saved; what it lacks of :func:`weight_names` stays as it is.

    Raises:
        CheckpointError: it cannot be read.
        RemoteError: another rank failed.
    """
    wrapper = engine.optimizer
    if hasattr(wrapper, "checkpoint_event_prologue"):
        wrapper.checkpoint_event_prologue()
    release_gathered(engine.module.parameters())
    with raise_on_all_ranks():
        _read_weights(engine, source)
    renew_forward_weights(wrapper)
    if hasattr(wrapper, "checkpoint_event_epilogue"):
        wrapper.checkpoint_event_epilogue()


def _read_weights(engine: Any, source: Source) -> None:
    """Read the masters where there are any, otherwise what forward passes read."""
    for logical, interval in _parts(engine):
        rectangles = logical.part(logical.own, interval.start, interval.end).rectangles
        if rectangles and source.has(logical.name):
            fragment = interval.fragment(logical)
            weights = fragment.weights
            source.read(logical.name, rectangles, weights)
            fragment.put(weights)
    for name, buffer in _buffers(engine.module):
        if not source.has(name):
            continue
        rows, columns = as_matrix(buffer.shape)
        found = torch.empty_like(buffer, memory_format=torch.contiguous_format)
        source.read(name, [Rectangle(0, 0, rows, columns, 0)], found)
        buffer.copy_(found)


def check_shapes(engine: Any, source: Source, *, is_strict: bool) -> None:
    """Check that weights were saved with the shapes that they have here.

    Args:
        engine: with an optimizer of this package.
        source: what was saved.
        is_strict: whether all of them must have been.

    Raises:
        CheckpointError: one was not.
    """
    wanted = {logical.name: logical.shape for logical, _ in _parts(engine)}
    wanted |= {name: tuple(buffer.shape) for name, buffer in _buffers(engine.module)}
    missing = sorted(name for name in wanted if not source.has(name))
    if missing and is_strict:
        raise CheckpointError(
            f"the checkpoint belongs to another model: it has no {missing[0]}"
            + (f", and lacks {len(missing) - 1} more tensors of this one" if missing[1:] else "")
        )
    for name, shape in wanted.items():
        if source.has(name) and tuple(source.shape(name)) != tuple(shape):
            raise CheckpointError(
                f"the checkpoint belongs to another model: {name} is {tuple(source.shape(name))} there and "
                f"{tuple(shape)} here"
            )


def _parts(engine: Any, parameters: Container[str] | None = None) -> Iterator[tuple[Logical, Interval]]:
    """Every logical matrix or vector of the model, and the elements that this rank has of the parameter it is in."""
    optimizer: LowRankOptimizer = engine.basic_optimizer
    grid: Grid = optimizer.grid
    names = tag_names(engine.module)
    for name, parameter in torch.nn.Module.named_parameters(engine.module):
        if parameters is not None and name not in parameters:
            continue
        interval = optimizer.interval_of(parameter) or forward_weights(parameter)[0]
        for logical in logical_matrices(parameter, unpartitioned_shape(parameter), names[name], grid):
            yield logical, interval


def _buffers(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers that belong to a model's state, by name."""
    for prefix, child in module.named_modules():
        for name, buffer in child.named_buffers(recurse=False):
            if name not in child._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer

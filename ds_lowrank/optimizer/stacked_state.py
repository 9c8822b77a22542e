"""The states of the matrices of a stack as one state, whose tensors have a leading dimension for the matrices."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch

from ds_lowrank.methods.base import State


class StackedState:
    """Views the states of several matrices as one.

    Each matrix keeps a state of its own, a dict under its name, for checkpoints and reports. Its tensors are views of
    the stack's tensors, so nothing is copied as long as the same matrices are stepped together. Where a state was
    replaced, by a checkpoint for example, or the matrices were in other stacks before, they are copied together once.

    Args:
        states: of the matrices, stored alike and with the same integers.
        is_here: whether this rank has rows of the states; if not, only the integers are kept up.
    """

    def __init__(self, states: Sequence[State], is_here: bool) -> None:
        self._states, self._is_here = states, is_here
        self._blocks: dict[str, torch.Tensor] = {}
        self._views: dict[str, Sequence[torch.Tensor]] = {}

    def open(self) -> State:
        """The state of the stack: tensors matrices x rows x columns, and the integers."""
        state: State = {}
        for key, value in self._states[0].items():
            if not isinstance(value, torch.Tensor):
                state[key] = value
            elif self._is_here:
                state[key] = self._block(key)
            else:
                state[key] = value.new_empty(len(self._states), *value.shape)
        return state

    def _block(self, key: str) -> torch.Tensor:
        rows = [state[key] for state in self._states]
        views = self._views.get(key)
        if views is None or not all(map(operator.is_, rows, views)):
            found = _behind_one_another(rows)
            if found is None:
                self._adopt(key, torch.stack(rows))
            else:
                self._blocks[key], self._views[key] = found, rows
        return self._blocks[key]

    def _adopt(self, key: str, block: torch.Tensor) -> None:
        views = block.unbind()
        for state, view in zip(self._states, views, strict=True):
            state[key] = view
        self._blocks[key], self._views[key] = block, views

    def close(self, state: State) -> None:
        """Take over what a step has changed.

        Args:
            state: what :meth:`open` returned, with other tensors or integers where a method replaced them. A list has
                an integer for each matrix.
        """
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                if self._is_here and value is not self._blocks.get(key):
                    self._adopt(key, value.contiguous())
            else:
                values = value if isinstance(value, list) else [value] * len(self._states)
                for own, number in zip(self._states, values, strict=True):
                    own[key] = number


def _behind_one_another(rows: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Tensors that lie behind one another in one storage as a single one with a leading dimension; None if not so."""
    first, numel = rows[0], rows[0].numel()
    if len(rows) == 1:
        return first.unsqueeze(0)
    if first.is_meta or not numel or not first.is_contiguous():
        return None
    size, start, storage = numel * first.element_size(), first.data_ptr(), first.untyped_storage().data_ptr()
    for i, row in enumerate(rows):
        apart = row.data_ptr() != start + i * size or row.untyped_storage().data_ptr() != storage
        if apart or row.shape != first.shape or row.dtype != first.dtype or not row.is_contiguous():
            return None
    shape, strides = (len(rows), *first.shape), (numel, *first.stride())
    return first.as_strided(shape, strides, first.storage_offset())

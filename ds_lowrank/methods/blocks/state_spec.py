"""What is kept of a parameter between steps, and how it is stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ds_lowrank.linalg.quantization import DITHER_BITS, FP32, Quantizer
from ds_lowrank.linalg.sketch import name_hash
from ds_lowrank.sharding.axis import Axis

State = dict[str, Any]
"""Tensors and ints under fixed keys. ``step`` (the optimizer's) is always there."""


@dataclass(frozen=True)
class TensorSpec:
    """A part of the state: ``columns`` numbers for every row along ``axis``, dealt over the ranks by rows."""

    axis: Axis
    columns: int
    quantizer: Quantizer = FP32

    @property
    def numel(self) -> int:
        """Numbers, over all ranks."""
        return self.axis.size * self.columns

    @property
    def nbytes(self) -> int:
        """Over all ranks."""
        return self.quantizer.nbytes(self.axis.size, self.columns)

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """Shape and dtype of what this rank stores, under what is appended to the key."""
        return self.quantizer.tensors(self.axis.owned_rows, self.columns)

    def encode(self, values: torch.Tensor, step: int, key: str) -> dict[str, torch.Tensor]:
        """What to store for this rank's rows after a step.

        Args:
            values: owned rows x columns, fp32.
            key: sets this tensor's rounding apart from that of others.
        """
        offset = name_hash(key, step) % 2**DITHER_BITS
        sizes = [hi - lo for lo, hi in self.axis.owned]
        if len(sizes) <= 1:
            return self.quantizer.encode(values, self.axis.owned[0][0] if sizes else 0, offset)
        pieces = [
            self.quantizer.encode(piece, lo, offset)
            for (lo, _), piece in zip(self.axis.owned, torch.split(values, sizes), strict=True)
        ]
        return {suffix: torch.cat([piece[suffix] for piece in pieces]) for suffix in pieces[0]}


StateSpec = Mapping[str, TensorSpec | int]
"""The state of one matrix: rows of numbers, and ints with their first values."""


class StateStore:
    """What is kept of one parameter between steps: a layout, and how a state of it is stored.

    Args:
        name: of the parameter.
        spec: what is kept at a rank.
        rank: with which it starts; a state may hold a smaller one.
    """

    def __init__(self, name: str, spec: Callable[[int], StateSpec], rank: int) -> None:
        self.name, self.spec, self.rank = name, spec, rank
        self.is_exact = all(rows.quantizer is FP32 for rows in self._rows(rank).values())

    def _rows(self, rank: int) -> dict[str, TensorSpec]:
        return {key: rows for key, rows in self.spec(rank).items() if isinstance(rows, TensorSpec)}

    def rank_of(self, state: State) -> int:
        """The present rank."""
        rank: int = state.get("rank", self.rank)
        return rank

    @cached_property
    def numel(self) -> int:
        """Numbers at the start, over all ranks."""
        return sum(rows.numel for rows in self._rows(self.rank).values())

    def nbytes(self, state: State) -> int:
        """Of all tensors now, over all ranks."""
        return sum(rows.nbytes for rows in self._rows(self.rank_of(state)).values())

    def tensors(self, rank: int) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """Shape and dtype of everything that this rank stores, by its key in the state."""
        return {key + suffix: like for key, rows in self._rows(rank).items() for suffix, like in rows.tensors.items()}

    def empty(self, device: torch.device) -> State:
        """The state before the first step."""
        tensors = self.tensors(self.rank).items()
        ints = {key: value for key, value in self.spec(self.rank).items() if not isinstance(value, TensorSpec)}
        return {**{key: torch.zeros(shape, dtype=dtype, device=device) for key, (shape, dtype) in tensors}, **ints}

    def decode(self, state: State) -> State:
        """The state as a method sees it: every number fp32, under its plain key. The state itself where it is that."""
        if self.is_exact:
            return state
        rows = self._rows(self.rank_of(state))
        stored = {key + suffix for key, one in rows.items() for suffix in one.tensors}
        plain = {key: value for key, value in state.items() if key not in stored}
        return plain | {
            key: one.quantizer.decode({suffix: state[key + suffix] for suffix in one.tensors})
            for key, one in rows.items()
        }

    def encode(self, state: State, opened: State) -> None:
        """Store in ``state`` what a method left in ``decode``."""
        if opened is state:
            return
        rows = self._rows(self.rank_of(opened))
        state |= {key: value for key, value in opened.items() if key not in rows}
        for key, one in rows.items():
            stored = one.encode(opened[key], opened["step"], f"{self.name}\0{key}")
            state |= {key + suffix: value for suffix, value in stored.items()}

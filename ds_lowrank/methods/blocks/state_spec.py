"""Which state a parameter has between steps, and how it is stored."""

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
"""The state of one parameter: tensors and ints under fixed keys. The optimizer's ``step`` is always among them."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the state, whose rows are dealt over the ranks.

    Attributes:
        axis: the dimension of the matrix that the rows belong to.
        columns: how many numbers each row has.
        quantizer: how the numbers are stored.
    """

    axis: Axis
    columns: int
    quantizer: Quantizer = FP32

    @property
    def numel(self) -> int:
        """Total number of elements, summed over ranks."""
        return self.axis.size * self.columns

    @property
    def nbytes(self) -> int:
        """Total stored bytes, summed over ranks."""
        return self.quantizer.nbytes(self.axis.size, self.columns)

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """Shape and dtype of each tensor that this rank stores, by the suffix that is appended to the spec's key."""
        return self.quantizer.tensors(self.axis.owned_rows, self.columns)

    def encode(self, values: torch.Tensor, step: int, key: str) -> dict[str, torch.Tensor]:
        """The tensors to store for this rank's rows after a step.

        Args:
            values: owned rows x columns, fp32.
            step: the number of steps before this one; it seeds the rounding together with ``key``.
            key: identifies the tensor, so that no two tensors round alike.

        Returns:
            Tensors as :attr:`tensors` describes them, by suffix.
        """
        offset = name_hash(key, step) % 2**DITHER_BITS
        sizes = [end - start for start, end in self.axis.owned]
        if len(sizes) <= 1:
            return self.quantizer.encode(values, self.axis.owned[0][0] if sizes else 0, offset)
        pieces = [
            self.quantizer.encode(piece, start, offset)
            for (start, _), piece in zip(self.axis.owned, torch.split(values, sizes), strict=True)
        ]
        return {suffix: torch.cat([piece[suffix] for piece in pieces]) for suffix in pieces[0]}


StateSpec = Mapping[str, TensorSpec | int]
"""The state of one matrix by key: a spec for each tensor, and the initial value of each int."""


class StateStore:
    """Stores the state of one parameter, in whatever dtypes its spec names, and shows it to a method in fp32.

    Args:
        name: the parameter's name.
        spec: returns the state's spec for a rank.
        rank: the initial rank, 0 for what has none; a state may have a smaller one under ``rank``.

    Attributes:
        is_exact: whether every tensor is stored in fp32.
    """

    def __init__(self, name: str, spec: Callable[[int], StateSpec], rank: int) -> None:
        self.name, self.spec, self.rank = name, spec, rank
        self.is_exact = all(spec.quantizer is FP32 for spec in self._tensor_specs(rank).values())

    def _tensor_specs(self, rank: int) -> dict[str, TensorSpec]:
        return {key: spec for key, spec in self.spec(rank).items() if isinstance(spec, TensorSpec)}

    def rank_of(self, state: State) -> int:
        """The current rank of a state.

        Args:
            state: stored or decoded.
        """
        rank: int = state.get("rank", self.rank)
        return rank

    @cached_property
    def numel(self) -> int:
        """Elements of the initial state, summed over ranks."""
        return sum(spec.numel for spec in self._tensor_specs(self.rank).values())

    def nbytes(self, state: State) -> int:
        """Stored bytes of all tensors at the state's current rank, summed over ranks.

        Args:
            state: stored or decoded.
        """
        return sum(spec.nbytes for spec in self._tensor_specs(self.rank_of(state)).values())

    def tensors(self, rank: int) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """Shape and dtype of every tensor that this rank stores, by its key in the state.

        Args:
            rank: the rank of the state.
        """
        specs = self._tensor_specs(rank)
        return {key + suffix: like for key, spec in specs.items() for suffix, like in spec.tensors.items()}

    def empty(self, device: torch.device) -> State:
        """The state before the first step: zeros, and the initial values of ints.

        Args:
            device: where to create the tensors.
        """
        tensors = self.tensors(self.rank).items()
        ints = {key: value for key, value in self.spec(self.rank).items() if not isinstance(value, TensorSpec)}
        return {**{key: torch.zeros(shape, dtype=dtype, device=device) for key, (shape, dtype) in tensors}, **ints}

    def decode(self, state: State) -> State:
        """The state as a method sees it: every tensor in fp32, under the key of its spec.

        Args:
            state: as stored.

        Returns:
            The state itself if everything is stored in fp32, else a new dict.
        """
        if self.is_exact:
            return state
        specs = self._tensor_specs(self.rank_of(state))
        stored = {key + suffix for key, spec in specs.items() for suffix in spec.tensors}
        others = {key: value for key, value in state.items() if key not in stored}
        return others | {
            key: spec.quantizer.decode({suffix: state[key + suffix] for suffix in spec.tensors})
            for key, spec in specs.items()
        }

    def encode(self, state: State, decoded: State) -> None:
        """Store a state that a method has changed.

        Args:
            state: where to store it, changed in place.
            decoded: what :meth:`decode` returned, as the method left it.
        """
        if decoded is state:
            return
        specs = self._tensor_specs(self.rank_of(decoded))
        state |= {key: value for key, value in decoded.items() if key not in specs}
        for key, spec in specs.items():
            stored = spec.encode(decoded[key], decoded["step"], f"{self.name}\0{key}")
            state |= {key + suffix: value for suffix, value in stored.items()}

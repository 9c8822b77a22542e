"""Which state a parameter has between steps, and how it is stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any

import torch

from ds_lowrank.linalg.dither import offsets
from ds_lowrank.linalg.quantization import FP32, Quantizer
from ds_lowrank.linalg.sketch import name_hash
from ds_lowrank.sharding.axis import Axis

Formats = Mapping[str, str]
"""In which formats numbers are stored: ``state_dtype`` and ``basis_dtype``, as in the options."""
State = dict[str, Any]
"""The state of one parameter: tensors and ints under fixed keys. The optimizer's ``step`` is always among them."""

BASIS_KEYS = ("basis", "indices")
"""Under which a state has its basis: as a tensor, or as the indices of columns of a fixed matrix."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the state, whose rows are dealt over the ranks.

    Attributes:
        axis: the dimension of the matrix that the rows belong to.
        columns: how many numbers each row has.
        quantizer: how the numbers are stored.
        is_basis: whether it is needed to project, and a method only ever replaces it, and never changes it in place.
    """

    axis: Axis
    columns: int
    quantizer: Quantizer = FP32
    is_basis: bool = False

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

    def decode(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The numbers of this rank's rows.

        Args:
            stored: tensors as :attr:`tensors` describes them with a leading dimension for matrices, by suffix.

        Returns:
            matrices x owned rows x columns, fp32.
        """
        return self.quantizer.decode(stored)

    def encode(self, values: torch.Tensor, offsets: torch.Tensor, out: Mapping[str, torch.Tensor]) -> None:
        """Store the numbers of this rank's rows.

        Args:
            values: matrices x owned rows x columns, fp32.
            offsets: one for each matrix, which decides the rounding.
            out: where to store them: tensors as :meth:`decode` reads them.
        """
        if len(self.axis.owned) <= 1:
            self.quantizer.encode(values, self.axis.owned[0][0] if self.axis.owned else 0, offsets, out)
            return
        position, places = 0, dict.fromkeys(out, 0)
        for start, end in self.axis.owned:  # blocks are counted from row 0 of the matrix: each span begins with one
            rows = end - start
            lengths = {suffix: shape[0] for suffix, (shape, _) in self.quantizer.tensors(rows, self.columns).items()}
            parts = {suffix: out[suffix].narrow(1, places[suffix], count) for suffix, count in lengths.items()}
            self.quantizer.encode(values.narrow(1, position, rows), start, offsets, parts)
            position += rows
            places = {suffix: places[suffix] + lengths[suffix] for suffix in out}


StateSpec = Mapping[str, TensorSpec | int]
"""The state of one matrix by key: a spec for each tensor, and the initial value of each int."""


class StateStore:
    """How the state of matrices that are cut alike is stored, and how a method sees it: in fp32.

    Args:
        spec: returns the state's spec for a rank and formats in place of those of the options.
        rank: the initial rank, 0 for what has none; a state may have another one under ``rank``.

    Attributes:
        is_exact: whether every tensor is stored in fp32.
    """

    def __init__(self, spec: Callable[[int, Formats], StateSpec], rank: int) -> None:
        self._spec, self.rank = spec, rank
        specs = self.tensor_specs(rank).values()
        self.is_exact = all(spec.quantizer is FP32 for spec in specs)
        self._has_quantized_bases = any(spec.is_basis and spec.quantizer is not FP32 for spec in specs)

    def spec(self, rank: int) -> StateSpec:
        """The spec of a matrix's state.

        Args:
            rank: of the state.
        """
        return self._spec(rank, {})

    def tensor_specs(self, rank: int, formats: Formats = MappingProxyType({})) -> dict[str, TensorSpec]:
        """The spec of every tensor of the state, by its key.

        Args:
            rank: of the state.
            formats: in which it is stored, where they are not those of the options.
        """
        specs = self._spec(rank, formats).items()
        return {key: spec for key, spec in specs if isinstance(spec, TensorSpec)}

    def rank_of(self, state: State) -> int:
        """The current rank of a state.

        Args:
            state: stored or decoded.
        """
        rank: int = state.get("rank", self.rank)
        return rank

    @cached_property
    def numel(self) -> int:
        """Elements of a matrix's initial state, summed over ranks."""
        return sum(spec.numel for spec in self.tensor_specs(self.rank).values())

    def nbytes(self, state: State) -> int:
        """Stored bytes of all tensors of a matrix at the state's current rank, summed over ranks.

        Args:
            state: stored or decoded.
        """
        return sum(spec.nbytes for spec in self.tensor_specs(self.rank_of(state)).values())

    def tensors(self, rank: int) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """Shape and dtype of every tensor that this rank stores of a matrix, by its key in the state.

        Args:
            rank: the rank of the state.
        """
        specs = self.tensor_specs(rank)
        return {key + suffix: like for key, spec in specs.items() for suffix, like in spec.tensors.items()}

    def empty(self, device: torch.device, matrices: int) -> list[State]:
        """The states of some matrices before the first step: zeros, and the initial values of ints.

        Args:
            device: where to create the tensors.
            matrices: how many there are. Their tensors lie behind one another in memory.
        """
        stacked = {
            key: torch.zeros(matrices, *shape, dtype=dtype, device=device).unbind()
            for key, (shape, dtype) in self.tensors(self.rank).items()
        }
        ints = {key: value for key, value in self.spec(self.rank).items() if not isinstance(value, TensorSpec)}
        return [{**{key: rows[i] for key, rows in stacked.items()}, **ints} for i in range(matrices)]

    def decode_bases(self, state: State) -> State:
        """The bases of a stack that are not stored in fp32, in fp32, under the keys of their specs.

        Args:
            state: as stored, with a leading dimension for matrices.
        """
        if not self._has_quantized_bases:
            return {}
        specs = self.tensor_specs(self.rank_of(state)).items()
        bases = {key: spec for key, spec in specs if spec.is_basis and spec.quantizer is not FP32}
        return {key: spec.decode({s: state[key + s] for s in spec.tensors}) for key, spec in bases.items()}

    def decode(self, state: State, bases: State) -> State:
        """A stack's state as a method sees it: every tensor in fp32, under the key of its spec.

        Args:
            state: as stored, with a leading dimension for matrices.
            bases: what :meth:`decode_bases` returned.

        Returns:
            The state itself if everything is stored in fp32, else a new dict.
        """
        if self.is_exact:
            return state
        specs = self.tensor_specs(self.rank_of(state))
        stored = {key + suffix for key, spec in specs.items() for suffix in spec.tensors}
        others = {key: value for key, value in state.items() if key not in stored}
        specs = {key: spec for key, spec in specs.items() if key not in bases}
        decoded = {key: spec.decode({s: state[key + s] for s in spec.tensors}) for key, spec in specs.items()}
        return others | bases | decoded

    def encode(self, state: State, decoded: State, names: Sequence[str], bases: State) -> None:
        """Store a stack's state that a method has changed.

        Args:
            state: where to store it, changed in place.
            decoded: what :meth:`decode` returned, as the method left it.
            names: of the matrices; rounding is a function of name, key and step.
            bases: what :meth:`decode_bases` returned: those that were not replaced stay as they are.
        """
        if decoded is state:
            return
        specs = self.tensor_specs(self.rank_of(decoded))
        state |= {key: value for key, value in decoded.items() if key not in specs}
        for key, spec in specs.items():
            values = decoded[key]
            if key in bases and values is bases[key]:
                continue
            out = {suffix: state[key + suffix] for suffix in spec.tensors}
            for suffix, (shape, dtype) in spec.tensors.items():
                if out[suffix].shape[1:] != shape:  # the rank has changed
                    out[suffix] = torch.empty(len(names), *shape, dtype=dtype, device=values.device)
            spec.encode(values, rounding_offsets(names, key, decoded["step"], values.device), out)
            state |= {key + suffix: value for suffix, value in out.items()}


def rounding_offsets(names: Sequence[str], key: str, step: int, device: torch.device) -> torch.Tensor:
    """What decides how the tensors under a key are rounded in a step: one offset for each matrix, int32.

    Args:
        names: of the matrices.
        key: of the tensor in their states.
        step: their number of steps before this one.
        device: of the tensors.
    """
    return offsets(_hashes(tuple(names), key, device), step, device)


@lru_cache(maxsize=256)
def _hashes(names: tuple[str, ...], key: str, device: torch.device) -> torch.Tensor:
    """What tells apart how the tensors under a key are rounded: one number for each matrix, int64."""
    return torch.tensor([name_hash(name, key) for name in names], dtype=torch.int64, device=device)

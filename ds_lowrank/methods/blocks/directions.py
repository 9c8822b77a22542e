"""Random directions in the space of one weight matrix, for methods that probe the loss around the weights.

A direction is given by its coordinates, which are a function of (seed, name, counter) alone: every shard, replica and
resumed run draws the same ones, and none is sent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ds_lowrank.linalg.sketch import gaussian
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.updates import Dense, Factors


@dataclass(frozen=True)
class Directions(ABC):
    """The directions of one matrix in one step.

    Attributes:
        shard: the part of the matrix whose weights are to be moved.
        seed: of the run.
    """

    shard: MatrixShard
    seed: int

    @abstractmethod
    def draw(self, counter: str) -> torch.Tensor:
        """The coordinates of one random direction, fp32."""

    @abstractmethod
    def square(self, coordinates: torch.Tensor) -> float:
        """The squared Frobenius norm of the whole matrix that they stand for, the same on all ranks."""

    @abstractmethod
    def to_matrix(self, coordinates: torch.Tensor) -> Factors | Dense:
        """The matrix that they stand for, on the elements of the shard."""

    def combined(self, counters: Sequence[str], weights: Sequence[float]) -> torch.Tensor:
        """The coordinates of a sum of directions."""
        total = torch.zeros((), device=self.shard.device)
        for counter, weight in zip(counters, weights, strict=True):
            total = weight * self.draw(counter) + total
        return total

    def _normal(self, counter: str, rows: int, columns: int) -> torch.Tensor:
        return gaussian(self.seed, self.shard.name, counter, rows, columns, self.shard.device)


@dataclass(frozen=True)
class Diagonal(Directions):
    """``Pi = F diag(u) Q^T`` with r normal numbers u: one for every pair of stored directions.

    Attributes:
        basis: held compressed rows x r, ``Q``.
        right_factor: held kept rows x r, ``F``.
        squares: r, the squared lengths of the pairs: one, or zero for a pair that a poor gradient left empty.
    """

    basis: torch.Tensor
    right_factor: torch.Tensor
    squares: torch.Tensor
    drawn: dict[str, torch.Tensor] = field(default_factory=dict)

    def draw(self, counter: str) -> torch.Tensor:
        """Remembered: r numbers take no room."""
        if counter not in self.drawn:
            self.drawn[counter] = self._normal(counter, 1, self.squares.numel())
        return self.drawn[counter]

    def square(self, coordinates: torch.Tensor) -> float:
        return float((coordinates.double().square() * self.squares).sum())

    def to_matrix(self, coordinates: torch.Tensor) -> Factors:
        return Factors(self.right_factor * coordinates, self.basis, 1.0)


@dataclass(frozen=True)
class GaussianInSubspace(Directions):
    """``Pi = U Q^T`` with kept x r normal numbers U.

    Attributes:
        basis: held compressed rows x r, ``Q``.
        squares: r, the squared lengths of its columns: one or zero.
    """

    basis: torch.Tensor
    squares: torch.Tensor

    def draw(self, counter: str) -> torch.Tensor:
        return self._normal(counter, self.shard.kept.size, self.squares.numel())

    def square(self, coordinates: torch.Tensor) -> float:
        lengths = torch.linalg.vector_norm(coordinates, dim=0, dtype=torch.float64)
        return float((lengths.square() * self.squares).sum())

    def to_matrix(self, coordinates: torch.Tensor) -> Factors:
        start, end = self.shard.kept.held
        return Factors(coordinates[start:end], self.basis, 1.0)


@dataclass(frozen=True)
class FullSpace(Directions):
    """``Pi``: m x n normal numbers."""

    def draw(self, counter: str) -> torch.Tensor:
        return self._normal(counter, *self.shard.shape)

    def square(self, coordinates: torch.Tensor) -> float:
        return float(torch.linalg.vector_norm(coordinates, dtype=torch.float64).square())

    def to_matrix(self, coordinates: torch.Tensor) -> Dense:
        return Dense(lambda: self.shard.elements_of(coordinates), 1.0)

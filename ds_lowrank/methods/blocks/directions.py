"""Random directions in the space of one weight matrix, for methods that probe the loss around the weights.

A direction is represented by its coordinates, a function of (seed, name, counter) alone: every shard, replica and
resumed run draws the same ones, so none has to be sent.
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
    """The random directions along which one matrix may be moved in one step.

    Attributes:
        shard: the part of the matrix whose weights will be moved.
        seed: the run's seed.
    """

    shard: MatrixShard
    seed: int

    @abstractmethod
    def draw(self, counter: str) -> torch.Tensor:
        """Draw the coordinates of one random direction.

        Args:
            counter: names the direction among those of the matrix; with the seed and the matrix's name it decides the
                numbers.

        Returns:
            Coordinates, fp32, the same on all ranks. Their shape depends on the kind of direction.
        """

    @abstractmethod
    def square(self, coordinates: torch.Tensor) -> float:
        """The squared Frobenius norm of the whole matrix with these coordinates, the same on all ranks.

        Args:
            coordinates: those of a direction, or of a sum of directions.
        """

    @abstractmethod
    def to_matrix(self, coordinates: torch.Tensor) -> Factors | Dense:
        """The matrix with these coordinates, on the elements of the shard.

        Args:
            coordinates: those of a direction, or of a sum of directions.
        """

    def combined(self, counters: Sequence[str], weights: Sequence[float]) -> torch.Tensor:
        """The coordinates of a weighted sum of directions.

        Args:
            counters: the counter of each direction.
            weights: the weight of each direction.

        Returns:
            Coordinates as :meth:`draw` returns them, fp32.
        """
        total = torch.zeros((), dtype=torch.float32, device=self.shard.device)
        for counter, weight in zip(counters, weights, strict=True):
            total = weight * self.draw(counter) + total
        return total

    def _normal(self, counter: str, rows: int, columns: int) -> torch.Tensor:
        return gaussian(self.seed, self.shard.name, counter, rows, columns, self.shard.device)


@dataclass(frozen=True)
class Diagonal(Directions):
    """Directions ``Pi = F diag(u) Q^T`` with r normal numbers u, one for each pair of stored singular directions.

    Attributes:
        basis: ``Q``, held compressed rows x r, fp32.
        right_factor: ``F``, held kept rows x r, fp32.
        squares: the squared length of each pair, r numbers: one, or zero for a pair that is empty because the gradient
            had fewer than r directions.
        drawn: the coordinates drawn so far, by counter.
    """

    basis: torch.Tensor
    right_factor: torch.Tensor
    squares: torch.Tensor
    drawn: dict[str, torch.Tensor] = field(default_factory=dict)

    def draw(self, counter: str) -> torch.Tensor:
        """Draw u, 1 x r normal numbers, or return those drawn before: r numbers are cheap to keep."""
        if counter not in self.drawn:
            self.drawn[counter] = self._normal(counter, 1, self.squares.numel())
        return self.drawn[counter]

    def square(self, coordinates: torch.Tensor) -> float:
        """``|F diag(u) Q^T|^2``: the sum of ``u_i^2`` over the pairs that are not empty."""
        return float((coordinates.double().square() * self.squares).sum())

    def to_matrix(self, coordinates: torch.Tensor) -> Factors:
        """``F diag(u) Q^T`` on this rank's elements, as two factors."""
        return Factors(self.right_factor * coordinates, self.basis, 1.0)


@dataclass(frozen=True)
class GaussianInSubspace(Directions):
    """Directions ``Pi = U Q^T`` with kept x r normal numbers U.

    Attributes:
        basis: ``Q``, held compressed rows x r, fp32.
        squares: the squared length of each column of the basis, r numbers: one, or zero for an empty column.
    """

    basis: torch.Tensor
    squares: torch.Tensor

    def draw(self, counter: str) -> torch.Tensor:
        """Draw the whole U, kept x r normal numbers."""
        return self._normal(counter, self.shard.kept.size, self.squares.numel())

    def square(self, coordinates: torch.Tensor) -> float:
        """``|U Q^T|^2``: the sum of the squared lengths of U's columns, except those that meet an empty column of Q."""
        lengths = torch.linalg.vector_norm(coordinates, dim=0, dtype=torch.float64)
        return float((lengths.square() * self.squares).sum())

    def to_matrix(self, coordinates: torch.Tensor) -> Factors:
        """``U Q^T`` on this rank's elements, as two factors."""
        start, end = self.shard.kept.held
        return Factors(coordinates[start:end], self.basis, 1.0)


@dataclass(frozen=True)
class FullSpace(Directions):
    """Directions of m x n normal numbers, not restricted to a subspace."""

    def draw(self, counter: str) -> torch.Tensor:
        """Draw the whole direction, m x n normal numbers."""
        return self._normal(counter, *self.shard.shape)

    def square(self, coordinates: torch.Tensor) -> float:
        """The squared Frobenius norm of the coordinates, which are the matrix itself."""
        return float(torch.linalg.vector_norm(coordinates, dtype=torch.float64).square())

    def to_matrix(self, coordinates: torch.Tensor) -> Dense:
        """This rank's elements of the m x n coordinates."""
        return Dense(lambda: self.shard.elements_of(coordinates), 1.0)

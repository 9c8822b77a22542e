"""Random directions in the space of weight matrices, for methods that probe the loss around the weights.

A direction is a function of (seed, name, counter) alone: every shard, replica and resumed run draws the same one, so
none has to be sent, and a rank draws no more of it than it moves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from ds_lowrank.linalg.sketch import normal
from ds_lowrank.sharding.elements import Piece
from ds_lowrank.sharding.layout import Range
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.updates import Dense, Factors

DRAWN_ELEMENTS = 2**22
"""Of a direction whose length is taken, this many numbers are drawn at a time."""


@dataclass(frozen=True)
class Combination:
    """A weighted sum of random directions.

    Attributes:
        counters: names each direction among those of the matrix; with the seed and the matrix's name it decides the
            numbers.
        weights: the weight of each direction.
    """

    counters: Sequence[str]
    weights: Sequence[float]


@dataclass(frozen=True)
class Directions(ABC):
    """The random directions along which one matrix may be moved in one step.

    Attributes:
        shard: the part of the matrix whose weights will be moved: a stack of one.
        seed: the run's seed.
    """

    shard: MatrixShard
    seed: int

    @abstractmethod
    def square(self, combination: Combination) -> float:
        """The squared Frobenius norm of the whole matrix, the same on all ranks.

        Args:
            combination: of directions.
        """

    @abstractmethod
    def to_matrix(self, combination: Combination) -> Factors | Dense:
        """The matrix, on the elements of the shard.

        Args:
            combination: of directions.
        """

    def on_device_of_weights(self) -> Directions:
        """The same directions, with what they are made of on the device of the weights: states may be on the CPU."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), torch.Tensor):
                moved[field.name] = value.to(self.shard.device)
        return replace(self, **moved)

    def coordinates(self, combination: Combination, rows: Range, columns: Range) -> torch.Tensor:
        """Some of the normal numbers that directions are made of, in a weighted sum: 1 x rows x columns, fp32.

        Args:
            combination: of directions.
            rows: which rows.
            columns: which columns.
        """
        total = torch.zeros((), dtype=torch.float32, device=self.shard.device)
        for counter, weight in zip(combination.counters, combination.weights, strict=True):
            total = weight * normal(self.seed, self.shard.names, counter, rows, columns, self.shard.device) + total
        return total


class SharedDraws:
    """The coordinates of many matrices' directions, drawn all at once, since drawing few numbers has a fixed cost.

    Args:
        directions: of the matrices, with one rank and one seed.
    """

    def __init__(self, directions: Sequence[Diagonal]) -> None:
        self._of = [direction.shard.names[0] for direction in directions]
        self._like = directions[0]
        self._drawn: dict[str, dict[str, torch.Tensor]] = {}

    def row(self, name: str, counter: str) -> torch.Tensor:
        """The normal numbers of one matrix: 1 x 1 x r, fp32.

        Args:
            name: of the matrix.
            counter: of the direction.
        """
        if counter not in self._drawn:
            like = self._like
            drawn = normal(like.seed, self._of, counter, (0, 1), (0, like.squares.shape[1]), like.shard.device)
            self._drawn[counter] = dict(zip(self._of, torch.split(drawn, 1), strict=True))
        return self._drawn[counter][name]


def sharing_draws(directions: Sequence[Directions]) -> list[Directions]:
    """The same directions; those of few numbers are drawn together.

    Args:
        directions: of all matrices that are moved together.
    """
    alike: dict[tuple[int, int], list[Diagonal]] = {}
    for one in directions:
        if isinstance(one, Diagonal):
            alike.setdefault((one.seed, one.squares.shape[1]), []).append(one)
    draws = {key: SharedDraws(group) for key, group in alike.items()}
    return [
        replace(one, draws=draws[one.seed, one.squares.shape[1]]) if isinstance(one, Diagonal) else one
        for one in directions
    ]


@dataclass(frozen=True)
class Diagonal(Directions):
    """Directions ``Pi = F diag(u) Q^T`` with r normal numbers u, one for each pair of stored singular directions.

    Attributes:
        basis: ``Q``, 1 x held compressed rows x r, fp32.
        right_factor: ``F``, 1 x held kept rows x r, fp32.
        squares: the squared length of each pair, 1 x r numbers: one, or zero for a pair that is empty because the
            gradient had fewer than r directions.
        draws: draws the numbers along with those of other matrices; None to draw them alone.
    """

    basis: torch.Tensor
    right_factor: torch.Tensor
    squares: torch.Tensor
    draws: SharedDraws | None = None

    def square(self, combination: Combination) -> float:
        """``|F diag(u) Q^T|^2``: the sum of ``u_i^2`` over the pairs that are not empty."""
        return float((self._u(combination).double().square() * self.squares).sum())

    def to_matrix(self, combination: Combination) -> Factors:
        """``F diag(u) Q^T`` on this rank's elements, as two factors."""
        return Factors(self.right_factor * self._u(combination), self.basis, 1.0)

    def _u(self, combination: Combination) -> torch.Tensor:
        if self.draws is None:
            return self.coordinates(combination, (0, 1), (0, self.squares.shape[1]))
        name, pairs = self.shard.names[0], zip(combination.counters, combination.weights, strict=True)
        total = torch.zeros((), dtype=torch.float32, device=self.shard.device)
        for counter, weight in pairs:
            total = weight * self.draws.row(name, counter) + total
        return total


@dataclass(frozen=True)
class GaussianInSubspace(Directions):
    """Directions ``Pi = U Q^T`` with kept x r normal numbers U.

    Attributes:
        basis: ``Q``, 1 x held compressed rows x r, fp32.
        squares: the squared length of each column of the basis, 1 x r numbers: one, or zero for an empty column.
    """

    basis: torch.Tensor
    squares: torch.Tensor

    def square(self, combination: Combination) -> float:
        """``|U Q^T|^2``: the sum of the squared lengths of U's columns, except those that meet an empty column of Q."""
        lengths = torch.linalg.vector_norm(self._u(combination, (0, self.shard.kept.size)), dim=1, dtype=torch.float64)
        return float((lengths.square() * self.squares).sum())

    def to_matrix(self, combination: Combination) -> Factors:
        """``U Q^T`` on this rank's elements, as two factors."""
        return Factors(self._u(combination, self.shard.kept.held), self.basis, 1.0)

    def _u(self, combination: Combination, rows: Range) -> torch.Tensor:
        return self.coordinates(combination, rows, (0, self.squares.shape[1]))


@dataclass(frozen=True)
class FullSpace(Directions):
    """Directions of m x n normal numbers, not restricted to a subspace."""

    def square(self, combination: Combination) -> float:
        """The squared Frobenius norm of the m x n numbers, of which a few rows are drawn at a time."""
        m, n = self.shard.shape
        at_once = max(1, DRAWN_ELEMENTS // n)
        drawn = (self.coordinates(combination, (row, min(row + at_once, m)), (0, n)) for row in range(0, m, at_once))
        return float(sum(torch.linalg.vector_norm(rows, dtype=torch.float64).square() for rows in drawn))

    def to_matrix(self, combination: Combination) -> Dense:
        """This rank's elements of the m x n numbers."""

        def numbers(piece: Piece) -> torch.Tensor:
            r = piece.rectangle
            return self.coordinates(combination, (r.row, r.row + r.height), (r.col, r.col + r.width))

        return Dense(numbers, 1.0)

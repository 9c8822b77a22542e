"""Moves the weights to where the loss is higher, for the one backward pass, and back.

:mod:`ds_lowrank.methods.blocks.ascent` decides where to move; this file moves, measures and restores. Every probe moves
all matrices at once, so that it costs one or two forward passes however many matrices there are. The losses are
averaged over the data-parallel ranks before they are used, and directions are functions of (seed, name, step), so all
ranks make the same move. The weights that forward passes read are moved: whole parameters, or at ZeRO 3 this rank's
partitions. They are copied before, so that every bit can be restored.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ds_lowrank.methods.base import Options, PerturbingMethod, State
from ds_lowrank.methods.blocks.ascent import Ascent, ascend
from ds_lowrank.methods.blocks.directions import Combination, Directions, sharing_draws
from ds_lowrank.optimizer.slots import Slot
from ds_lowrank.placement.fragment import Fragment
from ds_lowrank.placement.grid import Grid
from ds_lowrank.placement.zero import forward_weights, release_gathered
from ds_lowrank.sharding.geometry import Geometry
from ds_lowrank.sharding.matrix import MatrixShard, shard_of
from ds_lowrank.sharding.reduce import Executor, lockstep, sum_request

logger = logging.getLogger("ds_lowrank")

MIN_REALISED_SHARE = 0.5
"""If rounding to the weights' dtype leaves less than this share of a move, one warning is logged."""

LOST_TO_ROUNDING = (
    "%s: weights in %s keep a move of %.1e only as one of %.1e; the rest is lost to rounding. Raise %s, or "
    "train in fp32"
)


@dataclass
class PerturbedMatrix:
    """One matrix in one ascent.

    Attributes:
        place: the elements of the matrix that forward passes on this rank read.
        saved: a copy of these elements from before the ascent, flat.
        shard: says which elements of the matrix these are.
        directions: the random directions along which the matrix is probed.
        copies: how many ranks move the same elements.
        step: how often the matrix has been stepped.
    """

    place: Fragment
    saved: torch.Tensor
    shard: MatrixShard
    directions: Directions
    copies: int
    step: int

    def direction(self, probes: Sequence[str], shares: Sequence[float]) -> Combination:
        """A weighted sum of this step's probe directions.

        Args:
            probes: the names of the probes.
            shares: the weight of each probe's direction.
        """
        return Combination([f"{self.step} {probe}" for probe in probes], shares)

    def move(self, direction: Combination, distance: float) -> None:
        """Set the weights to saved + distance * direction.

        Args:
            direction: where to.
            distance: multiplies the direction.
        """
        weights = self.place.weights.copy_(self.saved)
        self.shard.attach([weights], [weights])
        self.directions.to_matrix(direction).write_to(self.shard, -distance, 0.0)
        self.place.put(weights)

    def mirror(self) -> None:
        """Move the weights to the other side of the saved ones, exactly as far away, even if the move was rounded."""
        weights = self.place.weights
        self.place.put(torch.lerp(weights, self.saved, 2.0, out=weights))

    def restore(self) -> None:
        """Set the weights back to the saved ones, bit for bit."""
        self.place.put(self.place.weights.copy_(self.saved))


class Perturbation:
    """Moves the weights of all projected matrices of an optimizer: the ``MovableWeights`` of an ascent.

    Args:
        method: the optimizer's.
        slots: the matrices to perturb.
        ascent: how to search for higher loss.
        executor: the optimizer's.
        grid: the optimizer's; all its stages are perturbed together.
        is_local: whether tensor-parallel ranks project their own shards and exchange nothing else.
        like: a parameter of the model, for dtype and device.

    Attributes:
        slots: the matrices to perturb; more may be added between steps.
        norm: the norm of the last perturbation, measured after rounding to the weights' dtype.
        failed_ascents: ascents so far that found no slope: a loss that is not finite, or the same on all sides.
    """

    def __init__(
        self,
        method: type[PerturbingMethod],
        slots: Sequence[Slot],
        ascent: Ascent,
        executor: Executor,
        grid: Grid,
        is_local: bool,
        like: torch.Tensor,
    ) -> None:
        self.ascent = ascent
        self._method, self.slots, self._executor, self._grid = method, slots, executor, grid
        self._local_group = grid.tensor if is_local else None
        self._dtype, self._device = like.dtype, like.device
        self._moving: list[Slot] = []
        self._moved: list[PerturbedMatrix] = []
        self._warned: set[str] = set()
        self._probe_measured = False
        self.norm = 0.0
        self.failed_ascents = 0

    def ascend(self, loss: Callable[[], float], options: Mapping[int, Options], micro_batch: int = 0) -> None:
        """Probe, then leave the weights where the loss is higher, until :meth:`restore`.

        Nothing is probed before a method has found its first subspace.

        Args:
            loss: returns the loss at the current weights, the same number on all ranks.
            options: of each parameter group, by the group's ``id``.
            micro_batch: the micro-batch's number in its step, so that each has directions of its own.
        """
        self.norm = 0.0
        slots = [slot for slot in self.slots if slot.has_begun or "basis" not in slot.state]
        (on_all_stages,) = self._sum_over_stages(len(slots))
        if not on_all_stages:
            return
        self._moving = slots
        self._save(slots, options)
        names = [f"probe {micro_batch}.{number}" for number in range(self.ascent.probes)]
        if not ascend(self.ascent, self, loss, names):
            self.failed_ascents += 1
            self.restore()

    def restore(self) -> None:
        """Restore every bit of the weights. Idempotent."""
        for matrix in self._moved:
            matrix.restore()
        if self._moved:
            self._release()
        self._moved = []

    def mark_gradients(self) -> None:
        """Record that this step's gradients are taken at perturbed weights, as the method's ``ascent`` asks."""
        for slot in self.slots:
            slot.perturbed = True

    def warn_once(self, key: str, message: str, *arguments: object) -> None:
        """Log a warning, unless one was logged under that key before.

        Args:
            key: identifies the warning.
            message: a format string of the logger.
            arguments: for the format string.
        """
        if key not in self._warned:
            logger.warning(message, *arguments)
        self._warned.add(key)

    def metrics(self) -> dict[str, float]:
        """Metrics for a log, by name."""
        return {"lowrank/perturbation_norm": self.norm, "lowrank/failed_ascents": self.failed_ascents}

    def probe(self, name: str, distance: float) -> None:
        """Set all weights to saved + distance * direction, for the random direction with the given name."""
        for matrix in self._moved:
            matrix.move(matrix.direction([name], [1.0]), distance)
        self._release()
        if self._dtype != torch.float32 and not self._probe_measured:  # fp32 keeps every move
            self._probe_measured = True
            squares = [matrix.directions.square(matrix.direction([name], [1.0])) for matrix in self._moved]
            (square,) = self._sum_over_matrices(squares)
            self._realised("probe_radius", distance * math.sqrt(square))

    def mirror(self) -> None:
        """Move all weights to the other side of the saved ones, exactly as far away."""
        for matrix in self._moved:
            matrix.mirror()
        self._release()

    def climb(self, names: Sequence[str], shares: Sequence[float], radius: float, per_matrix: bool) -> None:
        """Set all weights to saved + radius * G / |G|, where G is the weighted sum of the directions."""
        squares = [matrix.directions.square(matrix.direction(names, shares)) for matrix in self._moved]
        total, count = self._sum_over_matrices(squares, [float(square > 0) for square in squares])
        for matrix, square in zip(self._moved, squares, strict=True):
            length = math.sqrt(square if per_matrix else total)
            matrix.move(matrix.direction(names, shares), radius / length if length else 0.0)
        self._release()
        self.norm = self._realised("perturbation_radius", radius * (math.sqrt(count) if per_matrix else 1.0))

    def _save(self, slots: Sequence[Slot], options: Mapping[int, Options]) -> None:
        self._release()
        moved = [self._place(slot) for slot in slots]
        directions = self._executor.run(
            lockstep(
                self._method.directions(own, _stacked(slot), options[id(slot.group)], shard)
                for slot, (_, own, shard, _) in zip(slots, moved, strict=True)
            )
        )
        shared = sharing_draws([found.on_device_of_weights() for found in directions])
        self._moved = [
            PerturbedMatrix(place, place.weights.clone(), shard, found, copies, slot.state["step"])
            for slot, (place, _, shard, copies), found in zip(slots, moved, shared, strict=True)
        ]

    def _place(self, slot: Slot) -> tuple[Fragment, MatrixShard, MatrixShard, int]:
        """The elements of a matrix that are moved here, and the number of ranks that move them too.

        Returns:
            Where the elements are, what this rank's optimizer has of the matrix, what is moved, and the number.
        """
        interval, is_partition = forward_weights(slot.parameter)
        place, copies = interval.fragment(slot.logical), slot.copies
        own = shard = MatrixShard(slot.geometry, [slot.matrix.member])
        if not is_partition:
            part = slot.logical.part(slot.logical.own, interval.start, interval.end)
            shard = shard_of(slot.matrix.name, Geometry(own.shape, [part], 0, own.side))
            copies *= self._executor.size if self._local_group else self._executor.size // self._grid.tensor_size
        weights = place.weights
        shard.attach([weights], [weights])  # tells directions their device
        return place, own, shard, copies

    def _realised(self, key: str, intended: float) -> float:
        """The length of a move after rounding. If little is left of it, warn once, and say which option to raise."""
        if self._dtype == torch.float32:
            return intended
        realised = self._distance()
        if realised < MIN_REALISED_SHARE * intended:
            self.warn_once(key, LOST_TO_ROUNDING, key, self._dtype, intended, realised, key)
        return realised

    def _distance(self) -> float:
        """The distance of the weights from the saved ones, over all matrices and all ranks that hold parts of them."""
        total = 0.0
        if self._moved:
            squares = [
                torch.linalg.vector_norm(m.place.weights.float() - m.saved.float(), dtype=torch.float64).square()
                / m.copies
                for m in self._moved
            ]
            own = torch.stack(squares).sum().float().view(1, 1).to(self._moving[0].fragment.store.device)
            (own,) = self._executor.exchange([sum_request(own, [0], self._executor.size)])
            total = own.item()
        return math.sqrt(*self._sum_over_groups(total))

    def _sum_over_matrices(self, *lists: list[float]) -> list[float]:
        """Sum each list over the whole model. A list has one number for every matrix that is moved on this rank."""
        # A matrix that is replicated on the tensor-parallel ranks counts once.
        shares = [1.0 / slot.copies if self._local_group else 1.0 for slot in self._moving]
        return self._sum_over_groups(*(sum(n * s for n, s in zip(numbers, shares, strict=True)) for numbers in lists))

    def _sum_over_groups(self, *numbers: float) -> list[float]:
        """Sum each number over the stages and, if tensor-parallel ranks project their own shards, over these ranks."""
        local = self._local_group
        return self._sum_over_stages(*(numbers if local is None else self._sum(numbers, local)))

    def _sum_over_stages(self, *numbers: float) -> list[float]:
        """Sum each number over the stages of the pipeline."""
        return list(numbers) if self._grid.pipeline is None else self._sum(numbers, self._grid.pipeline)

    def _sum(self, numbers: Sequence[float], group: dist.ProcessGroup) -> list[float]:
        total = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        dist.all_reduce(total, group=group)
        found: list[float] = total.tolist()
        return found

    def _release(self) -> None:
        release_gathered(slot.parameter for slot in self.slots)


def _stacked(slot: Slot) -> State:
    """The state of a stack of one matrix, with every basis in fp32."""
    state = slot.state.items()
    stored = {key: value.unsqueeze(0) if isinstance(value, torch.Tensor) else value for key, value in state}
    return stored | slot.state_store.decode_bases(stored)

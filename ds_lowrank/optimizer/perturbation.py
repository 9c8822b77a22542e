"""Moving the weights to where the loss is higher, for the one backward pass, and back.

Where to is :mod:`ds_lowrank.methods.blocks.ascent`'s; this file moves, measures and restores. Every probe moves all
matrices at once, so that it costs one or two forward passes however many matrices there are. The losses are averaged
over the data-parallel ranks before they are used, and directions are functions of (seed, name, step), so all ranks move
alike. What is moved is what forward passes read: whole parameters, or at ZeRO 3 this rank's partitions. A copy of it
restores every bit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ds_lowrank.methods.base import Options, PerturbingMethod
from ds_lowrank.methods.blocks.ascent import Ascent, ascend
from ds_lowrank.methods.blocks.directions import Directions
from ds_lowrank.optimizer.slots import Slot
from ds_lowrank.placement.grid import Grid
from ds_lowrank.placement.zero import Fragment, forward_weights, release_gathered
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Executor, Request, all_reduce_route, lockstep

logger = logging.getLogger("ds_lowrank")

MIN_REALISED_SHARE = 0.5
"""If rounding to the weights' dtype leaves less than this share of a move, the user is told, once."""


LOST_TO_ROUNDING = (
    "%s: weights in %s keep a move of %.1e only as one of %.1e; the rest is lost to rounding. Raise %s, or "
    "train in fp32"
)


@dataclass
class PerturbedMatrix:
    """One matrix in one ascent.

    Attributes:
        place: what forward passes read of it.
        saved: a copy of it from before, flat.
        shard: which elements of the matrix these are.
        directions: along which it is probed.
        copies: how many ranks move the same elements.
        step: of its optimizer.
    """

    place: Fragment
    saved: torch.Tensor
    shard: MatrixShard
    directions: Directions
    copies: int
    step: int

    def coordinates(self, probes: Sequence[str], shares: Sequence[float]) -> torch.Tensor:
        """The coordinates of a weighted sum of this step's probe directions."""
        return self.directions.combined([f"{self.step} {probe}" for probe in probes], shares)

    def move(self, coordinates: torch.Tensor, distance: float) -> None:
        """Set the weights to saved + distance * direction."""
        weights = self.place.weights.copy_(self.saved)
        self.shard.attach(weights, weights)
        self.directions.to_matrix(coordinates).write_to(self.shard, -distance, 0.0)
        self.place.put(weights)

    def mirror(self) -> None:
        """Set the weights to the other side of the saved ones, as far away, whatever rounding made of the move."""
        weights = self.place.weights
        self.place.put(torch.lerp(weights, self.saved, 2.0, out=weights))

    def restore(self) -> None:
        """Set every bit as it was."""
        self.place.put(self.place.weights.copy_(self.saved))


class Perturbation:
    """What moves the weights of an optimizer's matrices: the ``MovableWeights`` of an ascent.

    Args:
        method: of the optimizer.
        slots: the matrices that are perturbed.
        ascent: how higher loss is looked for.
        executor: of the optimizer.
        grid: of the optimizer. All its stages are perturbed together.
        is_local: whether tensor-parallel ranks project their own shards, and exchange nothing else.
        like: a parameter of the model, for dtype and device.

    Attributes:
        norm: of the last perturbation, as the weights' dtype left it.
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
        self._method, self._slots, self._executor, self._grid = method, slots, executor, grid
        self._local_group = grid.tensor if is_local else None
        self._dtype, self._device = like.dtype, like.device
        self._moving: list[Slot] = []
        self._moved: list[PerturbedMatrix] = []
        self._warned: set[str] = set()
        self._measured: set[str] = set()
        self.norm = 0.0
        self.failed_ascents = 0

    def ascend(self, loss: Callable[[], float], options: Mapping[int, Options], micro_batch: int = 0) -> None:
        """Probe, then leave the weights where the loss is higher, until :meth:`restore`.

        Before a method has found its first subspace nothing is probed.

        Args:
            loss: the loss at the present weights, the same number on all ranks.
            options: of each parameter group, by the group's ``id``.
            micro_batch: the micro-batch's number in its step, so that each has directions of its own.
        """
        self.norm = 0.0
        slots = [slot for slot in self._slots if slot.has_begun or "basis" not in slot.state]
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
        """Put every bit back. Idempotent."""
        for matrix in self._moved:
            matrix.restore()
        if self._moved:
            self._release()
        self._moved = []

    def mark_gradients(self) -> None:
        """Note that the gradients to come were taken as ``ascent`` asks."""
        for slot in self._slots:
            slot.perturbed = True

    def warn_once(self, key: str, message: str, *arguments: object) -> None:
        """Log a warning, unless one was logged under that key before."""
        if key not in self._warned:
            logger.warning(message, *arguments)
        self._warned.add(key)

    def metrics(self) -> dict[str, float]:
        """Numbers for a log."""
        return {"lowrank/perturbation_norm": self.norm, "lowrank/failed_ascents": self.failed_ascents}

    def probe(self, name: str, distance: float) -> None:
        """Set all weights to saved + distance * direction, for the direction of that name."""
        for matrix in self._moved:
            matrix.move(matrix.coordinates([name], [1.0]), distance)
        self._release()
        if "probe_radius" not in self._measured:
            squares = [matrix.directions.square(matrix.coordinates([name], [1.0])) for matrix in self._moved]
            (square,) = self._sum_over_matrices(squares)
            self._realised("probe_radius", distance * math.sqrt(square))

    def mirror(self) -> None:
        """Set all weights to the other side of the saved ones."""
        for matrix in self._moved:
            matrix.mirror()
        self._release()

    def climb(self, names: Sequence[str], shares: Sequence[float], radius: float, per_matrix: bool) -> None:
        """Set all weights to saved + radius * G / |G|, where G is the weighted sum of the directions."""
        squares = [matrix.directions.square(matrix.coordinates(names, shares)) for matrix in self._moved]
        total, count = self._sum_over_matrices(squares, [float(square > 0) for square in squares])
        for matrix, square in zip(self._moved, squares, strict=True):
            length = math.sqrt(square if per_matrix else total)
            matrix.move(matrix.coordinates(names, shares), radius / length if length else 0.0)
        self._release()
        self.norm = self._realised("perturbation_radius", radius * (math.sqrt(count) if per_matrix else 1.0))

    def _save(self, slots: Sequence[Slot], options: Mapping[int, Options]) -> None:
        self._release()
        moved = [self._place(slot) for slot in slots]
        directions = self._executor.run(
            lockstep(
                self._method.directions(slot.shard, slot.state, options[id(slot.group)], shard)
                for slot, (_, shard, _) in zip(slots, moved, strict=True)
            )
        )
        self._moved = [
            PerturbedMatrix(place, place.weights.clone(), shard, found, copies, slot.state["step"])
            for slot, (place, shard, copies), found in zip(slots, moved, directions, strict=True)
        ]

    def _place(self, slot: Slot) -> tuple[Fragment, MatrixShard, int]:
        """What is moved of a matrix: where it is, which elements it has, and on how many ranks."""
        interval, is_partition = forward_weights(slot.parameter)
        place, shard, copies = interval.fragment(slot.logical), slot.shard, slot.copies
        if not is_partition:
            part = slot.logical.part(slot.logical.own, interval.start, interval.end)
            shard = MatrixShard(shard.name, shard.shape, [part], 0, shard.side, 0)
            copies *= self._executor.size if self._local_group else self._executor.size // self._grid.tensor_size
        weights = place.weights
        shard.attach(weights, weights)  # tells directions their device
        return place, shard, copies

    def _realised(self, key: str, asked: float) -> float:
        """How much of a move rounding has left. If that is little, the user is told once what to raise."""
        if self._dtype == torch.float32:
            return asked
        got = self._distance()
        if got < MIN_REALISED_SHARE * asked:
            self.warn_once(key, LOST_TO_ROUNDING, key, self._dtype, asked, got, key)
        self._measured.add(key)
        return got

    def _distance(self) -> float:
        """How far the weights are from the saved ones: over all matrices, and all ranks that hold parts of them."""
        total = 0.0
        if self._moved:
            squares = [
                torch.linalg.vector_norm(m.place.weights.float() - m.saved.float(), dtype=torch.float64).square()
                / m.copies
                for m in self._moved
            ]
            own = torch.stack(squares).sum().float().view(1, 1)
            (own,) = self._executor.exchange([Request(all_reduce_route(self._executor.size, 1), own)])
            total = own.item()
        return math.sqrt(*self._sum_over_groups(total))

    def _sum_over_matrices(self, *lists: list[float]) -> list[float]:
        """The sum of each list, which has a number for every matrix that is moved here, over the whole model."""
        # A matrix of which each tensor-parallel rank has a copy counts once.
        shares = [1.0 / slot.copies if self._local_group else 1.0 for slot in self._moving]
        return self._sum_over_groups(*(sum(n * s for n, s in zip(numbers, shares, strict=True)) for numbers in lists))

    def _sum_over_groups(self, *numbers: float) -> list[float]:
        """The sums over tensor-parallel ranks that have matrices of their own, and over the stages."""
        local = self._local_group
        return self._sum_over_stages(*(numbers if local is None else self._sum(numbers, local)))

    def _sum_over_stages(self, *numbers: float) -> list[float]:
        """The sums over the stages of the pipeline."""
        return list(numbers) if self._grid.pipeline is None else self._sum(numbers, self._grid.pipeline)

    def _sum(self, numbers: Sequence[float], group: dist.ProcessGroup) -> list[float]:
        total = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        dist.all_reduce(total, group=group)
        found: list[float] = total.tolist()
        return found

    def _release(self) -> None:
        release_gathered(slot.parameter for slot in self._slots)

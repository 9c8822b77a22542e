"""The order of a step, written once: the optimizer, the simulated world, the benchmarks and the docs all call it.

    find the basis if it is due, project
    stop on all ranks if any gradient is not finite
    update the moments, lift, decay, write

Nothing is changed before the decision. This file knows neither DeepSpeed nor ``torch.optim``; its inputs are matrices
with attached gradients and weights, wherever they came from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch

from ds_lowrank.methods.base import Method, Options, ProjectedGradient, State
from ds_lowrank.methods.blocks.state_spec import StateStore
from ds_lowrank.sharding.layout import Part
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Request, Rounds, all_reduce_route, lockstep

BUCKET_ELEMENTS = 2**28
"""Matrices with up to this many elements of state (1 GiB in fp32) are in flight at a time."""
TOO_LARGE = 1e16
"""A gradient with an element beyond it counts as not finite: sums of its squares leave the range of fp32."""


@dataclass
class SteppedMatrix:
    """One matrix in one step.

    Attributes:
        shard: this rank's part, with this step's gradient and weights attached.
        state_store: how its state is stored.
        state: its state, with ``step``; changed in place.
        options: the current options of its group.
        found: what its method found in the gradient; set by the first half of the step.
        updated: whether the step changed it.
    """

    shard: MatrixShard
    state_store: StateStore
    state: State
    options: Options
    found: ProjectedGradient = field(init=False)
    updated: bool = False

    @property
    def state_elements(self) -> int:
        """Elements of its initial state, summed over ranks."""
        return self.state_store.numel

    @property
    def has_begun(self) -> bool:
        """Whether the matrix has been stepped before. It waits for its first gradient that is not zero."""
        return bool(self.state["step"] > 0)


@dataclass(frozen=True)
class StepReport:
    """What a step did.

    Attributes:
        skipped: whether it changed nothing, because a gradient was not finite.
        refreshes: how many matrices have a new basis.
        other_magnitudes: for each of the other gradients about its largest magnitude, the same on all ranks; zero only
            if every element is zero.
    """

    skipped: bool
    refreshes: int = 0
    other_magnitudes: tuple[float, ...] = ()


def shard_matrix(
    method: type[Method],
    name: str,
    shape: tuple[int, int],
    parts: Sequence[Part],
    rank: int,
    options: Options,
    index: int = 0,
    peers: Sequence[int] | None = None,
    transposed: bool = False,
) -> tuple[MatrixShard, StateStore]:
    """One rank's part of a matrix, and the store of its state there.

    Args:
        method: the method that steps the matrix.
        name: of the matrix; seeds derive from it.
        shape: the logical ``(m, n)``.
        parts: what each rank of the group holds.
        rank: this rank's position in the group.
        options: of the matrix's group.
        index: the matrix's number among those of the optimizer: the ranks that hold it take turns as the root of its
            factorisations.
        peers: the ranks that share this copy of the matrix; None for all.
        transposed: whether its layer stores it input x output. It is then stepped as the transpose would be.
    """
    holders = [holder for holder, part in enumerate(parts) if part.numel]
    root = holders[index % len(holders)]
    side = method.side(output_first(shape, transposed), options)
    if transposed:
        side = "left" if side == "right" else "right"
    shard = MatrixShard(name, shape, parts, rank, side, root, options.block_rows, peers)
    shard.transposed = transposed
    initial = method.rank(output_first(shape, transposed), options)
    return shard, StateStore(name, lambda at: method.state(shard, options, at), initial)


def output_first(shape: tuple[int, int], transposed: bool) -> tuple[int, int]:
    """The shape of a weight as ``torch.nn.Linear`` would have it, output x input, which methods are asked about.

    Args:
        shape: as the layer stores it.
        transposed: whether the layer stores it input x output.
    """
    return (shape[1], shape[0]) if transposed else shape


def all_finite(magnitudes: Sequence[float]) -> bool:
    """Whether gradients of these magnitudes are finite, and small enough to be squared.

    Args:
        magnitudes: about the largest magnitude of each gradient.
    """
    return all(magnitude < TOO_LARGE for magnitude in magnitudes)


def step_matrices(
    method: type[Method],
    matrices: Sequence[SteppedMatrix],
    ranks: int,
    others: Sequence[torch.Tensor] = (),
    proceed: Callable[[Sequence[float]], bool] = all_finite,
) -> Rounds[StepReport]:
    """One step of some matrices, in lockstep on all ranks of a group.

    Args:
        method: the method that steps them.
        matrices: in the same order on all ranks; weights and state are changed in place.
        ranks: how many ranks the group has.
        others: gradients of parameters that are not projected, which take part in the decision.
        proceed: decides, from the magnitude of each matrix's gradient and of each other one, whether the step goes on.
            It must decide alike on all ranks, which are given the same numbers.
    """
    for bucket in buckets(matrices):
        projections = yield from lockstep(method.project(m.shard, m.state, m.options) for m in bucket)
        for matrix, found in zip(bucket, projections, strict=True):
            matrix.found = found
    magnitudes = yield from magnitudes_over_ranks([*(m.found.projected for m in matrices), *others], ranks)
    if not proceed(magnitudes):
        return StepReport(skipped=True)
    for matrix, magnitude in zip(matrices, magnitudes, strict=False):
        matrix.found.magnitude = magnitude
    refreshes = 0
    for bucket in buckets([m for m in matrices if m.has_begun or not m.found.is_zero]):
        refreshes += yield from _update(method, bucket)
    return StepReport(False, refreshes, tuple(magnitudes[len(matrices) :]))


def _update(method: type[Method], bucket: Sequence[SteppedMatrix]) -> Rounds[int]:
    """The second half of a step; how many of the matrices have a new basis."""
    states = [matrix.state_store.decode(matrix.state) for matrix in bucket]
    updates = yield from lockstep(
        method.update(matrix.shard, state, matrix.options, matrix.found)
        for matrix, state in zip(bucket, states, strict=True)
    )
    for matrix, state, update in zip(bucket, states, updates, strict=True):
        lr = matrix.options.effective_lr
        update.write_to(matrix.shard, lr, lr * matrix.options.weight_decay)
        matrix.state_store.encode(matrix.state, state)
        matrix.state["step"] += 1
        matrix.updated = True
    refreshes = sum(matrix.found.refreshed for matrix in bucket)
    for matrix in bucket:
        del matrix.found
    return refreshes


def magnitudes_over_ranks(tensors: Sequence[torch.Tensor], ranks: int) -> Rounds[list[float]]:
    """Roughly the largest magnitude in each tensor over all ranks: one number per tensor, the same on all ranks.

    It is zero if all elements are, and not finite if one is not: the sum of every rank's largest magnitude, which
    neither overflows nor underflows as a sum of squares would. On the meta device, where a step is costed and nothing
    is computed, every tensor counts as one.

    Args:
        tensors: this rank's parts, any shapes and floating dtypes, in the same order on all ranks.
        ranks: how many ranks there are.
    """
    largest = [largest_magnitude(tensor) for tensor in tensors]
    route = all_reduce_route(ranks, len(largest))
    (total,) = yield [Request(route, torch.stack(largest).view(-1, 1))]
    found: list[float] = [1.0] * len(largest) if total.is_meta else total.view(-1).tolist()
    return found


def largest_magnitude(tensor: torch.Tensor) -> torch.Tensor:
    """The largest magnitude in a tensor as a scalar, fp32: NaN if an element is, zero if there are no elements.

    Args:
        tensor: of any shape and floating dtype.
    """
    if tensor.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=tensor.device)
    low, high = torch.aminmax(tensor)  # one pass, no copy; the inf-norm is forty times slower on a CPU
    return torch.maximum(-low, high).float()


class HasState(Protocol):
    """Anything whose state has a size."""

    @property
    def state_elements(self) -> int:
        """Elements of its initial state, summed over ranks."""


T = TypeVar("T", bound=HasState)


def buckets(items: Sequence[T]) -> list[list[T]]:
    """Cut a sequence into buckets of at most BUCKET_ELEMENTS elements of state; the same cut on all ranks.

    A step gathers the basis and the direction of a matrix, which together are about as large as its initial state. The
    rank never grows beyond the initial one.

    Args:
        items: in the order in which they are stepped.
    """
    cut: list[list[T]] = []
    size = BUCKET_ELEMENTS
    for item in items:
        if size + item.state_elements > BUCKET_ELEMENTS:
            cut.append([])
            size = 0
        cut[-1].append(item)
        size += item.state_elements
    return cut

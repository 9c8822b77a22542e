"""The order of a step, written once: the optimizer, the simulated world, the benchmarks and the docs all call it.

    find the basis if it is due, project
    stop on all ranks if any gradient is not finite
    update the moments, lift, decay, write

Nothing is changed before the decision. This file knows neither DeepSpeed nor ``torch.optim``; its inputs are matrices
whose gradients and weights may come from anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from ds_lowrank.methods.base import Method
from ds_lowrank.optimizer.stack import Stack, SteppedMatrix
from ds_lowrank.optimizer.stacks import Stacks
from ds_lowrank.sharding.precision import products_in
from ds_lowrank.sharding.reduce import Rounds, lockstep, sum_request

TOO_LARGE = 1e16
"""A gradient with an element beyond it counts as not finite: sums of its squares leave the range of fp32."""
NOT_PROJECTED = 2**32
"""Numbers from here on identify gradients that are not projected."""


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
    stacks: Stacks | None = None,
    clip: Callable[[Sequence[Stack], Sequence[float]], Rounds[None]] | None = None,
    written: Callable[[Stack], AbstractContextManager[None]] | None = None,
) -> Rounds[StepReport]:
    """One step of some matrices, in lockstep on all ranks of a group.

    Args:
        method: the method that steps them.
        matrices: in the same order on all ranks; weights and state are changed in place.
        ranks: how many ranks the group has.
        others: gradients of parameters that are not projected, which take part in the decision.
        proceed: decides, from the magnitude of each matrix's gradient and of each other one, whether the step goes on.
            It must decide alike on all ranks, which are given the same numbers.
        stacks: remembers which matrices are stepped together; None to find out for this step alone.
        clip: may change what was found, once the step goes on, given the stacks and the magnitudes of all gradients;
            None where gradients are clipped before.
        written: the context in which the weights of a stack are changed; None for none.
    """
    stacks = Stacks(method) if stacks is None else stacks
    buckets = stacks.buckets(matrices)
    try:
        for bucket in buckets:
            for stack in bucket:
                stack.attach()
            projections = yield from lockstep(method.project(s.shard, s.projecting_state, s.options) for s in bucket)
            for stack, found in zip(bucket, projections, strict=True):
                stack.found = found
        magnitudes = yield from _decided_by([stack for bucket in buckets for stack in bucket], others, ranks)
        by_matrix = dict(zip(magnitudes.numbers, magnitudes.values, strict=True))
        others_found = [by_matrix[NOT_PROJECTED + i] for i in range(len(others))]
        if not proceed([*(by_matrix[matrix.member.number] for matrix in matrices), *others_found]):
            return StepReport(skipped=True)
        if clip is not None:
            yield from clip([stack for bucket in buckets for stack in bucket], magnitudes.values)
        refreshes = 0
        for bucket in buckets:
            refreshes += yield from _update(method, _going_on(stacks, bucket), written)
        return StepReport(False, refreshes, tuple(others_found))
    finally:
        for bucket in buckets:
            for stack in bucket:
                stack.detach()


def _going_on(stacks: Stacks, bucket: Sequence[Stack]) -> list[Stack]:
    """The stacks of a bucket that are updated, cut where what was found tells their matrices apart."""
    parts = []
    for stack in bucket:
        is_whole = all(stack.found.host_magnitudes) and not stack.found.tells_apart
        parts += [stack] if is_whole else stacks.split(stack)
    return parts


def _update(
    method: type[Method], stacks: Sequence[Stack], written: Callable[[Stack], AbstractContextManager[None]] | None
) -> Rounds[int]:
    """The second half of a step; how many matrices have a new basis."""
    if not stacks:
        return 0
    for stack in stacks:
        stack.note_energies()
    states = [stack.decoded() for stack in stacks]
    updates = yield from lockstep(
        method.update(stack.shard, state, stack.options, stack.found)
        for stack, state in zip(stacks, states, strict=True)
    )
    refreshes = 0
    for stack, state, update in zip(stacks, states, updates, strict=True):
        watched = nullcontext() if written is None else written(stack)
        with products_in(stack.options.matmul_precision, stack.shard.device), watched:
            update.write_to(stack.shard, stack.options.rate, stack.options.decay)
        refreshes += len(stack.matrices) * stack.found.refreshed
        stack.found = None
        stack.store(state)
    return refreshes


@dataclass(frozen=True)
class Magnitudes:
    """Roughly the largest magnitude of every gradient over all ranks, the same numbers on all ranks.

    Attributes:
        numbers: identifies each gradient.
        values: the magnitudes.
    """

    numbers: list[int]
    values: list[float]


def _decided_by(stacks: Sequence[Stack], others: Sequence[torch.Tensor], ranks: int) -> Rounds[Magnitudes]:
    """What decides whether the step goes on; every stack is told the magnitudes of its gradients.

    A magnitude is zero if all elements are, and not finite if one is not: the sum of every rank's largest magnitude,
    which neither overflows nor underflows as a sum of squares would. On the meta device, where a step is costed and
    nothing is computed, every gradient counts as one.
    """
    numbers = [matrix.member.number for stack in stacks for matrix in stack.matrices]
    numbers += range(NOT_PROJECTED, NOT_PROJECTED + len(others))
    largest = [largest_magnitudes(stack.found.projected) for stack in stacks]
    if others:
        largest.append(largest_magnitudes_of(others))
    (total,) = yield [sum_request(torch.cat(largest).unsqueeze(1), numbers, ranks)]
    total = torch.ones_like(total) if total.is_meta else total
    sizes = [*(len(stack.matrices) for stack in stacks), len(others)]
    for stack, own in zip(stacks, torch.split(total.view(-1), sizes)[:-1], strict=True):
        stack.found.magnitudes = own
    values: list[float] = [1.0] * len(numbers) if total.is_meta else total.view(-1).tolist()
    start = 0
    for stack in stacks:
        stack.found.host_magnitudes = values[start : start + len(stack.matrices)]
        start += len(stack.matrices)
    return Magnitudes(numbers, values)


def largest_magnitudes(stacked: torch.Tensor) -> torch.Tensor:
    """The largest magnitude in each matrix of a stack, fp32: NaN if an element is, zero if there are no elements.

    Args:
        stacked: matrices x rows x columns, any floating dtype.
    """
    if stacked.numel() == 0:
        return torch.zeros(stacked.shape[0], dtype=torch.float32, device=stacked.device)
    low, high = torch.aminmax(stacked.flatten(1), dim=1)  # one pass, no copy; the inf-norm is far slower on a CPU
    return torch.maximum(-low, high).float()


def largest_magnitudes_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The largest magnitude in each of several tensors, fp32, as :func:`largest_magnitudes`.

    Args:
        tensors: at least one, of any shapes and floating dtypes.
    """
    zero = torch.zeros((), dtype=torch.float32, device=tensors[0].device)
    extremes = [torch.aminmax(tensor) if tensor.numel() else (zero, zero) for tensor in tensors]
    low, high = (torch.stack([pair[i].float() for pair in extremes]) for i in (0, 1))
    return torch.maximum(-low, high)

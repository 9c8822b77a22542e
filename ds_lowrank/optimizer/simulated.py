"""An optimizer on the ranks of a world that does not exist: the real slots, states and steps, on the meta device.

One rank of the group is built by the code that builds it in a run. Its geometry says what every other rank owns, and
its requests say what every other rank sends, so one rank tells the bytes of all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch

from ds_lowrank.methods.base import Method, Options
from ds_lowrank.methods.blocks.state_spec import BASIS_KEYS, TensorSpec
from ds_lowrank.optimizer.accumulation import Accumulation
from ds_lowrank.optimizer.adamw import adamw_step
from ds_lowrank.optimizer.build_slots import slots_of
from ds_lowrank.optimizer.options import parse_options
from ds_lowrank.optimizer.param_groups import ParameterGroups
from ds_lowrank.optimizer.slots import Slot
from ds_lowrank.optimizer.stack import Stack, SteppedMatrix
from ds_lowrank.optimizer.stacks import Stacks
from ds_lowrank.optimizer.step import step_matrices
from ds_lowrank.placement.grid import Grid
from ds_lowrank.placement.zero import Interval
from ds_lowrank.sharding.axis import Axis
from ds_lowrank.sharding.layout import Range
from ds_lowrank.sharding.reduce import Executor, Rounds


@dataclass(frozen=True)
class StateBytes:
    """Bytes of state of one rank, or of several together.

    Attributes:
        moments: what the method keeps of projected matrices, without the bases.
        bases: their bases.
        rest: the moments of everything else.
    """

    moments: int = 0
    bases: int = 0
    rest: int = 0

    @property
    def matrices(self) -> int:
        """Of projected matrices: ``lowrank/state_bytes``, if it is of all ranks that share them."""
        return self.moments + self.bases

    @property
    def total(self) -> int:
        """Of everything."""
        return self.matrices + self.rest


class SimulatedOptimizer:
    """The optimizer of one rank, checked as in a run and without processes.

    Args:
        method: what steps the matrices.
        parameters: all that the model trains, of every pipeline stage, as this tensor-parallel rank has them; tagged.
        params: ``optimizer.params``.
        grid: tensor parallelism.

    Attributes:
        method: as given.
        options: validated.

    Raises:
        ConfigError: an option is refused, or a parameter does not fit the method.
    """

    def __init__(
        self, method: type[Method], parameters: Sequence[torch.nn.Parameter], params: Mapping[str, Any], grid: Grid
    ) -> None:
        self.method, self._grid = method, grid
        self.options: Options = parse_options(method, params)
        self._groups = ParameterGroups(method, params, lambda _: grid)
        group, options, present = self._groups.validated({"params": list(parameters)})
        self._groups.add(group, options, present)
        self._groups.check(self.options)

    def slots(
        self,
        parameters: Sequence[torch.nn.Parameter],
        held: Sequence[Sequence[Range]],
        rank: int,
        is_flat: bool,
        dtype: torch.dtype,
    ) -> list[Slot]:
        """The slots of a rank of the group that shares some of the parameters.

        Args:
            parameters: those of its pipeline stage.
            held: for each data-parallel rank, the ``(start, end)`` that it steps of each of them.
            rank: its position in the group: data-parallel rank by data-parallel rank, tensor-parallel ranks side by
                side.
            is_flat: whether what a rank steps lies in one flat buffer.
            dtype: of what a rank steps: fp32, or that of weights without masters.
        """
        tensor = self._grid.tensor_size
        states: dict[torch.Tensor, Any] = {parameter: {} for own in self._groups.parameters for parameter in own}
        chosen = {id(parameter) for parameter in parameters}
        found = [one for one in self._groups.logical_parameters(states) if id(one.parameter) in chosen]
        world = [held[r // tensor] for r in range(len(held) * tensor)]
        intervals = _intervals(parameters, held[rank // tensor], is_flat, dtype)
        return slots_of(self.method, found, intervals, rank, [r % tensor for r in range(len(world))], world)


def _intervals(
    parameters: Sequence[torch.nn.Parameter], held: Sequence[Range], is_flat: bool, dtype: torch.dtype
) -> list[Interval]:
    """A rank's elements with gradients, in one store or in one for each parameter: itself, or an fp32 clone."""
    lengths = [high - low for low, high in held]
    if not is_flat:
        stores = [p if p.dtype == dtype else _store(p.shape, dtype) for p in parameters]
        for store in stores:
            store.grad = torch.empty_like(store)
        return [Interval(store, *span, 0) for store, span in zip(stores, held, strict=True)]
    flat, starts = _store((sum(lengths),), dtype), [0, *accumulate(lengths)]
    return [Interval(flat, *span, start) for span, start in zip(held, starts, strict=False)]


def _store(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    store = torch.empty(shape, dtype=dtype, device="meta")
    store.grad = torch.empty_like(store)
    return store


def state_bytes_of_ranks(slots: Sequence[Slot], ranks: int, tensor: int) -> list[StateBytes]:
    """Bytes of the initial state of every rank of the group, by the specs that allocate it.

    What every tensor-parallel rank has a copy of is counted for each as for the first.

    Args:
        slots: of the group's first rank.
        ranks: how many the group has.
        tensor: how many of them are next to each other in tensor parallelism.
    """
    found = []
    for position in range(ranks):
        moments = bases = rest = 0
        for slot in slots:
            rank = position
            if not slot.is_projected and slot.matrix.options.reduction == "projected":
                rank = position % tensor  # every data-parallel rank has all of it
            if slot.logical.placement != "sharded":
                rank -= rank % tensor
            specs = slot.state_store.spec(slot.state_store.rank)
            for key, spec in specs.items():
                size = _bytes_on(spec, rank) if isinstance(spec, TensorSpec) else 0
                if not slot.is_projected:
                    rest += size
                elif key in BASIS_KEYS:
                    bases += size
                else:
                    moments += size
        found.append(StateBytes(moments, bases, rest))
    return found


def _bytes_on(spec: TensorSpec, rank: int) -> int:
    there = replace(spec, axis=Axis(spec.axis.layout, rank, ()))
    return sum(rows * columns * dtype.itemsize for (rows, columns), dtype in there.tensors.values())


class Rehearsal:
    """Steps of one rank, as the optimizer takes them.

    Args:
        method: what steps the matrices.
        slots: of the rank, all of its stage.
        stacks: the class that forms stacks.
    """

    def __init__(self, method: type[Method], slots: Sequence[Slot], stacks: type[Stacks] = Stacks) -> None:
        self._method, self._slots = method, slots
        self._options = {id(slot.group): slot.matrix.options for slot in slots}
        self._projected = [slot for slot in slots if slot.is_projected]
        self._rest = [slot for slot in slots if not slot.is_projected]
        self._stacks, self._stacks_of_rest = stacks(method), stacks(None)

    def rounds(self, number: int, ranks: int) -> Rounds[None]:
        """Step number ``number``, whose gradients are there or have been accumulated.

        Args:
            number: of the step, from 0.
            ranks: how many ranks share the matrices.
        """
        for slot in self._slots:
            slot.state["step"] = number
        others = [slot.fragment.gradient for slot in self._rest]
        matrices = [slot.matrix for slot in self._projected]
        yield from step_matrices(self._method, matrices, ranks, others, stacks=self._stacks)
        yield from adamw_step(self._rest, self._options, self._stacks_of_rest)

    @torch.no_grad()
    def run(self, executor: Executor, number: int, between: Callable[[int], None] = lambda _: None) -> None:
        """A step with everything around it. Under projected reduction, gradients are taken from backward first.

        Args:
            executor: answers the requests.
            number: of the step, from 0.
            between: called between backward and the step, with the number of elements of projected matrices whose
                whole gradients are there.
        """
        if not any(slot.is_accumulated for slot in self._slots):
            between(sum(slot.parameter.numel() for slot in self._projected))
            executor.run(self.rounds(number, executor.size))
            return
        accumulation = Accumulation(self._method, self._stacks, executor, 1 / executor.size)
        accumulation.watch(self._projected)
        for slot in self._slots:
            slot.state["step"] = number
        accumulation.prepare(self._options)
        for slot in self._slots:
            slot.parameter.grad = torch.empty_like(slot.parameter)
        accumulation.finish(self._options)
        kept = {id(slot.parameter): slot.parameter for slot in self._projected if slot.parameter.grad is not None}
        between(sum(parameter.numel() for parameter in kept.values()))
        executor.run(self.rounds(number, executor.size))
        accumulation.drop()
        accumulation.close()


class StacksOfAllRanks(Stacks):
    """Forms the stacks of matrices of which this rank has no element as the ranks do that have some.

    A rank's own stacks of these only take up rounds: their requests do not say what others send.

    Args:
        method: what steps the matrices; None for what is in no phase.
    """

    def __init__(self, method: type[Method] | None) -> None:
        super().__init__(method)
        self._elsewhere: dict[tuple[int, ...], list[Stack]] = {}

    def buckets(self, matrices: Sequence[SteppedMatrix]) -> list[list[Stack]]:
        """Form the stacks of a step, in the buckets of any rank."""
        return [[of_cut for stack in bucket for of_cut in self._by_cut(stack)] for bucket in super().buckets(matrices)]

    def _by_cut(self, stack: Stack) -> list[Stack]:
        """Stacks of the matrices of a stack that are cut alike; the same ones in every step."""
        if stack.is_here:
            return [stack]
        key = tuple(map(id, stack.matrices))  # matrices stay, stacks come and go with their phases
        if key not in self._elsewhere:
            alike: dict[int, list[SteppedMatrix]] = {}
            for matrix in stack.matrices:
                alike.setdefault(id(matrix.state_store), []).append(matrix)
            self._elsewhere[key] = [Stack(matrices, is_here=True) for matrices in alike.values()]
        return self._elsewhere[key]

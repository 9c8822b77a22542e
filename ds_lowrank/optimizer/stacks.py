"""Which matrices are stepped together: those that are cut alike and are in the same phase of their method.

A stack is formed anew in every step and is remembered as long as its matrices stay together. What decides is the same
on all ranks: the geometry, the parameter group, the integers of the state, and what the method adds to these. Matrices
of which this rank has no element only take part in the rounds: all of them that are in the same phase are one stack
without elements.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from ds_lowrank.methods.base import Method, ProjectedGradient
from ds_lowrank.methods.blocks.state_spec import StateStore, TensorSpec
from ds_lowrank.optimizer.stack import Stack, SteppedMatrix

BUCKET_ELEMENTS = 2**28
"""Matrices with up to this many elements of state (1 GiB in fp32) are in flight at a time."""
SMALL_BUCKET_ELEMENTS = 2**26
"""The same where memory counts more than rounds: under projected reduction, and of what AdamW steps."""


@dataclass
class Stacks:
    """Forms stacks, and remembers them between steps.

    DeepSpeed may step sub-groups of the matrices one after the other. Each is remembered as long as its matrices are
    stepped in no other company.

    Args:
        method: what steps the matrices; None for what is in no phase.
    """

    method: type[Method] | None
    _remembered: dict[tuple[int, ...], Remembered] = field(default_factory=dict)

    def buckets(self, matrices: Sequence[SteppedMatrix]) -> list[list[Stack]]:
        """Form the stacks of a step.

        Args:
            matrices: all that are stepped, here or on other ranks of the group; the same on all ranks.

        Returns:
            Buckets of stacks that are in flight together; as many on all ranks.
        """
        key = tuple(map(id, matrices))
        if key not in self._remembered:
            # What stacks keep, bases for example, is out of date once a matrix has been stepped in another company.
            company = set(key)
            self._remembered = {one: kept for one, kept in self._remembered.items() if company.isdisjoint(one)}
            self._remembered[key] = Remembered(_families(matrices), matrices)
        return self._remembered[key].form(self.method)

    def split(self, stack: Stack) -> list[Stack]:
        """Cut a stack where what was found tells its matrices apart.

        Args:
            stack: attached, with what was found in the gradients of its matrices, and their magnitudes.

        Returns:
            Attached stacks of the matrices that are to be updated, with what was found for them.
        """
        found: ProjectedGradient = stack.found
        magnitudes = found.host_magnitudes
        apart = found.tells_apart or [None] * len(magnitudes)
        classes: dict[tuple[bool, Hashable], list[int]] = {}
        for i, magnitude in enumerate(magnitudes):
            if stack.has_begun or magnitude > 0:
                classes.setdefault((magnitude == 0, apart[i]), []).append(i)
        parts = []
        for (zero, _), positions in classes.items():
            part = stack
            if len(positions) < len(magnitudes):
                part = Stack([stack.matrices[i] for i in positions], stack.is_here)
                part.attach(stack.shard.sums is None)
                part.found = found.at(positions)
            part.found.is_zero = zero
            parts.append(part)
        return parts


class Remembered:
    """The stacks of one set of matrices, as they were in the last step.

    Args:
        families: matrices that could be in a stack together, in order.
        matrices: all of them, kept alive.
    """

    def __init__(self, families: Sequence[Sequence[SteppedMatrix]], matrices: Sequence[SteppedMatrix]) -> None:
        self._families, self._matrices = families, matrices
        self._stacks: dict[tuple[int, ...], Stack] = {}
        self._keys = {id(m.state_store): _integers(m.state_store) for m in matrices}

    def form(self, method: type[Method] | None) -> list[list[Stack]]:
        """The stacks of this step, in buckets."""
        used: dict[tuple[int, ...], Stack] = {}
        formed: list[list[Stack]] = []
        first = self._families[0][0] if self._families else None
        is_small = method is None or (first is not None and first.options.reduction == "projected")
        most = SMALL_BUCKET_ELEMENTS if is_small else BUCKET_ELEMENTS
        for bucket in _bucketed([part for family in self._families for part in self._parts(family, method)], most):
            stacks, elsewhere = [], dict[Hashable, list[SteppedMatrix]]()
            for phase, matrices in bucket:
                first = matrices[0]
                if first.geometry.part.numel:
                    stacks.append(self._stack(matrices, True, used))
                else:
                    alike = id(first.options), first.state_store.rank, id(first.geometry.peers), phase
                    elsewhere.setdefault(alike, []).extend(matrices)
            stacks += [self._stack(matrices, False, used) for matrices in elsewhere.values()]
            formed.append(stacks)
        self._stacks = used
        return formed

    def _stack(self, matrices: Sequence[SteppedMatrix], is_here: bool, used: dict[tuple[int, ...], Stack]) -> Stack:
        key = tuple(map(id, matrices))
        used[key] = self._stacks.get(key) or Stack(matrices, is_here)
        return used[key]

    def _parts(
        self, family: Sequence[SteppedMatrix], method: type[Method] | None
    ) -> list[tuple[Hashable, Sequence[SteppedMatrix]]]:
        """Cut a family by phase."""
        keys, options = self._keys[id(family[0].state_store)], family[0].options
        phases: list[Hashable] = [tuple(map(matrix.state.__getitem__, keys)) for matrix in family]
        if method is not None:
            own = [method.phase(m.name, m.state["step"], options) for m in family]
            phases = phases if not any(own) else list(zip(phases, own, strict=True))
        return _by_phase(family, phases)


def _by_phase(
    family: Sequence[SteppedMatrix], phases: Sequence[Hashable]
) -> list[tuple[Hashable, Sequence[SteppedMatrix]]]:
    """Cut a family by phase: into runs of neighbors, whose states stay where they are, if these are few."""
    distinct = set(phases)
    if len(distinct) == 1:
        return [(phases[0], family)]
    runs: list[tuple[Hashable, list[SteppedMatrix]]] = []
    for phase, matrix in zip(phases, family, strict=True):
        if not runs or runs[-1][0] != phase:
            runs.append((phase, []))
        runs[-1][1].append(matrix)
    if len(runs) <= 4 * len(distinct):
        return [*runs]
    classes: dict[Hashable, list[SteppedMatrix]] = {}
    for phase, matrix in zip(phases, family, strict=True):
        classes.setdefault(phase, []).append(matrix)
    return list(classes.items())


def _bucketed(
    parts: Sequence[tuple[Hashable, Sequence[SteppedMatrix]]], most: int
) -> list[list[tuple[Hashable, Sequence[SteppedMatrix]]]]:
    """Put stacks into buckets of at most so many elements of state, or one matrix; the same on all ranks.

    The largest matrices come first, each into the first bucket with room; a stack is cut where a bucket is full. A step
    gathers the basis and the direction of a matrix, which together are about as large as its initial state. What a
    state may have beyond the initial one (Gum) is not counted.
    """
    buckets: list[list[tuple[Hashable, Sequence[SteppedMatrix]]]] = []
    rooms: list[int] = []
    for phase, part in sorted(parts, key=lambda one: (-one[1][0].state_store.numel, one[1][0].member.number)):
        elements, start, bucket = max(1, part[0].state_store.numel), 0, 0
        while start < len(part):
            if bucket == len(buckets):
                buckets.append([])
                rooms.append(max(most, elements))
            end = min(len(part), start + rooms[bucket] // elements)
            if start < end:
                buckets[bucket].append((phase, part[start:end]))
                rooms[bucket] -= elements * (end - start)
            start, bucket = end, bucket + 1
    return buckets


def _integers(store: StateStore) -> list[str]:
    return ["step", *(key for key, value in store.spec(store.rank).items() if not isinstance(value, TensorSpec))]


def _families(matrices: Sequence[SteppedMatrix]) -> list[list[SteppedMatrix]]:
    """Matrices that could be in a stack together; equal layers are next to each other, at even distances in memory."""
    families: dict[int, list[SteppedMatrix]] = {}
    for matrix in matrices:
        families.setdefault(id(matrix.state_store), []).append(matrix)
    for family in families.values():
        first: dict[str, int] = {}
        kinds = [re.sub(r"\d+", "*", matrix.name) for matrix in family]
        for kind in kinds:
            first.setdefault(kind, len(first))
        order = sorted(range(len(family)), key=lambda i: (first[kinds[i]], family[i].member.number))
        family[:] = [family[i] for i in order]
    return list(families.values())

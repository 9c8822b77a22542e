"""What the optimizer keeps, needs for a step, and sends: counted on its own code, run on the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ds_lowrank.estimate.deepspeed import stepped_elements
from ds_lowrank.estimate.live import LiveBytes
from ds_lowrank.estimate.projected import Projections, projections
from ds_lowrank.estimate.setup import ADAMW, Setup
from ds_lowrank.models.llama_shapes import names_of_stages, on_meta
from ds_lowrank.optimizer.registry import OPTIMIZERS
from ds_lowrank.optimizer.report import gathered_bytes
from ds_lowrank.optimizer.simulated import (
    Rehearsal,
    SimulatedOptimizer,
    StacksOfAllRanks,
    StateBytes,
    state_bytes_of_ranks,
)
from ds_lowrank.optimizer.slots import Slot
from ds_lowrank.placement.parameter_names import tag_parameters
from ds_lowrank.placement.simulated import SimulatedGrid, intervals
from ds_lowrank.sharding.ledger import Alone, Ledger


@dataclass(frozen=True)
class Stage:
    """The parameters of a pipeline stage on one tensor-parallel rank.

    Attributes:
        number: of the stage.
        layers: how many decoder layers it has.
        parameters: its parameters, tagged, on the meta device.
    """

    number: int
    layers: int
    parameters: list[torch.nn.Parameter]

    @property
    def numels(self) -> list[int]:
        """Elements of each parameter."""
        return [parameter.numel() for parameter in self.parameters]


@dataclass(frozen=True)
class OptimizerPart:
    """The optimizer on the ranks that share a stage. All are bytes.

    Attributes:
        states: of the rank that needs most in a step.
        shared: ``lowrank/state_bytes`` of the stage: the states of its projected matrices over all ranks.
        gathered: bases that the rank keeps gathered between refreshes (``basis_placement`` ``replicated``).
        ordinary: temporary tensors of an ordinary step at its fullest moment.
        refresh: the same of a step in which every basis is found anew.
        sent_ordinary: what a rank sends in an ordinary step, the mean over the ranks.
        sent_refresh: the same in a step with a refresh.
        copy: of the weights, that an ascent keeps during forward passes (Lorenza).
        projections: where gradients are projected before they are summed, what that needs; else None.
    """

    states: StateBytes
    shared: int = 0
    gathered: int = 0
    ordinary: int = 0
    refresh: int = 0
    sent_ordinary: int = 0
    sent_refresh: int = 0
    copy: int = 0
    projections: Projections | None = None

    @property
    def in_the_step(self) -> int:
        """States and the temporary tensors of the fuller kind of step."""
        return self.states.total + self.gathered + max(self.ordinary, self.refresh)


class Model:
    """The model of a run on one tensor-parallel rank, on the meta device, with its stages.

    Args:
        setup: the run.
    """

    def __init__(self, setup: Setup) -> None:
        model = on_meta(setup.model, setup.grid.tensor, setup.dtype)
        tag_parameters(model)
        self._named = dict(model.named_parameters())
        self.parameters = list(self._named.values())
        self.stages = [
            Stage(number, len({n.split(".")[2] for n in names if ".layers." in n}), [self._named[n] for n in names])
            for number, names in enumerate(names_of_stages(model, setup.grid.pipeline))
        ]


def optimizer_part(setup: Setup, model: Model, stage: Stage) -> OptimizerPart:
    """Count what the optimizer needs of a stage.

    Args:
        setup: the run.
        model: of the run.
        stage: one of its stages.

    Raises:
        ConfigError: an option is refused, or a parameter does not fit the method.
    """
    if setup.method == ADAMW:
        return OptimizerPart(StateBytes(rest=8 * stepped_elements(setup, stage.numels)))
    return Counter(setup, model, stage).part()


class Counter:
    """Builds the optimizer of one rank after the other, and counts.

    Args:
        setup: the run, of a method of this package.
        model: of the run.
        stage: one of its stages.

    Raises:
        ConfigError: an option is refused, or a parameter does not fit the method.
    """

    def __init__(self, setup: Setup, model: Model, stage: Stage) -> None:
        self._setup, self._model, self._stage = setup, model, stage
        self._optimizer = self._of(0)
        shares = setup.is_flat or setup.is_projected
        data = setup.grid.data if shares else 1
        self._ranks = data * setup.grid.tensor
        deals = setup.zero_settings.get("round_robin_gradients") is True and setup.zero in {1, 2}
        self._held = intervals(stage.numels, data, setup.layout_stage, deals)

    def _of(self, tensor_rank: int) -> SimulatedOptimizer:
        grid = SimulatedGrid(number=tensor_rank, size=self._setup.grid.tensor)
        method = OPTIMIZERS[self._setup.method].method
        return SimulatedOptimizer(method, self._model.parameters, self._setup.params, grid)

    def states(self) -> list[StateBytes]:
        """Bytes of state of every rank that shares the stage, in the order of their group."""
        return state_bytes_of_ranks(self._slots(0), self._ranks, self._setup.grid.tensor)

    def part(self) -> OptimizerPart:
        """Everything that is counted, of the rank that needs most."""
        slots, each = self._slots(0), self.states()
        shared = sum(slot.state_bytes for slot in slots if slot.is_projected)
        sent = self._sent()
        # At ZeRO 1 and 2 one rank may have the embedding's moments, another most matrices and so the larger step.
        by_total = max(range(self._ranks), key=lambda rank: each[rank].total)
        by_matrices = max(range(self._ranks), key=lambda rank: each[rank].matrices)
        parts = []
        for rank in {by_total, by_matrices}:
            found = self._temporary(rank)
            parts.append(
                OptimizerPart(
                    states=each[rank],
                    shared=shared,
                    gathered=found["gathered"],
                    ordinary=found["ordinary"],
                    refresh=found["refresh"],
                    sent_ordinary=sent["ordinary"],
                    sent_refresh=sent["refresh"],
                    copy=self._copy(slots),
                    projections=projections(slots, found["renewed"]) if self._setup.is_projected else None,
                )
            )
        return max(parts, key=lambda part: part.in_the_step)

    def _slots(self, rank: int) -> list[Slot]:
        dtype = torch.float32 if self._setup.has_masters else self._setup.dtype
        optimizer = self._of(rank % self._setup.grid.tensor)
        return optimizer.slots(self._stage.parameters, self._held, rank, self._setup.is_flat, dtype)

    def _numbers(self, slots: Sequence[Slot]) -> list[tuple[str, int]]:
        """The kinds of steps and a number of each: the first, an ordinary one, the fullest of those that renew bases.

        The ordinary one comes twice, because the first keeps what it makes. With staggered refreshes the steps that
        follow on each other differ: the fullest renews most elements, the ordinary one fewest.
        """
        options, method = self._optimizer.options, self._optimizer.method
        gap = getattr(options, "update_proj_gap", getattr(options, "kappa", None))
        if not gap:
            return [("refresh", 0), ("ordinary", 1), ("ordinary", 1)]
        due = {
            number: sum(
                slot.parameter.numel()
                for slot in slots
                if slot.is_projected and bool(method.phase(slot.tag.name, number, options))
            )
            for number in range(1, gap + 1)
        }
        ordinary = min(due, key=lambda number: due[number])
        fullest = max(due, key=lambda number: due[number]) if any(due.values()) else gap
        return [("refresh", 0), ("ordinary", ordinary), ("ordinary", ordinary), ("refresh", fullest)]

    def _temporary(self, rank: int) -> dict[str, int]:
        """Temporary bytes of an ordinary step and of one with a refresh, and what else stays or is whole."""
        found = {"ordinary": 0, "refresh": 0, "renewed": 0}
        with LiveBytes() as live:
            slots = self._slots(rank)
            rehearsal, alone = Rehearsal(self._optimizer.method, slots), Alone(rank, self._ranks)
            before = 0

            def between(whole: int) -> None:
                nonlocal before
                found["renewed"] = max(found["renewed"], whole)
                before = live.now
                live.restart()

            for kind, number in self._numbers(slots):
                rehearsal.run(alone, number, between)
                found[kind] = max(found[kind], live.peak - before)
        shared = [slot for slot in slots if len(slot.geometry.holders) > 1]  # alone, a rank uses the bases it stores
        return {**found, "gathered": gathered_bytes(shared)}

    def _sent(self) -> dict[str, int]:
        """Bytes that a rank sends in a step of each kind, the mean over the ranks.

        What tensor-parallel ranks have copies of is sent among those with the same copy, so each of them is asked.
        """
        found = {"ordinary": 0, "refresh": 0}
        if self._ranks == 1:
            return found
        tensor = self._setup.grid.tensor
        asked = [self._slots(rank) for rank in range(tensor)]
        rehearsals = [Rehearsal(self._optimizer.method, slots, StacksOfAllRanks) for slots in asked]
        # What an ordinary step sends is what the second of them sends: the first may gather what it then keeps.
        for kind, number in self._numbers(asked[0]):
            total = 0
            for rank, rehearsal in enumerate(rehearsals):
                ledger = Ledger(rank, self._ranks)
                rehearsal.run(ledger, number)
                total += int(ledger.bytes_sent[rank::tensor].sum())
            mean = round(total / self._ranks)
            found[kind] = mean if kind == "ordinary" else max(found[kind], mean)
        return found

    def _copy(self, slots: Sequence[Slot]) -> int:
        """Bytes of the weights that an ascent saves: those that forward passes read of the projected matrices."""
        if self._optimizer.options.ascent is None:
            return 0
        whole = sum(slot.parameter.numel() for slot in slots if slot.is_projected)
        return self._setup.weight * (-(-whole // self._setup.grid.data) if self._setup.zero == 3 else whole)

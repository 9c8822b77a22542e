"""One matrix as a step finds it, and a stack: matrices that are stepped together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import torch

from ds_lowrank.methods.base import Options, State
from ds_lowrank.methods.blocks.state_spec import StateStore
from ds_lowrank.optimizer.stacked_state import StackedState
from ds_lowrank.optimizer.stochastic_rounding import StochasticRounding
from ds_lowrank.placement.fragment import Fragment, FragmentRun, runs_of
from ds_lowrank.sharding.geometry import Geometry
from ds_lowrank.sharding.matrix import MatrixShard, Member, Sums


@dataclass(eq=False)
class SteppedMatrix:
    """One matrix, as a step finds it.

    Attributes:
        member: its name, root and number.
        geometry: how it is cut; the same object for all matrices that are cut alike.
        fragment: where this rank's elements of it are.
        state_store: how its state is stored; the same object for all matrices of a geometry and a group.
        state: its state, with ``step``; changed in place.
        options: the current options of its group.
        gathered: the rows of its basis that this rank computes with, as ``basis``, where they are kept between steps.
        updated: whether the last step changed it.
        energies: of the gradient that its newest basis was found in, this rank's contributions to ``|H Q|^2`` and
            ``|H|^2``, over any factor: 2, fp32; None if they have been summed, or are not known.
    """

    member: Member
    geometry: Geometry
    fragment: Fragment
    state_store: StateStore
    state: State
    options: Options
    gathered: State = field(default_factory=dict)
    updated: bool = False
    energies: torch.Tensor | None = None

    @property
    def name(self) -> str:
        """The matrix's name."""
        return self.member.name

    @property
    def has_begun(self) -> bool:
        """Whether the matrix has been stepped before. It waits for its first gradient that is not zero."""
        return bool(self.state["step"] > 0)


class Stack:
    """Matrices that are stepped together.

    Args:
        matrices: of one geometry or, without elements here, of any.
        is_here: whether this rank has elements of them.

    Attributes:
        shard: what a method sees of them.
        state: their state in this step, as it is stored.
        found: what their method found in their gradients.
        factors: what backward multiplies their gradients by; None where these are kept.
        sums: what it found of the gradients so far, once there is one.
    """

    found: Any = None
    factors: Sums | None = None
    sums: Sums | None = None

    def __init__(self, matrices: Sequence[SteppedMatrix], is_here: bool) -> None:
        first = matrices[0]
        self.matrices, self.is_here = matrices, is_here
        geometry = first.geometry if is_here else first.geometry.elsewhere
        self.shard = MatrixShard(geometry, [matrix.member for matrix in matrices])
        self.state_store = first.state_store
        self._states = StackedState([matrix.state for matrix in matrices], is_here)
        self._gathered = StackedState([matrix.gathered for matrix in matrices], is_here)
        self._runs: list[FragmentRun] = runs_of([matrix.fragment for matrix in matrices]) if is_here else []
        self._sizes = [run.count for run in self._runs]
        self._copied = [run.is_copied for run in self._runs]
        self.state: State = {}
        self._bases: State = {}

    @property
    def options(self) -> Options:
        """The current options of the matrices' group."""
        return self.matrices[0].options

    @property
    def has_begun(self) -> bool:
        """Whether the matrices have been stepped before."""
        return self.matrices[0].has_begun

    def attach(self, gradients: bool = True) -> None:
        """Take up this step's gradients or what backward found of them, the weights, and the state.

        Args:
            gradients: whether there are any: not before backward, and not if all that is needed of them was found.
        """
        if self.is_here:
            runs = [run.gradient for run in self._runs] if gradients and self.sums is None else None
            self.shard.attach(runs, [run.weights for run in self._runs], self._sizes)
            self.shard.sums = self.sums
        else:
            nothing = self.matrices[0].fragment.store.new_empty(len(self.matrices), 0)
            self.shard.attach([nothing], [nothing], [len(self.matrices)])
        self.shard.is_accumulated = gradients and self.factors is not None
        self.shard.precision = self.options.matmul_precision
        self.state = self._states.open()
        self._bases = self.state_store.decode_bases(self.state)
        if self.options.keeps_bases_gathered:
            self.shard.held_basis = self._held_basis()
        if self.is_here and not self.options.master_weights:
            names, device = self.shard.names, self.shard.device
            self.shard.rounding = StochasticRounding(names, self.state["step"], self.shard.shape[0] > 1, device)

    @property
    def projecting_state(self) -> State:
        """The state with every basis in fp32; moments are as stored."""
        return self.state | self._bases if self._bases else self.state

    def decoded(self) -> State:
        """The state with every tensor in fp32."""
        return self.state_store.decode(self.state, self._bases)

    def _held_basis(self) -> torch.Tensor | None:
        """The gathered bases of the last step: matrices x held compressed rows x k, fp32; None if there are none."""
        kept = [matrix.gathered.get("basis") for matrix in self.matrices]
        if any(one is None for one in kept):
            return None
        is_stored = self._is_alone and all(one is not None and not one.numel() for one in kept)
        basis: torch.Tensor = self.projecting_state["basis"] if is_stored else self._gathered.open()["basis"]
        return basis

    @property
    def _is_alone(self) -> bool:
        """Whether no other rank has elements of the matrices: what it gathers is its own state."""
        return self.is_here and len(self.shard.geometry.holders) == 1

    def keep_basis(self, is_stored: bool) -> None:
        """Keep a basis that was gathered for the next step, also if the matrices are in other stacks then.

        Args:
            is_stored: whether it is the basis in the states, of which a rank that is alone needs no second copy.
        """
        held = self.shard.held_basis
        if held is None:
            for matrix in self.matrices:
                matrix.gathered.pop("basis", None)
            return
        is_stored = is_stored and "basis" in self.state  # and not only the indices of its columns
        if self.is_here and not (is_stored and self._is_alone):
            self._gathered.close({"basis": held})
            return
        for matrix in self.matrices:  # only says, as other ranks know, that nothing has to be gathered
            matrix.gathered["basis"] = held.new_empty(0, held.shape[2])

    def note_energies(self) -> None:
        """Note what a new basis captures of the gradients. Nothing is sent."""
        if self.is_here and self.found.refreshed:
            energies = self.found.energies(self.shard, self.options)
            for matrix, own in zip(self.matrices, [] if energies is None else energies.unbind(), strict=False):
                matrix.energies = own

    def detach(self) -> None:
        """Release the gradients, the weights and what was found."""
        self.shard.detach()
        self.shard.held_basis = self.found = None
        self.shard.is_basis_new = False
        self._bases = {}

    def store(self, decoded: State) -> None:
        """Keep what the step has made of the weights and of the state.

        Args:
            decoded: the state as the method left it.
        """
        self.keep_basis(is_stored=True)
        if self.is_here:
            self.state_store.encode(self.state, decoded, self.shard.names, self._bases)
            for run, weights in compress(zip(self._runs, self.shard.weights.runs, strict=True), self._copied):
                run.put(weights)
        else:
            self.state = {key: value for key, value in decoded.items() if not isinstance(value, torch.Tensor)}
            if self.state.get("rank") != self.matrices[0].state.get("rank"):
                self._resize(self.state["rank"])
        self.state["step"] = decoded["step"] + 1
        self._states.close(self.state)
        for matrix in self.matrices:
            matrix.updated = True

    def _resize(self, rank: int) -> None:
        """Tensors without rows have as many columns as the rank says, too."""
        for matrix in self.matrices:
            device = matrix.fragment.store.device
            tensors = matrix.state_store.tensors(rank).items()
            matrix.state |= {key: torch.empty(shape, dtype=dtype, device=device) for key, (shape, dtype) in tensors}

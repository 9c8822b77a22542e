"""Bases that stay gathered between refreshes: the same update, and fewer bytes."""

from __future__ import annotations

import pytest
import torch

from ds_lowrank.methods import METHODS
from ds_lowrank.optimizer.matrices import Matrices
from ds_lowrank.optimizer.stacks import Stacks
from ds_lowrank.optimizer.step import step_matrices
from ds_lowrank.sharding.world import SimulatedWorld
from tests.methods import of
from tests.simulated.harness import ShardedMatrix, even_parts

KEEPING = [name for name in METHODS if "basis_placement" in METHODS[name].Options.model_fields]


class StackedWorld:
    """Matrices that are stepped together on every rank, with stacks that last."""

    def __init__(self, method, weights, ranks, **options):
        self.method, self.ranks = METHODS[method], ranks
        builders = [Matrices(self.method, rank) for rank in range(ranks)]
        self.matrices = [
            ShardedMatrix(
                method, w, even_parts(tuple(w.shape), ranks), name=f"layers.{i}.w", builders=builders, **options
            )
            for i, w in enumerate(weights)
        ]
        self.stacks = [Stacks(self.method) for _ in range(ranks)]
        self.world = SimulatedWorld(ranks)

    def step(self, gradients):
        """Step the matrices that have a gradient; the bytes that all ranks send."""
        before = sum(self.world.bytes_sent)
        present = [(m, g) for m, g in zip(self.matrices, gradients, strict=True) if g is not None]
        for matrix, gradient in present:
            matrix.attach(gradient)
        self.world.run(
            [
                step_matrices(self.method, [m.matrices[rank] for m, _ in present], self.ranks, stacks=self.stacks[rank])
                for rank in range(self.ranks)
            ]
        )
        for matrix, _ in present:
            matrix.gather()
        return sum(self.world.bytes_sent) - before


@pytest.mark.parametrize("method", KEEPING)
@pytest.mark.parametrize("shape", [(18, 10), (10, 18)])
def test_a_basis_that_stays_gathered_changes_no_bit_and_is_not_sent(method, shape):
    """Also where a gradient is zero at a refresh, or missing in a step, so that the stack is cut."""
    torch.manual_seed(0)
    options = of(method).cases[0] | {"lr": 1e-2, "eps": 0.1, "update_proj_gap": 4}
    starts = [of(method).start(shape) for _ in range(3)]
    worlds = {
        placement: StackedWorld(method, [s.clone() for s in starts], 3, basis_placement=placement, **options)
        for placement in ("partitioned", "replicated")
    }
    choose = of(method).gradients_for(shape)
    for step in range(9):
        gradients = [choose(3 * step + i) for i in range(3)]
        if step == 4:
            gradients[1] = torch.zeros(shape)
        if step == 6:
            gradients[2] = None
        sent = {name: world.step(gradients) for name, world in worlds.items()}
        for one, other in zip(*(world.matrices for world in worlds.values()), strict=True):
            assert torch.equal(one.weight, other.weight)
        assert sent["replicated"] <= sent["partitioned"]
        if step in (2, 3):  # ordinary steps: the gathered rows are kept
            assert sent["replicated"] < sent["partitioned"]

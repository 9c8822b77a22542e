"""``tensor_parallel_projection: local`` under real engines, against an oracle that steps each shard as a matrix."""

from __future__ import annotations

import pytest

from ds_lowrank.reference import DENSE
from tests.engines.grids import Grid, GridOracle, dense_model, role_table_of, run_grid, settings_of
from tests.engines.pool import run_ranks
from tests.engines.scenario import METHODS, max_relative_difference


class ShardOracle(GridOracle):
    """The oracle that projects every tensor-parallel rank's shard as a matrix of its own."""

    COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")

    def __init__(self, ranks, method):
        super().__init__(0.0, dense_model(), method=method)
        self.ranks, self.dims = ranks, {}
        for name, parameter in self.model.named_parameters():
            if type(self.rules[name]) is DENSE[method]:
                self.dims[name] = 0 if name.split(".")[-2] in self.COLUMN else 1
                del self.rules[name]
                self.rules |= {
                    shard: DENSE[method](part, name=shard, **METHODS[method])
                    for shard, part in self.shards(name, parameter.data)
                }

    def shards(self, name, whole):
        return [(f"{name}@tensor{rank}", part) for rank, part in enumerate(whole.chunk(self.ranks, self.dims[name]))]

    def gradients(self, step):
        found = {}
        for name, gradient in super().gradients(step).items():
            found |= dict(self.shards(name, gradient)) if name in self.dims else {name: gradient}
        return found


CASES = [
    (Grid(1, 2, 1, 0), "GaLore"),
    (Grid(2, 2, 1, 2), "AdaRankGrad"),  # shards refresh in different steps
    (Grid(1, 2, 2, 1), "Lorenza"),
    (Grid(2, 2, 1, 3, "autotp"), "GaLore"),
]


@pytest.mark.parametrize(("grid", "method"), CASES, ids=str)
def test_a_local_projection_steps_each_shard_as_a_matrix(grid, method):
    dense = ShardOracle(2, method)
    for step in range(6):
        dense.step(step)
    settings = settings_of(grid, method=method, params={"tensor_parallel_projection": "local"})
    results = run_ranks(grid.world, run_grid, grid, settings, 6)
    assert max_relative_difference(results[0]["weights"][1], dense.weights()) < 1e-4
    assert {name for name in results[0]["names"] if "@" in name} >= {"model.layers.0.mlp.up_proj.weight@tensor0"}


def test_the_role_table_counts_the_shards_of_all_tensor_ranks():
    grid = Grid(1, 2, 1, 0)
    tables = [
        run_ranks(2, role_table_of, grid, settings_of(grid, params={"tensor_parallel_projection": projection}))[0]
        for projection in ("logical", "local")
    ]
    assert all("State over 2 ranks" in table for table in tables)
    assert "projected as 2 independent shards" in tables[1]

"""The simulated world itself."""

from __future__ import annotations

import pytest
import torch

from ds_lowrank.sharding.reduce import sum_request
from ds_lowrank.sharding.world import SimulatedWorld


def test_ranks_that_disagree_on_an_exchange_are_refused():
    def requests(columns, rounds):
        for _ in range(rounds):
            yield [sum_request(torch.ones(3, columns), range(3), 2)]

    SimulatedWorld(2).run([requests(2, 1), requests(2, 1)])
    for programs in ([requests(2, 1), requests(2, 2)], [requests(2, 1), requests(1, 1)]):
        with pytest.raises(RuntimeError, match="the ranks disagree on the round"):
            SimulatedWorld(2).run(programs)

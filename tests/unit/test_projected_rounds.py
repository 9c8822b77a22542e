"""The collectives of a step under projected reduction, against the table of docs/communication.md."""

from __future__ import annotations

import pytest
import torch

import ds_lowrank
from ds_lowrank.sharding.reduce import SingleProcess
from tests.unit.pages import rows

TABLE = {cells[0].split("`")[1]: tuple(map(int, cells[1:])) for cells in rows("communication", "Under [projected")}
OPTIONS = {"AdaRankGrad": {"rank_max": 4, "grad_norm_ratio_tol": 0.0}, "VLoRP": {"rank": 4, "granularity": 4}}
PERTURBING = {"Lorenza": {"perturbation_radius": 0.0}}


@pytest.mark.parametrize("method", TABLE)
def test_a_step_takes_the_documented_rounds(method, monkeypatch):
    """On one rank, which asks for the same sums; a tall matrix, refreshes at steps 0 and 4."""
    counted = []
    exchange = SingleProcess.exchange
    monkeypatch.setattr(SingleProcess, "exchange", lambda self, asked: counted.append(1) or exchange(self, asked))
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 60)
    options = {"rank": 4} | PERTURBING.get(method, {}) if method not in OPTIONS else OPTIONS[method]
    optimizer = getattr(ds_lowrank, method)(model, reduction="projected", update_proj_gap=4, **options)
    optimizer.bind()
    found = []
    for _ in range(6):
        counted.clear()
        model(torch.randn(3, 40)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(len(counted))
    assert (found[1], found[4]) == TABLE[method]

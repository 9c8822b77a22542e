"""What the benchmarks of a step's cost count is right, and all of them run."""

from __future__ import annotations

import json
import sys
from collections import Counter
from importlib.util import find_spec

import pytest
import torch

from benchmarks import host_cost, offload, operations, ordinary, world_cost
from benchmarks.gpu.contenders import ADAMW, OFFICIAL
from benchmarks.grid_bytes import counted as ledger_of
from benchmarks.grid_layout import Degrees
from ds_lowrank.methods import METHODS
from ds_lowrank.methods.galore import GaLoreOptions

needs_galore_torch = pytest.mark.skipif(find_spec("galore_torch") is None, reason="galore-torch is not installed")
KEYS = {(method, state_dtype) for method in METHODS for state_dtype in ordinary.STATE_DTYPES} | {
    (peer, ordinary.AS_WEIGHTS) for peer in (ADAMW, ordinary.FOREACH, OFFICIAL)
}
MATRICES = 7
"""Of one layer."""


def by_optimizer(rows):
    return {(row["optimizer"], row["state_dtype"]): row for row in rows}


def test_kernels_are_counted_and_views_are_not():
    a, stack = torch.ones(4, 3), torch.ones(2, 4, 3)

    def step():
        b = torch.empty(3, 2).fill_(2.0)
        product = (a @ b).T.detach().view(2, 4)
        stack @ b  # one product of all matrices, viewed as a stack again
        torch.add(product, 1.0, out=torch.empty_like(product))
        first, _ = product.split(1)
        torch._foreach_mul_([*first.unbind(), product[1].as_strided((2,), (1,))], 3.0)
        product.sum().item()

    found = operations.counted(step)
    assert found.kernels == Counter(mm=2, fill_=1, add=1, _foreach_mul_=1, sum=1)
    assert (found.allocations, found.reads) == (2, 1)


def test_the_counted_model_has_the_layers_and_the_rest_of_a_1b():
    shapes = operations.shapes()
    assert sum("_proj." in name for name in shapes) == 24 * MATRICES
    assert len(shapes) == 24 * (MATRICES + 2) + 3
    assert shapes["model.layers.23.mlp.down_proj.weight"] == (128, 341)


@needs_galore_torch
def test_the_operations_of_every_optimizer_are_counted():
    rows = by_optimizer(operations.measure(seed=0, layers=1))
    assert rows.keys() == KEYS
    for (name, state_dtype), row in rows.items():
        assert row["a matrix"] == row["operations"] / MATRICES
        if state_dtype == "int8":  # it encodes and decodes in addition
            assert row["operations"] > rows[name, "fp32"]["operations"]
    # Of one step of all parameters: their step counts, and the update.
    assert rows[ADAMW, ordinary.AS_WEIGHTS]["operations"] == 2


@needs_galore_torch
def test_every_optimizer_takes_its_turn():
    rows = by_optimizer(host_cost.measure(seed=0, layers=1, repeats=3))
    assert rows.keys() == KEYS
    for (name, state_dtype), row in rows.items():
        assert row["us a matrix"] == pytest.approx(1e3 * row["ms"] / MATRICES)
        peers = {"AdamW foreach": ordinary.FOREACH, "galore-torch": OFFICIAL}
        for label, peer in peers.items():
            assert row[f"over {label}"] == pytest.approx(row["ms"] / rows[peer, ordinary.AS_WEIGHTS]["ms"])
        expected = row["ms"] / rows[name, "fp32"]["ms"] if state_dtype == "int8" else None
        assert row["int8 over fp32"] == (expected and pytest.approx(expected))


@needs_galore_torch
@pytest.mark.parametrize(
    "measure",
    [lambda: host_cost.measure(seed=0, layers=1, repeats=2), lambda: operations.measure(seed=0, layers=1)],
    ids=["timed", "counted"],
)
def test_a_step_that_refreshes_is_not_taken_for_an_ordinary_one(monkeypatch, measure):
    monkeypatch.setattr(ordinary, "NEVER", 2)  # steps 0 and 1 come before the measured ones
    with pytest.raises(RuntimeError, match="refreshed a basis"):
        measure()


def test_one_rank_of_many_sends_what_a_world_would():
    options = GaLoreOptions(rank=world_cost.RANK)
    rows = world_cost.measure([2, 9], layers=1, repeats=2, seed=0)
    assert [(row["ZeRO"], row["ranks"]) for row in rows] == [(1, 2), (1, 9), (3, 2), (3, 9)]
    for row in rows:
        zero, world = row["ZeRO"], row["ranks"]
        middle = world // 2
        ledger = ledger_of(world_cost.model(world, 1), Degrees(world, 1, zero=zero), 0, options, "ordinary", middle)
        assert row["rounds"] == ledger.rounds
        assert row["kB sent"] == ledger.bytes_sent[middle] / 1e3
        assert row["holds"] == MATRICES if zero == 3 else row["holds"] < MATRICES
        assert 0 < row["exchange ms"] < row["ms"]


@pytest.mark.parametrize("world", [8, 64, 65, 1024])
def test_zero_3_leaves_every_rank_a_row(world):
    assert world_cost.model(world, 1)["hidden_size"] >= world


@needs_galore_torch
@pytest.mark.parametrize(
    "module",
    [host_cost, operations, offload, pytest.param(world_cost, marks=pytest.mark.slow)],
    ids=lambda each: each.__name__,
)
def test_it_writes_what_it_prints(module, monkeypatch, tmp_path, capsys):
    file = tmp_path / "numbers.json"
    monkeypatch.setattr(sys, "argv", [module.__file__, "--quick", "--json", str(file)])
    module.main()
    record = json.loads(file.read_text())
    assert record["command"] == f"python -m {module.__name__} --quick --json {file}"
    assert record["quick"]
    table = capsys.readouterr().out.split("\n\n")[0].splitlines()  # the first table, if there are several
    assert len(table) == 2 + len(record["numbers"])
    assert [head.strip() for head in table[0].strip("|").split("|")] == list(record["numbers"][0])
